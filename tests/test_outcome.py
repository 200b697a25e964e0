"""What a response or an exception makes of the session's work (contract: outcome)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sessionscope import SessionMiddleware, commit_on_success, session_scope
from sessionscope.testing import isolated
from sqlalchemy import Engine, event
from sqlalchemy import text as sql
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import PATIENCE, Server, environ, names, refuse_commit, serve_once, text

from models import Item

Registry = scoped_session[Session]


@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "302 Found", "399 Odd", "200"])
def test_success_and_redirection_commit(status: str, registry: Registry, outside: Engine) -> None:
    """A response of 2xx or 3xx commits what the application did."""
    app = text(b"", status=status, before=lambda: registry.add(Item(name="kept")))
    reply = serve_once(SessionMiddleware(app, registry))
    assert reply.status == status
    assert names(outside) == ["kept"]


@pytest.mark.parametrize(
    "status", ["100 Continue", "199 Odd", "400 Bad", "404 Not Found", "500 Oops", "2000 Long", "x"]
)
def test_everything_else_rolls_back(status: str, registry: Registry, outside: Engine) -> None:
    """A response of any other status rolls back, and is delivered as it is."""
    app = text(b"sorry", status=status, before=lambda: registry.add(Item(name="gone")))
    reply = serve_once(SessionMiddleware(app, registry))
    assert (reply.status, reply.content) == (status, b"sorry")
    assert names(outside) == []


@pytest.mark.parametrize("raised", [ValueError, SystemExit, GeneratorExit, KeyboardInterrupt])
def test_an_exception_rolls_back_and_is_what_the_server_sees(
    raised: type[BaseException], registry: Registry, outside: Engine
) -> None:
    """Whatever leaves the application, BaseException included, rolls back and propagates."""

    def app(environ: Any, start_response: Any) -> Any:
        registry.add(Item(name="gone"))
        registry.flush()
        start_response("200 OK", [])
        raise raised("from the app")

    with pytest.raises(raised, match="from the app"):
        serve_once(SessionMiddleware(app, registry))
    assert names(outside) == []


def test_the_session_is_the_registrys_and_the_environs(registry: Registry) -> None:
    """The application finds one session, in the registry and in the environ."""
    seen = []

    def app(environ: Any, start_response: Any) -> Any:
        seen.append((registry(), environ["sessionscope.session"]))
        return text(b"")(environ, start_response)

    application = SessionMiddleware(app, registry)
    serve_once(application)
    serve_once(application)
    assert seen[0][0] is seen[0][1]
    assert seen[1][0] is seen[1][1]
    assert seen[0][0] is not seen[1][0]


def test_work_after_start_response_counts(registry: Registry, outside: Engine) -> None:
    """What is done after start_response was called is committed too."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        registry.add(Item(name="late"))
        return [b"done"]

    serve_once(SessionMiddleware(app, registry))
    assert names(outside) == ["late"]


