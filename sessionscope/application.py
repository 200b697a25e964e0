"""One call of the application, in place of the server (PEP 3333)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sessionscope.response import END, Head, is_whole

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from sessionscope.response import Headers


class Call:
    """One call of an application: its head (status and headers), held back, and its iterable.

    :param method: the request's method; the application may change the environ.
    :param start_response: that of the server.
    :param on_start: called when the application has called ``start_response``.
    """

    head: Head | None = None
    iterable: object = None
    exhausted = False
    """The application has ended."""

    def __init__(
        self,
        environ: WSGIEnvironment,
        method: str,
        start_response: StartResponse,
        on_start: Callable[[], None],
    ) -> None:
        self.environ = environ
        self.method = method
        self.server_start_response: Callable[..., Any] = start_response
        self.on_start = on_start
        self.iterator: Iterator[Any] = iter(())
        self.written: list[Any] = []
        """The chunks that were passed to ``write()``, which precede the body."""
        self.ahead: list[Any] = []
        """Chunks to be returned before the next of the iterator."""

    def begin(self, app: WSGIApplication) -> Any:
        """Call *app*; return its body if iterating over it runs none of its code, else None."""
        body: Any = app(self.environ, self.start_response)
        self.iterable = body
        if self.written and type(body) in (list, tuple):
            body = [*self._take_written(), *body]
        if not self.written and is_whole(body, self.environ):
            self.exhausted = True
            return body
        self.iterator = iter(body)
        return None

    def start_response(
        self, status: str, headers: Headers, exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Hold back the head (PEP 3333, "The start_response() Callable").

        A head that replaces another also discards the body so far.

        :raises AssertionError: for a second call without *exc_info*.
        """
        if exc_info is not None:
            if self.head is not None and self.head.sent:
                try:
                    raise exc_info[1].with_traceback(exc_info[2])
                finally:
                    exc_info = None  # PEP 3333: no cycle of frames
            self.written.clear()
        elif self.head is not None:
            raise AssertionError("start_response was called again without exc_info (PEP 3333)")
        self.head = Head(self.method, status, headers, exc_info)
        self.on_start()
        return self.written.append

    def next(self) -> Any:
        """Run the application for its next chunk; `END` if there is none."""
        try:
            chunk = next(self.iterator, END)
        except BaseException:
            self.exhausted = True
            raise
        self.exhausted = chunk is END
        return chunk

    def put_written_before(self, chunk: Any) -> Any:
        """Return the first chunk passed to ``write()``; *chunk* comes after those."""
        first, *self.ahead = [*self._take_written(), chunk]
        return first

    def _take_written(self) -> list[Any]:
        taken = self.written.copy()
        self.written.clear()
        return taken

    def status_and_headers(self) -> tuple[str, Headers] | None:
        """Return a copy of status and headers; None if there are none yet."""
        head = self.head
        if head is None:
            return None
        return head.status, list(head.headers) if isinstance(head.headers, Iterable) else []

    def send_head(self) -> None:
        """Pass the head to the server, once; if there is none, the server raises."""
        if self.head is not None and not self.head.sent:
            self.head.send(self.server_start_response)

    def replace_head(self) -> None:
        """Replace a head that the server has: uWSGI sends even one that it has rejected."""
        if self.head is not None and self.head.sent:
            headers = [("Content-Length", "0")]
            with suppress(Exception):
                self.server_start_response("500 Internal Server Error", headers, sys.exc_info())

    def close(self) -> None:
        """Close the iterable, not its iterator (PEP 3333)."""
        close = getattr(self.iterable, "close", None)
        if close is not None:
            close()

    def forget(self) -> None:
        """Drop references, so that a traceback or a server that keeps the body frees the rest."""
        self.iterable, self.iterator = None, iter(())
        self.server_start_response = _nobody
        self.on_start = _nobody
        if self.head is not None:
            self.head.exc_info = None


def _nobody(*_head: object) -> None:
    """Replace the server's ``start_response`` when the response is over."""
