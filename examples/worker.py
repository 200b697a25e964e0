"""A worker: each order is one unit of work, and only what is durable is announced.

    python examples/worker.py lamp table,,chair shelf,books

An order in which an item has no name is refused as a whole; the others stand.
They are kept in items.db, or where DATABASE_URL says.
Needed: ``pip install sessionscope``
"""

import logging
import os
import sys
from functools import partial

from sessionscope import on_commit, session_scope
from sqlalchemy import String, create_engine, orm

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///items.db"))
Session = orm.scoped_session(orm.sessionmaker(engine))


class Base(orm.DeclarativeBase): ...


class Item(Base):
    __tablename__ = "items"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str | None] = orm.mapped_column(String(16))


def store(names: list[str]) -> None:
    """Store items; a model that serves web requests and workers alike.

    :raises ValueError: for an item without a name.
    """
    for name in names:
        if not name:
            raise ValueError("an item has no name")
        item = Item(name=name)
        Session.add(item)
        Session.flush()  # the database gives the id
        on_commit(Session, partial(announce, item.id, name))


def announce(id: int, name: str) -> None:
    """Where mail is sent or a queue is fed: it runs once, after the COMMIT."""
    print(f"item {id} is {name}")


if __name__ == "__main__":
    logging.basicConfig()
    Base.metadata.create_all(engine)
    for order in sys.argv[1:]:
        try:
            with session_scope(Session):
                store(order.split(","))
        except ValueError as error:
            print(f"{order} is refused: {error}")
