"""An application behaves under the middleware as without it (PEP 3333)."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from processes import run_python
from sessionscope import SessionMiddleware, session_scope
from sessionscope.engines import make_engine
from sqlalchemy import Engine
from sqlalchemy import text as sql
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import Server, environ, names, serve_once, text

from models import Item

Registry = scoped_session[Session]


def test_the_app_gets_the_servers_own_environ(registry: Registry) -> None:
    """The environ is the server's dict itself, so what the application puts there arrives."""
    request = environ()

    def app(environ: Any, start_response: Any) -> Any:
        assert environ is request
        return text(b"")(environ, start_response)

    serve_once(SessionMiddleware(app, registry), request)


def test_a_second_start_response_without_exc_info_is_an_error(registry: Registry) -> None:
    """start_response may be called again only with exc_info."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        start_response("200 OK", [])

    with pytest.raises(AssertionError, match="without exc_info"):
        serve_once(SessionMiddleware(app, registry))


def replace(start_response: Any, message: str) -> None:
    try:
        raise LookupError(message)
    except LookupError:
        start_response("500 Oops", [("X-Replaced", "yes")], sys.exc_info())


def test_exc_info_replaces_the_pending_head_and_the_outcome(
    registry: Registry, outside: Engine
) -> None:
    """A head replaced before the first byte is the one that counts, for the outcome too."""

    def app(environ: Any, start_response: Any) -> Any:
        registry.add(Item(name="gone"))
        start_response("200 OK", [])
        replace(start_response, "before")
        return [b"sorry"]

    reply = serve_once(SessionMiddleware(app, registry))
    assert (reply.status, reply.headers) == ("500 Oops", [("X-Replaced", "yes")])
    assert names(outside) == []


def test_exc_info_takes_back_a_chunk_that_was_held_back(registry: Registry) -> None:
    """A head that replaces another at the end of the body has no chunk of the other's."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        yield b"ok"
        try:
            raise LookupError
        except LookupError:
            start_response("500 Oops", [("Content-Length", "0")], sys.exc_info())

    reply = serve_once(SessionMiddleware(app, registry))
    assert (reply.status, reply.chunks) == ("500 Oops", [])


def test_exc_info_after_the_first_byte_is_raised(registry: Registry, outside: Engine) -> None:
    """Once bytes have left, start_response with exc_info raises what it is given."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        registry.add(Item(name="gone"))
        start_response("200 OK", [])
        yield b"half"
        replace(start_response, "too late")

    server = Server(SessionMiddleware(app, registry))
    with pytest.raises(LookupError, match="too late"):
        server.run()
    assert (server.reply.status, server.reply.chunks) == ("200 OK", [b"half"])
    assert names(outside) == []


@pytest.mark.parametrize("given", [True, False])
def test_exc_info_is_passed_on_only_when_given(given: bool, registry: Registry) -> None:
    """The server's start_response gets an exc_info exactly when the application gave one."""
    calls: list[tuple[Any, ...]] = []

    def app(environ: Any, start_response: Any) -> Any:
        if given:
            replace(start_response, "first")
        else:
            start_response("200 OK", [])
        return [b""]

    SessionMiddleware(app, registry)(environ(), lambda *call: calls.append(call))  # type: ignore[arg-type]
    [call] = calls
    assert len(call) == (3 if given else 2)
    assert not given or call[2][0] is LookupError


def test_a_head_replaced_while_a_chunk_is_held(registry: Registry, outside: Engine) -> None:
    """A head that replaces another replaces what was kept of that one's body."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        registry.add(Item(name="gone"))
        start_response("200 OK", [("Content-Length", "4")])
        yield b"half"
        replace(start_response, "held")
        yield b"sorry"

    reply = serve_once(SessionMiddleware(app, registry))
    assert (reply.status, reply.content) == ("500 Oops", b"sorry")
    assert names(outside) == []


@pytest.mark.parametrize("body", [None, 7], ids=str)
@pytest.mark.parametrize(("status", "kept"), [("200 OK", ["x"]), ("400 Bad", [])])
def test_a_body_that_is_not_iterable_reaches_the_server(
    body: Any, status: str, kept: list[str], registry: Registry, outside: Engine
) -> None:
    """What is no body is the server's to complain of; the outcome follows the status."""

    def app(environ: Any, start_response: Any) -> Any:
        registry.add(Item(name="x"))
        start_response(status, [])
        return body

    server = Server(SessionMiddleware(app, registry))
    with pytest.raises(TypeError, match="not iterable"):
        server.run()
    assert server.reply.body is body
    assert names(outside) == kept


def test_a_status_that_is_bytes_reaches_the_server(registry: Registry, outside: Engine) -> None:
    """A status that is no native string goes to the server as it is, and nothing is kept."""

    def app(environ: Any, start_response: Any) -> Any:
        registry.add(Item(name="gone"))
        start_response(b"200 OK", [])
        return [b"x"]

    assert serve_once(SessionMiddleware(app, registry)).status == b"200 OK"  # type: ignore[comparison-overlap]
    assert names(outside) == []


