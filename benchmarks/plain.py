"""The items without sessionscope, which must not slow those who do not use it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, String, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

PRAGMAS = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL")


class Base(DeclarativeBase):
    """A base of their own."""


class Item(Base):
    """An item of the service's table."""

    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(16))


def make_durable(engine: Engine) -> Engine:
    """Have SQLite write to the disk before a COMMIT returns, as PostgreSQL does by default."""
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def configure(connection: Any, _record: object) -> None:
            for pragma in PRAGMAS:
                connection.execute(pragma)

    return engine


def make_engine(url: str) -> Engine:
    return make_durable(create_engine(url))
