"""What several parts need: a database with items, and workloads that are counted on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from counting import counts
from sessionscope.engines import make_engine
from sqlalchemy import text

from web.database import create_tables

WORKLOADS = str(Path(__file__).with_name("workloads.py"))


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
    return counts(WORKLOADS, kind, name, url, jobs=jobs)


def count_all(kind: str, jobs: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """The same for several, each on a SQLite file of its own with 100 items."""

    def on_file(name: str) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{folder}/items.db"
            fill(url, 100)
            return count(kind, name, url, jobs[name])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(on_file, jobs), strict=True))
