"""A list of a million items through a real waitress, beside the same list made in memory.

``make bench`` runs it: peak memory of the process that serves, above that of a list of
10,000 items, and processor time beside ``msgspec.json.encode`` of all rows at once.
"""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import process_time

import msgspec
from sqlalchemy import insert, select

from models import Item, create_tables, make_engine, make_reader
from resources import ItemList, ItemView

ROOT = Path(__file__).resolve().parent.parent


def fill(url: str, count: int) -> None:
    engine = make_engine(url)
    create_tables(engine)
    with engine.begin() as connection:
        for first in range(1, count + 1, 10_000):
            rows = [
                {"id": id, "name": f"Item #{id}"}
                for id in range(first, min(first + 10_000, count + 1))
            ]
            connection.execute(insert(Item), rows)
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


def serve(url: str) -> tuple[float, float, int]:
    """Peak memory, processor seconds and bytes of one list, through ``serve.py``."""
    command = [sys.executable, str(ROOT / "serve.py"), "--database-url", url]
    options = ["--listen", "127.0.0.1:0", "--log-level", "info"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        port = re.search(r"serving on http://127.0.0.1:(\d+)", server.stderr.readline())
        assert port is not None
        threading.Thread(target=server.stderr.read, daemon=True).start()
        fetch(int(port[1]), "/?limit=1")
        before = usage(server.pid)[1]
        length = fetch(int(port[1]), "/")
        peak, after = usage(server.pid)
        server.terminate()
    return peak, after - before, length


def in_memory(url: str) -> float:
    """Processor seconds of making the same list at once."""
    engine = make_reader(url)
    assert engine is not None
    with engine.connect() as connection:
        connection.execute(select(Item.id).limit(1))
        began = process_time()
        found = connection.execute(select(Item.id, Item.name).order_by(Item.id))
        body = msgspec.json.encode(ItemList([ItemView(id, name) for id, name in found]))
        took = process_time() - began
    engine.dispose()
    assert body
    return took


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        small, large = f"sqlite:///{folder}/small.db", f"sqlite:///{folder}/large.db"
        fill(small, 10_000)
        fill(large, 1_000_000)
        base, _, _ = serve(small)
        peak, seconds, length = serve(large)
        at_once = in_memory(large)
    print(f"\na list of 1,000,000 items ({length / 2**20:.0f} MiB), SQLite, through waitress")
    print(f"  peak memory above that at 10,000 items {peak - base:6.1f} MiB")
    print(f"  processor time, to that in memory      {seconds / at_once:6.2f}")


if __name__ == "__main__":
    main()
