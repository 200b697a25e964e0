"""What a view does with its own transactions, and what then becomes of its key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

import flask
import keyed_service
import pytest
from flask_sqlalchemy import SQLAlchemy
from keyed_service import Service, code, is_replay, key_table, keys, post, prepared, rows, sent
from sessionscope import SessionMiddleware, TransactionDoomed, on_commit, session_scope
from sessionscope.engines import make_engine
from sessionscope.idempotency import Idempotency, idempotency_table
from sqlalchemy import (
    Engine,
    func,
    insert,
    select,
)
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import (
    Server,
    names,
    serve_once,
)

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

service, any_service = keyed_service.service, keyed_service.any_service

Registry = scoped_session[Session]


def commit_early(session: Session) -> None:
    session.commit()


def test_an_early_commit_and_then_success(any_service: Service, any_engine: Engine) -> None:
    """The response is kept, also where a part of the work was committed before."""
    any_service.work = commit_early
    first = any_service.post()
    assert is_replay(any_service.post(), first)
    assert any_service.calls == len(names(any_engine)) == 1


def test_an_early_commit_and_then_failure(any_service: Service, any_engine: Engine) -> None:
    """A part may be done, so a repeat is refused and nothing is done twice."""
    any_service.work, any_service.status = commit_early, "500 Internal Server Error"
    assert code(any_service.post()) == 500
    repeat = any_service.post()
    assert code(repeat) == 409
    assert b"not kept" in repeat.content
    assert "Retry-After" not in dict(repeat.headers)
    assert any_service.calls == len(names(any_engine)) == 1


def test_an_early_commit_and_then_an_exception(service: Service, engine: Engine) -> None:
    """It is the same for a view that raises."""

    def work(session: Session) -> None:
        session.commit()
        raise ZeroDivisionError

    service.work = work
    with pytest.raises(ZeroDivisionError):
        service.post()
    assert code(service.post()) == 409
    assert service.calls == 1


def roll_back_and_go_on(session: Session) -> None:
    session.rollback()
    session.add(Item(name="after"))


def test_a_rollback_and_then_success(any_service: Service, any_engine: Engine) -> None:
    """The row that the view has rolled back is written again with the response."""
    any_service.work = roll_back_and_go_on
    first = any_service.post()
    assert is_replay(any_service.post(), first)
    assert (any_service.calls, names(any_engine)) == (1, ["after"])


def test_a_rollback_without_other_work_is_kept(any_service: Service, any_engine: Engine) -> None:
    """A success that has done nothing else is kept all the same."""
    any_service.work = lambda session: session.rollback()
    first = any_service.post()
    assert is_replay(any_service.post(), first)
    assert (any_service.calls, names(any_engine)) == (1, [])


def lose_to(rival: Service) -> Any:
    """Roll back, so that *rival* gets the key, and go on."""

    def work(session: Session) -> None:
        session.rollback()
        rival.post()
        session.add(Item(name="after"))

    return work


def test_a_rollback_and_then_a_rival(any_service: Service, any_engine: Engine) -> None:
    """If a rival took the key meanwhile, only the rival's work stays, and this is a 409."""
    rival = Service(any_engine)
    any_service.work = lose_to(rival)
    lost = any_service.post()
    assert code(lost) == 409
    assert dict(lost.headers)["Retry-After"] == "1"
    assert names(any_engine) == [rival.post().content.decode()]


@pytest.mark.parametrize("sized", [True, False])
def test_a_stream_that_lost_to_a_rival(sized: bool, service: Service, engine: Engine) -> None:
    """It is a 409 where no byte has left, and otherwise ends with an exception."""
    rival = Service(engine)
    stream = Service(engine)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "4")] if sized else [])
        lose_to(rival)(stream.registry())
        yield b"mine"

    stream.inner = app
    server = Server(stream.app)
    if sized:
        reply = server.run(post())
        assert (code(reply), b"still running" in reply.content) == (409, True)
    else:
        with pytest.raises(Exception, match="still running"):
            server.run(post())
    assert names(engine) == [rival.post().content.decode()]


def test_a_rollback_and_then_failure_sends_nothing(service: Service, engine: Engine) -> None:
    """A view that has taken all back and says so has its own response, whatever became of the key.

    So it needs no database any more, which may be why it has rolled back.
    """
    words = sent(engine)

    def work(session: Session) -> None:
        session.rollback()
        words.clear()

    service.work, service.status = work, "503 Service Unavailable"
    assert code(service.post()) == 503
    assert words == []


