"""Requests that get in each other's way at a known point, and a witness of what was refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from sessionscope import Outcome, SessionMiddleware
from sqlalchemy import Engine, event, func, insert, select, update
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from support import PATIENCE, Reply, drop_tables, environ, make_tables, serve_once, text

Work = Callable[[Session, int], object]
"""What a request does, told its session and the number of the attempt."""


class Base(DeclarativeBase):
    """The declarative base of what the tests add to the service's tables."""


class Counter(Base):
    """A row that many requests want to change."""

    __tablename__ = "counters"

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]


@contextmanager
def prepared(engine: Engine, counters: int = 2) -> Iterator[Engine]:
    """Lend *engine* with all tables and some counters at 0; no connection may stay out."""
    make_tables(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"id": key, "value": 0} for key in range(1, counters + 1)]
        connection.execute(insert(Counter), rows)
    try:
        yield engine
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        Base.metadata.drop_all(engine)
        drop_tables(engine)
        engine.dispose()


def values(engine: Engine) -> list[int]:
    """The counters in their order, seen from outside."""
    with engine.connect() as connection:
        return list(connection.scalars(select(Counter.value).order_by(Counter.id)))


class Request:
    """A request through a middleware and a registry of its own, and what became of it."""

    def __init__(
        self,
        engine: Engine,
        work: Work,
        *,
        attempts: int = 3,
        status: str = "200 OK",
        confirm: bool = False,
    ) -> None:
        self.registry = scoped_session(sessionmaker(engine))
        self.work = work
        self.calls = 0
        self.outcomes: list[Outcome] = []
        self.app = SessionMiddleware(
            text(b"fine", status=status, before=self._call),
            self.registry,
            attempts=attempts,
            confirm=confirm,
            observer=self.outcomes.append,
        )

    def _call(self) -> None:
        self.calls += 1
        self.work(self.registry(), self.calls)

    def send(self) -> Reply:
        try:
            return serve_once(self.app, environ("POST"))
        finally:
            assert not self.registry.registry.has(), "a session was left in the registry"

    @property
    def attempts(self) -> int:
        """After how many attempts it was committed."""
        (outcome,) = self.outcomes
        assert outcome.action == "commit"
        return outcome.attempts


def meanwhile(action: Callable[[], object]) -> None:
    """Do *action* in another thread, as another request would, while this one waits."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(action).result(PATIENCE)


def together(*requests: Request) -> None:
    """Send all *requests* at once."""
    with ThreadPoolExecutor(len(requests)) as threads:
        for sent in [threads.submit(request.send) for request in requests]:
            sent.result(PATIENCE)


class Holder:
    """A request that does its work, and then stays open until it is told to finish."""

    def __init__(self, engine: Engine, work: Work) -> None:
        self.work = work
        self.holds, self.may_finish = threading.Event(), threading.Event()
        self.request = Request(engine, self._hold, attempts=1)
        self.thread = ThreadPoolExecutor(1)
        self.sent: Future[Reply]

    def _hold(self, session: Session, attempt: int) -> None:
        self.work(session, attempt)
        self.holds.set()
        assert self.may_finish.wait(PATIENCE)

    def finish(self) -> None:
        self.may_finish.set()
        self.sent.result(PATIENCE)

    def __enter__(self) -> Holder:
        self.sent = self.thread.submit(self.request.send)
        assert self.holds.wait(PATIENCE)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finish()
        self.thread.shutdown()


def add_one(session: Session, key: int = 1) -> None:
    """Add to a counter in one statement."""
    session.execute(update(Counter).where(Counter.id == key).values(value=Counter.value + 1))


def change(session: Session, attempt: int) -> None:
    """Read a counter and write it, as an object is changed."""
    session.get_one(Counter, 1).value += 1


def change_after(action: Callable[[], object]) -> Work:
    """The same, but between the two, at the first attempt, *action* happens."""

    def work(session: Session, attempt: int) -> None:
        counter = session.get_one(Counter, 1)
        if attempt == 1:
            meanwhile(action)
        counter.value += 1

    return work


def leave(doctor: int, before_commit: Callable[[], object] = bool) -> Work:
    """Go off call, if somebody else is left; then, at the first attempt, *before_commit*."""

    def work(session: Session, attempt: int) -> None:
        if on_call(session) > 1:
            session.execute(update(Counter).where(Counter.id == doctor).values(value=0))
        if attempt == 1:
            meanwhile(before_commit)

    return work


def on_call(session: Session) -> int:
    """How many doctors are on call: those whose counter is not 0."""
    return session.scalar(select(func.count()).where(Counter.value > 0)) or 0


def witness(engine: Engine) -> list[tuple[str, Any]]:
    """What the database refuses from now on: the first word sent, and the error's code."""
    refused: list[tuple[str, Any]] = []

    def ending(word: str) -> Callable[[Any], None]:
        return lambda connection: connection.info.update(ending=word)

    event.listen(engine, "commit", ending("COMMIT"))
    event.listen(engine, "rollback", ending("ROLLBACK"))

    @event.listens_for(engine, "handle_error")
    def note(context: Any) -> None:
        info = context.connection.info if context.connection else {}
        sent = context.statement or info.get("ending", "BEGIN")
        refused.append((sent.split()[0], code(context.original_exception)))

    return refused


def code(error: Any) -> Any:
    """MariaDB's number, SQLSTATE or SQLite's name of a driver's error."""
    if isinstance(error.args[0], int):
        return error.args[0]
    return getattr(error, "sqlstate", None) or getattr(error, "sqlite_errorname", None)
