"""A list of a million items through a real waitress, beside the same list made in memory.

``make bench`` runs it: peak memory of the process that serves, above that of a list of
10,000 items; processor time beside that of making the same bytes at once, without sending
them; and a page at the end of the table beside the first one.  Each ratio is the median of
rounds in which both are measured, one after the other.  It uses SQLite files, or the two
empty databases whose URLs are given.
"""

from __future__ import annotations

import http.client
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import process_time

from sessionscope.engines import make_engine, make_reader
from sqlalchemy import text
from sqlalchemy.orm import scoped_session, sessionmaker

from models import MAX_ID
from resources import ItemList, Items, Selection
from web.database import create_tables
from web.responses import json_bytes

ROUNDS, PAGES = 7, 300

ROOT = Path(__file__).resolve().parent.parent


def fill(url: str, count: int) -> None:
    """Have the database itself make *count* items."""
    engine = make_engine(url)
    create_tables(engine)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)"
    with engine.begin() as connection:
        statement = f"INSERT INTO items {numbers} SELECT i, 'Item #' || i FROM n"
        connection.execute(text(statement), {"count": count})
    engine.dispose()


def usage(pid: int) -> tuple[float, float]:
    """Peak memory in MiB and processor seconds of a process; see proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    assert peak is not None
    return int(peak[1]) / 1024, sum(map(int, ticks)) / 100


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
        before = usage(self.process.pid)[1]
        length = fetch(self.port, "/")
        return usage(self.process.pid)[1] - before, length

    def pages(self, query: str) -> float:
        """Processor seconds of many pages."""
        before = usage(self.process.pid)[1]
        for _ in range(PAGES):
            fetch(self.port, f"/?{query}")
        return usage(self.process.pid)[1] - before

    def stop(self) -> float:
        """End it; its peak memory in MiB."""
        peak = usage(self.process.pid)[0]
        self.process.terminate()
        self.process.communicate()
        return peak


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


def compare(small: str, large: str) -> None:
    """Fill two databases, and list them."""
    fill(small, 10_000)
    fill(large, 1_000_000)
    server = Server(small)
    for _ in range(ROUNDS):
        server.list()
    base = server.stop()
    server = Server(large)
    lists = []
    for _ in range(ROUNDS):
        seconds, length = server.list()
        lists.append(seconds / in_memory(large))
    peak = server.stop()
    server = Server(large)
    first, last = "limit=100", "limit=100&after=999900"
    pages = [server.pages(last) / server.pages(first) for _ in range(ROUNDS)]
    server.stop()
    print(f"\na list of 1,000,000 items ({length / 2**20:.0f} MiB) through waitress")
    print(f"  peak memory above that at 10,000 items  {peak - base:6.1f} MiB")
    print(f"  processor time, to that in memory       {statistics.median(lists):6.2f}")
    print(f"  the last page of 100, to the first one  {statistics.median(pages):6.2f}")


def main() -> None:
    if len(sys.argv) == 3:
        compare(*sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(f"sqlite:///{folder}/small.db", f"sqlite:///{folder}/large.db")


if __name__ == "__main__":
    main()
