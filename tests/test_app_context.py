"""COMMIT, its hooks and the callbacks run where the application is at home."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import flask
import pytest
from flask_login import LoginManager, UserMixin, current_user, login_user
from sessionscope import SessionMiddleware, on_commit
from sqlalchemy import Engine, ForeignKey, event
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)
from support import Server, environ, names, refuse_commit, serve_once
from webtest import TestApp

from models import Item

Registry = scoped_session[Session]

where: ContextVar[str] = ContextVar("where", default="outside")


class Base(DeclarativeBase):
    """The tables of these tests."""


class User(Base, UserMixin):  # type: ignore[misc]
    """Somebody who has logged in."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)


class Note(Base):
    """A note that knows its author, and the path that it came from."""

    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(default=lambda: flask.request.path)
    user_id: Mapped[int] = mapped_column(ForeignKey(User.id))
    user: Mapped[User] = relationship()


@pytest.fixture
def notes(engine: Engine) -> Iterator[flask.Flask]:
    """A Flask application whose models and hooks speak of the request."""
    registry: Registry = scoped_session(sessionmaker(engine))
    Base.metadata.create_all(engine)
    app = flask.Flask(__name__)
    app.secret_key = "secret"
    app.config.update(seen=[])
    app.wsgi_app = SessionMiddleware(app.wsgi_app, registry)  # type: ignore[method-assign]
    app.extensions["registry"] = registry
    login = LoginManager(app)
    login.user_loader(lambda id: registry.get(User, int(id)))

    @event.listens_for(registry.session_factory, "after_commit")
    def audit(session: Session) -> None:
        flask.current_app.config["seen"].append(flask.request.path)

    yield app
    Base.metadata.drop_all(engine)


def test_what_flask_has_popped_is_back_at_commit(notes: flask.Flask, engine: Engine) -> None:
    """current_user, request and current_app work in flushes, defaults and hooks at COMMIT."""
    registry: Registry = notes.extensions["registry"]

    @notes.post("/notes")
    def create() -> str:
        user = User()
        registry.add(user)
        registry.flush()
        login_user(user)
        registry.add(Note(user=current_user._get_current_object()))  # flushed at COMMIT
        return "ok"

    TestApp(notes).post("/notes")
    with engine.connect() as connection:
        rows = connection.execute(Note.__table__.select()).all()
    assert [(row.path, row.user_id) for row in rows] == [("/notes", 1)]
    assert notes.config["seen"] == ["/notes"]


def test_callbacks_know_the_request(notes: flask.Flask) -> None:
    """url_for() and current_app work in what runs on_commit."""
    registry: Registry = notes.extensions["registry"]
    sent: list[str] = []

    @notes.post("/notes")
    def create() -> str:
        on_commit(registry, lambda: sent.append(flask.url_for("create", _external=True)))
        return "ok"

    TestApp(notes).post("/notes")
    assert sent == ["http://localhost:80/notes"] or sent == ["http://localhost/notes"]


def test_a_stream_commits_in_the_context_of_its_start(notes: flask.Flask) -> None:
    """A stream that goes on after Flask has popped its context commits in it all the same."""
    registry: Registry = notes.extensions["registry"]

    def body() -> Iterator[str]:
        yield "one"
        registry.add(User())
        yield "two"

    @notes.post("/notes")
    def create() -> flask.Response:
        return flask.Response(body())

    TestApp(notes).post("/notes")
    assert notes.config["seen"] == ["/notes"]


# The variables one by one.


def seen_before_commit(registry: Registry) -> list[str]:
    seen: list[str] = []

    @event.listens_for(registry.session_factory, "before_commit")
    def look(session: Session) -> None:
        seen.append(where.get())

    return seen


def test_what_returned_to_its_old_value_gets_the_one_at_start_response(registry: Registry) -> None:
    """A variable that was reset after start_response has its value of then at COMMIT."""
    seen = seen_before_commit(registry)

    def app(environ: Any, start_response: Any) -> Any:
        token = where.set("inside")
        start_response("200 OK", [])
        registry.add(Item(name="x"))
        where.reset(token)
        return [b""]

    serve_once(SessionMiddleware(app, registry), environ("POST"))
    assert seen == ["inside"]
    assert where.get() == "outside"


def test_what_was_set_later_is_kept(registry: Registry) -> None:
    """A variable that the application set after start_response keeps that value at COMMIT."""
    seen = seen_before_commit(registry)

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        where.set("early")
        start_response("200 OK", [])
        registry.add(Item(name="x"))
        yield b"one"
        where.set("late")
        yield b"two"

    contextvars.copy_context().run(serve_once, SessionMiddleware(app, registry), environ("POST"))
    assert seen == ["late"]


def test_a_hook_sets_nothing_outside(registry: Registry, outside: Engine) -> None:
    """What a hook of COMMIT sets is not seen after the request."""
    event.listen(registry.session_factory, "before_commit", lambda session: where.set("hook"))

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        registry.add(Item(name="kept"))
        return [b""]

    serve_once(SessionMiddleware(app, registry), environ("POST"))
    assert where.get() == "outside"
    assert names(outside) == ["kept"]


@pytest.mark.parametrize("end", ["refuse", "hang up", "fail"])
def test_a_rollback_runs_in_the_context_too(end: str, registry: Registry) -> None:
    """Hooks of ROLLBACK see the application's context, whatever the reason is."""
    seen: list[str] = []
    event.listen(
        registry.session_factory, "after_rollback", lambda session: seen.append(where.get())
    )

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        def body() -> Iterator[bytes]:
            yield b"one"
            yield b"two"

        token = where.set("inside")
        start_response("409 Conflict" if end == "refuse" else "200 OK", [])
        registry.add(Item(name="gone"))
        registry.flush()
        if end == "fail":
            refuse_commit(registry)
        where.reset(token)
        return body()

    server = Server(SessionMiddleware(app, registry))
    body = server.begin(environ("POST"))
    if end == "hang up":
        server.finish()
    elif end == "refuse":
        list(body)
    else:
        with pytest.raises(Exception, match="FOREIGN KEY"):
            list(body)
    assert seen == ["inside"]
