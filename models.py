"""The tables: items, and the keys of requests that must not be carried out twice."""

from __future__ import annotations

from sessionscope.idempotency import idempotency_table
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

MAX_ID = 2**31 - 1
"""The largest value of an INTEGER column."""

MAX_NAME = 16
"""Characters in a name."""

# Compared by code point on every engine, so that the names with a prefix are a range of the index.
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
    # No id is used again, not even SQLite's last one after a DELETE: clients know items by it.
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(NAME, index=True)


keys = idempotency_table(Base.metadata)
