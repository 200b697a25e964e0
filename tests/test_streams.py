"""A session lives as long as the body that uses it, and not a moment longer."""

from __future__ import annotations

import gc
import logging
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from processes import run_python
from sessionscope import SessionMiddleware, attempt
from sqlalchemy import Engine, create_engine, event, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.orm.exc import DetachedInstanceError
from sqlalchemy.pool import QueuePool
from support import (
    PATIENCE,
    Server,
    environ,
    in_thread,
    names,
    refuse_commit,
    serve_once,
    serving,
)

from models import Item

Registry = scoped_session[Session]


def checked_out(engine: Engine) -> int:
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.checkedout()


def stream(registry: Registry, count: int = 3) -> Any:
    """An application that adds an item with each chunk it yields."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        for number in range(count):
            registry.add(Item(name=f"{number}"))
            registry.flush()
            yield b"%d" % number

    return app


def test_a_generator_reads_through_a_cursor(registry: Registry, engine: Engine) -> None:
    """A cursor that a generator holds with yield_per stays open between its chunks."""
    with engine.begin() as connection:
        connection.execute(insert(Item), [{"name": f"{n}"} for n in range(100)])

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        for name in registry.scalars(
            select(Item.name).order_by(Item.id).execution_options(yield_per=7)
        ):
            yield str(name).encode()

    reply = serve_once(SessionMiddleware(app, registry))
    assert reply.chunks == [b"%d" % n for n in range(100)]


def test_a_chunk_leaves_before_the_next_is_asked_for(registry: Registry) -> None:
    """Chunk n reaches the server before the application is asked for chunk n + 1."""
    made = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "3")])
        for number in range(3):
            made.append(number)
            yield b"%d" % number

    server = Server(SessionMiddleware(app, registry))
    body = server.begin()
    assert made == [0]
    assert (next(body), made) == (b"0", [0])
    assert (next(body), made) == (b"1", [0, 1])
    assert (next(body), made) == (b"2", [0, 1, 2])
    server.finish()


def test_an_event_reaches_a_client_before_the_next_is_made(registry: Registry) -> None:
    """Over a real socket each event arrives while the next has not been produced yet."""
    arrived = [threading.Event() for _ in range(5)]

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        for number, event in enumerate(arrived):
            yield b"data: %d\n\n" % number
            assert event.wait(PATIENCE)

    with (
        serving(SessionMiddleware(app, registry)) as port,
        socket.create_connection(("127.0.0.1", port), PATIENCE) as client,
    ):
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = b""
        for number, event in enumerate(arrived):
            while b"data: %d\n\n" % number not in received:
                received += client.recv(4096)
            event.set()
        while chunk := client.recv(4096):
            received += chunk
    assert received.endswith(b"\r\n0\r\n\r\n")


MEMORY = """
import resource
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker
from sessionscope import SessionMiddleware
registry = scoped_session(sessionmaker(create_engine("sqlite://")))
def app(environ, start_response):
    start_response("200 OK", [])
    registry.execute(text("SELECT 1"))
    for _ in range({chunks}):
        yield bytes(64 * 1024)
body = SessionMiddleware(app, registry)({{"REQUEST_METHOD": "GET"}}, lambda *head: None)
total = sum(map(len, body))
body.close()
assert total == {chunks} * 64 * 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_stream_needs_no_memory_of_its_length() -> None:
    """100 MB through the middleware take at most 8 MiB more than 1 MB does."""

    def peak(chunks: int) -> int:
        return int(run_python("-c", MEMORY.format(chunks=chunks)).stdout)

    kibibytes = peak(1600) - peak(16)
    assert kibibytes < 8 * 1024


@pytest.mark.parametrize("pulled", [0, 1, 2])
def test_a_client_that_hangs_up_rolls_back_at_once(
    pulled: int, registry: Registry, engine: Engine, outside: Engine
) -> None:
    """close() before the end rolls back and returns the connection."""
    server = Server(SessionMiddleware(stream(registry), registry))
    body = server.begin()
    for _ in range(pulled):
        next(body)
    assert checked_out(engine) == 1
    server.finish()
    assert checked_out(engine) == 0
    assert names(outside) == []
    assert list(body) == []


def test_a_client_that_hangs_up_on_a_socket_rolls_back(
    registry: Registry, engine: Engine, outside: Engine
) -> None:
    """When a real client hangs up, the server's close() rolls the stream back."""
    closed = threading.Event()

    class Endless:
        def __iter__(self) -> Iterator[bytes]:
            registry.add(Item(name="gone"))
            registry.flush()
            while True:
                yield bytes(64 * 1024)

        def close(self) -> None:
            closed.set()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Endless()

    with serving(SessionMiddleware(app, registry)) as port:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(4096)
        assert closed.wait(PATIENCE)
    assert checked_out(engine) == 0
    assert names(outside) == []


