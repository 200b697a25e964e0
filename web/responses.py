"""Responses: JSON, entity tags, and the one shape that every error has.

An error is ``{"error": sentence}``.  Where fields of the body or of the query are to blame it
also has ``errors``, which say so to programs: ``{"field": "name", "code": "too_long",
"limit": 16}``.  WebOb's Response is not used: it makes a Location absolute, which is wrong behind
a proxy, and takes twenty times as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from wsgiref.headers import Headers

import msgspec

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

JSON = "application/json"

JSON_HEADERS = {
    "Content-Type": JSON,
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}

STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


class FieldError(msgspec.Struct, omit_defaults=True, frozen=True):
    """What is wrong with a field of the body, or with a parameter of the query."""

    field: str
    code: str
    limit: int | None = None


class Error(msgspec.Struct, omit_defaults=True):
    """Why a request has no success, in words, by field, and by the id that the log has."""

    error: str
    errors: tuple[FieldError, ...] = ()
    id: str | None = None


class Response:
    """A WSGI response: a status, headers, and a body that is a list or a stream."""

    def __init__(self, status: int, headers: Mapping[str, str], body: Iterable[bytes] = ()) -> None:
        self.status = status
        self.headers = Headers([*headers.items()])
        self.body = body

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse, *exc_info: Any
    ) -> Iterable[bytes]:
        start_response(STATUS_LINES[self.status], self.headers.items(), *exc_info)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else self.body


class HTTPError(Exception):
    """Raised by a handler to respond with an error instead."""

    def __init__(
        self,
        status: int,
        message: str,
        headers: Mapping[str, str] | None = None,
        *,
        errors: tuple[FieldError, ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}
        self.errors = errors

    def response(self) -> Response:
        return _with_body(_error_bytes(self.message, self.errors), self.status, self.headers)


@lru_cache(maxsize=64)
def _error_bytes(message: str, errors: tuple[FieldError, ...]) -> bytes:
    return json_bytes(Error(message, errors))


def json_bytes(value: Any) -> bytes:
    """Encode *value* as a line of JSON, with a space after each comma and colon."""
    return msgspec.json.format(msgspec.json.encode(value), indent=0) + b"\n"


def json_response(
    value: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return _with_body(json_bytes(value), status, headers or {})


def _with_body(body: bytes, status: int, headers: Mapping[str, str]) -> Response:
    return Response(status, {**JSON_HEADERS, "Content-Length": str(len(body)), **headers}, [body])


def stream_json(member: str, batches: Iterable[Iterable[msgspec.Struct]]) -> Response:
    """Send ``{member: [...]}`` batch by batch; until the last it is no JSON, if it is cut."""

    def chunks() -> Iterator[bytes]:
        separator = f'{{"{member}": ['.encode()
        for batch in batches:
            yield separator + json_bytes(batch)[1:-2]
            separator = b", "
        yield b"]}\n"

    return Response(200, JSON_HEADERS, chunks())


def etag_of(body: bytes) -> str:
    """Return a strong entity tag (RFC 9110, 8.8.3): equal for equal bytes, and only for them."""
    return f'"{blake2b(body, digest_size=16).hexdigest()}"'
