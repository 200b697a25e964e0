"""Payments, each made once: the application of the tests that kill what serves it.

``POST`` makes a payment of the name that is the body.  ``Authorization`` says whose it is.
Headers are no part of the request that a key stands for, so they say what shall happen in one
attempt: ``X-View`` is what the view answers with, ``X-Die`` is where the process kills itself.

``ONCE_DATABASE`` has one URL or more, of which each process takes one; with ``ONCE_KEYS=no``
the keys mean nothing.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sessionscope import SessionMiddleware, on_commit
from sessionscope.engines import make_engine
from sessionscope.idempotency import Idempotency, idempotency_table
from sqlalchemy import Engine, MetaData, event
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

keys = idempotency_table(MetaData(), "once")  # the service has a table of the usual name


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # no further, whenever the signal comes


def die_if_told(environ: WSGIEnvironment, point: str) -> None:
    if environ.get("HTTP_X_DIE") == point:
        die()


def caller(environ: WSGIEnvironment) -> str:
    return str(environ["HTTP_AUTHORIZATION"])


def payments(registry: scoped_session[Session]) -> WSGIApplication:
    """An application of one view; each of its answers differs from all others."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or -1)
        name = environ["wsgi.input"].read(length).decode()
        if len(name) < length:
            start_response("400 Bad Request", [])
            return []
        die_if_told(environ, "before the work")
        item = Item(name=name)
        registry.add(item)
        registry.flush()
        time.sleep(random.uniform(0, float(environ.get("HTTP_X_PACE", "0"))))
        die_if_told(environ, "after the work")
        if environ.get("HTTP_X_DIE") == "before COMMIT":
            registry.connection().info["doomed"] = True
        on_commit(registry, lambda: die_if_told(environ, "in on_commit"))
        if environ.get("HTTP_X_DIE") == "after an early commit":
            registry.commit()
            die()
        view = environ.get("HTTP_X_VIEW")
        headers = [("Content-Type", "text/plain"), ("Location", f"/payments/{item.id}")]
        if view == "fail":
            start_response("503 Service Unavailable", headers[:1])
            return [b"not now"]
        start_response("201 Created", headers)
        chunks = [b"payment %d of " % item.id, name.encode(), b": ", uuid4().bytes]
        return stream(environ, chunks) if view == "stream" else [b"".join(chunks)]

    return app


def stream(environ: WSGIEnvironment, chunks: list[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        die_if_told(environ, "in the stream")


def make_application(engine: Engine, keyed: bool = True) -> WSGIApplication:
    registry = scoped_session(sessionmaker(engine))
    app = payments(registry)
    once = Idempotency(app, keys, scope=caller, required=True) if keyed else app
    application = SessionMiddleware(once, registry, attempts=5)

    @event.listens_for(engine, "commit")
    def before_commit(connection: Any) -> None:
        if connection.info.get("doomed"):
            die()

    def outermost(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body = application(environ, start_response)
        die_if_told(environ, "after COMMIT")  # of a list, whose head has not left yet
        return dying_at_the_end(body) if environ.get("HTTP_X_DIE") == "before the end" else body

    def dying_at_the_end(body: Iterable[bytes]) -> Iterator[bytes]:
        yield from body  # of a stream; SessionMiddleware commits before it ends
        die()

    return outermost


@cache
def application_of(process: int) -> WSGIApplication:
    """The application of one process, made there: servers fork it from another."""
    urls = os.environ["ONCE_DATABASE"].split()
    engine = make_engine(urls[process % len(urls)])
    return make_application(engine, os.environ.get("ONCE_KEYS") != "no")


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    return application_of(os.getpid())(environ, start_response)
