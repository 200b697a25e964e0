"""Items on Flask-SQLAlchemy: one line in the factory, and no view handles the session.

    python examples/flask_sqlalchemy_items.py

PORT and DATABASE_URL as in the others.  Needed: ``pip install . Flask-SQLAlchemy waitress``
"""

import logging
import os

from flask import Flask
from flask.typing import ResponseReturnValue
from flask_sqlalchemy import SQLAlchemy
from sessionscope import SessionMiddleware
from sqlalchemy import String, orm
from waitress import serve

db = SQLAlchemy()


class Item(db.Model):  # type: ignore[name-defined,misc]
    __tablename__ = "items"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str | None] = orm.mapped_column(String(16))

    def record(self) -> dict[str, object]:
        return {"id": self.id, "name": self.name}


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ.get("DATABASE_URL", "sqlite:///items.db")
    db.init_app(app)
    app.wsgi_app = SessionMiddleware(app.wsgi_app, db.session)  # type: ignore[method-assign]
    with app.app_context():
        db.create_all()  # what a project leaves to its migrations

    @app.post("/")
    def create() -> ResponseReturnValue:
        item = Item()
        db.session.add(item)
        db.session.flush()  # the database assigns the id
        item.name = f"Item #{item.id}"
        return item.record()

    @app.get("/")
    def index() -> ResponseReturnValue:
        return {"items": [item.record() for item in Item.query.order_by(Item.id)]}

    @app.get("/<int:id>")
    def show(id: int) -> ResponseReturnValue:
        item = db.session.get(Item, id)
        return item.record() if item else ({"error": "not found"}, 404)

    return app


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)  # shows each commit and rollback
    serve(create_app(), listen=f"127.0.0.1:{os.environ.get('PORT', '8080')}")
