"""What a request with an Idempotency-Key may look like, and its response, byte for byte."""

from __future__ import annotations

import gc
import io
import json
import uuid
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import ref

import keyed_service
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from keyed_service import REPLAYED, Service, code, is_replay, post, rows, sent
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError
from support import Server, environ, names, serve_once

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

service, any_service = keyed_service.service, keyed_service.any_service


# The key.


@pytest.mark.parametrize(
    "fields",
    [
        ['"k"', "k", '"k";a=1', ' "k" ', '"k"; b ;c="x;\\"y";d=*e', '"k";a=:Zm9v:;b=?1'],
        ['"a\\"b"', '"a\\"b";v'],
        ['"a\\\\b"', '"a\\\\b";v'],
        ["8e03978e-40d5-43dd-bc93-6894a57f9324", '"8e03978e-40d5-43dd-bc93-6894a57f9324"'],
        ['"a;b"', "a;b"],
    ],
    ids=lambda fields: fields[0],
)
def test_spellings_of_one_key(fields: list[str], service: Service) -> None:
    """Quotes, escapes and parameters don't make another key of it."""
    first = service.post(fields[0])
    assert all(is_replay(service.post(field), first) for field in fields)


@pytest.mark.parametrize(
    "field",
    [
        "",
        " ",
        '""',
        '"k',
        'k"',
        '"k"x',
        '"a\\b"',
        "a\\b",
        "\xe9",
        '"\xe9"',
        '"k";a=\xe9',
        '"k";a=\x01',
        '"k";a=\x7f',
        "a\tb",
        "a\x00",
        '"a\x7f"',
        "a,b",
        '"a", "b"',
        '"k";',
        '"k";A',
        '"k";a=',
        "k" * 256,
        '"' + "k" * 256 + '"',
    ],
    ids=ascii,
)
def test_a_malformed_key_is_refused(field: str, service: Service, engine: Engine) -> None:
    """What is no single String of 1 to 255 characters is a 400, and nothing is sent."""
    words = sent(engine)
    assert code(service.post(field)) == 400
    assert (words, service.calls) == ([], 0)


def test_the_longest_key(any_service: Service) -> None:
    """255 characters are a key, and the last of them counts; an escape does not."""
    first = any_service.post('"' + "k" * 254 + '\\""')
    assert code(any_service.post("k" * 255)) == 201
    assert is_replay(any_service.post('"' + "k" * 254 + '\\""'), first)
    assert any_service.calls == 2


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.text(st.characters(max_codepoint=255), max_size=300) | st.text('"\\;=, ak*\t', max_size=9)
)
@example('"' + '";a=' * 2000)
def test_any_field_is_a_key_or_refused(service: Service, field: str) -> None:
    """Whatever a client sends is carried out or a 400, and never an exception."""
    assert code(service.post(field)) in (201, 400, 422)


def test_a_key_may_be_required(service: Service, engine: Engine) -> None:
    """Where it is, a request without one is a 400; another method needs none."""
    strict, words = Service(engine, required=True), sent(engine)
    assert code(strict.post(None)) == 400
    assert (words, strict.calls) == ([], 0)
    assert code(strict.post("k")) == code(serve_once(strict.app, environ("GET"))) == 201


# The request.


