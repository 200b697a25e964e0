"""What the session of a request costs, by this middleware and by others.

``make bench`` runs it.  Two measures in one run:

- processor time, of slices that are interleaved in random order, so that what disturbs the
  machine disturbs all alike;
- instructions, counted by ``valgrind --tool=callgrind`` where it is installed.  They differ
  by about a fiftieth from run to run.

Both are given without what the application itself costs, as a ratio to the management
written by hand.  Each contestant has a process of its own.
"""

from __future__ import annotations

import random
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from time import process_time
from typing import TYPE_CHECKING

from contestants import CONTESTANTS
from counting import Player, count, request
from sessionscope.engines import make_engine
from sqlalchemy import insert

from models import Item
from web.database import create_tables

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

PATHS = {"/": "session not used", "/touch": "one read"}
ROUNDS, SLICE = 60, 40


def make(name: str, folder: str) -> WSGIApplication:
    engine = make_engine(f"sqlite:///{folder}/items.db")
    create_tables(engine)
    with engine.begin() as connection:
        connection.execute(insert(Item).values(id=1, name="Item #1"))
    return CONTESTANTS[name](engine)


def play(name: str, path: str) -> None:
    """Serve as many requests as each line of the input says, and tell the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        app = make(name, folder)
        for line in sys.stdin:
            began = process_time()
            for _ in range(int(line)):
                request(app, "GET", path)
            print(process_time() - began, flush=True)


def processor_time(path: str) -> dict[str, float]:
    """Median seconds of a slice, by contestant."""
    samples: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with ExitStack() as stack:
        players = {name: stack.enter_context(Player(__file__, name, path)) for name in CONTESTANTS}
        for player in players.values():
            player.ask(SLICE)
        for _ in range(ROUNDS):
            for name in random.sample([*players], len(players)):
                samples[name].append(players[name].ask(SLICE))
    return {name: statistics.median(values) for name, values in samples.items()}


def instructions(path: str) -> dict[str, float]:
    """Instructions of a request, by contestant."""
    return {name: count(__file__, name, path) for name in CONTESTANTS}


def table(measure: str, found: dict[str, float]) -> None:
    base = found.pop("no management")
    unit = found["by hand"] - base
    print(f"\n{measure}")
    for name, value in found.items():
        print(f"  {name:26} {(value - base) / unit:6.2f}")


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
        play(*sys.argv[1:])
