"""What must stay small however much there is to do: garbage, memory, the start, what is stored."""

from __future__ import annotations

import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from contestants import sessionscope, with_keys
from measuring import fill
from playing import call
from report import Row
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine
from sqlalchemy import Engine, event
from sqlalchemy.orm import scoped_session, sessionmaker

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

TITLE = "Garbage, memory, start, the disk"
MINUTES = 1

START = """
import time, sqlalchemy.orm
began = time.process_time()
from sessionscope import SessionMiddleware
print(time.process_time() - began)
"""


def rows() -> Iterator[Row]:
    yield Row("10,000 requests that raise, objects in cycles", f"{garbage()}", "0")
    more = memory(attempts=3) - memory(attempts=1)
    yield Row("attempts=3: a body of 100 MB, read at once", f"{more:.1f} MiB more", "2 MiB")
    yield Row("import, beyond that of SQLAlchemy", f"{start() * 1000:.0f} ms", "20 ms")
    full, normal = (milliseconds_of_a_commit(mode) for mode in ("FULL", "NORMAL"))
    less_durable = f"NORMAL, which a power failure can undo: {normal:.2f} ms"
    yield Row("COMMIT on SQLite, synchronous=FULL", f"{full:.2f} ms", beside=less_durable)
    statements, size = storage()
    stored = f"{statements:.0f} statements, {size:.0f} bytes stored"
    yield Row("Idempotency: a key adds", stored)


@contextmanager
def database() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/items.db"
        fill(url, 1)
        engine = make_engine(url)
        yield engine
        engine.dispose()


def python(*arguments: str, **environ: str) -> float:
    """The number that a Python of its own prints."""
    command = [sys.executable, *arguments]
    return float(
        subprocess.run(command, check=True, stdout=-1, env={**os.environ, **environ}).stdout
    )


def start() -> float:
    """Seconds of processor time that the import takes, when it has been compiled once."""
    with tempfile.TemporaryDirectory() as folder:
        cache = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": folder}
        _, *starts = [python("-c", START, **cache) for _ in range(16)]
    return statistics.median(starts)


def peak(pid: str) -> float:
    """Peak memory of a process in MiB; see proc(5)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def garbage() -> int:
    """Objects that only the cycle collector can free, after 10,000 requests that raise."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.get(Item, 1)
        raise RuntimeError("as views do")

    with database() as engine:
        registry = scoped_session(sessionmaker(engine))
        application = SessionMiddleware(app, registry)
        gc.collect()
        gc.disable()
        for _ in range(10_000):
            with suppress(RuntimeError):
                call(application, "GET", "/")
        found = gc.collect()
        gc.enable()
    return found


def memory(attempts: int) -> float:
    """Peak MiB of a process that serves a request whose body is read at once."""
    return python(__file__, str(attempts))


class Network:
    """A body of 100 MB, which comes when it is read."""

    left = 100_000_000

    def read(self, size: int = -1) -> bytes:
        size = self.left if size < 0 else min(size, self.left)
        self.left -= size
        return b"x" * size


def serve_large_body(attempts: int) -> None:
    with database() as engine:
        application = sessionscope(engine, attempts=attempts)
        call(application, "POST", "/read")
        call(application, "POST", "/body", body=Network())
    print(peak("self"))


def milliseconds_of_a_commit(synchronous: str) -> float:
    """How long one INSERT takes to be as durable as *synchronous* makes it, by the median."""
    times = []
    with database() as engine, closing(engine.raw_connection()) as connection:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA synchronous={synchronous}")
        for _ in range(200):
            began = perf_counter()
            cursor.execute("INSERT INTO items (name) VALUES ('a lamp')")
            times.append(perf_counter() - began)
    return statistics.median(times) * 1000


def storage() -> tuple[float, float]:
    """Statements that a key adds to a request, and bytes that it adds to the database."""
    with database() as engine:
        statements: list[object] = []
        event.listen(engine, "before_cursor_execute", lambda *_: statements.append(1))
        application = with_keys(engine)
        call(application, "POST", "/read")
        without = len(statements)
        statements.clear()
        size = database_size(engine)
        for _ in range(1000):
            call(application, "POST", "/read", "new")
        with_key = len(statements) / 1000
        return with_key - without, (database_size(engine) - size) / 1000


def database_size(engine: Engine) -> int:
    with closing(engine.raw_connection()) as connection:
        cursor = connection.cursor()
        ((pages,), (size,)) = (
            cursor.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
        )
    return int(pages) * int(size)


if __name__ == "__main__":
    serve_large_body(int(sys.argv[1]))
