"""What a client of each real server gets, above all when COMMIT fails (contract: receipt)."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from wsgiref.simple_server import make_server
from wsgiref.validate import validator

import databases
import pytest
import shapes
from server_app import CONTENT, EARLY, make_application
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session
from support import (
    PATIENCE,
    Answer,
    Server,
    environ,
    fetch,
    make_tables,
    names,
    refuse_commit,
    serving,
)

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

Registry = scoped_session[Session]

TEARING = ["waitress", "gunicorn", "gunicorn-gthread", "gunicorn-gevent", "granian"]
"""Servers that leave a stream of unknown length without its end when the application raises."""

COMPLETING = ["wsgiref", "uwsgi"]
"""Servers that end it, by closing, as if it were whole."""

SERVERS = TEARING + COMPLETING

USUAL = [shape for shape in shapes.SHAPES if shape != "replaced head"]
"""Shapes that every server takes: uWSGI fails at any exc_info, whoever gives it."""

SHAPES = [*USUAL, "single", "file"]

STREAMS = [shape for shape in USUAL if shape not in shapes.WHOLE]
"""Shapes of which something leaves before COMMIT."""

CLEAN = [
    *((shape, "GET", sized) for shape in sorted(shapes.WHOLE) for sized in [(), ("sized",)]),
    ("single", "GET", ("sized",)),
    ("file", "GET", ("sized",)),
    ("generator", "HEAD", ()),
    ("no content", "GET", ()),
]
"""Shape, method and options of what leaves only after COMMIT."""

HEADS = [
    ("single", "GET", ("sized",)),
    ("generator", "GET", ("sized",)),
    ("empty", "GET", ("sized",)),
    ("empty", "GET", ()),
    ("list", "GET", ()),
    ("generator", "HEAD", ()),
    ("no content", "GET", ()),
]
"""Shape, method and options of what a server completes, or does not, after an early head."""

lengths = pytest.mark.parametrize("sized", [(), ("sized",)], ids=["unsized", "sized"])
linted = pytest.mark.parametrize("lint", [(), ("lint",)], ids=["plain", "lint"])


def command(name: str, port: int) -> list[str]:
    at = f"127.0.0.1:{port}"
    arguments = {
        "gunicorn": ["-m", "gunicorn", "--bind", at, "server_app"],
        "gunicorn-gthread": ["-m", "gunicorn", "--bind", at, "--threads", "2", "server_app"],
        "gunicorn-gevent": ["-m", "gunicorn", "--bind", at, "-k", "gevent", "server_app"],
        "uwsgi": [
            *("-c", "import pyuwsgi; pyuwsgi.run()", "--master", "--die-on-term", "--need-app"),
            *("--http-socket", at, "--module", "server_app"),
        ],
        "granian": [
            *("-m", "granian", "--interface", "wsgi", "--blocking-threads", "2"),
            *("--port", str(port), "server_app:application"),
        ],
    }
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    return ["env", f"PYTHONPATH={path}", sys.executable, *arguments[name]]


@contextmanager
def subprocess_server(name: str, folder: Path) -> Iterator[int]:
    with (
        databases.free_port() as port,
        databases.running(command(name, port), user=None, folder=folder, port=port),
    ):
        yield port


@contextmanager
def wsgiref_server(app: WSGIApplication) -> Iterator[int]:
    with make_server("127.0.0.1", 0, app) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join(PATIENCE)
            assert not thread.is_alive()


@dataclass
class Site:
    """A running server, and its database seen from outside."""

    name: str
    port: int
    engine: Engine
    numbers: Iterator[int] = field(default_factory=count)

    def ask(self, shape: str, *options: str, method: str = "GET") -> tuple[Answer, bool]:
        """The answer of the server, and whether the item is durable when it has come."""
        name = f"item{next(self.numbers)}"
        query = "".join(f"&{option}=1" for option in options)
        answer = fetch(self.port, method, f"/{quote(shape)}?name={name}{query}")
        return answer, name in names(self.engine)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Site]]:
    """Start the server of a name when a test first wants it; all are stopped at the end."""
    with ExitStack() as stack:

        @cache
        def start(name: str) -> Site:
            folder = tmp_path_factory.mktemp(name)
            inside, outside = (make_engine(f"sqlite:///{folder}/items.db") for _ in range(2))
            stack.callback(inside.dispose)
            stack.callback(outside.dispose)
            make_tables(outside)
            server: AbstractContextManager[int]
            if name == "waitress":
                server = serving(make_application(inside))
            elif name == "wsgiref":
                server = wsgiref_server(make_application(inside))
            else:
                server = subprocess_server(name, folder)
            return Site(name, stack.enter_context(server), outside)

        yield start


@pytest.fixture(params=SERVERS)
def site(request: pytest.FixtureRequest, start: Callable[[str], Site]) -> Site:
    """Each server in turn."""
    return start(request.param)


@linted
@lengths
@pytest.mark.parametrize("shape", SHAPES)
def test_a_complete_success_has_its_row(site: Site, shape: str, sized: Any, lint: Any) -> None:
    """When a response of any shape is there, whole, its work is durable."""
    answer, durable = site.ask(shape, *sized, *lint)
    assert (answer.status, answer.content, answer.complete) == (200, CONTENT, True)
    assert durable


@linted
@pytest.mark.parametrize(
    ("shape", "method", "status"), [("generator", "HEAD", 200), ("no content", "GET", 204)]
)
def test_a_success_without_a_body_has_its_row(
    site: Site, shape: str, method: str, status: int, lint: Any
) -> None:
    """When a response that is nothing but its head is there, its work is durable."""
    answer, durable = site.ask(shape, "sized", *lint, method=method)
    assert (answer.status, answer.content, answer.complete) == (status, b"", True)
    assert durable


@pytest.mark.parametrize(("shape", "method", "options"), CLEAN)
def test_a_refused_commit_is_a_clean_error_while_nothing_has_left(
    site: Site, shape: str, method: str, options: tuple[str, ...]
) -> None:
    """Before the first byte a COMMIT that fails is to the client what a crash of the app is."""
    answer, durable = site.ask(shape, "refuse", *options, method=method)
    crashed, _ = site.ask("crash", method=method)
    # uWSGI answers an exception by closing; a proxy in front of it makes that a 502.
    assert answer.status == crashed.status == (None if site.name == "uwsgi" else 500)
    assert answer.content == crashed.content
    assert not durable


@linted
@pytest.mark.parametrize("shape", SHAPES)
def test_a_refused_commit_never_completes_a_known_length(site: Site, shape: str, lint: Any) -> None:
    """A response with a Content-Length is an error or is cut when COMMIT fails."""
    answer, durable = site.ask(shape, "sized", "refuse", *lint)
    assert answer.status != 200 or not answer.complete
    assert not durable


@pytest.mark.parametrize("site", TEARING, indirect=True)
@pytest.mark.parametrize("shape", STREAMS)
def test_a_refused_commit_cuts_a_stream_of_unknown_length(site: Site, shape: str) -> None:
    """A stream of unknown length lacks its end when COMMIT fails."""
    answer, durable = site.ask(shape, "refuse")
    # granian may hang up before the head has left it, and then there is no answer at all.
    if answer.status is not None or site.name != "granian":
        assert (answer.status, answer.headers["transfer-encoding"]) == (200, "chunked")
    assert not answer.complete
    assert not durable


@pytest.mark.parametrize("site", COMPLETING, indirect=True)
@pytest.mark.parametrize("shape", STREAMS)
def test_limit_some_servers_complete_whatever_was_raised(site: Site, shape: str) -> None:
    """A known limit: here a stream of unknown length looks whole although COMMIT failed."""
    answer, durable = site.ask(shape, "refuse")
    assert (answer.status, answer.content, answer.complete) == (200, CONTENT, True)
    assert not durable


@pytest.mark.parametrize("site", [name for name in SERVERS if name != "uwsgi"], indirect=True)
def test_a_head_that_was_replaced_is_never_completed_by_a_refused_commit(site: Site) -> None:
    """The Content-Length that counts is the last head's, on every server that takes one."""
    answer, durable = site.ask("replaced head", "sized")
    assert (answer.content, durable) == (CONTENT, True)
    answer, durable = site.ask("replaced head", "sized", "refuse")
    assert (answer.complete, durable) == (False, False)


