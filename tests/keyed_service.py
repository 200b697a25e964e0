"""A service whose POST creates an item, and whose clients may send an Idempotency-Key."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from databases import INNODB_PAUSE, until, waiting
from sessionscope import SessionMiddleware
from sessionscope.idempotency import Idempotency, idempotency_table
from sqlalchemy import Connection, Engine, MetaData, Row, event
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import PATIENCE, Reply, drop_tables, environ, make_tables, serve_once

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

Work = Callable[[Session], object]
"""What a view does beside creating its item."""

keys = idempotency_table(MetaData(), "once")  # the service has a table of the usual name
"""The table of all services."""

numbers = count(1)
"""Of the items, whichever instance makes them."""

REPLAYED = ("Idempotent-Replayed", "true")


@contextmanager
def key_table(engine: Engine) -> Iterator[Engine]:
    """Lend *engine* with the table of the keys."""
    keys.create(engine)
    try:
        yield engine
    finally:
        keys.drop(engine)


@contextmanager
def prepared(engine: Engine) -> Iterator[Engine]:
    """Lend *engine* with all tables."""
    make_tables(engine)
    try:
        with key_table(engine):
            yield engine
    finally:
        drop_tables(engine)
        engine.dispose()


def rows(engine: Engine) -> list[Row[Any]]:
    """The rows of the keys that are durable, the oldest first."""
    with engine.connect() as connection:
        return list(connection.execute(keys.select().order_by(keys.c.created)))


def caller(environ: WSGIEnvironment) -> str:
    user: str = environ.get("REMOTE_USER", "")
    return user


class Service:
    """One process of it: what other instances have in flight it does not know.

    :param work: what the view does after it has added its item.
    :param app: another application in its place.
    :param around: what wraps the layer of the keys, inside of the session.
    :param registry: one that is made otherwise.
    :ivar calls: how often the application was called.
    """

    def __init__(
        self,
        engine: Engine,
        work: Work = bool,
        *,
        app: WSGIApplication | None = None,
        around: Callable[[WSGIApplication], WSGIApplication] | None = None,
        registry: scoped_session[Session] | None = None,
        sessions: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.registry = registry or scoped_session(sessionmaker(engine))
        self.work = work
        self.inner = app or self.create
        self.status = "201 Created"
        self.calls = 0
        self.once = Idempotency(self.count, keys, **{"scope": caller, **options})
        inside = around(self.once) if around else self.once
        self.app = SessionMiddleware(inside, self.registry, **{"attempts": 3, **(sessions or {})})

    def count(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.calls += 1
        return self.inner(environ, start_response)

    def create(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Add an item that no other call has added, and say so."""
        name = f"item {next(numbers)}"
        self.registry.add(Item(name=name))
        self.registry.flush()
        self.work(self.registry())
        start_response(self.status, [("Content-Type", "text/plain"), ("Location", f"/{name}")])
        return [name.encode()]

    def post(self, key: str | None = "k", body: bytes = b"", **more: Any) -> Reply:
        return serve_once(self.app, post(key, body, **more))


def post(key: str | None = "k", body: bytes = b"", **more: Any) -> WSGIEnvironment:
    """A POST with a key."""
    known = {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}
    field = {} if key is None else {"HTTP_IDEMPOTENCY_KEY": key}
    return environ("POST", **{**known, **field, **more})


def bind_of(service: Service) -> Engine:
    engine: Engine = service.registry.session_factory.kw["bind"]
    return engine


def code(reply: Reply) -> int:
    return int((reply.status or "0")[:3])


def is_replay(reply: Reply, first: Reply) -> bool:
    """Tell whether *reply* is *first* again, and says so."""
    same = (reply.status, reply.content) == (first.status, first.content)
    return same and reply.headers == [*first.headers, REPLAYED]


def sent(engine: Engine) -> list[str]:
    """The first word of each statement that *engine* sends from now on."""
    words: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_1: object, _2: object, statement: str, *_: object) -> None:
        words.append(statement.split()[0])

    return words


class Held:
    """A request in a thread that has worked, and does not end until it is told to.

    :param service: its view; all later calls of that go through.
    """

    def __init__(self, service: Service, **request: Any) -> None:
        self.holds, self.may_end = threading.Event(), threading.Event()
        self.service, self.request = service, request
        self.threads = ThreadPoolExecutor(1)
        self.work = service.work
        service.work = self.hold

    def hold(self, session: Session) -> None:
        self.holds.set()
        assert self.may_end.wait(PATIENCE)
        self.work(session)

    def end(self) -> Reply:
        self.may_end.set()
        return self.reply.result(PATIENCE)

    def __enter__(self) -> Held:
        self.reply: Future[Reply] = self.threads.submit(self.service.post, **self.request)
        until(lambda: self.holds.is_set() or self.reply.done(), "a request to hold")
        assert self.holds.is_set(), self.reply.result()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.may_end.set()
        self.threads.shutdown()


class Rivals:
    """Requests in threads, each of a service that knows of no other."""

    def __init__(self, services: list[Service], **request: Any) -> None:
        self.services, self.request = services, request
        self.threads = ThreadPoolExecutor(len(services))
        self.begun: set[Engine] = set()
        self.replies: list[Future[Reply]] = []

    def __enter__(self) -> Rivals:
        for service in self.services:
            event.listen(bind_of(service), "begin", self.begin)
        self.replies = [self.threads.submit(one.post, **self.request) for one in self.services]
        everyone = len(self.services)
        until(lambda: self.waiting() >= everyone, "rivals to wait", pause=INNODB_PAUSE)
        return self

    def begin(self, connection: Connection) -> None:
        self.begun.add(connection.engine)

    def waiting(self) -> int:
        """How many wait in the database; of SQLite, which cannot be asked, how many began."""
        url = bind_of(self.services[0]).url
        if url.get_backend_name() == "sqlite":
            return len(self.begun)
        return waiting(url)

    def end(self) -> list[Reply]:
        return [reply.result(PATIENCE) for reply in self.replies]

    def __exit__(self, *_exc_info: object) -> None:
        self.threads.shutdown()
        for service in self.services:
            event.remove(bind_of(service), "begin", self.begin)


def in_step(services: Sequence[Service], times: int) -> list[tuple[Reply, ...]]:
    """Post each of so many keys to all *services* at the same instant; the replies to each key."""
    together = threading.Barrier(len(services))

    def post_all(service: Service) -> list[Reply]:
        replies = []
        for number in range(times):
            together.wait(PATIENCE)
            replies.append(service.post(f"{number}"))
        return replies

    with ThreadPoolExecutor(len(services)) as threads:
        return [*zip(*threads.map(post_all, services), strict=True)]


@pytest.fixture
def service(engine: Engine) -> Iterator[Service]:
    """The service on SQLite."""
    with key_table(engine):
        yield Service(engine)


@pytest.fixture
def any_service(any_engine: Engine) -> Iterator[Service]:
    """The same on each engine in turn."""
    with key_table(any_engine):
        yield Service(any_engine)
