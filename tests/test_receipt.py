"""A complete successful response exists only where COMMIT returned, whatever its shape."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from wsgiref.validate import validator

import pytest
from sessionscope import SessionMiddleware
from shapes import CONTENTS, SHAPES, WHOLE
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session
from support import Server, environ, fetch, names, refuse_commit, serve_once, serving

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from shapes import Shape

Registry = scoped_session[Session]

every_shape = pytest.mark.parametrize("shape", [pytest.param(SHAPES[n], id=n) for n in SHAPES])
every_content = pytest.mark.parametrize(
    "chunks", [pytest.param(CONTENTS[n], id=n) for n in CONTENTS]
)
sized_or_not = pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
validated_or_not = pytest.mark.parametrize("validated", [True, False], ids=["validated", "bare"])


def wrap(app: WSGIApplication, registry: Registry, validated: bool, **options: Any) -> Any:
    if not validated:
        return SessionMiddleware(app, registry, **options)
    return validator(SessionMiddleware(validator(app), registry, **options))


@every_shape
@every_content
@sized_or_not
@validated_or_not
def test_success_arrives_whole_and_durable(
    shape: Shape,
    chunks: list[bytes],
    sized: bool,
    validated: bool,
    registry: Registry,
    outside: Engine,
) -> None:
    """A 200 of any shape reaches the server byte for byte, and its work is durable."""
    app = shape(lambda: registry.add(Item(name="kept")), "200 OK", chunks, sized)
    reply = serve_once(wrap(app, registry, validated))
    assert reply.status == "200 OK"
    assert dict(reply.headers).get("Content-Length") == (str(len(reply.content)) if sized else None)
    assert reply.content == b"".join(chunks)
    assert names(outside) == ["kept"]


@every_shape
@sized_or_not
@validated_or_not
def test_failure_arrives_whole_and_leaves_nothing(
    shape: Shape, sized: bool, validated: bool, registry: Registry, outside: Engine
) -> None:
    """A 404 of any shape reaches the server byte for byte, and its work is rolled back."""
    chunks = CONTENTS["three chunks"]
    app = shape(lambda: registry.add(Item(name="gone")), "404 Not Found", chunks, sized)
    reply = serve_once(wrap(app, registry, validated))
    assert (reply.status, reply.content) == ("404 Not Found", b"".join(chunks))
    assert names(outside) == []


@every_shape
@every_content
@sized_or_not
@validated_or_not
def test_a_refused_commit_never_completes_a_response(
    shape: Shape,
    chunks: list[bytes],
    sized: bool,
    validated: bool,
    registry: Registry,
    outside: Engine,
) -> None:
    """Where COMMIT fails, the server gets an exception before the byte that completes."""

    def work() -> None:
        registry.add(Item(name="gone"))
        refuse_commit(registry)

    server = Server(wrap(shape(work, "200 OK", chunks, sized), registry, validated))
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        server.run()
    if sized:
        assert not server.reply.content or len(server.reply.content) < len(b"".join(chunks))
    if shape in map(SHAPES.get, WHOLE) and not validated:
        assert server.reply.status is None
    assert names(outside) == []


@every_shape
@every_content
@sized_or_not
def test_on_a_socket_a_refused_commit_is_a_500_or_visibly_cut(
    shape: Shape, chunks: list[bytes], sized: bool, registry: Registry, outside: Engine
) -> None:
    """Over a real waitress a failed COMMIT is a clean 500 while nothing has left, else a cut."""

    def work() -> None:
        registry.add(Item(name="gone"))
        refuse_commit(registry)

    with serving(SessionMiddleware(shape(work, "200 OK", chunks, sized), registry)) as port:
        answer = fetch(port)
    if shape in map(SHAPES.get, WHOLE) or not chunks or (sized and len(chunks) == 1):
        assert (answer.status, answer.complete) == (500, True)
    else:
        assert answer.status == 500 or not answer.complete
    assert names(outside) == []


@every_shape
@sized_or_not
def test_on_a_socket_success_is_complete(
    shape: Shape, sized: bool, registry: Registry, outside: Engine
) -> None:
    """Over a real waitress a response of any shape arrives whole when COMMIT returned."""
    chunks = CONTENTS["megabytes"]
    app = shape(lambda: registry.add(Item(name="kept")), "200 OK", chunks, sized)
    with serving(SessionMiddleware(app, registry)) as port:
        answer = fetch(port)
    assert (answer.status, answer.content, answer.complete) == (200, b"".join(chunks), True)
    assert names(outside) == ["kept"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_whole_body_is_handed_on_as_it_is(kind: type, registry: Registry) -> None:
    """The server gets the very list or tuple that the application returned."""
    body = kind([b"one", b"two"])

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return body

    assert serve_once(SessionMiddleware(app, registry)).body is body


def test_the_servers_file_wrapper_is_handed_on_as_it_is(registry: Registry) -> None:
    """A body made by the server's wsgi.file_wrapper keeps its type, for the fast path."""

    class FileWrapper(Iterable[bytes]):
        def __init__(self, file: io.BytesIO) -> None:
            self.file = file

        def __iter__(self) -> Iterator[bytes]:
            return iter(self.file)

    app = SHAPES["file wrapper"](bool, "200 OK", [b"hello"], False)
    reply = serve_once(
        SessionMiddleware(app, registry), {**environ(), "wsgi.file_wrapper": FileWrapper}
    )
    assert type(reply.body) is FileWrapper


