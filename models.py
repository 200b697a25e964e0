"""The items table: the model, and how its table comes into being.

It knows nothing of the web.  `create_tables` makes what is missing, also when several
processes start at once; `make_probe` tells whether the database can serve.
"""

from __future__ import annotations

from collections.abc import Callable

from sessionscope.engines import make_reader
from sqlalchemy import Engine, String, func, select
from sqlalchemy.engine import URL
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateTable

MAX_ID = 2**31 - 1
"""The largest value of the column's type, a 32-bit integer."""


class Base(DeclarativeBase):
    """The declarative base of this application."""


class Item(Base):
    """A named item."""

    __tablename__ = "items"
    # Any name that JSON can say, whatever the character set of the database is.
    __table_args__ = {"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(16))


def make_probe(url: str | URL) -> Callable[[], None]:
    """Make a function that raises where the items cannot be read.

    It reads on a connection of its own, so it waits for no pool and finds none stale.  A
    database in memory has no other connection, and lives as long as its process.
    """
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
