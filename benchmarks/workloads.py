"""The script that is counted: a contestant or a service, and the requests it is told to serve."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from contestants import CONTESTANTS
from counting import counts, play
from playing import directly, served
from services import SERVICES
from sessionscope.engines import make_engine
from sqlalchemy import text

from web.database import create_tables


def fill(url: str, count: int) -> None:
    """Have the database itself make *count* items."""
    engine = make_engine(url)
    create_tables(engine)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)"
    with engine.begin() as connection:
        statement = f"INSERT INTO items (name) {numbers} SELECT 'Item #' || i FROM n"
        connection.execute(text(statement), {"count": count})
    engine.dispose()


def count(kind: str, name: str, url: str, jobs: Iterable[str]) -> dict[str, float]:
    """Instructions of each job, done by one contestant or service."""
    return counts(__file__, kind, name, url, jobs=jobs)


def count_all(kind: str, jobs: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """The same for several, each on a SQLite file of its own with 100 items."""

    def on_file(name: str) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{folder}/items.db"
            fill(url, 100)
            return count(kind, name, url, jobs[name])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(on_file, jobs), strict=True))


if __name__ == "__main__":
    kind, name, url = sys.argv[1:]
    if kind == "session":
        play(directly(CONTESTANTS[name](make_engine(url))))
    else:
        play({"service": directly, "served": served}[kind](SERVICES[name](url)))