def test_a_file_from_a_wrapper_function_is_handed_on_as_it_is(registry: Registry) -> None:
    """Where the server's wrapper is a function that returns the file, the file is handed on."""
    app = SHAPES["file wrapper"](bool, "200 OK", [b"hello"], False)
    request = {**environ(), "wsgi.file_wrapper": lambda file: file}
    reply = serve_once(SessionMiddleware(app, registry), request)
    assert type(reply.body) is io.BytesIO


def complete_with_the_head(method: str, status: str, length: str | None) -> WSGIApplication:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response(status, [("Content-Length", length)] if length else [])
        yield b""
        environ["work"]()

    return app


@pytest.mark.parametrize(
    ("method", "status", "length"),
    [
        pytest.param("HEAD", "200 OK", None, id="HEAD"),
        pytest.param("HEAD", "200 OK", "5", id="HEAD with a length"),
        pytest.param("POST", "204 No Content", None, id="204"),
        pytest.param("GET", "304 Not Modified", None, id="304"),
        pytest.param("POST", "200 OK", "0", id="length 0"),
    ],
)
def test_a_response_that_is_complete_with_its_head_is_settled_first(
    method: str, status: str, length: str | None, registry: Registry, outside: Engine
) -> None:
    """HEAD, 204, 304 and a length of 0 release nothing, not an empty chunk, before COMMIT."""
    application = SessionMiddleware(complete_with_the_head(method, status, length), registry)
    server = Server(application)
    body = server.begin(environ(method, work=lambda: registry.add(Item(name="kept"))))
    assert names(outside) == ["kept"]
    assert list(body) == []
    server.finish()

    refused = Server(application)
    with pytest.raises(IntegrityError):
        refused.begin(environ(method, work=lambda: refuse_commit(registry)))
    assert refused.reply.status is None


def test_the_body_of_a_head_response_is_dropped(registry: Registry) -> None:
    """What an application yields for HEAD never reaches the server, and nobody is warned."""
    app = SHAPES["generator"](bool, "200 OK", [b"hello"], True)
    reply = serve_once(SessionMiddleware(app, registry), environ("HEAD"))
    assert (dict(reply.headers)["Content-Length"], reply.chunks) == ("5", [])


