"""A worker: each order is one unit of work, and is announced after its commit.

    python examples/worker.py lamp table,,chair shelf,books

If an item of an order has no name, nothing of that order is stored; the others are not affected.
Set DATABASE_URL for another database than items.db.  Needed, in a clone: ``pip install .``
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
    """Store items; web requests and workers can both call this.

    :raises ValueError: for an item without a name.
    """
    for name in names:
        if not name:
            raise ValueError("an item has no name")
        item = Item(name=name)
        Session.add(item)
        Session.flush()  # the database assigns the id
        on_commit(Session, partial(announce, item.id, name))


def announce(id: int, name: str) -> None:
    """Send mail, or fill a queue: this runs once, after the COMMIT."""
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