def test_work_while_the_body_is_iterated_counts(registry: Registry, outside: Engine) -> None:
    """What is done while the body is iterated is committed too."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.add(Item(name="first"))
        yield b"one"
        registry.add(Item(name="last"))
        yield b"two"
        registry.add(Item(name="after"))

    reply = serve_once(SessionMiddleware(app, registry))
    assert reply.chunks == [b"one", b"two"]
    assert names(outside) == ["first", "last", "after"]


def test_commit_when_replaces_the_rule(registry: Registry, outside: Engine) -> None:
    """commit_when decides alone, from environ, status and a copy of the headers."""
    calls = []

    def commit_when(environ: Any, status: str, headers: Any) -> bool:
        calls.append((environ["PATH_INFO"], status, list(headers)))
        headers.clear()
        return status.startswith("404")

    application = SessionMiddleware(
        text(b"", status="404 Not Found", before=lambda: registry.add(Item(name="kept"))),
        registry,
        commit_when=commit_when,
    )
    reply = serve_once(application, environ("POST", "/x"))
    assert calls == [("/x", "404 Not Found", [("Content-Type", "text/plain")])]
    assert reply.headers == [("Content-Type", "text/plain")]
    assert names(outside) == ["kept"]


def test_commit_when_sees_what_the_application_said(registry: Registry, outside: Engine) -> None:
    """At the end of a stream commit_when gets the headers as they were before the server."""
    seen = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        registry.add(Item(name="kept"))
        start_response("200 OK", [("X-Name", "value")])
        yield b"body"

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        headers.append(("Date", "now"))  # as wsgiref does

    def commit_when(environ: Any, status: str, headers: Any) -> bool:
        seen.extend(headers)
        return True

    application = SessionMiddleware(app, registry, commit_when=commit_when)
    body = application(environ(), start_response)
    assert list(body) == [b"body"]
    body.close()  # type: ignore[attr-defined]
    assert seen == [("X-Name", "value")]
    assert names(outside) == ["kept"]


def test_commit_when_that_raises_rolls_back(registry: Registry, outside: Engine) -> None:
    """An exception from commit_when rolls back and is what the server sees."""

    def commit_when(environ: Any, status: str, headers: Any) -> bool:
        raise LookupError("no rule")

    app = text(b"", before=lambda: registry.add(Item(name="gone")))
    server = Server(SessionMiddleware(app, registry, commit_when=commit_when))
    with pytest.raises(LookupError, match="no rule"):
        server.run()
    assert server.reply.status is None
    assert names(outside) == []


@pytest.mark.parametrize("status", [None, b"200 OK", 200, "", "2", "2xx", "\u0662\u0660\u0660 OK"])
def test_a_status_that_cannot_be_read_is_no_success(status: Any) -> None:
    """commit_on_success is False, never an error, for what is no status line."""
    assert commit_on_success({}, status, []) is False


def test_an_unused_session_takes_no_connection(engine: Engine, registry: Registry) -> None:
    """A request that never used its session takes nothing from the pool and sends nothing."""
    taken: list[object] = []
    event.listen(engine, "checkout", lambda *args: taken.append(args))
    serve_once(SessionMiddleware(text(b"", before=registry), registry))
    assert taken == []


def test_an_untouched_transaction_costs_no_statement(engine: Engine, registry: Registry) -> None:
    """A session that has begun, but touched no database, sends nothing at its end."""
    taken: list[object] = []
    event.listen(engine, "checkout", lambda *args: taken.append(args))
    serve_once(SessionMiddleware(text(b"", before=lambda: registry.begin()), registry))
    assert taken == []


def test_the_apps_own_commit_stands(registry: Registry, outside: Engine) -> None:
    """What the application commits itself stays, whatever the response."""

    def work() -> None:
        registry.add(Item(name="kept"))
        registry.commit()
        registry.add(Item(name="gone"))

    serve_once(SessionMiddleware(text(b"", status="500 Oops", before=work), registry))
    assert names(outside) == ["kept"]


def test_a_failed_rollback_does_not_hide_the_apps_exception(
    registry: Registry, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """When ROLLBACK fails too, the server sees the application's exception and the log both."""

    def app(environ: Any, start_response: Any) -> Any:
        connection = registry.connection()
        event.listen(registry(), "after_rollback", lambda session: 1 / 0)
        connection.execute(sql("SELECT 1"))
        raise ValueError("from the app")

    with pytest.raises(ValueError, match="from the app"):
        serve_once(SessionMiddleware(app, registry))
    assert "ROLLBACK failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_refused_commit_is_the_servers_to_report(registry: Registry, outside: Engine) -> None:
    """A COMMIT that fails is an exception to the server, which has got no head."""

    def work() -> None:
        registry.add(Item(name="gone"))
        refuse_commit(registry)

    server = Server(SessionMiddleware(text(b"fine", before=work), registry))
    with pytest.raises(Exception, match="FOREIGN KEY"):
        server.run()
    assert server.reply.status is None
    assert names(outside) == []


def test_each_outcome_is_logged(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    """The log tells each outcome with method, path and status."""
    caplog.set_level(logging.DEBUG, "sessionscope")
    use = lambda: registry.execute(sql("SELECT 1"))  # noqa: E731
    serve_once(SessionMiddleware(text(b"", before=use), registry), environ("POST", "/a b\n"))
    serve_once(SessionMiddleware(text(b"", status="404 Not Found", before=use), registry))
    serve_once(SessionMiddleware(text(b""), registry))
    assert [record.getMessage() for record in caplog.records] == [
        "commit POST /a%20b%0A 200 OK",
        "rollback GET / 404 Not Found",
        "none GET / 200 OK",
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("not callable", None), {}, "app must be a WSGI application"),
        ((text(b""), sessionmaker()), {}, "registry must be a scoped_session"),
        ((text(b""), scoped_session(sessionmaker())), {"commit_when": 1}, "commit_when must be"),
        ((text(b""), scoped_session(sessionmaker())), {"reader": "sqlite://"}, "reader must be"),
        ((text(b""), scoped_session(sessionmaker())), {"observer": 1}, "observer must be"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: Any, options: Any, message: str) -> None:
    """An argument of another type is refused when the middleware is made."""
    with pytest.raises(TypeError, match=message):
        SessionMiddleware(*arguments, **options)


@pytest.mark.parametrize("use", [session_scope, isolated])
@pytest.mark.parametrize("wrong", [sessionmaker(), Session(), None], ids=type)
def test_a_registry_of_another_type_is_refused(use: Any, wrong: Any) -> None:
    """Nothing but a scoped_session is taken for a registry, and the message says so."""
    with pytest.raises(TypeError, match="registry must be a scoped_session, not"), use(wrong):
        pass


def test_threads_have_sessions_of_their_own(registry: Registry, outside: Engine) -> None:
    """Two requests at once, in two threads, work in two sessions."""
    sessions = []
    both = threading.Barrier(2)

    def work() -> None:
        sessions.append(registry())
        both.wait(PATIENCE)

    application = SessionMiddleware(text(b"", before=work), registry)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(serve_once, [application] * 2))
    assert len(set(sessions)) == 2
