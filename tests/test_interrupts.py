"""An interrupt between any two lines of the library leaves nothing behind.

A signal handler may raise anywhere: Ctrl-C, a worker's timeout, a killed greenlet.  Each test
plays one kind of request again and again, with an exception at the first line of the library
that runs, at the second, and so on, until a request comes through.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import sessionscope
from conftest import engine_at
from sessionscope import SessionMiddleware, engines, on_commit, session_scope
from sessionscope.stage import entries
from sqlalchemy import Engine, create_engine, insert
from sqlalchemy import text as sql
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.exc import StaleDataError
from support import Server, environ, names, serve_once, text

import middleware
from models import Item

pytestmark = pytest.mark.long

Registry = scoped_session[Session]

LIBRARY = (str(Path(sessionscope.__file__).parent), middleware.__file__)


class Interrupted(BaseException):
    """What the signal handler raises."""


class Interrupt:
    """Raises at the n-th line of the library that this thread runs."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.place = ""

    def __enter__(self) -> Interrupt:
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise Interrupted(self.place)
        return self.trace


def checked_out(engine: Engine) -> int:
    return engine.pool.checkedout()  # type: ignore[attr-defined,no-any-return]


Play = Callable[[Registry], bytes]


def add(registry: Registry) -> None:
    registry.execute(insert(Item).values(name="x"))


def as_list(registry: Registry) -> bytes:
    app = text(b"fine", before=lambda: add(registry))
    return serve_once(SessionMiddleware(app, registry), environ("POST")).content


def refused(registry: Registry) -> bytes:
    app = text(b"no", status="409 Conflict", before=lambda: add(registry))
    return serve_once(SessionMiddleware(app, registry), environ("POST")).content[2:]


def raised(registry: Registry) -> bytes:
    def work() -> None:
        add(registry)
        raise LookupError

    with suppress(LookupError):
        serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    return b""


def stream(registry: Registry) -> Any:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "4")])
        add(registry)
        yield b"fi"
        yield b"ne"

    return SessionMiddleware(app, registry)


def as_stream(registry: Registry) -> bytes:
    return serve_once(stream(registry), environ("POST")).content


def hung_up(registry: Registry) -> bytes:
    server = Server(stream(registry))
    try:
        next(server.begin(environ("POST")))
    finally:
        server.finish()
    return b""


def retried(registry: Registry) -> bytes:
    calls: list[int] = []

    def work() -> None:
        add(registry)
        calls.append(1)
        if len(calls) == 1:
            raise StaleDataError

    app = SessionMiddleware(text(b"fine", before=work), registry, attempts=2)
    return serve_once(app, environ("POST")).content


def two_databases(registry: Registry) -> bytes:
    other = create_engine("sqlite://")

    def work() -> None:
        add(registry)
        registry.execute(sql("SELECT 1"), bind_arguments={"bind": other})

    try:
        app = SessionMiddleware(text(b"fine", before=work), registry)
        return serve_once(app, environ("POST")).content
    finally:
        other.dispose()


def observed(registry: Registry) -> bytes:
    def work() -> None:
        add(registry)
        on_commit(registry, lambda: registry().get(Item, 1))

    observe = SessionMiddleware(
        text(b"fine", before=work), registry, observer=lambda outcome: registry()
    )
    return serve_once(observe, environ("POST")).content


def scope(registry: Registry) -> bytes:
    with session_scope(registry) as session:
        session.add(Item(name="x"))
    return b"fine"


@pytest.fixture
def engine(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine that doesn't wait for a connection that was left out."""
    monkeypatch.setattr(engines, "POOL_TIMEOUT", 0.0)
    yield from engine_at(sqlite_url)


@pytest.fixture(autouse=True)
def _only_what_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait, and nothing is logged."""
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.0)
    # Captured log records hold tracebacks, and so sessions.
    monkeypatch.setattr(logging.getLogger("sessionscope"), "disabled", True)


@pytest.mark.parametrize(
    "play",
    [as_list, refused, raised, as_stream, hung_up, retried, two_databases, observed, scope],
    ids=lambda play: play.__name__,
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_leaves_nothing_behind(
    play: Play, registry: Registry, engine: Engine, outside: Engine
) -> None:
    """Nothing stays on stage, no connection is out, no success lacks its row, the next is sound."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(interrupt_everywhere, play, registry, engine, outside).result()


def interrupt_everywhere(play: Play, registry: Registry, engine: Engine, outside: Engine) -> None:
    """Play until a request comes through.

    In a thread of its own: a tracer that raises leaves an exception in ``sys.exc_info()``.
    """
    play(registry)
    at, rows = 0, len(names(outside))
    while True:
        at += 1
        content = b""
        with Interrupt(at) as interrupt:
            try:
                content = play(registry)
            except BaseException:
                if not interrupt.place:
                    raise
        assert list(entries()) == [], f"something is on stage after {interrupt.place}"
        assert not registry.registry.has(), f"a session is left after {interrupt.place}"
        # SQLAlchemy leaves a cycle with the error.  And at the first line of close() nobody has
        # closed the response yet.
        gc.collect()
        assert checked_out(engine) == 0, f"a connection is out after {interrupt.place}"
        more = len(names(outside)) - rows
        assert content != b"fine" or more == 1, f"a success without its row at {interrupt.place}"
        assert more in (0, 1), f"work was done twice after {interrupt.place}"
        if not interrupt.place:
            break
        rows += more
    assert at > 50
