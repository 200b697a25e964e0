"""A driver whose n-th call fails, on any engine.

SQLite tests itself like this: let the n-th call of the operating system fail, for
every n until the operation needs no more, and look each time whether a promise broke
(https://www.sqlite.org/testing.html, "Anomaly Testing").
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event

CALLS = ("do_begin", "do_execute", "do_executemany", "do_commit", "do_rollback")


class Faults:
    """Counts the driver's calls and fails one of them.

    *after* says whether the call is made before it fails: then the database has done
    what was asked, and only the answer is lost.
    """

    def __init__(self) -> None:
        self.left = 0
        self.struck = self.in_commit = self.after = False
        self.error: BaseException | None = None

    def arm(self, at: int, error: BaseException, after: bool) -> None:
        self.left, self.error, self.after = at, error, after
        self.struck = self.in_commit = False

    def disarm(self) -> None:
        self.left, self.error = 0, None

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left != 0 or self.error is None:
            return function(*args, **options)
        self.struck = True
        self.in_commit = function.__name__.endswith("commit")
        if self.after:
            function(*args, **options)
        raise self.error


def install(engine: Engine) -> Faults:
    """Make the driver of *engine* fail on demand."""
    faults = Faults()
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "do_connect")
        def connect(dialect: Any, record: Any, args: Any, options: dict[str, Any]) -> None:
            options["factory"] = faulty_connection(faults)

    else:
        for name in CALLS:
            original = getattr(engine.dialect, name)

            def failing(*args: Any, _original: Any = original, **options: Any) -> Any:
                return faults.call(_original, *args, **options)

            setattr(engine.dialect, name, failing)
    return faults


def faulty_connection(faults: Faults) -> type[sqlite3.Connection]:
    """A connection of the standard library's driver whose every call can fail."""

    class FaultyCursor(sqlite3.Cursor):
        def execute(self, *args: Any) -> Any:
            return faults.call(super().execute, *args)

        def executemany(self, *args: Any) -> Any:
            return faults.call(super().executemany, *args)

        def fetchone(self) -> Any:
            return faults.call(super().fetchone)

        def fetchmany(self, *args: Any) -> Any:
            return faults.call(super().fetchmany, *args)

        def fetchall(self) -> Any:
            return faults.call(super().fetchall)

    class FaultyConnection(sqlite3.Connection):
        def cursor(self, factory: Any = None) -> Any:
            return faults.call(super().cursor, FaultyCursor)

        def execute(self, *args: Any) -> Any:
            return faults.call(super().execute, *args)

        def commit(self) -> None:
            faults.call(super().commit)

        def rollback(self) -> None:
            faults.call(super().rollback)

    return FaultyConnection
