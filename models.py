"""The items table, and engines that keep the middleware's promises on each database.

It knows nothing of the web.  `make_engine` turns a URL into an Engine whose
transactions are real ones; `make_reader` gives the second, read-only engine that
``SessionMiddleware(reader=...)`` binds safe requests to; `create_tables` makes what
is missing, also when several processes start at once.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy import Engine, String, create_engine, event, func, make_url, select
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import QueuePool
from sqlalchemy.schema import CreateTable

MAX_ID = 2**31 - 1
"""The largest value of the column's type, a 32-bit integer."""

BUSY_TIMEOUT = 10.0
"""Seconds that a SQLite connection waits for another process to finish its transaction."""

DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
"""What a URL that names no driver means."""


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
        ``mariadb:`` mean PyMySQL, where the URL names no driver.
    :param pool_size: connections kept open, at most; SQLite has one writer and so
        keeps one, for which the threads of this process queue.
    :raises sqlalchemy.exc.ArgumentError: for what is no URL.
    """
    url = make_url(url)
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, "sqlite+immediate", "journal_mode=WAL", pool_size=1)
    url = url.set(drivername=DRIVERS.get(url.drivername, url.drivername))
    engine = create_engine(url, pool_size=pool_size, max_overflow=0)
    if engine.dialect.name in ("mysql", "mariadb"):
        event.listen(engine, "connect", _isolate_snapshots)
    return engine


def make_reader(url: str | URL, *, pool_size: int = 8) -> Engine | None:
    """Make the engine for safe requests, or None where the first engine serves them too.

    On a SQLite file readers don't wait for the writer (https://www.sqlite.org/wal.html),
    if only they don't begin as one.
    """
    url = make_url(url)
    if url.get_backend_name() != "sqlite" or _in_memory(url):
        return None
    return _sqlite_engine(url, "sqlite+deferred", "query_only=ON", pool_size=pool_size)


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


def _isolate_snapshots(dbapi_connection: Any, _record: object) -> None:
    """Have MariaDB refuse a lost update (error 1020) where the server knows how to.

    https://mariadb.com/kb/en/innodb-system-variables/#innodb_snapshot_isolation
    """
    with dbapi_connection.cursor() as cursor:
        cursor.execute("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'")
        for name, _ in cursor.fetchall():
            cursor.execute(f"SET SESSION {name} = ON")