def test_a_database_that_goes_away(tmp_path: Path) -> None:
    """A view that finds it gone, rolls back and says so has its own response."""
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.mkdir()
    with prepared(make_engine(f"sqlite:///{there}/items.db")) as engine:

        def work(session: Session) -> None:
            session.rollback()
            engine.dispose()
            there.rename(gone)
            with pytest.raises(OperationalError):
                session.execute(select(Item))
            session.rollback()

        service = Service(engine, work)
        service.status = "503 Service Unavailable"
        assert service.post().status == "503 Service Unavailable"
        gone.rename(there)


def test_a_rollback_and_then_failure_and_a_rival(any_service: Service, any_engine: Engine) -> None:
    """A view that rolls back, loses the key to a rival and fails has its own response."""
    rival = Service(any_engine)
    any_service.work, any_service.status = lose_to(rival), "404 Not Found"
    assert any_service.post().status == "404 Not Found"
    assert names(any_engine) == [rival.post().content.decode()]


def test_remove_after_an_error_takes_back_the_key(service: Service, engine: Engine) -> None:
    """With a key, too, a view goes on after remove(), whatever the scope of the registry."""
    with engine.begin() as connection:
        connection.execute(insert(Item).values(id=1, name="once"))
    registry = scoped_session(sessionmaker(engine), scopefunc=get_ident)

    def work(session: Session) -> None:
        break_a_rule(session)
        registry.remove()
        registry.add(Item(name="after"))

    recovering = Service(engine, work, registry=registry)
    first = recovering.post()
    assert is_replay(recovering.post(), first)
    assert (code(first), names(engine)) == (201, ["once", "after"])


def break_a_rule(session: Session) -> None:
    """Add what the database refuses, and take no notice."""
    session.add(Item(id=1, name="twice"))
    with suppress(IntegrityError):
        session.flush()


