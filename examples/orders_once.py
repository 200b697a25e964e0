"""Orders on Flask that are paid once, however often the client repeats the request.

    python examples/orders_once.py

It serves http://127.0.0.1:8080.  Send this twice, like a client that lost the first response:

    curl -i -u ada: -H 'Idempotency-Key: "8e03978e"' -d item=lamp -d cents=4900 127.0.0.1:8080

The second response is the first one again, with ``Idempotent-Replayed: true``, and orders.db has
one order.  Needed, in a clone: ``pip install . Flask waitress``
"""

import logging
import os
from typing import Any

from flask import Flask, request
from sessionscope import SessionMiddleware
from sessionscope.idempotency import Idempotency, idempotency_table
from sqlalchemy import create_engine, orm
from waitress import serve

engine = create_engine("sqlite:///orders.db")
Session = orm.scoped_session(orm.sessionmaker(engine))


class Base(orm.DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    item: orm.Mapped[str]
    cents: orm.Mapped[int]


keys = idempotency_table(Base.metadata)  # create_all and Alembic find it like any other
app = Flask(__name__)


@app.post("/")
def create() -> tuple[dict[str, Any], int]:
    order = Order(item=request.form["item"], cents=int(request.form["cents"]))
    Session.add(order)
    Session.flush()  # the database assigns the id
    return {"id": order.id, "item": order.item, "paid": order.cents}, 201


def caller(environ: dict[str, Any]) -> str:
    """Return whose key it is, so that nobody gets the response of another."""
    return str(environ.get("HTTP_AUTHORIZATION", ""))


application = SessionMiddleware(Idempotency(app, keys, scope=caller), Session, attempts=3)

if __name__ == "__main__":
    Base.metadata.create_all(engine)  # what a project leaves to its migrations
    logging.basicConfig(level=logging.DEBUG)  # shows each commit and replay
    serve(application, listen=f"127.0.0.1:{os.environ.get('PORT', '8080')}")
