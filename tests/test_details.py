"""Details of WSGI that servers, frameworks and adapters differ in."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from wsgiref.handlers import SimpleHandler
from wsgiref.util import FileWrapper

import pytest
from sessionscope import Outcome, SessionMiddleware
from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.exc import StaleDataError
from support import Server, environ, names, refuse_commit, serve_once
from werkzeug.wsgi import LimitedStream

import middleware
from models import Item

Registry = scoped_session[Session]


# Bodies.


class Download(io.RawIOBase):
    """A file-like that reads from the database."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.sessions: list[Session] = []
        self.left = 2

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sessions.append(self.registry())
        self.registry.execute(select(Item)).all()
        self.left -= 1
        buffer[:1] = b"x"
        return 1 if self.left >= 0 else 0


@pytest.mark.parametrize("buffered", [True, False])
def test_a_file_that_reads_from_the_database_is_a_stream(
    buffered: bool, registry: Registry, engine: Engine
) -> None:
    """What is read under the server's file wrapper is read in the request's session."""
    raw = Download(registry)
    seen: list[Session] = []

    def app(environ: Any, start_response: Any) -> Any:
        seen.append(registry())
        start_response("200 OK", [])
        file: Any = io.BufferedReader(raw) if buffered else raw
        return environ["wsgi.file_wrapper"](file, 1)

    request = {**environ(), "wsgi.file_wrapper": FileWrapper}
    assert serve_once(SessionMiddleware(app, registry), request).content == b"xx"
    assert set(raw.sessions) == set(seen)
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_a_body_that_ends_short_is_logged(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream with fewer bytes than its Content-Length is in the log."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "9")])
        yield b"short"

    serve_once(SessionMiddleware(app, registry))
    assert "the body ended after 5 of 9 bytes" in caplog.text


def test_a_held_chunk_is_the_one_that_was_given(registry: Registry) -> None:
    """A buffer that the application goes on to use does not change what is held back of it."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "4")])
        buffer = bytearray(b"good")
        yield buffer  # type: ignore[misc]
        buffer[:] = b"evil"

    class Lenient(Server):
        def write(self, chunk: bytes) -> None:
            self.reply.chunks.append(chunk)

    assert Lenient(SessionMiddleware(app, registry)).run().content == b"good"


def test_a_head_that_comes_after_a_chunk_reaches_the_server(registry: Registry) -> None:
    """start_response may be called late, even after a chunk, if the server takes that."""

    class Lenient(Server):
        def write(self, chunk: bytes) -> None:
            self.reply.chunks.append(chunk)

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        yield b"early"
        start_response("200 OK", [("X-Late", "yes")])
        yield b"late"

    reply = Lenient(SessionMiddleware(app, registry)).run()
    assert (reply.status, reply.headers) == ("200 OK", [("X-Late", "yes")])
    assert reply.content == b"earlylate"


# Heads.


def run_in_wsgiref(app: Any) -> bytes:
    output = io.BytesIO()
    handler = SimpleHandler(io.BytesIO(), output, io.StringIO(), environ("POST"))
    handler.run(app)
    return output.getvalue()


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        ("200 OK", [("Connection", "close")]),
        ("200 OK", (("X-Name", "in a tuple"),)),
        ("200 OK", [("X-Name", type("Text", (str,), {})("of another class"))]),
        ("200", []),
    ],
    ids=["hop-by-hop", "tuple", "subclass", "no reason"],
)
def test_a_head_that_wsgiref_refuses_commits_nothing(
    status: str, headers: Any, registry: Registry, outside: Engine
) -> None:
    """What a server refuses in a head, whatever its reason is, rolls the work back."""

    def app(environ: Any, start_response: Any) -> Any:
        registry.add(Item(name="work"))
        start_response(status, headers)
        return [b"fine"]

    sent = run_in_wsgiref(SessionMiddleware(app, registry))
    assert names(outside) == (["work"] if b"fine" in sent else [])


def test_a_head_that_went_first_is_taken_back(registry: Registry) -> None:
    """If COMMIT fails after an odd head was sent, the server gets a 500 in its place."""
    heads: list[tuple[Any, ...]] = []

    def app(environ: Any, start_response: Any) -> Any:
        refuse_commit(registry)
        start_response("200 OK", [("Connection", "close")])
        return [b"fine"]

    def start_response(*head: Any) -> Any:
        heads.append(head)

    with pytest.raises(IntegrityError):
        SessionMiddleware(app, registry)(environ("POST"), start_response)
    assert [head[0] for head in heads] == ["200 OK", "500 Internal Server Error"]
    assert heads[1][2][0] is IntegrityError


# Outcomes.


def test_a_stream_that_fails_is_reported_at_once(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """Adapters that never call close() get their Outcome and log line when a stream fails."""
    caplog.set_level(logging.DEBUG, "sessionscope")
    seen: list[Outcome] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.execute(select(Item))
        yield b"one"
        raise LookupError

    body = Server(SessionMiddleware(app, registry, observer=seen.append)).begin()
    next(body)
    with pytest.raises(LookupError):
        next(body)
    assert [(one.action, type(one.error)) for one in seen] == [("rollback", LookupError)]
    assert "rollback GET / LookupError()" in caplog.text


# The recorded input.


class Input:
    """An input that cannot be rewound, with something of the server's own."""

    name = "the server's own"
    closed = False
    flush = close = lambda self: None

    def __init__(self, content: bytes) -> None:
        self.content = io.BytesIO(content)
        self.readinto = self.content.readinto
        self.peek = self.content.getvalue

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        return self.content.read(size)

    def read1(self, size: int = -1) -> bytes:
        """Return what has arrived: four bytes at a time."""
        return self.content.read(4 if size < 0 else min(size, 4))

    def readinto1(self, buffer: Any) -> int:
        data = self.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readline(self, size: int = -1) -> bytes:
        return self.content.readline(size)

    def readlines(self, hint: int = -1) -> list[bytes]:
        return self.content.readlines(hint)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.content)