def test_a_stream_that_is_dropped_is_freed(
    registry: Registry, engine: Engine, outside: Engine
) -> None:
    """A response that nobody closes is freed by the garbage collector, connection included."""
    server = Server(SessionMiddleware(stream(registry), registry))
    next(server.begin())
    assert checked_out(engine) == 1
    del server
    gc.collect()
    assert checked_out(engine) == 0
    assert names(outside) == []


def test_an_error_midway_rolls_back_and_propagates(
    registry: Registry, engine: Engine, outside: Engine
) -> None:
    """An exception while the body is iterated rolls back, and the server sees it."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        yield from stream(registry, 2)(environ, start_response)
        raise LookupError("midway")

    server = Server(SessionMiddleware(app, registry))
    with pytest.raises(LookupError, match="midway"):
        server.run()
    assert server.reply.chunks == [b"0", b"1"]
    assert checked_out(engine) == 0
    assert names(outside) == []


def test_an_error_in_the_first_next_is_raised_by_the_call(
    registry: Registry, outside: Engine
) -> None:
    """An exception before the first byte leaves the call itself: a clean 500."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.add(Item(name="gone"))
        raise LookupError("at once")
        yield b""

    server = Server(SessionMiddleware(app, registry))
    with pytest.raises(LookupError, match="at once"):
        server.begin()
    assert server.reply.status is None
    assert names(outside) == []


@pytest.mark.parametrize("finished", [True, False])
def test_close_may_be_called_twice(finished: bool, registry: Registry, outside: Engine) -> None:
    """A second close() does nothing."""
    closed = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            registry.add(Item(name="once"))
            yield b"one"
            yield b"two"

        def close(self) -> None:
            closed.append(True)

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Body()

    server = Server(SessionMiddleware(app, registry))
    body = server.begin()
    if finished:
        assert list(body) == [b"one", b"two"]
    server.finish()
    server.finish()
    assert closed == [True]
    assert names(outside) == (["once"] if finished else [])


@pytest.mark.parametrize("finished", [True, False])
def test_close_from_another_thread(
    finished: bool, registry: Registry, engine: Engine, outside: Engine
) -> None:
    """close() in a thread that never saw the session releases it all the same."""
    server = Server(SessionMiddleware(stream(registry), registry))
    body = server.begin()
    if finished:
        list(body)
    in_thread(server.finish)
    assert checked_out(engine) == 0
    assert names(outside) == (["0", "1", "2"] if finished else [])


def test_what_another_thread_cannot_release_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that refuses to work in another thread is logged, and nothing is raised."""
    engine = create_engine(
        f"sqlite:///{tmp_path}/strict.db", connect_args={"check_same_thread": True}
    )
    opened: list[sqlite3.Connection] = []
    event.listen(engine, "connect", lambda driver, _: opened.append(driver))
    Item.metadata.create_all(engine)
    registry = scoped_session(sessionmaker(engine))
    server = Server(SessionMiddleware(stream(registry), registry))
    server.begin()
    in_thread(server.finish)
    assert "ROLLBACK failed" in caplog.text
    assert checked_out(engine) == 0
    for connection in opened:
        connection.close()
    engine.dispose()


def test_streams_interleaved_in_one_thread_see_their_own_sessions(
    registry: Registry, outside: Engine, sqlite_url: str
) -> None:
    """Two streams pulled alternately in one thread each find their own session."""
    seen: dict[str, set[Session]] = {"/a": set(), "/b": set()}

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        for _ in range(3):
            seen[environ["PATH_INFO"]].add(registry())
            assert registry() is environ["sessionscope.session"]
            yield b"."

    application = SessionMiddleware(app, registry)
    first, second = Server(application), Server(application)
    pulls = [first.begin(environ(path="/a")), second.begin(environ(path="/b"))]
    for pull in pulls * 3:
        next(pull)
        assert not registry.registry.has()
    for pull in pulls:
        assert next(pull, None) is None
    first.finish()
    second.finish()
    assert [len(sessions) for sessions in seen.values()] == [1, 1]
    assert seen["/a"] != seen["/b"]


def test_a_stream_pulled_from_another_thread_sees_its_own_session(
    registry: Registry, outside: Engine
) -> None:
    """A stream that each chunk is pulled from in a new thread works in one session."""
    server = Server(SessionMiddleware(stream(registry), registry))
    body = server.begin()
    pulled: list[bytes] = []
    for _ in range(4):
        in_thread(lambda: pulled.append(next(body, b"end")))
    server.finish()
    assert pulled == [b"0", b"1", b"2", b"end"]
    assert names(outside) == ["0", "1", "2"]


def test_close_has_a_session_whose_late_work_is_rolled_back(
    registry: Registry, engine: Engine, outside: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """close() can use the session; work done there is rolled back, with a warning."""

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            registry.add(Item(name="kept"))
            yield b"body"

        def close(self) -> None:
            assert registry.scalars(select(Item.name)).all() == ["kept"]
            registry.add(Item(name="late"))
            registry.flush()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Body()

    assert serve_once(SessionMiddleware(app, registry)).content == b"body"
    assert names(outside) == ["kept"]
    assert checked_out(engine) == 0
    assert "work done in close()" in caplog.text


def test_close_finds_the_objects_detached(registry: Registry, outside: Engine) -> None:
    """After the end of a stream its objects are in no session, and expired by the COMMIT."""

    class Body:
        def __init__(self) -> None:
            self.item = Item(name="kept")
            registry.add(self.item)

        def __iter__(self) -> Iterator[bytes]:
            yield b"body"

        def close(self) -> None:
            assert self.item not in registry()
            with pytest.raises(DetachedInstanceError):
                _ = self.item.name

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Body()

    assert serve_once(SessionMiddleware(app, registry)).content == b"body"
    assert names(outside) == ["kept"]


tenant: ContextVar[str | None] = ContextVar("tenant", default=None)


def stream_of_one(registry: Registry, kept: list[Item]) -> Any:
    """An application whose stream stores one object, and a context variable around its call."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        token = tenant.set("acme")
        start_response("200 OK", [])
        kept.append(Item(name="kept"))
        registry.add(kept[0])
        tenant.reset(token)
        return iter([b"one", b"two"])

    return app


