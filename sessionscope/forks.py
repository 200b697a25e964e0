"""Connections that were opened before a fork, and belong to the parent process.

Two processes must not use the same socket, or the same SQLite connection
(https://docs.sqlalchemy.org/en/20/core/pooling.html, "Using Connection Pools with
Multiprocessing or os.fork()").  A child process forgets the connections of its parent, so its
pools open their own.  uWSGI forks in C and by default does not notify Python; the engines of
`sessionscope.engines` therefore check each checkout, and the sessions of requests each
transaction.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, Pool, event
from sqlalchemy.exc import DBAPIError, DisconnectionError

log = logging.getLogger("sessionscope")

_PROCESS = "sessionscope.process"
"""The key in ``Connection.info`` that holds the process that opened the connection."""

_opened: WeakSet[Any] = WeakSet()

_engines: WeakSet[Engine] = WeakSet()

_inherited: list[object] = []
"""References to the parent's connections: a child must not even close those of SQLite
(https://www.sqlite.org/howtocorrupt.html, 2.6)."""


class InheritedConnection(Exception):
    """The connection was opened in another process."""


@event.listens_for(Pool, "connect", insert=True)
def _note_process(dbapi_connection: object, record: Any) -> None:
    if not _is_in_memory(dbapi_connection):  # a child has its own copy of such a database
        record.info[_PROCESS] = os.getpid()
        _opened.add(record)


def _is_in_memory(dbapi_connection: object) -> bool:
    if not isinstance(dbapi_connection, sqlite3.Connection):
        return False
    databases = dbapi_connection.execute("PRAGMA database_list").fetchall()
    return not any(file for _, _, file in databases)


def _forget_connections() -> None:
    """Leave all connections to the parent process, untouched."""
    for record in list(_opened):
        _inherited.append(record.dbapi_connection)
        record.dbapi_connection = None
    _opened.clear()
    for engine in list(_engines):  # their pools count connections that the parent's threads used
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_connections)


def survive_forks(engine: Engine) -> None:
    """Make *engine* open its own connections in a child process.

    :param engine: its database is not in memory.
    """
    _engines.add(engine)
    event.listen(engine, "checkout", _on_checkout)


def _on_checkout(dbapi_connection: object, record: Any, fairy: Any) -> None:
    if record.info.get(_PROCESS, os.getpid()) != os.getpid():
        _inherited.append(dbapi_connection)
        record.dbapi_connection = fairy.dbapi_connection = None
        raise DisconnectionError("the connection was opened in another process")


def refusal(connection: Connection) -> DBAPIError | None:
    """Return the error to raise if *connection* was opened in another process.

    The connection is left alone, and its engine gets a new pool, so another attempt goes well.
    """
    process, engine = connection.info.get(_PROCESS, os.getpid()), connection.engine
    if process == os.getpid():
        return None
    log.warning(
        "%r was used before this process was forked, so its connections are shared with process "
        "%d, and this process opens new ones. Call engine.dispose() before the fork",
        engine,
        process,
    )
    fairy: Any = connection.connection
    _inherited.extend((engine.pool, fairy.dbapi_connection))
    fairy.dbapi_connection = None  # or ROLLBACK would be sent on it
    engine.dispose(close=False)
    error = InheritedConnection(
        f"the connection belongs to process {process}: call engine.dispose() before the fork"
    )
    return DBAPIError("BEGIN", None, error, connection_invalidated=True)
