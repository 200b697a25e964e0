"""HTTP for requests with an Idempotency-Key: the header, the body, stored responses, problems.

Nothing here knows of sessions.  RFC 9110 is HTTP, RFC 9457 problem details, RFC 9651 structured
fields, and PEP 3333 (https://peps.python.org/pep-3333/) is WSGI.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from sessionscope.response import Head, is_success

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from sessionscope.response import Headers

MAX_KEY = 255
"""Maximum number of characters of a key."""

MAX_RESPONSE = 2**24 - 1
"""Maximum size of a stored response with its headers, in bytes: that of MariaDB's MEDIUMBLOB."""

NOT_STORED = frozenset({"date", "set-cookie"})
"""Headers that are valid for one message only, or for one moment of a client's session."""

PHRASES = {
    400: "Bad Request",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    422: "Unprocessable Content",
}

# A String (RFC 9651, 3.3.3) whose parameters (3.1.2) mean nothing here; or its characters
# without quotes, as most clients send them.  A comma would separate two fields (RFC 9110, 5.3).
_STRING = r'"((?:[ !#-\[\]-~]|\\["\\])*)"'
_PARAMETER = r' *; *[a-z*][a-z0-9_.*-]*(?:=(?:"(?:[ !#-\[\]-~]|\\["\\])*"|[!#-+\--:<-~]+))?'
_QUOTED = re.compile(f"{_STRING}(?:{_PARAMETER})*")
_BARE = re.compile(r"[ !#-+\--\[\]-~]*")
_NUMBER = re.compile(r"[0-9]+")


class Problem(Exception):
    """The reason why a request is rejected, as problem details (RFC 9457).

    docs/troubleshooting.md has a heading for each title.
    """

    def __init__(self, status: int, title: str, headers: Headers | None = None) -> None:
        super().__init__(title)
        self.status = status
        self.title = title
        self.headers = headers or []

    def respond(self, start_response: StartResponse, help: str, *exc_info: Any) -> list[bytes]:
        """Send the problem details.

        :param help: the URI for ``type``.
        """
        details = {"type": help, "title": self.title, "status": self.status}
        body = json.dumps(details).encode()
        headers = [
            ("Content-Type", "application/problem+json"),
            ("Content-Length", str(len(body))),
            *self.headers,
        ]
        start_response(f"{self.status} {PHRASES[self.status]}", headers, *exc_info)
        return [body]


def in_progress() -> Problem:
    title = "A request with this Idempotency-Key is still running"
    return Problem(409, title, [("Retry-After", "1")])


def parse_key(text: str) -> str:
    """Return the key in the value of the header.

    :raises Problem: 400 if it is not one String of 1 to 255 characters (RFC 9651, 3.3.3).
    """
    text = text.strip(" \t")
    quoted = _QUOTED.fullmatch(text)
    if quoted is None and not _BARE.fullmatch(text):
        raise Problem(400, "Idempotency-Key must be one String of printable ASCII (RFC 9651)")
    key = text if quoted is None else re.sub(r"\\(.)", r"\1", quoted[1])
    if not 1 <= len(key) <= MAX_KEY:
        raise Problem(400, f"Idempotency-Key must have 1 to {MAX_KEY} characters")
    return key


def read_body(environ: WSGIEnvironment, limit: int) -> bytes:
    """Read the body of the request.

    :param limit: its maximum size in bytes; at most one more byte is read.
    :raises Problem: 400 if it is incomplete, 413 if it is too long, 411 if the server does not
        say where it ends.
    """
    length = environ.get("CONTENT_LENGTH") or ""
    too_long = Problem(413, f"A request with an Idempotency-Key may have at most {limit} bytes")
    if length and not _NUMBER.fullmatch(length):
        raise Problem(400, "Content-Length must be a number")
    if len(length) > 18 or (length and int(length) > limit):
        raise too_long
    ends = environ.get("wsgi.input_terminated")
    if not length and not ends and "HTTP_TRANSFER_ENCODING" in environ:
        # Reading could block for ever, or return something else than the application would get.
        raise Problem(411, "With an Idempotency-Key, a body needs a Content-Length here")
    wanted = int(length) if length else (limit + 1 if ends else 0)
    body = b""
    while len(body) < wanted and (piece := environ["wsgi.input"].read(wanted - len(body))):
        body += piece
    if len(body) > limit:
        raise too_long
    if length and len(body) < wanted:
        raise Problem(400, "The body is shorter than its Content-Length")
    return body