@pytest.mark.parametrize("streamed", [True, False])
def test_a_chunk_before_start_response_reaches_the_server(
    streamed: bool, registry: Registry, outside: Engine
) -> None:
    """A body without a head is the server's to complain of, and nothing is kept."""

    def app(environ: Any, start_response: Any) -> Any:
        registry.add(Item(name="gone"))
        return iter([b"x"]) if streamed else [b"x"]

    with pytest.raises(AssertionError, match="a chunk before start_response"):
        serve_once(SessionMiddleware(app, registry))
    assert names(outside) == []


def test_no_start_response_at_all_reaches_the_server(registry: Registry, outside: Engine) -> None:
    """An application that ends without a head leaves that to the server, and keeps nothing."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        registry.add(Item(name="gone"))
        yield from ()

    assert serve_once(SessionMiddleware(app, registry)).status is None
    assert names(outside) == []


@pytest.mark.parametrize("kind", [tuple, iter], ids=["tuple", "iterator"])
def test_headers_of_another_kind(kind: Any, registry: Registry, outside: Engine) -> None:
    """Headers that are no list reach the server with every field they have."""

    def app(environ: Any, start_response: Any) -> Any:
        registry.add(Item(name="kept"))
        start_response("200 OK", kind([("Content-Length", "1")]))
        return iter([b"x"])

    assert serve_once(SessionMiddleware(app, registry)).headers == [("Content-Length", "1")]
    assert names(outside) == ["kept"]


def test_the_call_works_at_once(registry: Registry) -> None:
    """The middleware is no generator function: the application runs when it is called."""
    called = []

    def app(environ: Any, start_response: Any) -> Any:
        called.append(True)
        return text(b"")(environ, start_response)

    SessionMiddleware(app, registry)(environ(), lambda *head: None)  # type: ignore[arg-type]
    assert called == [True]


class Body:
    """An iterable whose iterator has a close() of its own."""

    def __init__(self) -> None:
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        yield b"one"
        yield b"two"

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("pulled", [0, 1, 2])
def test_the_iterable_is_closed_once(pulled: int, registry: Registry) -> None:
    """close() is called once, on the iterable that the application returned."""
    body = Body()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return body

    server = Server(SessionMiddleware(app, registry))
    iterator = server.begin()
    for _ in range(pulled):
        next(iterator)
    server.finish()
    assert body.closed == 1


def test_a_response_refused_by_the_server_closes_the_iterable(
    registry: Registry, outside: Engine
) -> None:
    """When the server refuses the head of a stream, the iterable is closed and all rolled back."""
    body = Body()

    def app(environ: Any, start_response: Any) -> Any:
        registry.add(Item(name="gone"))
        start_response("200 OK", [])
        return body

    def refuse(*head: Any) -> Any:
        raise ConnectionError("the client has left")

    with pytest.raises(ConnectionError):
        SessionMiddleware(app, registry)(environ(), refuse)
    assert body.closed == 1
    assert names(outside) == []


def test_an_iterable_whose_close_raises_too(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in close() after another is logged, and the first is what the server sees."""

    class Broken:
        def __iter__(self) -> Iterator[bytes]:
            raise LookupError("first")
            yield b""

        def close(self) -> None:
            raise OSError("second")

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Broken()

    with pytest.raises(LookupError, match="first"):
        serve_once(SessionMiddleware(app, registry))
    assert "OSError: second" in caplog.text


def test_an_error_in_close_reaches_the_server(registry: Registry, outside: Engine) -> None:
    """What the iterable's close() raises at the end is what the server sees."""

    class Broken(Body):
        def close(self) -> None:
            raise OSError("from close")

    def app(environ: Any, start_response: Any) -> Any:
        registry.add(Item(name="kept"))
        start_response("200 OK", [])
        return Broken()

    with pytest.raises(OSError, match="from close"):
        serve_once(SessionMiddleware(app, registry))
    assert names(outside) == ["kept"]


def test_a_middleware_that_is_dropped_leaves_nothing_behind(sqlite_url: str) -> None:
    """Nothing keeps a used middleware, its application, its registry or its engine alive."""

    def use() -> list[weakref.ref[Any]]:
        def work() -> None:
            registry.execute(sql("SELECT 1"))

        engine = make_engine(sqlite_url)
        registry: Registry = scoped_session(sessionmaker(engine))
        app = text(b"", before=work)
        application = SessionMiddleware(app, registry)
        serve_once(application)
        with session_scope(registry):
            work()
        engine.dispose()
        kept = (application, app, registry, registry.session_factory, engine, engine.dialect)
        return [weakref.ref(thing) for thing in kept]

    left = use()
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)


def test_an_engine_gets_one_listener(registry: Registry, engine: Engine) -> None:
    """One listener for errors is on all engines; the pool of one that is used gets another."""
    for _ in range(3):
        app = text(b"", before=lambda: registry.add(Item(name="x")))
        serve_once(SessionMiddleware(app, registry))
    assert len(list(engine.dialect.dispatch.handle_error)) == 1
    assert len(list(engine.pool.dispatch.reset)) == 1


ONE_COPY = """
import middleware, sessionscope, sessionscope.middleware
from sessionscope import SessionMiddleware
from sessionscope.middleware import SessionMiddleware as by_package
from middleware import SessionMiddleware as by_module
print(SessionMiddleware is by_package is by_module, sessionscope.middleware is middleware)
"""


def test_the_module_has_one_copy() -> None:
    """By whatever name the middleware is imported in a clone, it is the same module."""
    done = run_python("-c", ONE_COPY)
    assert done.stdout == "True True\n"