@pytest.mark.parametrize("shape", ["list", "stream"])
def test_a_swallowed_error(shape: str, any_service: Service, any_engine: Engine) -> None:
    """What dooms the transaction is a TransactionDoomed as without a key, and leaves no row."""
    with any_engine.begin() as connection:
        connection.execute(insert(Item).values(id=1, name="once"))
    registry = any_service.registry

    def stream(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        break_a_rule(registry())
        yield b"fine"

    def listed(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return list(stream(environ, start_response))

    any_service.inner = stream if shape == "stream" else listed
    for _ in range(2):
        with pytest.raises(TransactionDoomed):
            any_service.post()
    assert (names(any_engine), rows(any_engine)) == (["once"], [])


def test_a_scope_inside_stays(any_service: Service, any_url: str, any_engine: Engine) -> None:
    """What a session_scope has committed stays, though its request is rolled back."""
    if any_engine.dialect.name == "sqlite":
        any_service.work = lambda session: session.rollback()  # one writer at a time
    work = any_service.work
    other = make_engine(any_url)
    log: Registry = scoped_session(sessionmaker(other))

    def write_log(session: Session) -> None:
        work(session)
        with session_scope(log) as inner:
            inner.add(Item(name="logged"))

    any_service.work, any_service.status = write_log, "409 Conflict"
    any_service.post()
    assert (names(any_engine), rows(any_engine)) == (["logged"], [])
    other.dispose()


def test_a_failure_that_is_committed(any_engine: Engine) -> None:
    """Where commit_when commits a 4xx, a repeat is refused: it is not carried out again."""
    always = {"commit_when": lambda environ, status, headers: True}
    with key_table(any_engine):
        service = Service(any_engine, sessions=always)
        service.status = "402 Payment Required"
        assert code(service.post()) == 402
        repeat = service.post()
        assert (code(repeat), b"not kept" in repeat.content) == (409, True)
        assert service.calls == len(names(any_engine)) == 1


def test_a_failure_that_is_committed_after_a_rollback(service: Service, engine: Engine) -> None:
    """The row that the view has rolled back is written again, without a response."""
    always = {"commit_when": lambda environ, status, headers: True}
    failing = Service(engine, roll_back_and_go_on, sessions=always)
    failing.status = "402 Payment Required"
    assert [code(failing.post()), code(failing.post())] == [402, 409]
    assert (failing.calls, names(engine)) == (1, ["after"])


def test_a_success_that_is_not_committed(service: Service, engine: Engine) -> None:
    """A dry run, which commit_when rolls back, leaves no row and may be made again."""
    never = {"commit_when": lambda environ, status, headers: False}
    dry = Service(engine, sessions=never)
    assert [code(dry.post()), code(dry.post())] == [201, 201]
    assert (dry.calls, names(engine), rows(engine)) == (2, [], [])


def test_callbacks_run_once(any_service: Service) -> None:
    """What waits for COMMIT runs with the first, and not when its response is replayed."""
    mails: list[str] = []
    any_service.work = lambda session: on_commit(session, lambda: mails.append("mail"))
    for _ in range(2):
        any_service.post()
    assert mails == ["mail"]


def test_a_second_layer_does_not_claim(service: Service, engine: Engine) -> None:
    """A layer inside a layer passes the request through, as a part of it."""
    inner = Idempotency(service.create, keys, scope=lambda environ: "")
    service.inner = inner
    first = service.post()
    assert is_replay(service.post(), first)
    assert (service.calls, len(rows(engine))) == (1, 1)


@pytest.mark.parametrize("shape", ["list", "stream"])
def test_a_subrequest_is_a_part(shape: str, service: Service, engine: Engine) -> None:
    """A subrequest with a copy of the environ is carried out with what it is a part of."""

    def stream(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        if environ["PATH_INFO"] == "/":
            yield serve_once(service.once, {**environ, "PATH_INFO": "/part"}).content
        else:
            yield b"part"

    def listed(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return list(stream(environ, start_response))

    service.inner = stream if shape == "stream" else listed
    first = service.post()
    assert first.content == b"part"
    assert is_replay(service.post(), first)
    assert (service.calls, len(rows(engine))) == (2, 1)


def test_an_environ_may_be_used_again(service: Service) -> None:
    """A server that keeps an environ for its next request does not turn keys off by it."""
    service.inner = lambda environ, start_response: iter(service.create(environ, start_response))
    request, server = post(), Server(service.app)
    first = server.run(request)
    assert is_replay(serve_once(service.app, request), first)
    assert server.reply is first  # which holds the body


# Flask-SQLAlchemy, whose session finds its engine in the context of the application.


@pytest.fixture
def shop(sqlite_url: str) -> Iterator[flask.Flask]:
    """A Flask application with Flask-SQLAlchemy that counts what it carries out."""
    app = flask.Flask(__name__)
    app.config.update(SQLALCHEMY_DATABASE_URI=sqlite_url, CALLS=0)
    db = SQLAlchemy(app)
    table = idempotency_table(db.metadata)

    class Lamp(db.Model):  # type: ignore[name-defined, misc]
        id = db.Column(db.Integer, primary_key=True)

    def add() -> int:
        app.config["CALLS"] += 1
        db.session.add(Lamp())
        db.session.flush()
        return int(db.session.scalar(select(func.count()).select_from(Lamp)) or 0)

    @app.post("/list")
    def listed() -> tuple[str, int]:
        return f"lamp {add()}", 201

    @app.post("/stream")
    def streamed() -> flask.Response:
        def chunks() -> Iterator[str]:
            yield "lamp "
            yield str(add())

        return flask.Response(flask.stream_with_context(chunks()), 201)

    @app.post("/early")
    def early() -> tuple[str, int]:
        number = add()
        db.session.commit()
        return f"lamp {number}", 201

    @app.post("/undone")
    def undone() -> tuple[str, int]:
        db.session.rollback()
        return f"lamp {add()}", 201

    @app.post("/removed")
    def removed() -> tuple[str, int]:
        db.session.execute(insert(Lamp).values(id=1))
        db.session.add(Lamp(id=1))
        try:
            db.session.flush()
        except IntegrityError:
            db.session.remove()
        return f"lamp {add()}", 201

    @app.get("/count")
    def counted() -> str:
        return str(db.session.scalar(select(func.count()).select_from(Lamp)))

    with app.app_context():
        db.create_all()
    once = Idempotency(app.wsgi_app, table, scope=lambda environ: "", context=app.app_context)
    app.wsgi_app = SessionMiddleware(once, db.session, attempts=3)  # type: ignore[method-assign]
    yield app
    with app.app_context():
        db.engine.dispose()


@pytest.mark.parametrize("path", ["/list", "/stream", "/early", "/undone", "/removed"])
def test_flask_sqlalchemy(path: str, shop: flask.Flask) -> None:
    """With the application's context the same holds for its views, and for its streams."""
    client = shop.test_client()
    first = client.post(path, headers={"Idempotency-Key": '"k"'})
    assert (first.status_code, first.data) == (201, b"lamp 1")  # which ends a stream
    repeat = client.post(path, headers={"Idempotency-Key": '"k"'})
    assert (repeat.status_code, repeat.data) == (201, b"lamp 1")
    assert [*repeat.headers] == [*first.headers, ("Idempotent-Replayed", "true")]
    assert "Idempotent-Replayed" not in first.headers
    assert shop.config["CALLS"] == 1
    assert client.get("/count").data == b"1"


def test_flask_sqlalchemy_refuses_as_others_do(shop: flask.Flask) -> None:
    """Another request with the key is a 422, a failed one may be made again."""
    client = shop.test_client()
    key = {"Idempotency-Key": "k"}
    assert client.post("/nowhere", headers=key).status_code == 404
    assert client.post("/list", headers=key).status_code == 201
    assert client.post("/stream", headers=key).status_code == 422
    assert client.get("/count").data == b"1"
