"""The response, by the rules of PEP 3333 (https://peps.python.org/pep-3333/) and RFC 9110.

Which status and headers (together: the head) a server may reject, after how many bytes a response
is complete, and a streamed body that holds back its last chunk.  Nothing here knows of sessions.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    Headers = list[tuple[str, str]]

log = logging.getLogger("sessionscope")

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, 9.2.1

END: Any = object()
"""Returned instead of a chunk if there are no more."""

_NOTHING: Any = object()

_SUCCESS = frozenset(f"{code}{end}" for code in range(200, 400) for end in ("", " "))
_LENGTH = re.compile(r"[ \t]*([0-9]+)[ \t]*")  # RFC 9110, 5.5: space around is no part of it
_TEXT = r"[\t\x20-\x7e\x80-\xff]*"  # latin-1 (PEP 3333, "Unicode Issues") without controls
_STATUS = re.compile(rf"[0-9]{{3}} (?=[^ ]){_TEXT}")
_FIELD = rf"""
    (?! (connection | keep-alive | proxy-authenticate | proxy-authorization | te | trailers
         | transfer-encoding | upgrade) \n )  # hop-by-hop: PEP 3333, "Other HTTP Features"
    (content-length \n [0-9]+
     | (?! content-length \n) [!\#$%&'*+.^_`|~0-9a-z-]+ \n {_TEXT})  # RFC 9110, 5.1 and 5.5
    """
_FIELDS = re.compile(rf"( {_FIELD} ( \n\n {_FIELD} )* )?", re.VERBOSE | re.IGNORECASE | re.ASCII)
"""Header fields: name and value are lines, with an empty line between two fields."""


def is_success(status: object) -> bool:
    """Return whether *status* is 2xx or 3xx; False if it is not a status line."""
    return isinstance(status, str) and status[:4] in _SUCCESS


class Head:
    """Status and headers as the application gave them to ``start_response``."""

    def __init__(self, method: str, status: str, headers: Headers, exc_info: Any) -> None:
        self.method = method
        self.status = status
        # The application may change its list afterwards, and the server the one that it
        # gets, so each has its own list, and this is a third.
        self.odd = type(headers) is not list
        self.headers: Any = list(headers) if isinstance(headers, (list, Iterator)) else headers
        self.exc_info = exc_info
        self.sent = False

    def may_be_refused(self) -> bool:
        """Return whether a server may reject the head."""
        if self.odd or type(self.status) is not str or not _STATUS.fullmatch(self.status):
            return True
        try:
            shapes = {(type(header), *map(type, header)) for header in self.headers}
            fields = "\n\n".join(map("\n".join, self.headers))
        except TypeError:
            return True
        # A line break in a value could make it look like more fields.
        broken = fields.count("\n") > 3 * len(self.headers)
        return broken or not shapes <= {(tuple, str, str)} or not _FIELDS.fullmatch(fields)

    @cached_property
    def length(self) -> int | None:
        """The number of bytes after which the response is complete; None if it is unknown.

        Of several Content-Length, also in one field, the smallest counts (RFC 9110, 8.6).
        """
        status = self.status
        if self.method == "HEAD" or (isinstance(status, str) and status[:3] in ("204", "304")):
            return 0
        lengths: list[int] = []
        try:
            for name, value in self.headers:
                if name.lower() == "content-length":
                    found = [_LENGTH.fullmatch(one) for one in value.split(",")]
                    lengths += [int(one[1]) for one in found if one is not None]
        except (TypeError, ValueError, AttributeError):
            return None  # left to the server, which may reject these headers
        return min(lengths, default=None)

    def send(self, start_response: StartResponse) -> None:
        """Pass the head to the server, which may reject it by raising."""
        self.sent = True
        headers = self.headers.copy() if isinstance(self.headers, list) else self.headers
        if self.exc_info is None:
            start_response(self.status, headers)
        else:
            exc_info, self.exc_info = self.exc_info, None  # PEP 3333: no cycle of frames
            start_response(self.status, headers, exc_info)


def is_whole(body: object, environ: WSGIEnvironment) -> bool:
    """Return whether iterating over *body* runs none of the application's code."""
    if isinstance(body, (list, tuple)):
        return type(body).__iter__ in (list.__iter__, tuple.__iter__)
    if not hasattr(body, "__iter__") and not hasattr(body, "__getitem__"):
        return True  # no body at all: left to the server, which raises
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, type):
        if type(body) is not wrapper:
            return False
        # wsgiref and gunicorn call it filelike, waitress calls it file.
        return _is_file(getattr(body, "filelike", None) or getattr(body, "file", None))
    # uWSGI's wrapper is a function that returns the file itself.
    return wrapper is not None and _is_file(body)


def _is_file(file: Any) -> bool:
    """Return whether reading *file* runs no Python code: it is a file, or a buffer in memory.

    A reader of ``io`` has a ``fileno()`` if its source has.
    """
    if type(file) is io.BytesIO:
        return True
    try:
        return isinstance(file.fileno(), int)
    except (AttributeError, OSError):
        return False


def size_of(chunk: Any) -> int:
    """Return the bytes in a chunk; 1 if it has no size, so that the server gets and rejects it."""
    if isinstance(chunk, memoryview):
        return chunk.nbytes
    return len(chunk) if hasattr(chunk, "__len__") else 1


def _keep(chunk: Any) -> Any:
    """Return *chunk*, or a copy if the application could change it while it is held back."""
    return bytes(chunk) if isinstance(chunk, (bytearray, memoryview)) else chunk


class Source(Protocol):
    """The source of the chunks of a `StreamedBody`."""

    @property
    def head(self) -> Head | None:
        """The head that was passed to ``start_response`` last."""

    def pull(self) -> Any:
        """Return the next chunk; `END` when the body is exhausted and the work committed."""

    def finish(self) -> None:
        """Close the application's iterable."""

    def release(self) -> None:
        """Release all resources; may be called twice."""


class StreamedBody:
    """A response that is produced while it is sent.

    Each chunk is passed on at once, except the one that completes the Content-Length: that is
    passed on when the source has ended.  It is an iterator with ``close()`` rather than a
    generator, because a generator that is closed before its first ``next()`` never runs its
    ``finally``.

    :param name: the request, for the log.
    """

    def __init__(self, source: Source, name: object) -> None:
        self.source = source
        self.name = name
        self.head: Head | None = None
        self.received = 0
        self.first: Any = _NOTHING

    def prefetch(self) -> None:
        """Get the first chunk that is not empty.

        Inside the call of the application, because some servers take the head between the
        call and the first ``next()``.
        """
        self.first = self._advance()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self.first is _NOTHING:
            chunk = self._advance()
        else:
            chunk, self.first = self.first, _NOTHING
        if chunk is END:
            self.first = END
            raise StopIteration
        return chunk  # type: ignore[no-any-return]

    def _advance(self) -> Any:
        """Return the next chunk that may be sent; `END` after the last."""
        withheld, excess = END, 0
        while True:
            chunk, head = self.source.pull(), self.source.head
            if head is not self.head:  # the new head takes back the old one's body
                self.head, withheld, self.received, excess = head, END, 0, 0
            if chunk is END:
                self._compare(excess)
                return withheld
            length = None if head is None else head.length
            size = len(chunk) if type(chunk) is bytes else size_of(chunk)
            if size == 0:
                if head is not None and head.sent and withheld is END:
                    return chunk
            elif length is None or self.received + size < length:
                self.received += size
                return chunk
            elif self.received < length:
                self.received += size
                withheld = _keep(chunk)
            else:
                excess += size

    def _compare(self, excess: int) -> None:
        """Log the difference between the body, which has ended, and its Content-Length."""
        head = self.head
        if head is None:
            return
        # A server must not send the body of a HEAD response (RFC 9110, 9.3.2), and many
        # applications leave it to the server to drop it.
        if excess and head.method != "HEAD":
            message = "%s: %d bytes beyond the Content-Length were dropped"
            log.warning(message, str(self.name), excess)
        elif head.length is not None and self.received < head.length:
            message = "%s: the body ended after %d of %d bytes"
            log.warning(message, str(self.name), self.received, head.length)

    def close(self) -> None:
        """End the request.  The server calls this in any case (PEP 3333)."""
        try:
            self.first = END
            self.source.finish()
        finally:
            self.source.release()  # also when an interrupt struck in finish()
