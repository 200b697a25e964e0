"""Every shape that a WSGI response can have, each as an application.

An application does its *work* when it makes the response, at the latest moment that
its shape allows.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    Work = Callable[[], object]
    Shape = Callable[[Work, str, list[bytes], bool], WSGIApplication]


def headers(chunks: list[bytes], sized: bool) -> list[tuple[str, str]]:
    made = [("Content-Type", "text/plain")]
    if sized:
        made.append(("Content-Length", str(sum(map(len, chunks)))))
    return made


def as_list(work: Work, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, headers(chunks, sized))
        work()
        return list(chunks)

    return app


def as_tuple(work: Work, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, headers(chunks, sized))
        work()
        return tuple(chunks)

    return app


def generator(work: Work, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    """start_response in the call, the work after the last chunk."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, headers(chunks, sized))
        return body()

    def body() -> Iterator[bytes]:
        yield from chunks
        work()

    return app


def late_generator(work: Work, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    """Everything, start_response too, happens in the first next()."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response(status, headers(chunks, sized))
        yield from chunks
        work()

    return app


class Closing:
    """An iterable, not an iterator, with a close() that counts."""

    def __init__(self, chunks: list[bytes], work: Work) -> None:
        self.chunks = chunks
        self.work = work
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        yield from self.chunks
        self.work()

    def close(self) -> None:
        self.closed += 1


def closing(work: Work, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, headers(chunks, sized))
        return Closing(chunks, work)

    return app


def legacy_write(work: Work, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    """The first half by write(), the rest in a list."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write: Any = start_response(status, headers(chunks, sized))
        half = (len(chunks) + 1) // 2
        for chunk in chunks[:half]:
            write(chunk)
        work()
        return chunks[half:]

    return app


def write_and_yield(work: Work, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    """The first half by write(), the rest by a generator."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write: Any = start_response(status, headers(chunks, sized))
        half = (len(chunks) + 1) // 2
        for chunk in chunks[:half]:
            write(chunk)
        return rest(chunks[half:])

    def rest(left: list[bytes]) -> Iterator[bytes]:
        yield from left
        work()

    return app


def file_wrapper(work: Work, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    """The server's own file wrapper, or a list where it has none."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, headers(chunks, sized))
        work()
        wrap: Any = environ.get("wsgi.file_wrapper", list)
        return wrap(io.BytesIO(b"".join(chunks)))  # type: ignore[no-any-return]

    return app


def replaced_head(work: Work, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    """A head that is taken back, with exc_info, before the first byte."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("202 Accepted", [("Content-Type", "text/html"), ("Content-Length", "1")])
        try:
            raise LookupError("changed my mind")
        except LookupError:
            start_response(status, headers(chunks, sized), sys.exc_info())
        yield from chunks
        work()

    return app


def blanks(work: Work, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    """Empty chunks before, between and after."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, headers(chunks, sized))
        return body()

    def body() -> Iterator[bytes]:
        yield b""
        for chunk in chunks:
            yield chunk
            yield b""
        work()

    return app


SHAPES: dict[str, Shape] = {
    "list": as_list,
    "tuple": as_tuple,
    "generator": generator,
    "late generator": late_generator,
    "closing": closing,
    "write": legacy_write,
    "write and yield": write_and_yield,
    "file wrapper": file_wrapper,
    "replaced head": replaced_head,
    "blanks": blanks,
}

WHOLE = {"list", "tuple", "write", "file wrapper"}
"""Shapes whose work is over before the server gets anything."""

CONTENTS: dict[str, list[bytes]] = {
    "empty": [],
    "one chunk": [b"hello"],
    "three chunks": [b"one ", b"two ", b"three"],
    "megabytes": [bytes([65 + n]) * 700_000 for n in range(5)],
}
