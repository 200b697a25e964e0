"""Applications on real frameworks: each behaves as without us, and its work follows suit."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import framework_apps
import pytest
from django.test import override_settings
from framework_apps import FRAMEWORKS, flask_app
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine
from sessionscope.testing import isolated
from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session
from support import Server, drop_tables, environ, make_tables, names, serve_once

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication, WSGIEnvironment

Registry = scoped_session[Session]
Durable = Callable[[], list[str | None]]


def request(action: str, method: str = "POST") -> WSGIEnvironment:
    return environ(method, f"/{action}", **{"wsgi.file_wrapper": FileWrapper})


@dataclass
class Seen:
    """All that a server makes of a request."""

    status: str | None
    headers: list[tuple[str, str]]
    chunks: list[bytes]
    raised: str


def seen(app: WSGIApplication, request: WSGIEnvironment) -> Seen:
    server = Server(app)
    raised = ""
    try:
        server.run(request)
    except Exception as error:
        raised = repr(error)
    reply = server.reply
    headers = [header for header in reply.headers if header[0] != "Date"]
    # A server sends nothing of what an application makes for HEAD.
    chunks = [] if request["REQUEST_METHOD"] == "HEAD" else reply.chunks
    return Seen(reply.status, headers, chunks, raised)


@pytest.fixture
def registry(engine: Engine) -> Iterator[Registry]:
    """The registry of the applications, on the test's own database; left empty."""
    registry = framework_apps.registry
    registry.configure(bind=engine)
    yield registry
    framework_apps.opened.clear()
    left = registry.registry.has()
    registry.remove()
    assert not left, "a session was left in the registry"


@pytest.fixture(scope="module")
def lasting_engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Engine]]:
    """For each database one engine, whose tables are made once: tests are isolated there."""
    with ExitStack() as at_the_end:

        @cache
        def engine_on(name: str) -> Engine:
            if name == "sqlite":
                url = f"sqlite:///{tmp_path_factory.mktemp('lasting')}/items.db"
            else:
                url = request.getfixturevalue(f"{name}_url")
            engine = make_engine(url)
            at_the_end.callback(engine.dispose)
            make_tables(engine)
            at_the_end.callback(drop_tables, engine)
            return engine

        yield engine_on


@pytest.fixture(params=["for real", "sqlite", "postgresql", "mariadb"])
def durable(
    request: pytest.FixtureRequest,
    registry: Registry,
    outside: Engine,
    lasting_engine: Callable[[str], Engine],
) -> Iterator[Durable]:
    """The names of the items that are durable: for real, or isolated on each database."""
    if request.param == "for real":
        yield lambda: names(outside)
        return
    registry.configure(bind=lasting_engine(request.param))
    with isolated(registry) as connection:
        yield lambda: list(connection.scalars(select(Item.name).order_by(Item.id)))


@pytest.fixture(params=FRAMEWORKS)
def app(request: pytest.FixtureRequest) -> WSGIApplication:
    """The application on each framework in turn."""
    made: WSGIApplication = FRAMEWORKS[request.param]()
    return made


@pytest.fixture(params=["plain", "lint"])
def wrapped(
    request: pytest.FixtureRequest, app: WSGIApplication, registry: Registry
) -> WSGIApplication:
    """That application under the middleware; also with wsgiref.validate on both sides."""
    if request.param == "plain":
        return SessionMiddleware(app, registry)
    return validator(SessionMiddleware(validator(app), registry))


def test_create_commits(wrapped: WSGIApplication, durable: Durable) -> None:
    """What a view adds and answers with 200 is durable."""
    reply = serve_once(wrapped, request("create"))
    assert str(reply.status)[:3] == "200"
    assert re.fullmatch(rb"item \d+ is first", reply.content)
    assert durable() == ["first"]


def test_refuse_rolls_back(wrapped: WSGIApplication, durable: Durable) -> None:
    """What a view adds before it refuses, as its framework refuses, is rolled back."""
    reply = serve_once(wrapped, request("refuse"))
    assert str(reply.status)[:3] in ("403", "409")
    assert durable() == []


def test_crash_rolls_back(wrapped: WSGIApplication, durable: Durable) -> None:
    """What a view adds before it raises is rolled back, also where the framework catches."""
    got = seen(wrapped, request("crash"))
    assert str(got.status)[:3] == "500" or got.raised == "RuntimeError('crash, on purpose')"
    assert durable() == []


def test_a_stream_commits_all_at_its_end(wrapped: WSGIApplication, durable: Durable) -> None:
    """What is added before and during a stream is durable together when it has ended."""
    reply = serve_once(wrapped, request("stream"))
    assert (str(reply.status)[:3], reply.content) == ("200", b"one,two,three")
    assert durable() == ["first", "second"]


