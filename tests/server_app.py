"""The application that the real servers of test_servers.py serve.

``/<shape>?name=x`` adds an item of that name and answers in that shape.  In the query,
``sized`` declares the Content-Length, ``refuse`` has the database refuse the COMMIT,
``lint`` puts wsgiref.validate on both sides of the middleware, and one of `EARLY` makes the
head one that goes to the server before COMMIT.  The database is ``items.db`` in the working
directory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import shapes
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine
from sqlalchemy import Engine
from sqlalchemy.orm import scoped_session, sessionmaker
from support import refuse_commit

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

CHUNKS = [b"first,", b"second,", b"last."]
CONTENT = b"".join(CHUNKS)


def single(work: Any, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    """A generator whose only chunk is everything."""
    return shapes.generator(work, status, [b"".join(chunks)], sized)


def file(work: Any, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    """A real file, which some servers send without reading it."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response(status, shapes.headers(chunks, sized))
        opened = tempfile.TemporaryFile()  # noqa: SIM115  the server closes it
        opened.writelines(chunks)
        opened.seek(0)
        body: Iterable[bytes] = environ.get("wsgi.file_wrapper", FileWrapper)(opened)
        return body

    return app


def no_content(work: Any, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("204 No Content", [])
        yield b""
        work()

    return app


def empty(work: Any, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    """A generator without a chunk."""
    return shapes.generator(work, status, [], sized)


def crash(work: Any, status: str, chunks: list[bytes], sized: bool) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        raise RuntimeError("from the app")

    return app


SHAPES = {
    **shapes.SHAPES,
    "single": single,
    "empty": empty,
    "file": file,
    "no content": no_content,
    "crash": crash,
}


class Text(str):
    """A string of the application's own class."""


EARLY: dict[str, Callable[[str, Any], tuple[str, Any]]] = {
    "no-reason": lambda status, headers: (f"{status[:3]} ", headers),
    "hop-by-hop": lambda status, headers: (status, [*headers, ("Connection", "close")]),
    "subclass": lambda status, headers: (status, [*headers, ("X-Name", Text("name"))]),
    "tuple": lambda status, headers: (status, tuple(headers)),
    "snowman": lambda status, headers: (status, [*headers, ("X-Name", "\u2603")]),
}
"""What makes a head one that a server may refuse."""


def oddly(app: WSGIApplication, early: str) -> WSGIApplication:
    """The same application with an odd head."""

    def with_odd_head(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def odd_start(status: str, headers: Any, *exc_info: Any) -> Any:
            return start_response(*EARLY[early](status, headers), *exc_info)

        return app(environ, odd_start)

    return with_odd_head


def make_application(engine: Engine) -> WSGIApplication:
    registry = scoped_session(sessionmaker(engine))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        query = parse_qs(environ["QUERY_STRING"])

        def work() -> None:
            registry.add(Item(name=query["name"][0]))
            if "refuse" in query:
                refuse_commit(registry)

        shape = SHAPES[environ["PATH_INFO"].strip("/")]
        answering = shape(work, "200 OK", CHUNKS, "sized" in query)
        for early in EARLY.keys() & query.keys():
            answering = oddly(answering, early)
        return answering(environ, start_response)

    plain = SessionMiddleware(app, registry)
    linted = validator(SessionMiddleware(validator(app), registry))

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        chosen = linted if "lint=" in environ["QUERY_STRING"] else plain
        return chosen(environ, start_response)

    return application


application = make_application(make_engine("sqlite:///items.db"))