def test_excess_is_dropped_and_logged(
    registry: Registry, outside: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Chunks beyond the Content-Length are dropped, with one warning; the work counts."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "5")])
        yield b"hello"
        yield b"too "
        yield b"much"
        registry.add(Item(name="kept"))

    reply = serve_once(SessionMiddleware(app, registry))
    assert reply.content == b"hello"
    assert names(outside) == ["kept"]
    assert caplog.messages == ["GET /: 8 bytes beyond the Content-Length were dropped"]


@pytest.mark.parametrize("chunks", [[], [b"hel"]])
def test_a_body_that_ends_short_is_logged(
    chunks: list[bytes], registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """A body that ends before its Content-Length is passed on as it is, with a warning."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "5")])
        yield from chunks

    assert serve_once(SessionMiddleware(app, registry)).chunks == chunks
    assert caplog.messages == [f"GET /: the body ended after {len(b''.join(chunks))} of 5 bytes"]


@pytest.mark.parametrize(
    ("lengths", "held"),
    [
        (["3"], True),
        (["9", "3"], True),
        (["3", "nonsense"], True),
        (["\u0663"], False),
        (["-3"], False),
        (["3, 3"], True),
        (["9, 3, x"], True),
        (["+3"], False),
        (["3.0"], False),
        ([" 3\t"], True),
        (["0" * 30 + "3"], True),
        (["9" * 5000], False),
        ([], False),
    ],
)
def test_what_counts_as_a_content_length(
    lengths: list[str], held: bool, registry: Registry
) -> None:
    """A length is ASCII digits; of several, in one field or not, the smallest counts."""
    asked = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("content-LENGTH", length) for length in lengths])
        yield b"abc"
        asked.append("again")

    headers_may_be_odd = SessionMiddleware(app, registry, commit_when=lambda *_: True)
    server = Server(headers_may_be_odd)
    body = server.begin()
    assert bool(asked) is held
    assert list(body) == [b"abc"]
    server.finish()


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(("X-Name", "a\nb"), id="newline"),
        pytest.param(("X-Name", "a\n\nX-Other\nb"), id="like two fields"),
        pytest.param(("X-Name", "a\rb"), id="carriage return"),
        pytest.param(("X-Name", "a\x7fb"), id="delete"),
        pytest.param(("X-Name", "a\0b"), id="NUL"),
        pytest.param(("X-Name", "snow \u2603"), id="not Latin-1"),
        pytest.param(("X-Name", b"bytes"), id="bytes"),
        pytest.param(("X-Name", None), id="None"),
    ],
)
@pytest.mark.parametrize("shape", [SHAPES["list"], SHAPES["generator"]], ids=["list", "generator"])
def test_a_head_that_a_server_may_refuse(
    header: Any, shape: Shape, registry: Registry, outside: Engine
) -> None:
    """A server gets an odd head as it is before COMMIT: if it refuses, the work is rolled back."""
    inner = shape(lambda: registry.add(Item(name="work")), "200 OK", [b"hello"], True)

    def app(environ: Any, start_response: Any) -> Any:
        def with_header(status: str, headers: Any, exc_info: Any = None) -> Any:
            return start_response(status, [*headers, header])

        return inner(environ, with_header)

    got: list[Any] = []

    class Strict(Server):
        def start_response(self, status: str, headers: Any, exc_info: Any = None, /) -> Any:
            assert names(outside) == []
            got.append(headers)
            super().start_response(status, headers, exc_info)
            raise ValueError("refused")

    server = Strict(SessionMiddleware(app, registry))
    with pytest.raises(ValueError, match="refused"):
        server.run()
    assert header in got[0]
    assert names(outside) == []

    with serving(SessionMiddleware(app, registry)) as port:
        answer = fetch(port)
    assert answer.status != 200 or names(outside) == ["work"]

    assert serve_once(SessionMiddleware(app, registry)).content == b"hello"
    assert names(outside)[-1] == "work"


@pytest.mark.parametrize("header", [("X-Name", "tab\there"), ("X-Name", "caf\xe9")])
def test_a_head_that_servers_take_commits(
    header: tuple[str, str], registry: Registry, outside: Engine
) -> None:
    """Latin-1 and tabs are no reason to refuse a head (RFC 9110, 5.5)."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [header])
        registry.add(Item(name="kept"))
        return [b""]

    assert serve_once(SessionMiddleware(app, registry)).headers == [header]
    assert names(outside) == ["kept"]


def test_the_servers_changes_to_the_headers_do_not_matter(registry: Registry) -> None:
    """The length is read from a copy: a server may change the list that it gets."""

    class Rude(Server):
        def start_response(self, status: str, headers: Any, exc_info: Any = None, /) -> Any:
            answer = super().start_response(status, headers, exc_info)
            headers.clear()
            return answer

    app = SHAPES["generator"](lambda: refuse_commit(registry), "200 OK", [b"one", b"two"], True)
    server = Rude(SessionMiddleware(app, registry))
    with pytest.raises(IntegrityError):
        server.run()
    assert server.reply.content == b"one"


def test_the_rest_of_a_short_body_is_settled_at_its_end(
    registry: Registry, outside: Engine
) -> None:
    """A body that ends before its Content-Length is settled there."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "100")])
        yield b"short"
        registry.add(Item(name="kept"))

    assert serve_once(SessionMiddleware(app, registry)).content == b"short"
    assert names(outside) == ["kept"]


def test_a_server_that_takes_the_head_before_the_first_next_sees_a_late_one(
    registry: Registry,
) -> None:
    """The head of a late generator is there when the call returns, and so is its first chunk."""
    app = SHAPES["late generator"](bool, "200 OK", [b"one", b"two"], False)
    server = Server(SessionMiddleware(app, registry))
    body = server.begin()
    assert server.reply.status == "200 OK"
    assert list(body) == [b"one", b"two"]
    server.finish()


def test_a_chunk_that_is_no_bytes_reaches_the_server_as_it_is(
    registry: Registry, outside: Engine
) -> None:
    """A chunk that the server will refuse is the server's to refuse; then all is rolled back."""

    def app(environ: Any, start_response: Any) -> Iterator[Any]:
        start_response("200 OK", [])
        registry.add(Item(name="gone"))
        yield None

    with pytest.raises(AssertionError, match="None is not bytes"):
        serve_once(SessionMiddleware(app, registry))
    assert names(outside) == []


def test_write_passes_on_what_is_no_bytes(registry: Registry) -> None:
    """What write() was given is the server's to refuse, too."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])("text")
        return []

    with pytest.raises(AssertionError, match="'text' is not bytes"):
        serve_once(SessionMiddleware(app, registry))
