"""Engines with the settings that the middleware needs on each database.

`make_engine` creates an Engine whose transactions are isolated and durable.  `make_reader`
creates a second, read-only Engine for ``SessionMiddleware(reader=...)``.  Both survive a fork: a
child process opens its own connections.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from sessionscope.forks import survive_forks
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.pool import QueuePool

__all__ = ["make_engine", "make_reader"]

BUSY_TIMEOUT = 10.0
"""Seconds for which a SQLite connection waits for another process's transaction to end."""

POOL_TIMEOUT = 10.0
"""Seconds for which a request waits for a connection if all are in use."""

DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
"""The driver for a URL that names none."""

# In seconds, except `tcp_user_timeout`.  A server that has vanished must not block a thread for
# ever.  https://www.postgresql.org/docs/current/libpq-connect.html,
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
    "mariadbconnector": {"connect_timeout": 5, "read_timeout": 20, "write_timeout": 20},
}

# Set for each connection, if the server knows the variable: refuse a lost update (error 1020);
# read, change and reference on one Galera node what was written on another; stop waiting for a
# lock before `read_timeout` closes the connection.
# https://mariadb.com/kb/en/innodb-system-variables/, https://mariadb.com/kb/en/galera-cluster-system-variables/
_MARIADB_SETTINGS = {
    "innodb_snapshot_isolation": "ON",
    "wsrep_sync_wait": "7",
    "innodb_lock_wait_timeout": "10",
}


def make_engine(url: str | URL, *, pool_size: int = 8) -> Engine:
    """Create an engine that may write.

    On SQLite it sets ``journal_mode=WAL``, ``synchronous=FULL`` and ``foreign_keys=ON``, and begins
    with BEGIN IMMEDIATE.  On MariaDB it sets ``innodb_snapshot_isolation``, ``wsrep_sync_wait`` and
    ``innodb_lock_wait_timeout``, if the server has them.

    :param url: a SQLAlchemy URL.  If it names no driver, ``postgresql:`` means psycopg 3, and
        ``mysql:`` and ``mariadb:`` mean PyMySQL.  Several servers are given as
        ``?host=a:1&host=b:2``; they are tried in that order.
    :param pool_size: maximum number of connections.  SQLite has one writer, and always gets
        one connection, for which the threads of this process queue.
    :raises sqlalchemy.exc.ArgumentError: if *url* is not a URL.
    """
    url = make_url(url)
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, "sqlite+immediate", "journal_mode=WAL", pool_size=1)
    return _server_engine(url, pool_size=pool_size)


def make_reader(url: str | URL, *, pool_size: int = 8) -> Engine | None:
    """Create a read-only engine for requests with safe methods.

    On a SQLite file its transactions do not wait for the writer
    (https://www.sqlite.org/wal.html).  On PostgreSQL, MariaDB and MySQL each statement is its own
    transaction (AUTOCOMMIT), so a read costs one round trip.  Other databases are not supported.

    :param url: a SQLAlchemy URL, as for `make_engine`.
    :param pool_size: maximum number of connections.
    :returns: None for a SQLite database in memory, which has only one connection.
    :raises sqlalchemy.exc.ArgumentError: if *url* is not a URL.
    """
    url = make_url(url)
    if url.get_backend_name() == "sqlite":
        if is_in_memory(url):
            return None
        return _sqlite_engine(url, "sqlite+deferred", "query_only=ON", pool_size=pool_size)
    engine = _server_engine(
        url,
        pool_size=pool_size,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
    )

    @event.listens_for(engine, "connect")
    def only_read(dbapi_connection: Any, _record: object) -> None:
        with dbapi_connection.cursor() as cursor:
            cursor.execute(_READ_ONLY[engine.dialect.name])

    return engine


class ImmediateSQLite(SQLiteDialect_pysqlite):
    """SQLite for writers: a transaction holds the write lock from its beginning.

    A transaction that reads first and writes later would otherwise fail at once with
    "database is locked" if another one has written in between, whatever the timeout
    (https://www.sqlite.org/lang_transaction.html, "DEFERRED, IMMEDIATE, and EXCLUSIVE").
    This is a dialect rather than a ``begin`` listener, which would slow every statement.
    """

    supports_statement_cache = True
    begin_statement = "BEGIN IMMEDIATE"

    def do_begin(self, dbapi_connection: Any) -> None:
        dbapi_connection.execute(self.begin_statement)


class DeferredSQLite(ImmediateSQLite):
    """SQLite for readers: a transaction sees one state of the database and takes no write lock."""

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

    if not is_in_memory(url):
        survive_forks(engine)
    return engine


def _set_when_free(dbapi_connection: sqlite3.Connection, pragma: str) -> None:
    """Set a PRAGMA that SQLite refuses at once while another process writes.

    Two processes that open a new file at the same time both switch it to WAL.
    """
    while True:
        try:
            dbapi_connection.execute(f"PRAGMA {pragma}")
            return
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY"):
                raise
        dbapi_connection.execute("BEGIN EXCLUSIVE")  # waits, for at most BUSY_TIMEOUT
        dbapi_connection.execute("ROLLBACK")


def is_in_memory(url: URL) -> bool:
    """Return whether *url* names a SQLite database in memory."""
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
    survive_forks(engine)
    return engine


def _try_each(engine: Engine, hosts: list[str]) -> None:
    """Connect to the first host that accepts a connection, as libpq does by itself."""

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Dialect, _record: object, arguments: Any, parameters: Any) -> Any:
        for host in hosts:
            name, _, port = host.partition(":")
            try:
                made: Any = dialect.connect(
                    *arguments,
                    **{**parameters, "host": name, "port": int(port or 3306)},
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
