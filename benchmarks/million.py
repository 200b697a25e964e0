"""A list of a million items through a real waitress, beside the same list made in memory.

Peak memory of the process that serves, above that of a list of 10,000 items; processor time
beside that of making the same bytes at once, without sending them; and a page at the end of
the table beside the first one.  Each ratio is the median of rounds in which both are
measured, one after the other.
"""

from __future__ import annotations

import http.client
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from time import process_time

from limits import peak
from measuring import fill
from report import Row
from sessionscope.engines import make_reader
from sqlalchemy.orm import scoped_session, sessionmaker

from models import MAX_ID
from resources import ItemList, Items, Selection
from web.responses import json_bytes

TITLE = "A list of 1,000,000 items through waitress (SQLite)"
MINUTES = 4

ROUNDS, PAGES = 5, 300

ROOT = Path(__file__).resolve().parent.parent


def processor_time(pid: int) -> float:
    """Processor seconds of a process; see proc(5)."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / 100


def fetch(port: int, path: str) -> int:
    """Read a response to its end, in pieces; its length."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    response = connection.getresponse()
    length = 0
    while piece := response.read(2**16):
        length += len(piece)
    connection.close()
    return length


class Server:
    """``serve.py`` in a process of its own."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, str(ROOT / "serve.py"), "--database-url", url]
        options = ["--listen", "127.0.0.1:0", "--log-level", "info"]
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        found = re.search(r"serving on http://127.0.0.1:(\d+)", self.process.stderr.readline())
        assert found is not None
        self.port = int(found[1])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        fetch(self.port, "/?limit=1")

    def list(self) -> tuple[float, int]:
        """Processor seconds and bytes of the whole list."""
        before = processor_time(self.process.pid)
        length = fetch(self.port, "/")
        return processor_time(self.process.pid) - before, length

    def pages(self, query: str) -> float:
        """Processor seconds of many pages."""
        before = processor_time(self.process.pid)
        for _ in range(PAGES):
            fetch(self.port, f"/?{query}")
        return processor_time(self.process.pid) - before

    def stop(self) -> float:
        """End it; its peak memory in MiB."""
        found = peak(str(self.process.pid))
        self.process.terminate()
        self.process.communicate()
        return found


def in_memory(url: str) -> float:
    """Processor seconds of making the same bytes at once."""
    engine = make_reader(url)
    assert engine is not None
    with scoped_session(sessionmaker(engine))() as session:
        session.connection()
        items = Items(scoped_session(lambda: session))  # type: ignore[arg-type]
        began = process_time()
        body = json_bytes(ItemList(items.fetch(Selection(), MAX_ID)))
        took = process_time() - began
    engine.dispose()
    assert body
    return took


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        small, large = f"sqlite:///{folder}/small.db", f"sqlite:///{folder}/large.db"
        fill(small, 10_000)
        fill(large, 1_000_000)
        server = Server(small)
        for _ in range(ROUNDS):
            server.list()
        base = server.stop()
        server, lists = Server(large), []
        for _ in range(ROUNDS):
            seconds, length = server.list()
            lists.append(seconds / in_memory(large))
        more = server.stop() - base
        yield Row("peak memory, beyond that of 10,000 items", f"{more:.1f} MiB", "8 MiB")
        ratio, size = statistics.median(lists), f"{length / 2**20:.0f} MiB are sent"
        yield Row("processor time, to the same bytes made at once", f"{ratio:.2f}", beside=size)
        server = Server(large)
        first, last = "limit=100", "limit=100&after=999900"
        pages = [server.pages(last) / server.pages(first) for _ in range(ROUNDS)]
        server.stop()
        yield Row("the last page of 100, to the first", f"{statistics.median(pages):.2f}", "1.05")
