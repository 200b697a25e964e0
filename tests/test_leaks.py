"""Many requests of each kind leave nothing: no object, no memory, no connection.

LEAK_REQUESTS=10000 makes more of them than the default.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from sessionscope import SessionMiddleware, TransactionDoomed
from sqlalchemy import Engine, insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.exc import StaleDataError
from support import Server, environ, serve_once, text

import middleware
from models import Item

pytestmark = pytest.mark.long

Registry = scoped_session[Session]
Once = Callable[[], object]

REQUESTS = int(os.environ.get("LEAK_REQUESTS", "400"))
FEW = 100


def read(registry: Registry) -> None:
    registry.execute(insert(Item).values(name=None))
    registry.rollback()


def success(registry: Registry) -> Once:
    app = SessionMiddleware(text(b"", before=lambda: read(registry)), registry)
    return lambda: serve_once(app)


def refusal(registry: Registry) -> Once:
    app = SessionMiddleware(
        text(b"", status="404 No", before=lambda: registry.execute(insert(Item))), registry
    )
    return lambda: serve_once(app)


def exception(registry: Registry) -> Once:
    def work() -> None:
        read(registry)
        raise LookupError

    app = SessionMiddleware(text(b"", before=work), registry)

    def once() -> None:
        with suppress(LookupError):
            serve_once(app)

    return once


def recovered(registry: Registry) -> Once:
    """An error of the database that the view handles: its traceback leads to the view."""

    def work() -> None:
        for _ in range(2):
            with suppress(IntegrityError):
                registry.execute(insert(Item).prefix_with("OR ROLLBACK").values(id="no"))
            registry.rollback()
            registry.execute(insert(Item))
        registry.rollback()

    app = SessionMiddleware(text(b"", before=work), registry)
    return lambda: serve_once(app)


def closed(registry: Registry) -> Once:
    def work() -> None:
        registry.execute(insert(Item))
        registry().close()

    app = SessionMiddleware(text(b"", before=work), registry)

    def once() -> None:
        with suppress(TransactionDoomed):
            serve_once(app, environ("POST"))

    return once


def generator(registry: Registry) -> Any:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        read(registry)
        yield b"one"
        yield b"two"

    return SessionMiddleware(app, registry)


def stream(registry: Registry) -> Once:
    app = generator(registry)
    return lambda: serve_once(app)


def hang_up(registry: Registry) -> Once:
    app = generator(registry)

    def once() -> None:
        server = Server(app)
        next(server.begin())
        server.finish()

    return once


def retry(registry: Registry) -> Once:
    calls: list[int] = [0]

    def work() -> None:
        calls[0] += 1
        read(registry)
        if calls[0] % 2:
            raise StaleDataError

    app = SessionMiddleware(text(b"", before=work), registry, attempts=2)
    return lambda: serve_once(app)


def curious_observer(registry: Registry) -> Once:
    """The observer gets a session from the registry, and does nothing with it."""
    app = text(b"", before=lambda: read(registry))
    watched = SessionMiddleware(app, registry, observer=lambda _: registry())
    return lambda: serve_once(watched)


def async_view(registry: Registry) -> Once:
    async def view() -> None:
        read(registry)

    app = SessionMiddleware(text(b"", before=lambda: asyncio.run(view())), registry)
    return lambda: serve_once(app)


KINDS = [
    success, refusal, exception, recovered, closed, stream, hang_up, retry, async_view
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_requests_leave_nothing(
    kind: Callable[[Registry], Once],
    registry: Registry,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither objects nor memory grow with the number of requests."""
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.0)
    monkeypatch.setattr(logging.getLogger("sessionscope"), "disabled", True)
    once = kind(registry)
    for _ in range(FEW):
        once()
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    memory = tracemalloc.get_traced_memory()[0]
    for _ in range(FEW):
        once()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - memory
    tracemalloc.stop()
    for _ in range(REQUESTS - FEW):
        once()
    gc.collect()
    assert len(gc.get_objects()) - before < REQUESTS / 4
    assert grown < 2000 * FEW
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def late_exception(registry: Registry) -> Once:
    """An exception for ``start_response``, after the head has been sent."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        read(registry)
        yield b"one"
        try:
            raise LookupError
        except LookupError:
            start_response("500 Oops", [], sys.exc_info())

    managed = SessionMiddleware(app, registry)

    def once() -> None:
        with suppress(LookupError):
            serve_once(managed)

    return once


class Unclosable:
    """A body whose close() raises."""

    def __iter__(self) -> Iterator[bytes]:
        return iter([b"one"])

    def close(self) -> None:
        raise LookupError


def unclosable(registry: Registry) -> Once:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        read(registry)
        return Unclosable()

    managed = SessionMiddleware(app, registry)

    def once() -> None:
        with suppress(LookupError):
            serve_once(managed)

    return once


CYCLELESS = [
    success,
    refusal,
    exception,
    late_exception,
    unclosable,
    stream,
    hang_up,
    retry,
    curious_observer,
]


@pytest.mark.parametrize("kind", CYCLELESS)
def test_requests_leave_no_cycle(
    kind: Callable[[Registry], Once], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request is freed at once, without the cycle collector."""
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.0)
    monkeypatch.setattr(logging.getLogger("sessionscope"), "disabled", True)
    once = kind(registry)
    for _ in range(5):
        once()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(10):
            once()
        gc.collect()
        assert [type(one).__name__ for one in gc.garbage] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