DIFFERENT: dict[str, dict[str, Any]] = {
    "method": {"REQUEST_METHOD": "PATCH"},
    "host": {"HTTP_HOST": "other.example"},
    "server": {"HTTP_HOST": "", "SERVER_NAME": "other.example"},
    "path": {"PATH_INFO": "/other"},
    "mount": {"SCRIPT_NAME": "/other"},
    "query": {"QUERY_STRING": "a=1"},
    "type": {"CONTENT_TYPE": "application/json"},
    "body": {"body": b"other"},
    "no body": {"body": b""},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_request_with_a_kept_key(what: str, service: Service, engine: Engine) -> None:
    """It is a 422 and nothing is carried out, whichever part of it is another."""
    one: dict[str, Any] = {"body": b"one", "CONTENT_TYPE": "text/plain"}
    first = service.post("k", **one)
    refused = service.post("k", **(one | DIFFERENT[what]))
    assert (code(refused), service.calls) == (422, 1)
    assert is_replay(service.post("k", **one), first)


@pytest.mark.parametrize(
    "host",
    [
        {"HTTP_HOST": "one.example:8080"},
        {"HTTP_HOST": "ONE.example"},
        {"HTTP_HOST": "one.example:"},
        {"HTTP_HOST": "", "SERVER_NAME": "one.example"},
    ],
    ids=str,
)
def test_spellings_of_one_host(host: dict[str, Any], service: Service) -> None:
    """Neither port nor case makes another host of it."""
    first = service.post(HTTP_HOST="one.example")
    assert is_replay(service.post(**host), first)


def test_parts_of_a_request_are_kept_apart(service: Service) -> None:
    """What ends the path does not count as the beginning of the query."""
    service.post(PATH_INFO="/ab", QUERY_STRING="c")
    assert code(service.post(PATH_INFO="/a", QUERY_STRING="bc")) == 422


class Upload(io.RawIOBase):
    """A body that comes in small pieces, and how much of it was read."""

    def __init__(self, content: bytes, piece: int = 3) -> None:
        self.content, self.piece, self.taken = content, piece, 0

    def read(self, size: int = -1) -> bytes:
        end = self.taken + min(self.piece, size if size >= 0 else self.piece)
        found = self.content[self.taken : end]
        self.taken += len(found)
        return found


def upload(content: bytes, **how: Any) -> tuple[Upload, WSGIEnvironment]:
    body = Upload(content)
    return body, post() | {"wsgi.input": body, "CONTENT_LENGTH": ""} | how


SENT: dict[str, dict[str, Any]] = {
    "announced": {"CONTENT_LENGTH": "10"},
    "chunked": {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True},
    "terminated": {"wsgi.input_terminated": True},
}


@pytest.mark.parametrize("how", SENT)
def test_the_application_reads_what_the_client_sent(how: str, service: Service) -> None:
    """It gets exactly those bytes, in each attempt, and they count for the repeat."""
    read: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        read.append(environ["wsgi.input"].read())
        return service.create(environ, start_response)

    def work(_: object) -> None:
        if len(read) == 1:
            raise StaleDataError("somebody has changed it")

    service.inner, service.work = app, work
    first = serve_once(service.app, upload(b"0123456789", **SENT[how])[1])
    assert read == [b"0123456789"] * 2
    assert is_replay(serve_once(service.app, upload(b"0123456789", **SENT[how])[1]), first)
    other = upload(b"012345678x", **SENT[how])[1]
    assert code(serve_once(service.app, other)) == 422


def test_a_chunked_body_of_unknown_end(service: Service) -> None:
    """It is a 411, unread, if the server does not say that the input ends with the body."""
    body, request = upload(b"0123456789", HTTP_TRANSFER_ENCODING="chunked")
    assert code(serve_once(service.app, request)) == 411
    assert (body.taken, service.calls) == (0, 0)


@pytest.mark.parametrize("how", SENT)
@pytest.mark.parametrize("limit", [9, 3])
def test_a_body_over_the_limit(how: str, limit: int, service: Service, engine: Engine) -> None:
    """It is a 413, of which no more than one byte beyond the limit was read."""
    small, words = Service(engine, limit=limit), sent(engine)
    body, request = upload(b"0123456789", **SENT[how])
    assert code(serve_once(small.app, request)) == 413
    assert body.taken == (0 if how == "announced" else limit + 1)
    assert (words, small.calls) == ([], 0)


@pytest.mark.parametrize("how", SENT)
def test_a_body_of_the_limit(how: str, service: Service, engine: Engine) -> None:
    """It is carried out: the limit is what a body may have."""
    small = Service(engine, limit=10)
    assert code(serve_once(small.app, upload(b"0123456789", **SENT[how])[1])) == 201


@pytest.mark.parametrize("length", ["11", "-1", "1e1", "x", "\u0661"])
def test_an_incomplete_body(length: str, service: Service, engine: Engine) -> None:
    """A body that is shorter than announced, or announced by no number, is a 400."""
    words = sent(engine)
    request = upload(b"0123456789", CONTENT_LENGTH=length)[1]
    assert code(serve_once(service.app, request)) == 400
    assert (words, service.calls) == ([], 0)


@pytest.mark.parametrize("length", ["9" * 18, "9" * 5000])
def test_a_huge_announcement(length: str, service: Service) -> None:
    """It is a 413, and no number that Python refuses to read."""
    assert code(serve_once(service.app, upload(b"", CONTENT_LENGTH=length)[1])) == 413


def test_what_follows_the_body_is_not_read(service: Service) -> None:
    """On a connection that is kept, the next request comes after the body."""
    body, request = upload(b"bodyPOST /", CONTENT_LENGTH="4")
    assert code(serve_once(service.app, request)) == 201
    assert body.taken == 4


def test_without_a_length_nothing_is_read(service: Service) -> None:
    """No Content-Length means no body, and a read could wait for ever."""
    body, request = upload(b"never read")
    assert code(serve_once(service.app, request)) == 201
    assert body.taken == 0


# Refusals.


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"key": ""}, "400 Bad Request"),
        ({"body": b"xyz", "CONTENT_LENGTH": "9"}, "413 Content Too Large"),
        ({"body": b"xyz"}, "422 Unprocessable Content"),
    ],
    ids=["400", "413", "422"],
)
@pytest.mark.parametrize("help", ["about:blank", "https://example.org/keys"])
def test_a_refusal_is_problem_details(
    help: str, request_: dict[str, Any], status: str, service: Service, engine: Engine
) -> None:
    """It says its type, title and status in JSON (RFC 9457), and its length."""
    service.post()
    refused = Service(engine, limit=5, help=help).post(**request_)
    headers = dict(refused.headers)
    assert refused.status == status
    assert headers["Content-Type"] == "application/problem+json"
    assert int(headers["Content-Length"]) == len(refused.content)
    details = json.loads(refused.content)
    assert details.keys() == {"type", "title", "status"}
    assert (details["type"], details["status"]) == (help, int(status[:3]))


