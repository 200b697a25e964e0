"""Measure what requests cost: ``make bench``, or ``make bench PARTS='sessions limits'`` in part.

Each part is a module here: it has a title, an estimate, and rows, which are printed as soon as
they are there and written to ``build/bench.md``.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from importlib import import_module
from typing import Any

import sqlalchemy
from databases import Missing
from report import BUILD, HEAD

PARTS = ["sessions", "service", "layers", "limits", "million", "served"]


def conditions() -> str:
    versions = {"Python": platform.python_version(), "SQLAlchemy": sqlalchemy.__version__}
    versions["SQLite"] = sqlite3.sqlite_version
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{found}; {platform.machine()}, {os.cpu_count()} processors"


def main(names: list[str]) -> None:
    parts: list[Any] = [import_module(name) for name in names or PARTS]
    minutes = sum(part.MINUTES for part in parts)
    BUILD.mkdir(exist_ok=True)
    with BUILD.joinpath("bench.md").open("w", encoding="utf-8") as file:

        def write(line: str = "") -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        def write_row(cells: tuple[str, ...]) -> None:
            write(f"| {' | '.join(cells)} |")

        print(f"{len(parts)} parts, about {minutes} minutes on two idle processors", flush=True)
        write(conditions())
        for part in parts:
            head = getattr(part, "HEAD", HEAD)
            write(f"\n## {part.TITLE}\n")
            print(f"(about {part.MINUTES} minutes)\n", flush=True)
            write_row(head)
            write_row(("---",) * len(head))
            try:
                for row in part.rows():
                    write_row(row)
            except Missing as missing:
                write(f"\nThe rest is left out: {missing}.")
    print(f"\nwritten to {BUILD / 'bench.md'}")


if __name__ == "__main__":
    main(sys.argv[1:])