def is_success(answer: Answer) -> bool:
    return answer.status in (200, 204) and answer.complete


def is_half_a_head(answer: Answer, site: Site, shape: str, early: str) -> bool:
    """Whether wsgiref found out within the head; to Python's client that looks whole."""
    found_out_late = (site.name, shape, early) == ("wsgiref", "generator", "snowman")
    return found_out_late and "content-type" not in answer.headers


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize(("shape", "method", "options"), [*HEADS, ("generator", "GET", ())])
def test_an_early_head_without_its_row_is_no_success(
    site: Site, shape: str, method: str, options: tuple[str, ...], early: str
) -> None:
    """What a server makes of an odd head, taken or refused, is a success only with its row."""
    answer, durable = site.ask(shape, early, *options, method=method)
    assert durable or not is_success(answer) or is_half_a_head(answer, site, shape, early)


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize(("shape", "method", "options"), HEADS)
def test_a_refused_commit_takes_back_an_early_head(
    site: Site, shape: str, method: str, options: tuple[str, ...], early: str
) -> None:
    """A head that the server got before a COMMIT that fails never becomes a whole success."""
    answer, durable = site.ask(shape, early, "refuse", *options, method=method)
    assert not is_success(answer) or is_half_a_head(answer, site, shape, early)
    assert not durable