# Responses.


def answer(status: str, headers: list[tuple[str, str]], chunks: Iterable[bytes]) -> Any:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, headers)
        return chunks

    return app


TOKEN = "!#$%&'*+.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-"
HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailers",
    "transfer-encoding", "upgrade",
}  # fmt: skip
NOT_KEPT = {"date", "set-cookie"}
VALUES = st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]))
NAMES = st.text(TOKEN, min_size=1).filter(
    lambda name: name.lower() not in HOP_BY_HOP | NOT_KEPT | {"content-length"}
)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    status=st.builds("{} {}".format, st.integers(200, 399), st.text(TOKEN, min_size=1)),
    headers=st.lists(st.tuples(NAMES, VALUES | st.just("a: b\x85\xa0 "))),
    chunks=st.lists(st.binary()),
    streamed=st.booleans(),
)
def test_any_response_survives_the_row(
    any_service: Service,
    status: str,
    headers: list[tuple[str, str]],
    chunks: list[bytes],
    streamed: bool,
) -> None:
    """Whatever a server accepts is replayed byte for byte."""
    if status.startswith(("204", "304")):
        chunks = []
    any_service.inner = answer(status, headers, map(bytes, chunks) if streamed else chunks)
    key = str(uuid.uuid4())
    first = any_service.post(key)
    assert (first.status, first.content) == (status, b"".join(chunks))
    assert is_replay(any_service.post(key), first)


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified", "200 OK"])
def test_a_response_without_a_body(status: str, service: Service) -> None:
    """A response that had no body is replayed without one."""
    service.inner = answer(status, [], [])
    first = service.post()
    repeat = service.post()
    assert (first.status, is_replay(repeat, first), repeat.chunks) == (status, True, [])


@pytest.mark.parametrize(
    ("status", "headers"),
    [("200 OK", [("Content-Length", "4")]), ("204 No Content", [])],
    ids=["long", "204"],
)
def test_what_http_drops_is_not_kept(
    status: str, headers: list[tuple[str, str]], service: Service
) -> None:
    """What is beyond the Content-Length, or the body of a 204, is not replayed either."""
    service.inner = answer(status, headers, iter([b"fine", b"st"]))
    first = service.post()
    assert first.content == (b"fine" if headers else b"")
    assert is_replay(service.post(), first)


