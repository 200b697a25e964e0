"""The service's database: create its tables, check them, and probe it."""

import logging
from collections.abc import Callable
from random import randint
from time import monotonic, sleep
from typing import Any

from sessionscope.databases import driver_connection, error_code, is_unavailable
from sessionscope.engines import make_engine, make_reader
from sqlalchemy import Column, Engine, delete, exc, func, insert, inspect, make_url, select
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.engine.interfaces import ReflectedColumn
from sqlalchemy.schema import CreateIndex, CreateTable

from models import MAX_ID, Base, Item
from web.options import StartError

log = logging.getLogger("items")


class WrongTable(Exception):
    """The database has a table that the service cannot use."""

    def __init__(self, difference: str, remedy: str = "change the column") -> None:
        remedies = f"run `alembic upgrade head`, {remedy}, or use another database"
        super().__init__(f"{difference}; {remedies}")


def parse_url(text: str, option: str) -> URL:
    """Parse the URL that *option* gives.

    :raises StartError: if it is not a URL.
    """
    try:
        return make_url(text)
    except (exc.ArgumentError, ValueError) as error:
        example = "a URL looks like sqlite:///items.db or postgresql://user@host:5432/database"
        raise StartError(f"{option}: {error}; {example}") from None


def open_database(url: URL, *, threads: int, create: bool, wait: float) -> Engine:
    """Return the engine of a database that has the tables.

    :param create: create missing tables.
    :param wait: seconds to wait for a database that is not available yet.
    :raises StartError: if it stays unavailable, or has other tables.
    """
    engine = None
    try:
        engine = make_engine(url, pool_size=threads)
        wait_for(engine, wait)
        if create:
            create_tables(engine)
        check_tables(engine)
        return engine
    except (exc.SQLAlchemyError, ImportError, TypeError, WrongTable) as error:
        if engine is not None:
            engine.dispose()
        reason = getattr(error, "orig", None) or error
        raise StartError(
            f"cannot use the database {shown(url)} (--database-url): {reason}{remedy(error, wait)}"
        ) from error


def shown(url: URL) -> str:
    """Return *url* without its passwords, of which some drivers take one from the query."""
    hidden = {name: "..." for name in url.query if "passw" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def remedy(error: Exception, wait: float) -> str:
    """Return what to do about *error*, after a semicolon; nothing if that is unknown."""
    if isinstance(error, ImportError):
        extra = {"psycopg": "-e '.[postgresql]'", "pymysql": "-e '.[mysql]'"}
        return f"; run: pip install {extra.get(error.name or '', error.name)}"
    if isinstance(error, exc.NoSuchModuleError):
        return "; the URL must begin with sqlite:, postgresql: or mariadb:"
    if error_code(error) == "SQLITE_CANTOPEN":
        return "; its folder must exist and be writable"
    if isinstance(error, exc.DBAPIError) and is_unavailable(error):
        return "; is it running?" + ("" if wait else " With --wait 30 the service waits for it")
    return ""


def wait_for(engine: Engine, seconds: float) -> None:
    """Connect, and retry for some *seconds* while the database is not available.

    :raises sqlalchemy.exc.DBAPIError: when the time is over.
    """
    deadline = monotonic() + seconds
    while True:
        try:
            engine.connect().close()
            return
        except exc.DBAPIError as error:
            if monotonic() >= deadline or not is_unavailable(error):
                raise
            log.info("waiting for the database: %s", error.orig)
        sleep(0.2)


def create_tables(engine: Engine) -> None:
    """Create missing tables; several processes may do so at once."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # IF NOT EXISTS does not keep two sessions from creating the same table.
            connection.execute(select(func.pg_advisory_xact_lock(0x6974656D73)))
        # MySQL, unlike MariaDB, has no IF NOT EXISTS for an index.
        is_mysql = not getattr(engine.dialect, "is_mariadb", True)
        for table in Base.metadata.tables.values():
            connection.execute(CreateTable(table, if_not_exists=True))
            found = inspect(connection).get_indexes(table.name) if is_mysql else []
            names = {index["name"] for index in found}
            for index in [index for index in table.indexes if index.name not in names]:
                connection.execute(CreateIndex(index, if_not_exists=not is_mysql))


def check_tables(engine: Engine) -> None:
    """Compare the tables with the model.

    :raises WrongTable: naming the column and the difference.
    """
    found = inspect(engine)
    for table in Base.metadata.tables.values():
        if not found.has_table(table.name):
            raise WrongTable(f"there is no table {table.name}", "start with --create-tables")
        columns = {column["name"]: column for column in found.get_columns(table.name)}
        wrong = [difference(column, columns, engine.dialect) for column in table.columns]
        wrong += [
            f"{name} is required, but the service does not know it"
            for name in columns.keys() - table.columns.keys()
            if not columns[name]["nullable"] and columns[name]["default"] is None
        ]
        for words in filter(None, wrong):
            raise WrongTable(f"the column {table.name}.{words}")


def difference(
    column: Column[Any], found: dict[str, ReflectedColumn], dialect: Dialect
) -> str | None:
    """Return how the column that was *found* differs from *column*; None if it will do."""
    if column.name not in found:
        return f"{column.name} is missing"
    wanted: Any = column.type.dialect_impl(dialect)
    has: Any = found[column.name]["type"]
    length, collation = getattr(wanted, "length", None), getattr(wanted, "collation", None)
    if has.as_generic().python_type is not wanted.python_type:
        return f"{column.name} is {has}, not {wanted}"
    if length and (getattr(has, "length", None) or length) < length:
        return f"{column.name} has {has.length} characters, not {length}"
    if collation and has.collation != collation:
        difference = f"the collation {has.collation}, not {collation}"
        return f"{column.name} has {difference}, which migration 0002 changes"
    return None


def make_probe(url: URL, reader_url: URL | None = None) -> Callable[[], None]:
    """Return a function that raises if items cannot be read or written.

    It has its own connections, so it waits for no pool and finds none stale.  It inserts a row,
    deletes it in the same transaction and commits, because only a COMMIT notices a full disk.
    """
    writer, reader = make_engine(url, pool_size=1), make_reader(reader_url or url, pool_size=1)
    if reader is None:  # a database in memory has one connection, and lives as long as the process
        return lambda: None

    def probe() -> None:
        try:
            write_and_delete(writer)
            with reader.connect() as connection:
                connection.execute(select(Item.id, Item.name).limit(1))
        finally:
            writer.dispose()
            reader.dispose()

    return probe


def write_and_delete(engine: Engine) -> None:
    id = -randint(1, MAX_ID)  # an id that no item has, nor another probe at this moment
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                driver_connection(connection).execute("PRAGMA busy_timeout=0")
            with connection.begin():
                connection.execute(insert(Item).values(id=id, name="probe"))
                connection.execute(select(Item.id, Item.name).where(Item.id == id)).one()
                connection.execute(delete(Item).where(Item.id == id))
    except exc.OperationalError as error:
        if not str(error_code(error)).startswith("SQLITE_BUSY"):  # another process is writing
            raise
