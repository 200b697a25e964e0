"""What the session of a request costs, by this middleware and by others.

``make bench`` runs it.  Two measures in one run:

- processor time, of slices that are interleaved in random order in one process, so that
  what disturbs the machine disturbs all alike;
- instructions, counted by ``valgrind --tool=callgrind`` where it is installed: those of a
  long run less those of a short one.  They hardly differ from run to run.

Both are given without what the application itself costs, as a ratio to the management
written by hand.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from time import process_time
from typing import TYPE_CHECKING
from wsgiref.util import setup_testing_defaults

from contestants import CONTESTANTS
from sqlalchemy import insert

from models import Item, create_tables, make_engine

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

PATHS = {"/": "session not used", "/touch": "one read"}
ROUNDS, SLICE = 60, 40
SHORT, LONG = 50, 250


def make(name: str, folder: str) -> WSGIApplication:
    engine = make_engine(f"sqlite:///{folder}/{name.replace(' ', '-')}.db")
    create_tables(engine)
    with engine.begin() as connection:
        connection.execute(insert(Item).values(id=1, name="Item #1"))
    return CONTESTANTS[name](engine)


def serve(app: WSGIApplication, path: str, times: int) -> None:
    for _ in range(times):
        environ = {"PATH_INFO": path, "REQUEST_METHOD": "GET"}
        setup_testing_defaults(environ)
        body = app(environ, lambda *_: bool)
        assert b"".join(body)
        close = getattr(body, "close", bool)
        close()


def processor_time(path: str) -> dict[str, float]:
    """Median seconds of a slice, by contestant."""
    samples: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        apps = {name: make(name, folder) for name in CONTESTANTS}
        for app in apps.values():
            serve(app, path, SLICE)
        for _ in range(ROUNDS):
            for name in random.sample([*apps], len(apps)):
                began = process_time()
                serve(apps[name], path, SLICE)
                samples[name].append(process_time() - began)
    return {name: statistics.median(values) for name, values in samples.items()}


def instructions(path: str) -> dict[str, float]:
    """Instructions of a request, by contestant."""
    return {
        name: (count(name, path, LONG) - count(name, path, SHORT)) / (LONG - SHORT)
        for name in CONTESTANTS
    }


def count(name: str, path: str, times: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    done = subprocess.run(
        [*command, sys.executable, __file__, name, path, str(times)],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None
    return int(found[1])


def table(measure: str, found: dict[str, float]) -> None:
    base = found.pop("no management")
    unit = found["by hand"] - base
    print(f"\n{measure}")
    for name, value in found.items():
        print(f"  {name:20} {(value - base) / unit:6.2f}")


def main() -> None:
    print("cost of the session alone; 1.00 is what it costs by hand")
    for path, what in PATHS.items():
        table(f"processor time, {what}", processor_time(path))
    if shutil.which("valgrind") is None:
        print("\nvalgrind is not installed: instructions are not counted")
        return
    for path, what in PATHS.items():
        table(f"instructions, {what}", instructions(path))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            serve(make(sys.argv[1], scratch), sys.argv[2], int(sys.argv[3]))
