"""Responses: JSON, streams, gzip, and the one shape that all errors have.

An error is ``{"error": sentence}``.  If fields of the body or of the query are wrong, it also has
``errors`` for programs: ``{"field": "name", "code": "too_long", "limit": 16}``.  WebOb's Response
is not used: it makes each Location absolute, which is wrong behind a proxy.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from http import HTTPStatus
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import msgspec

Headers = Mapping[str, str]

JSON = "application/json"

JSON_HEADERS = {
    "Content-Type": JSON,
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}

STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}

SHORT = 1400
"""Bytes that fit into one packet, compressed or not."""


class FieldError(msgspec.Struct, omit_defaults=True):
    """What is wrong with a field of the body, or with a parameter of the query."""

    field: str
    code: str
    limit: int | None = None


class Error(msgspec.Struct, omit_defaults=True):
    """Why a request failed: in words, by field, and by its id in the log."""

    error: str
    errors: tuple[FieldError, ...] = ()
    id: str | None = None


class Response:
    """A WSGI response.

    :param body: a list, or an iterable that is streamed.
    :param etag: a strong entity tag (RFC 9110, 8.8.3).
    """

    def __init__(
        self, status: int, headers: Headers, body: Iterable[bytes] = (), etag: str | None = None
    ) -> None:
        self.status = status
        self.headers = [*headers.items()]
        self.body = body
        self.etag = etag

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse, *exc_info: Any
    ) -> Iterable[bytes]:
        headers, body = self.headers, self.body
        if isinstance(body, list):
            headers = [*headers, ("Content-Length", str(sum(map(len, body))))]
        if self.etag is not None:
            headers = [*headers, ("ETag", self.etag)]
        start_response(STATUS_LINES[self.status], headers, *exc_info)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else body

    def compress(self, is_accepted: bool) -> None:
        """Compress a stream, or a long body, if the client accepts it.

        A response with an entity tag is left alone: a tag belongs to one encoding.
        """
        body, is_list = self.body, isinstance(self.body, list)
        if self.status != 200 or self.etag or (is_list and sum(map(len, body)) <= SHORT):
            return
        self.headers.append(("Vary", "Accept-Encoding"))
        if is_accepted:
            self.headers.append(("Content-Encoding", "gzip"))
            self.body = [gzip.compress(b"".join(body), 1)] if is_list else compress_stream(body)


class HTTPError(Exception):
    """Raised by a handler to send an error."""

    def __init__(
        self, status: int, message: str, headers: Headers | None = None, *errors: FieldError
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.error = Error(message, errors)

    def response(self) -> Response:
        return json_response(self.error, self.status, self.headers)


def json_bytes(value: Any) -> bytes:
    """Encode *value* as a line of JSON, with a space after each comma and colon."""
    return msgspec.json.format(msgspec.json.encode(value), indent=0) + b"\n"


def json_response(
    value: msgspec.Struct, status: int = 200, headers: Headers | None = None
) -> Response:
    return Response(status, {**JSON_HEADERS, **(headers or {})}, [json_bytes(value)])


def stream_json(member: str, batches: Iterable[Iterable[msgspec.Struct]]) -> Response:
    """Stream ``{member: [...]}`` batch by batch; if it is cut, it is not JSON."""

    def chunks() -> Iterator[bytes]:
        separator = f'{{"{member}": ['.encode()
        for batch in batches:
            yield separator + json_bytes(batch)[1:-2]
            separator = b", "
        yield b"]}\n"

    return Response(200, JSON_HEADERS, chunks())


def compress_stream(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Compress *chunks* so that each can be read when it arrives."""
    compressor = zlib.compressobj(1, wbits=31)
    for chunk in chunks:
        yield compressor.compress(chunk) + compressor.flush(zlib.Z_SYNC_FLUSH)
    yield compressor.flush()


def etag_of(body: bytes) -> str:
    return f'"{blake2b(body, digest_size=16).hexdigest()}"'
