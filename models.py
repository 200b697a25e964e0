"""The items table, and engines that keep the middleware's promises on each database.

It knows nothing of the web.  `make_engine` turns a URL into an Engine whose
transactions are real ones; `make_reader` gives the second, read-only engine that
``SessionMiddleware(reader=...)`` binds safe requests to; `create_tables` makes what
is missing, also when several processes start at once; `make_probe` and `is_unavailable`
tell whether the database can serve.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, String, create_engine, event, func, make_url, select
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.exc import DBAPIError, OperationalError, TimeoutError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import QueuePool
from sqlalchemy.schema import CreateTable

MAX_ID = 2**31 - 1
"""The largest value of the column's type, a 32-bit integer."""

BUSY_TIMEOUT = 10.0
"""Seconds that a SQLite connection waits for another process to finish its transaction."""

POOL_TIMEOUT = 10.0
"""Seconds that a request waits for a connection when all are in use."""

DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
"""What a URL that names no driver means."""

# Seconds, but for the last.  A server that is gone without a word must not keep a thread of
# ours for ever.  https://www.postgresql.org/docs/current/libpq-connect.html,
# https://pymysql.readthedocs.io/en/latest/modules/connections.html
_LIVENESS: dict[str, dict[str, int]] = {
    "psycopg": {
        "connect_timeout": 5,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
    },
    "psycopg2": {"connect_timeout": 5},
    "pymysql": {"connect_timeout": 5, "read_timeout": 20, "write_timeout": 20},
    "mysqldb": {"connect_timeout": 5, "read_timeout": 20, "write_timeout": 20},
}

# What each session of a server is told, where the server knows the variable: refuse a lost
# update (error 1020); read, change and refer to on one Galera node what was written on
# another; give up a lock before `read_timeout` gives up the connection.
# https://mariadb.com/kb/en/innodb-system-variables/, https://mariadb.com/kb/en/galera-cluster-system-variables/
_MARIADB_SETTINGS = {
    "innodb_snapshot_isolation": "ON",
    "wsrep_sync_wait": "7",
    "innodb_lock_wait_timeout": "10",
}


class Base(DeclarativeBase):
    """The declarative base of this application."""


class Item(Base):
    """A named item."""

    __tablename__ = "items"
    # Any name that JSON can say, whatever the character set of the database is.
    __table_args__ = {"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(16))


def make_engine(url: str | URL, *, pool_size: int = 8) -> Engine:
    """Make the engine that may write.

    :param url: a SQLAlchemy URL.  ``postgresql:`` means psycopg 3, ``mysql:`` and
        ``mariadb:`` mean PyMySQL, where the URL names no driver.  Several servers are
        given as ``?host=a:1&host=b:2``; they are tried in that order.
    :param pool_size: connections kept open, at most; SQLite has one writer and so
        keeps one, for which the threads of this process queue.
    :raises sqlalchemy.exc.ArgumentError: for what is no URL.
    """
    url = make_url(url)
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, "sqlite+immediate", "journal_mode=WAL", pool_size=1)
    return _server_engine(url, pool_size=pool_size)


def make_reader(url: str | URL, *, pool_size: int = 8) -> Engine | None:
    """Make the engine for safe requests, or None where the first engine serves them too.

    It can only read.  On a SQLite file readers don't wait for the writer
    (https://www.sqlite.org/wal.html), if only they don't begin as one.  On a server each
    statement is a transaction of its own, so a read costs one round trip.
    """
    url = make_url(url)
    if url.get_backend_name() == "sqlite":
        if _in_memory(url):
            return None
        return _sqlite_engine(url, "sqlite+deferred", "query_only=ON", pool_size=pool_size)
    engine = _server_engine(
        url, pool_size=pool_size, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True
    )

    @event.listens_for(engine, "connect")
    def only_read(dbapi_connection: Any, _record: object) -> None:
        with dbapi_connection.cursor() as cursor:
            cursor.execute(_READ_ONLY[engine.dialect.name])

    return engine


def make_probe(url: str | URL) -> Callable[[], None]:
    """Make a function that raises where the items cannot be read.

    It reads on a connection of its own, so it waits for no pool and finds none stale.  A
    database in memory has no other connection, and lives as long as its process.
    """
    url = make_url(url)
    reader = make_reader(url, pool_size=1)

    def probe() -> None:
        if reader is None:
            return
        try:
            with reader.connect() as connection:
                connection.execute(select(Item.id).limit(1))
        finally:
            reader.dispose()

    return probe