def digest(*parts: str | bytes) -> str:
    """Return the SHA-256 of *parts* in hexadecimal; each part is preceded by its length."""
    result = sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        result.update(b"%d:%b" % (len(data), data))
    return result.hexdigest()


def request_digest(environ: WSGIEnvironment, body: bytes) -> str:
    """Return the digest of everything in which two requests must agree to be the same."""
    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    query, kind = environ.get("QUERY_STRING", ""), environ.get("CONTENT_TYPE") or ""
    host = environ.get("HTTP_HOST") or environ.get("SERVER_NAME", "")
    host = re.sub(":[0-9]*$", "", host.lower())  # ports may differ behind a proxy
    return digest(environ["REQUEST_METHOD"], host, path, query, kind, body)


class Recording:
    """A response that is recorded while it is passed on.

    :param start_response: that of the server.
    :param limit: maximum number of bytes of the body that are kept; a longer body is still sent.
    """

    def __init__(self, start_response: StartResponse, limit: int) -> None:
        self.server_start_response = start_response
        self.limit = limit
        self.status: object = None
        self.headers: object = None
        self.chunks: list[bytes] = []
        self.room = limit

    def start_response(
        self, status: str, headers: Headers, exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """Pass the head on; a head that replaces another also discards the recorded body."""
        more = [] if exc_info is None else [exc_info]
        write = self.server_start_response(status, headers, *more)
        self.status, self.headers = status, headers.copy() if type(headers) is list else None
        self.chunks, self.room = [], self.limit

        def write_and_record(chunk: bytes) -> object:
            self.add(chunk)
            return write(chunk)

        return write_and_record

    def add(self, chunk: object) -> None:
        """Record *chunk*; nothing is kept of a body that is too long, or is not bytes."""
        if isinstance(chunk, bytes) and len(chunk) <= self.room:
            self.room -= len(chunk)
            self.chunks.append(chunk)
        else:
            self.room = -1
            self.chunks.clear()

    @property
    def is_success(self) -> bool:
        return is_success(self.status)

    def as_http(self) -> bytes | None:
        """Return the response in the format of HTTP/1.1; None if it cannot be kept."""
        if self.room < 0 or not isinstance(self.headers, list):
            return None
        try:
            stored = [(name, value) for name, value in self.headers if not _is_left_out(name)]
            lines = [f"HTTP/1.1 {self.status}", *(f"{name}: {value}" for name, value in stored)]
            head = "\r\n".join(lines).encode("latin-1")
        except (AttributeError, TypeError, ValueError):
            return None  # left to the server, which may reject such headers
        # Bytes beyond the Content-Length are dropped on their way, and a 204 has no body.
        length = Head("", str(self.status), self.headers, None).length
        written = head + b"\r\n\r\n" + b"".join(self.chunks)[:length]
        is_plain = len(re.split(b"[\r\n]+", head)) == len(lines)
        return written if is_plain and len(written) <= MAX_RESPONSE else None


def _is_left_out(name: str) -> bool:
    return name.lower() in NOT_STORED


def replay(written: bytes, start_response: StartResponse) -> list[bytes]:
    """Send a response that `Recording.as_http` returned, with ``Idempotent-Replayed: true``."""
    head, _, body = written.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(": ") for line in lines)
    headers = [(name, value) for name, _, value in pairs]
    start_response(status.removeprefix("HTTP/1.1 "), [*headers, ("Idempotent-Replayed", "true")])
    return [body] if body else []