def test_headers_keep_number_order_and_bytes(any_service: Service) -> None:
    """One that comes twice comes twice again, and Latin-1 is Latin-1."""
    headers = [("Link", "<a>"), ("X-Name", "J\xf6rg \xff"), ("Link", "<b>"), ("X-Empty", "")]
    any_service.inner = answer("200 OK", headers, [b"fine"])
    any_service.post()
    assert any_service.post().headers == [*headers, REPLAYED]


def test_what_belongs_to_one_message_is_not_kept(service: Service, engine: Engine) -> None:
    """Date and Set-Cookie, however they are written, are in the first response and in no row."""
    headers = [("dAtE", "Mon"), ("Set-Cookie", "secret"), ("set-cookie", "more"), ("X", "1")]
    service.inner = answer("200 OK", headers, [b"fine"])
    assert service.post().headers == headers
    assert service.post().headers == [("X", "1"), REPLAYED]
    (row,) = rows(engine)
    assert row.response == b"HTTP/1.1 200 OK\r\nX: 1\r\n\r\nfine"


@pytest.mark.parametrize("shape", ["list", "stream", "write"])
@pytest.mark.parametrize("size", [10, 11])
def test_a_response_over_the_limit(size: int, shape: str, service: Service, engine: Engine) -> None:
    """It is delivered and committed but not kept, so a repeat is a 409, and the work is there once.

    One of the limit is kept.
    """
    small = Service(engine, limit=10)
    chunks = [b"12345", b"x" * (size - 5)]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        small.registry.add(Item(name="once"))
        write = start_response("200 OK", [])
        if shape == "write":
            for chunk in chunks:
                write(chunk)
            return []
        return chunks if shape == "list" else iter(chunks)

    small.inner = app
    assert small.post().content == b"".join(chunks)
    repeat = small.post()
    if size > 10:
        assert (code(repeat), b"not kept" in repeat.content) == (409, True)
    else:
        assert repeat.content == b"".join(chunks)
    assert (small.calls, names(engine)) == (1, ["once"])


def test_a_response_whose_head_fills_the_row(service: Service, engine: Engine) -> None:
    """What is longer than the column with its head is delivered, and not kept."""
    big = Service(engine, limit=2**24 - 1)
    big.inner = answer("200 OK", [], [bytes(2**24 - 1)])
    assert [code(big.post()), code(big.post())] == [200, 409]


def test_a_stream_is_not_held_back(service: Service) -> None:
    """Each chunk leaves before the next is made, and the replay has all of them."""
    made: list[int] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        for number in range(3):
            made.append(number)
            yield b"%d" % number

    service.inner = app
    server = Server(service.app)
    body = server.begin(post())
    for number in range(3):
        assert next(body) == b"%d" % number
        assert made == [*range(number + 1)]
    assert list(body) == []
    server.finish()
    assert service.post().content == b"012"


class Counted(bytes):
    """Bytes that tell how many of them there are, and were at most."""

    alive = most = 0

    def __init__(self, *_: object) -> None:
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1


def test_a_long_stream_needs_no_memory(service: Service, engine: Engine) -> None:
    """Nothing is kept of what is longer than the limit."""
    small = Service(engine, limit=10)
    small.inner = answer("200 OK", [], (Counted(b"12345") for _ in range(50)))
    server = Server(small.app)
    assert sum(map(len, server.begin(post()))) == 250
    server.finish()
    assert (Counted.most, Counted.alive) == (3, 0)  # two are kept until a third is too much


