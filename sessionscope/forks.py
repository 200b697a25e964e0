"""Connections that were opened before a fork, and belong to the parent process.

Two processes must not talk on one socket, nor use one SQLite connection
(https://docs.sqlalchemy.org/en/20/core/pooling.html, "Using Connection Pools with
Multiprocessing or os.fork()").  ``os.register_at_fork`` does not help: uWSGI forks in C, and
runs such hooks only if it is told to.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from sessionscope.databases import is_in_memory
from sqlalchemy import Connection, Engine, Pool, event
from sqlalchemy.exc import DBAPIError, DisconnectionError

log = logging.getLogger("sessionscope")

_PROCESS = "sessionscope.process"
"""The key in ``Connection.info`` that holds the process that opened the connection."""

_inherited: list[object] = []
"""What is kept of the parent, since SQLite's connections must not even be closed in a child
(https://www.sqlite.org/howtocorrupt.html, 2.6)."""


class InheritedConnection(Exception):
    """The connection was opened in another process."""


@event.listens_for(Pool, "connect", insert=True)
def _note_process(dbapi_connection: object, record: Any) -> None:
    record.info[_PROCESS] = os.getpid()


def survive_forks(engine: Engine) -> None:
    """Have *engine* open connections of its own in a child process."""
    if not is_in_memory(engine.url):  # which lives in its one connection, in a child, too
        event.listen(engine, "checkout", _leave_to_parent)


def _leave_to_parent(dbapi_connection: object, record: Any, fairy: Any) -> None:
    if record.info[_PROCESS] != os.getpid():
        _inherited.append(dbapi_connection)
        record.dbapi_connection = fairy.dbapi_connection = None
        raise DisconnectionError("the connection was opened in another process")


def refusal(connection: Connection) -> DBAPIError | None:
    """Return the error to raise if *connection* was opened in another process.

    Its engine then has a new pool, so another attempt goes well.
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
    _inherited.append(engine.pool)
    engine.dispose(close=False)
    error = InheritedConnection(f"the connection belongs to process {process}")
    return DBAPIError("BEGIN", None, error, connection_invalidated=True)
