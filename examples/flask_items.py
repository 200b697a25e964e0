"""Items on Flask: no view handles the session.

    python examples/flask_items.py
    gunicorn examples.flask_items:application
    granian --interface wsgi examples.flask_items:application

The first serves http://127.0.0.1:8080; set PORT for another port, and DATABASE_URL for another
database than the SQLite file items.db.  Needed, in a clone: ``pip install . Flask waitress``
`swapped.py` replaces the models or the views, and keeps the other half.
"""

from __future__ import annotations

import logging
import os

from flask import Flask
from flask.typing import ResponseReturnValue
from sessionscope import SessionMiddleware
from sqlalchemy import String, create_engine, orm, select
from sqlalchemy.orm import Mapped, mapped_column
from waitress import serve

Record = dict[str, int | str | None]

# The models know nothing of the web.


class Base(orm.DeclarativeBase):
    """The declarative base."""


class Item(Base):
    """A named item."""

    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(16))

    def record(self) -> Record:
        return {"id": self.id, "name": self.name}


class Items:
    """The items, as plain records: nothing is left to load when a view has them."""

    def __init__(self, session: orm.scoped_session[orm.Session]) -> None:
        self.session = session

    def create(self) -> Record:
        item = Item()
        self.session.add(item)
        self.session.flush()  # the database assigns the id
        item.name = f"Item #{item.id}"
        return item.record()

    def all(self) -> list[Record]:
        return [item.record() for item in self.session.scalars(select(Item).order_by(Item.id))]

    def find(self, id: int) -> Record | None:
        item = self.session.get(Item, id)
        return None if item is None else item.record()


# The views know nothing of the database.


def make_app(items: Items) -> Flask:
    app = Flask(__name__)

    @app.post("/")
    def create() -> ResponseReturnValue:
        return items.create()

    @app.get("/")
    def index() -> ResponseReturnValue:
        return {"items": items.all()}

    @app.get("/<int:id>")
    def show(id: int) -> ResponseReturnValue:
        return items.find(id) or ({"error": "not found"}, 404)

    return app


engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///items.db"))
Base.metadata.create_all(engine)  # what a project leaves to its migrations
Session = orm.scoped_session(orm.sessionmaker(engine))
application = SessionMiddleware(make_app(Items(Session)), Session)

if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)  # shows each commit and rollback
    serve(application, listen=f"127.0.0.1:{os.environ.get('PORT', '8080')}")