def test_what_was_written_comes_first(service: Service) -> None:
    """What write() was given is replayed in front of the body."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])(b"one ")
        return [b"two"]

    service.inner = app
    first = service.post()
    assert first.content == b"one two"
    assert is_replay(service.post(), first)


@pytest.mark.parametrize("shape", ["list", "stream"])
def test_a_head_that_replaces_another(shape: str, service: Service) -> None:
    """The last head is the one that is kept, and what belonged to the first is not."""

    def stream(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("X", "first")])(b"first")
        try:
            raise ZeroDivisionError
        except ZeroDivisionError as error:
            info: Any = (type(error), error, error.__traceback__)
            start_response("202 Accepted", [("X", "second")], info)
        yield b"second"

    def listed(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return list(stream(environ, start_response))

    service.inner = stream if shape == "stream" else listed
    first = service.post()
    assert (first.status, first.content) == ("202 Accepted", b"second")
    assert is_replay(service.post(), first)


def test_the_head_is_passed_on_in_the_call(service: Service, engine: Engine) -> None:
    """A server that refuses a head raises in the application's own call of start_response."""
    raised: list[Exception] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        try:
            start_response("200 OK", [])
        except AssertionError as error:
            raised.append(error)
        return [b"fine"]

    service.inner = app
    first = service.post()
    assert "called again" in str(raised)
    assert is_replay(service.post(), first)


class Body:
    """An iterable with a ``close()``."""

    def __init__(self, *chunks: bytes, error: Exception | None = None) -> None:
        self.chunks, self.error, self.closed = chunks, error, 0

    def __iter__(self) -> Iterator[bytes]:
        yield from self.chunks
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed += 1


def test_a_body_is_closed_once(service: Service) -> None:
    """And no other is made or closed for the replay."""
    body = Body(b"one", b"two")
    service.inner = answer("200 OK", [], body)
    for _ in range(2):
        assert service.post().content == b"onetwo"
        assert body.closed == 1


@pytest.mark.parametrize("hangs_up", [False, True])
def test_a_closed_stream_is_freed_at_once(hangs_up: bool, service: Service) -> None:
    """Its session needs no cycle collector."""
    sessions: list[ref[Session]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        sessions.append(ref(service.registry()))
        start_response("200 OK", [])
        yield b"one"
        yield b"two"

    service.inner = app
    gc.disable()
    try:
        server = Server(service.app)
        chunks = server.begin(post())
        next(chunks) if hangs_up else [*chunks]
        server.finish()
        del server, chunks
        assert [session() for session in sessions] == [None]
    finally:
        gc.enable()


def test_a_body_may_be_asked_again_after_its_end(service: Service) -> None:
    """A server that asks once more is told of the end once more."""
    service.inner = answer("200 OK", [], Body(b"one"))
    server = Server(service.app)
    body = server.begin(post())
    assert [*body, *body] == [b"one"]
    server.finish()


def test_a_body_that_raises(service: Service, engine: Engine) -> None:
    """It leaves no row, and the repeat is carried out."""
    service.inner = answer("200 OK", [], Body(b"one", error=ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        service.post()
    assert rows(engine) == []
    service.inner = service.create
    assert code(service.post()) == 201


def test_a_client_that_leaves(service: Service, engine: Engine) -> None:
    """One that hangs up in a stream leaves no row, and the repeat is carried out."""
    service.inner = answer("200 OK", [], Body(b"one", b"two"))
    server = Server(service.app)
    next(server.begin(post()))
    server.finish()
    assert rows(engine) == []
    service.inner = service.create
    assert code(service.post()) == 201


ODD: dict[str, tuple[Any, Any]] = {
    "headers as a tuple": ((("X", "1"),), [b"fine"]),
    "a bytearray": ([], [bytearray(b"fine")]),
    "not Latin-1": ([("X", "\u20ac")], [b"fine"]),
    "a name alone": (["X"], [b"fine"]),
    "a number for a name": ([(1, "X")], [b"fine"]),
    "two lines": ([("X", "1\nY: 2")], [b"fine"]),
}


class Lenient(Server):
    """A server that sends what others refuse."""

    def start_response(self, status: Any, headers: Any, exc_info: Any = None, /) -> Any:
        return super().start_response(status, [], exc_info)

    def write(self, chunk: Any) -> None:
        super().write(bytes(chunk))


@pytest.mark.parametrize("what", ODD)
def test_what_http_does_not_have_is_not_kept(what: str, service: Service) -> None:
    """A response that not every server takes is passed on, and protected all the same."""
    service.inner = answer("200 OK", *ODD[what])
    assert Lenient(service.app).run(post()).content == b"fine"
    assert code(service.post()) == 409
    assert service.calls == 1
