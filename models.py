"""The tables: items, and the idempotency keys of requests."""

from sessionscope.idempotency import idempotency_table
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

MAX_ID = 2**31 - 1
"""The largest value of an INTEGER column."""

MAX_NAME = 16
"""Characters in a name."""

# Compared by code point on every database, so that names with a prefix are a range of the index.
NAME = (
    String(MAX_NAME)
    .with_variant(String(MAX_NAME, "C"), "postgresql")
    .with_variant(String(MAX_NAME, "utf8mb4_bin"), "mysql", "mariadb")
)


class Base(DeclarativeBase):
    """The declarative base of the service."""


class Item(Base):
    """A named item."""

    __tablename__ = "items"
    # SQLite, too, must not use an id again after a DELETE: clients know items by their ids.
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(NAME, index=True)


keys = idempotency_table(Base.metadata)