LINES = b"one\ntwo\nthree\n"
READS: dict[str, Callable[[Any], object]] = {
    "read(None)": lambda stream: stream.read(None),
    "read(5), rest": lambda stream: [stream.read(5), stream.read()],
    "readline(None)": lambda stream: [stream.readline(None), stream.readline(2), stream.read()],
    "readlines(5)": lambda stream: [stream.readlines(5), stream.readlines()],
    "readlines(None)": lambda stream: stream.readlines(None),
    "iteration": lambda stream: list(stream),
    "name": lambda stream: stream.name,
    "read1": lambda stream: b"".join(iter(lambda: stream.read1(5), b"")),
    "readinto1": lambda stream: b"".join(pieces(stream)),
    "Werkzeug": lambda stream: LimitedStream(stream, len(LINES)).read(len(LINES)),
    "as text": lambda stream: read_by(io.TextIOWrapper(stream)),
    "buffered": lambda stream: read_by(io.BufferedReader(stream)),
}


def pieces(stream: Any) -> Iterator[bytes]:
    buffer = bytearray(5)
    while count := stream.readinto1(buffer):
        yield bytes(buffer[:count])


def read_by(reader: Any) -> object:
    """Read a stream as an application does that wraps it."""
    content = reader.readlines()
    reader.detach()
    return content


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("first", [b"", b"on"])
def test_the_recorded_input_is_as_the_servers(
    first: bytes, read: Callable[[Any], object], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under attempts an application finds all that PEP 3333 asks for, at each attempt."""
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.0)
    seen: list[object] = []

    def app(environ: Any, start_response: Any) -> Any:
        stream = environ["wsgi.input"]
        if not seen and first:
            assert stream.read(len(first)) == first  # and so a part is recorded
            seen.append(None)
            raise StaleDataError
        seen.append(read(stream))
        if len(seen) < 3:
            raise StaleDataError
        start_response("200 OK", [])
        return [b""]

    request = {**environ("POST"), "wsgi.input": Input(LINES)}
    serve_once(SessionMiddleware(app, registry, attempts=4), request)
    expected = read(Input(LINES))
    assert [one for one in seen if one is not None] == [expected] * (2 if first else 3)


def test_a_replayed_read1_does_not_wait_for_the_client(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been recorded is returned at once, though the application would take more."""
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.0)
    seen: list[bytes] = []

    def app(environ: Any, start_response: Any) -> Any:
        stream = environ["wsgi.input"]
        seen.append(stream.read1(100) if seen else stream.read(2))
        if len(seen) < 2:
            raise StaleDataError
        start_response("200 OK", [])
        return [b""]

    request = {**environ("POST"), "wsgi.input": Input(LINES)}
    serve_once(SessionMiddleware(app, registry, attempts=2), request)
    assert seen == [b"on", b"on"]


def test_a_body_that_was_not_recorded_is_not_read_again(registry: Registry) -> None:
    """A request whose body was read by something of the server's own is not repeated."""

    calls: list[bytes] = []

    def app(environ: Any, start_response: Any) -> Any:
        calls.append(environ["wsgi.input"].peek())
        raise StaleDataError

    request = {**environ("POST"), "wsgi.input": Input(LINES)}
    with pytest.raises(StaleDataError):
        serve_once(SessionMiddleware(app, registry, attempts=3), request)
    assert calls == [LINES]


def test_a_large_body_is_recorded_on_disk(registry: Registry) -> None:
    """A body of several megabytes that is read at once is there again at the next attempt."""
    content = bytes(3_000_000)
    seen: list[bool] = []

    def app(environ: Any, start_response: Any) -> Any:
        seen.append(environ["wsgi.input"].read() == content)
        if len(seen) < 2:
            raise StaleDataError
        start_response("200 OK", [])
        return [b""]

    request = {**environ("POST"), "wsgi.input": Input(content)}
    with suppress(StaleDataError):
        serve_once(SessionMiddleware(app, registry, attempts=2), request)
    assert seen == [True, True]