def test_limit_http_1_0_knows_no_end_but_the_length(site: Site) -> None:
    """A known limit: to an HTTP/1.0 client a stream of unknown length always looks whole."""
    with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE) as client:
        client.sendall(b"GET /generator?name=x&refuse=1 HTTP/1.0\r\n\r\n")
        with client.makefile("rb") as answer:
            head, _, content = answer.read().partition(b"\r\n\r\n")
    assert b"content-length" not in head.lower()
    assert content == CONTENT


def in_turns(servers: list[Server], requests: list[str]) -> dict[str, BaseException]:
    """Serve all requests in this thread, a chunk of each in turn; what was raised by which."""
    running = {
        path: (server, server.begin(environ(path=path)))
        for server, path in zip(servers, requests, strict=True)
    }
    raised: dict[str, BaseException] = {}
    while running:
        for path, (server, body) in list(running.items()):
            try:
                server.write(next(body))
            except Exception as error:
                del running[path]
                server.finish()
                if not isinstance(error, StopIteration):
                    raised[path] = error
    return raised


def stream_of(registry: Registry) -> Any:
    """An application that answers with what its own session holds, item by item."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        path = environ["PATH_INFO"]
        start_response("200 OK", [("Content-Type", "text/plain")])
        for number in range(3):
            registry.add(Item(name=f"{path}{number}"))
            yield " ".join(sorted(item.name for item in registry.new)).encode()
        if path == "/refused":
            refuse_commit(registry)

    return validator(SessionMiddleware(validator(app), registry))


def test_responses_interleaved_in_one_thread_see_their_own_session(
    registry: Registry, outside: Engine
) -> None:
    """Streams that one thread pulls in turns find each its own session, and all commit."""
    servers = [Server(stream_of(registry)) for _ in range(3)]
    assert in_turns(servers, ["/a", "/b", "/c"]) == {}
    for server, path in zip(servers, ["/a", "/b", "/c"], strict=True):
        own = [f"{path}{number}" for number in range(3)]
        assert server.reply.chunks == [" ".join(own[: n + 1]).encode() for n in range(3)]
    assert sorted(map(str, names(outside))) == [f"/{p}{n}" for p in "abc" for n in range(3)]


def test_a_refused_commit_among_interleaved_responses_is_one_responses_own(
    registry: Registry, outside: Engine
) -> None:
    """Where COMMIT fails for one of several interleaved streams, the others' work stands."""
    servers = [Server(stream_of(registry)) for _ in range(3)]
    raised = in_turns(servers, ["/a", "/refused", "/c"])
    assert list(raised) == ["/refused"]
    assert isinstance(raised["/refused"], IntegrityError)
    assert sorted(map(str, names(outside))) == [f"/{p}{n}" for p in "ac" for n in range(3)]
