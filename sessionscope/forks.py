"""Connections that were opened before a fork, and belong to the parent process.

Two processes must not talk on one socket, nor use one SQLite connection
(https://docs.sqlalchemy.org/en/20/core/pooling.html, "Using Connection Pools with
Multiprocessing or os.fork()").
"""

from __future__ import annotations

import logging
import os
from typing import Any

from sessionscope.databases import is_in_memory
from sqlalchemy import Connection, Engine, Pool, event
from sqlalchemy.exc import DBAPIError

log = logging.getLogger("sessionscope")

_PROCESS = "sessionscope.process"
"""The key in ``Connection.info`` that holds the process that opened the connection."""

_inherited: list[Pool] = []
"""Pools of the parent.  SQLite's connections must not even be closed in a child
(https://www.sqlite.org/howtocorrupt.html, 2.6), so they are kept."""


class InheritedConnection(Exception):
    """The connection was opened in another process."""


@event.listens_for(Pool, "connect", insert=True)
def _note_process(dbapi_connection: object, record: Any) -> None:
    record.info[_PROCESS] = os.getpid()


def leave_to_parent(engine: Engine) -> None:
    """Give *engine* a new pool, and leave the connections of the old one alone."""
    _inherited.append(engine.pool)
    engine.dispose(close=False)


def inherited(connection: Connection) -> DBAPIError | None:
    """Return the error to raise if *connection* was opened in another process.

    The engine then has a new pool, so another attempt goes well.
    """
    process, engine = connection.info.get(_PROCESS), connection.engine
    if process in (None, os.getpid()) or is_in_memory(engine.url):
        return None
    log.warning(
        "%r was used before this process was forked, so its connections are shared with process "
        "%d: they are left alone from now on. Call engine.dispose() before the fork",
        engine,
        process,
    )
    leave_to_parent(engine)
    error = InheritedConnection(f"the connection belongs to process {process}")
    return DBAPIError("BEGIN", None, error, connection_invalidated=True)
