"""Items on Bottle: no view handles the session.

    python examples/bottle_items.py

Set PORT for another port than 8080, and DATABASE_URL for another database than items.db.
Needed, in a clone: ``pip install . bottle waitress``
"""

import logging
import os

from bottle import Bottle, HTTPResponse
from sessionscope import SessionMiddleware
from sqlalchemy import String, create_engine, orm, select
from waitress import serve

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///items.db"))
Session = orm.scoped_session(orm.sessionmaker(engine))


class Base(orm.DeclarativeBase): ...


class Item(Base):
    __tablename__ = "items"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str | None] = orm.mapped_column(String(16))

    def record(self) -> dict[str, object]:
        return {"id": self.id, "name": self.name}


def create() -> dict[str, object]:
    item = Item()
    Session.add(item)
    Session.flush()  # the database assigns the id
    item.name = f"Item #{item.id}"
    return item.record()


def index() -> dict[str, object]:
    return {"items": [item.record() for item in Session.scalars(select(Item).order_by(Item.id))]}


def show(id: int) -> dict[str, object] | HTTPResponse:
    item = Session.get(Item, id)
    return HTTPResponse({"error": "not found"}, 404) if item is None else item.record()


app = Bottle()
app.route("/", "POST", create)
app.route("/", "GET", index)
app.route("/<id:int>", "GET", show)
Base.metadata.create_all(engine)
application = SessionMiddleware(app, Session)

if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)  # shows each commit and rollback
    serve(application, listen=f"127.0.0.1:{os.environ.get('PORT', '8080')}")