def test_a_hook_that_raises_when_objects_are_detached_tears_no_stream(
    registry: Registry, outside: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its work is durable by then, so the stream ends well and the log has the error."""
    kept: list[Item] = []

    @event.listens_for(registry.session_factory, "persistent_to_detached")
    def hook(session: Session, item: object) -> None:
        raise ZeroDivisionError

    reply = serve_once(SessionMiddleware(stream_of_one(registry, kept), registry))
    assert reply.content == b"onetwo"
    assert names(outside) == ["kept"]
    assert "ZeroDivisionError" in caplog.text


def test_a_hook_of_detached_objects_sees_the_applications_context(registry: Registry) -> None:
    """What the application has set around its call is set when its objects are detached."""
    kept: list[Item] = []
    seen: list[str | None] = []

    @event.listens_for(registry.session_factory, "persistent_to_detached")
    def hook(session: Session, item: object) -> None:
        seen.append(tenant.get())

    serve_once(SessionMiddleware(stream_of_one(registry, kept), registry))
    assert seen == ["acme"]


def test_an_adapter_that_never_calls_close_loses_nothing(
    registry: Registry, engine: Engine, outside: Engine
) -> None:
    """A server that only exhausts the body has the work committed and the connection back."""
    server = Server(SessionMiddleware(stream(registry), registry))
    assert list(server.begin()) == [b"0", b"1", b"2"]
    assert checked_out(engine) == 0
    assert names(outside) == ["0", "1", "2"]


def test_a_handler_that_commits_first_holds_no_connection(
    registry: Registry, engine: Engine
) -> None:
    """A stream that committed before its first yield takes a connection only to use it."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.add(Item(name="before"))
        registry.commit()
        yield b"one"
        assert registry.scalar(select(Item.name)) == "before"
        registry.commit()
        yield b"two"

    server = Server(SessionMiddleware(app, registry))
    body = server.begin()
    assert checked_out(engine) == 0
    assert list(body) == [b"one", b"two"]
    server.finish()


def test_a_stream_that_keeps_a_transaction_open_says_so_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A transaction open for longer than a stream should is warned of, once."""
    monkeypatch.setattr(attempt, "LONG_TRANSACTION", 0.0)
    caplog.set_level(logging.WARNING, "sessionscope")
    serve_once(SessionMiddleware(stream(registry, 5), registry), environ(path="/events"))
    [record] = caplog.records
    assert record.getMessage().startswith("GET /events: a stream has kept its transaction open")
    assert "commit before its first yield" in record.getMessage()


def test_a_short_stream_is_not_warned_of(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that ends soon is no reason for a warning."""
    caplog.set_level(logging.WARNING, "sessionscope")
    serve_once(SessionMiddleware(stream(registry, 5), registry))
    assert caplog.records == []


def test_a_commit_refused_at_the_end_of_a_stream_is_raised_before_it_ends(
    registry: Registry,
) -> None:
    """A body of unknown length is torn, not ended, when its COMMIT fails."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"one"
        refuse_commit(registry)

    server = Server(SessionMiddleware(app, registry))
    body = server.begin()
    assert next(body) == b"one"
    with pytest.raises(IntegrityError):
        next(body)
    server.finish()
