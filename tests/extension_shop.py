"""A shop of Flask-SQLAlchemy with migrations and WebSockets, which test_extensions.py runs.

``FLASK_SQLALCHEMY_DATABASE_URI`` says where its items are.
"""

from __future__ import annotations

import logging

import flask
from flask_migrate import Migrate
from flask_sock import Sock
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import Model
from sessionscope import SessionMiddleware, session_scope
from simple_websocket import Server
from sqlalchemy.orm import Mapped, mapped_column

db = SQLAlchemy()
migrate = Migrate()
sock = Sock()
_Base: type[Model] = db.Model


class Item(_Base):  # type: ignore[valid-type,misc]
    """The table of models.Item, in the metadata of Flask-SQLAlchemy."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def create_app() -> flask.Flask:
    """The application as ``flask`` and gunicorn find it; the log tells what became of a session."""
    app = flask.Flask(__name__)
    app.config.from_prefixed_env()
    for extension in db, sock:
        extension.init_app(app)
    migrate.init_app(app, db)
    app.add_url_rule("/<name>", view_func=create, methods=["POST"])
    app.wsgi_app = SessionMiddleware(app.wsgi_app, db.session)  # type: ignore[method-assign]
    return app


def create_logging_app() -> flask.Flask:
    """The same, with what becomes of each session in its log."""
    logging.basicConfig()
    logging.getLogger("sessionscope").setLevel(logging.DEBUG)
    return create_app()


def create(name: str) -> str:
    db.session.add(Item(name=name))
    return "ok"


@sock.route("/commits")  # type: ignore[untyped-decorator]
def commit_each(ws: Server) -> None:
    """Commit the request's session after each message; what comes last waits for the end."""
    while True:
        name = ws.receive()
        db.session.add(Item(name=name))
        if name != "last":
            db.session.commit()
        ws.send(f"have {name}")


@sock.route("/scopes")  # type: ignore[untyped-decorator]
def scope_each(ws: Server) -> None:
    """Open a unit of work for each message."""
    while True:
        name = ws.receive()
        try:
            with session_scope(db.session):
                create(name)
                db.session.flush()
                if name == "gone":
                    raise ValueError(name)
        except ValueError:
            ws.send("refused")
        else:
            ws.send("kept")
