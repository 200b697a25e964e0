"""What several parts need: a database with items, and workloads that are counted on it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from counting import counts
from sessionscope.engines import make_engine
from sqlalchemy import text

from web.database import create_tables

SEEDS = range(3)
"""Processes that count the same: how things are hashed moves a count by some per cent."""

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


def count(kind: str, name: str, url: str, jobs: Iterable[str], seed: int) -> dict[str, float]:
    """Instructions of each job, done by one contestant or service."""
    return counts(WORKLOADS, kind, name, url, jobs=jobs, seed=seed)


def count_all(kind: str, jobs: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """The same for several, on SQLite files with 100 items; by the median."""

    def on_file(name: str, seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{folder}/items.db"
            fill(url, 100)
            return count(kind, name, url, jobs[name], seed)

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.map(on_file, jobs, repeat(seed)) for seed in SEEDS]
    return {name: median(found) for name, found in zip(jobs, zip(*runs, strict=True), strict=True)}


def median(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {job: statistics.median(run[job] for run in runs) for job in runs[0]}
