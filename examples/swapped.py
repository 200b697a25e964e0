"""`flask_items.py` with other models or other views.

    python examples/swapped.py models
    python examples/swapped.py views

``models`` uses SQL without the ORM below Flask's views, ``views`` uses Bottle above the ORM.
PORT and DATABASE_URL are as there.  Needed, in a clone: ``pip install . Flask bottle waitress``
"""

from __future__ import annotations

import logging
import os
import sys

import bottle
from flask_items import Base, Items, Record, Session, make_app
from sessionscope import SessionMiddleware
from sqlalchemy import insert, select, update
from waitress import serve

table = Base.metadata.tables["items"]


class CoreItems(Items):
    """The same items, without the ORM."""

    def create(self) -> Record:
        id = self.session.scalars(insert(table).returning(table.c.id)).one()
        name = f"Item #{id}"
        self.session.execute(update(table).where(table.c.id == id).values(name=name))
        return {"id": id, "name": name}

    def all(self) -> list[Record]:
        return [{**row} for row in self.session.execute(select(table).order_by("id")).mappings()]

    def find(self, id: int) -> Record | None:
        found = self.session.execute(select(table).where(table.c.id == id)).mappings().one_or_none()
        return None if found is None else {**found}


def make_bottle(items: Items) -> bottle.Bottle:
    app = bottle.Bottle()
    app.route("/", "POST", items.create)
    app.route("/", "GET", lambda: {"items": items.all()})
    app.route("/<id:int>", "GET", lambda id: items.find(id) or not_found())
    return app


def not_found() -> bottle.HTTPResponse:
    return bottle.HTTPResponse({"error": "not found"}, 404)


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)  # shows each commit and rollback
    apps = {"models": make_app(CoreItems(Session)), "views": make_bottle(Items(Session))}
    if len(sys.argv) != 2 or sys.argv[1] not in apps:
        sys.exit(f"usage: python {sys.argv[0]} {' | '.join(apps)}")
    application = SessionMiddleware(apps[sys.argv[1]], Session)
    serve(application, listen=f"127.0.0.1:{os.environ.get('PORT', '8080')}")
