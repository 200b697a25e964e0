"""Items on Falcon: no view handles the session.

    python examples/falcon_items.py

Set PORT for another port than 8080, and DATABASE_URL for another database than items.db.
Needed, in a clone: ``pip install . falcon waitress``
"""

import logging
import os

import falcon
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


class Items:
    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        item = Item()
        Session.add(item)
        Session.flush()  # the database assigns the id
        item.name = f"Item #{item.id}"
        response.media = item.record()

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        items = Session.scalars(select(Item).order_by(Item.id))
        response.media = {"items": [item.record() for item in items]}

    def on_get_one(self, request: falcon.Request, response: falcon.Response, id: int) -> None:
        item = Session.get(Item, id)
        response.status = falcon.HTTP_404 if item is None else falcon.HTTP_200
        response.media = {"error": "not found"} if item is None else item.record()


app = falcon.App()
app.add_route("/", Items())
app.add_route("/{id:int}", Items(), suffix="one")
Base.metadata.create_all(engine)
application = SessionMiddleware(app, Session)

if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)  # shows each commit and rollback
    serve(application, listen=f"127.0.0.1:{os.environ.get('PORT', '8080')}")