def test_a_client_that_hangs_up_rolls_back(wrapped: WSGIApplication, durable: Durable) -> None:
    """A stream that the server closes before its end leaves nothing."""
    server = Server(wrapped)
    assert next(server.begin(request("stream"))) == b"one,"
    server.finish()
    assert durable() == []


def test_a_failing_stream_rolls_back(wrapped: WSGIApplication, durable: Durable) -> None:
    """A stream that raises midway leaves nothing, and the server sees what it raised."""
    server = Server(wrapped)
    with pytest.raises(RuntimeError, match="midway, on purpose"):
        server.run(request("fail"))
    assert server.reply.content == b"one,two,"
    assert durable() == []


@pytest.mark.parametrize("action", ["owe", "owe-stream"])
def test_a_refused_commit_is_no_complete_success(
    wrapped: WSGIApplication, action: str, outside: Engine
) -> None:
    """The server sees that COMMIT failed: before the head of a page, before the end of a stream."""
    server = Server(wrapped)
    with pytest.raises(IntegrityError):
        server.run(request(action))
    assert server.reply.status is None or action == "owe-stream"
    assert names(outside) == []


@pytest.mark.parametrize("action", ["file", "owe-file"])
def test_a_file_is_closed_whatever_becomes_of_the_commit(
    wrapped: WSGIApplication, action: str, outside: Engine
) -> None:
    """A file that a framework hands over is closed once it was sent, or cannot be."""
    server = Server(wrapped)
    if action == "file":
        assert server.run(request(action)).content == b"from a file"
    else:
        with pytest.raises(IntegrityError):
            server.run(request(action))
    assert framework_apps.opened[0].closed
    assert names(outside) == (["first"] if action == "file" else [])


METHODS = ["GET", "HEAD", "OPTIONS", "POST"]
ACTIONS = ["create", "refuse", "crash", "stream", "fail", "file", "read", "a/b"]


@pytest.mark.parametrize(
    ("method", "action"),
    # A head that is all of a response leaves after COMMIT: a failing body comes before it.
    [pair for pair in product(METHODS, ACTIONS) if pair != ("HEAD", "fail")],
)
def test_the_response_is_the_one_without_us(
    app: WSGIApplication, registry: Registry, method: str, action: str
) -> None:
    """Status, headers, chunks and exceptions are the same with and without the middleware."""
    bare = seen(app, request(action, method))
    registry.remove()
    assert seen(SessionMiddleware(app, registry), request(action, method)) == bare


def test_limit_django_gives_a_length_only_with_its_common_middleware(
    registry: Registry, outside: Engine
) -> None:
    """A known limit: without CommonMiddleware a page is a stream of unknown length."""
    with override_settings(MIDDLEWARE=[]):
        server = Server(SessionMiddleware(FRAMEWORKS["django"](), registry))
        with pytest.raises(IntegrityError):
            server.run(request("owe"))
    assert (server.reply.status, server.reply.content) == ("200 OK", b"item 1 is first")
    assert names(outside) == []


def teardown_app(registry: Registry) -> WSGIApplication:
    """A Flask application with the recipe that its documentation gives for SQLAlchemy."""
    app = flask_app()

    @app.teardown_appcontext
    def shutdown_session(exception: Any = None) -> None:
        registry.remove()

    return SessionMiddleware(app, registry)


@pytest.mark.parametrize(
    ("method", "action", "kept"),
    [("POST", "create", 1), ("GET", "create", 1), ("POST", "read", 0), ("GET", "read", 0)],
)
def test_flasks_teardown_recipe_may_stay(
    method: str,
    action: str,
    kept: int,
    registry: Registry,
    outside: Engine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Work before a teardown function that removes the session is committed, without a warning."""
    assert serve_once(teardown_app(registry), request(action, method)).status == "200 OK"
    assert len(names(outside)) == kept
    assert caplog.text == ""


def test_flasks_teardown_recipe_under_a_stream_that_goes_on(
    registry: Registry, outside: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that goes on after it keeps what was done before, and the log names the line."""
    assert serve_once(teardown_app(registry), request("stream")).content == b"one,two,three"
    assert len(names(outside)) == 2
    (place,) = re.findall(r"(\S+):(\d+) removed a session that held work", caplog.text)
    assert linecache.getline(place[0], int(place[1])).strip() == "registry.remove()"


def test_flasks_teardown_recipe_leaves_a_stream_its_session(
    registry: Registry, outside: Engine
) -> None:
    """A stream that works only after the teardown function finds its session again."""
    app = teardown_app(registry)
    assert serve_once(app, request("late")).content == b"one,two,three"
    assert names(outside) == ["second"]