def create_tables(engine: Engine) -> None:
    """Create the tables that are missing; safe to call from several processes at once."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # IF NOT EXISTS does not keep two sessions from creating the same table.
            connection.execute(select(func.pg_advisory_xact_lock(0x6974656D73)))
        for table in Base.metadata.sorted_tables:
            connection.execute(CreateTable(table, if_not_exists=True))


class ImmediateSQLite(SQLiteDialect_pysqlite):
    """SQLite for writers: a transaction holds the write lock from its beginning.

    A transaction that reads first and writes later would otherwise fail at once with
    "database is locked" when another has written in between, whatever the timeout
    (https://www.sqlite.org/lang_transaction.html, "DEFERRED, IMMEDIATE, and EXCLUSIVE").
    A dialect rather than the usual ``begin`` event, which would slow every statement.
    """

    supports_statement_cache = True
    begin_statement = "BEGIN IMMEDIATE"

    def do_begin(self, dbapi_connection: Any) -> None:
        dbapi_connection.execute(self.begin_statement)


class DeferredSQLite(ImmediateSQLite):
    """SQLite for readers: a transaction sees one state and locks nobody out."""

    supports_statement_cache = True
    begin_statement = "BEGIN"


registry.register("sqlite.immediate", __name__, ImmediateSQLite.__name__)
registry.register("sqlite.deferred", __name__, DeferredSQLite.__name__)


def _sqlite_engine(url: URL, drivername: str, pragma: str, *, pool_size: int) -> Engine:
    engine = create_engine(
        url.set(drivername=drivername),
        # Also for a database in memory, which belongs to its one connection: sessions
        # take turns with it, whatever thread they run in.
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT,
        connect_args={
            # The driver's own transactions would leave SELECT and DDL outside.
            "isolation_level": None,
            "timeout": BUSY_TIMEOUT,
            "check_same_thread": False,
        },
    )

    @event.listens_for(engine, "connect")
    def configure(dbapi_connection: Any, _record: object) -> None:
        for setting in ("synchronous=FULL", "foreign_keys=ON"):
            dbapi_connection.execute(f"PRAGMA {setting}")
        _set_when_free(dbapi_connection, pragma)

    return engine


def _set_when_free(dbapi_connection: sqlite3.Connection, pragma: str) -> None:
    """Set what SQLite refuses to set, without waiting, while another process writes.

    Two processes that open a fresh file at once both turn it to WAL.
    """
    while True:
        try:
            dbapi_connection.execute(f"PRAGMA {pragma}")
            return
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY"):
                raise
        dbapi_connection.execute("BEGIN EXCLUSIVE")  # waits, but for BUSY_TIMEOUT at most
        dbapi_connection.execute("ROLLBACK")


def _in_memory(url: URL) -> bool:
    return not url.database or ":memory:" in url.database or "mode=memory" in str(url)


def _server_engine(url: URL, **options: Any) -> Engine:
    url = url.set(drivername=DRIVERS.get(url.drivername, url.drivername))
    dialect = url.get_dialect()
    known = _LIVENESS.get(dialect.driver, {})
    several = url.query.get("host") if dialect.name in ("mysql", "mariadb") else None
    engine = create_engine(
        url.difference_update_query(["host"]) if several else url,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT,
        connect_args={name: value for name, value in known.items() if name not in url.query},
        **options,
    )
    if dialect.name in ("mysql", "mariadb"):
        event.listen(engine, "connect", _configure_mariadb)
    if several:
        _try_each(engine, [several] if isinstance(several, str) else list(several))
    return engine


def _try_each(engine: Engine, hosts: list[str]) -> None:
    """Connect to the first host that serves, as libpq does by itself."""

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Dialect, _record: object, arguments: Any, parameters: Any) -> Any:
        for host in hosts:
            name, _, port = host.partition(":")
            try:
                made: Any = dialect.connect(
                    *arguments, **{**parameters, "host": name, "port": int(port or 3306)}
                )
                with made.cursor() as cursor:
                    cursor.execute("SELECT 1")  # a node outside the cluster's majority refuses
                return made
            except dialect.loaded_dbapi.OperationalError as error:
                failure = error
        raise failure


def _configure_mariadb(dbapi_connection: Any, _record: object) -> None:
    names = ", ".join(map(repr, _MARIADB_SETTINGS))
    with dbapi_connection.cursor() as cursor:
        cursor.execute(f"SHOW VARIABLES WHERE Variable_name IN ({names})")
        for name, _ in cursor.fetchall():
            cursor.execute(f"SET SESSION {name} = {_MARIADB_SETTINGS[name]}")


_READ_ONLY = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
}


# SQLSTATE classes: connection lost, try again, out of resources, an operator stepped in; a
# lock or a statement that timed out, a primary that has become a standby.
_UNAVAILABLE = re.compile(r"08|40|53|57|55P03|25P03|25006|SQLITE_(BUSY|LOCKED|FULL|IOERR|CANTOPEN)")
# The same of MariaDB: too many connections, shutting down, unreachable, gone, locked,
# outside the majority of its cluster.
_UNAVAILABLE_NUMBERS = frozenset(
    {1020, 1040, 1047, 1053, 1180, 1203, 1205, 1213, 1290, 2002, 2003, 2006, 2013}
)


def is_unavailable(error: BaseException) -> bool:
    """Tell whether *error* says that the database cannot serve now, but may a little later.

    It is down or starting, has no connection to spare, is locked, or met one conflict after
    another.
    """
    if isinstance(error, TimeoutError):
        return True  # of the pool
    if not isinstance(error, DBAPIError):
        return False
    code = _error_code(error.orig)
    if code is None:  # psycopg: no server has answered
        return error.connection_invalidated or isinstance(error, OperationalError)
    return code in _UNAVAILABLE_NUMBERS or bool(_UNAVAILABLE.match(str(code)))


def _error_code(error: Any) -> object:
    """MariaDB's number, PostgreSQL's SQLSTATE or SQLite's name of an error."""
    if error.args and isinstance(error.args[0], int):
        return error.args[0]
    names = ("sqlstate", "pgcode", "sqlite_errorname")
    return next(filter(None, (getattr(error, name, None) for name in names)), None)
