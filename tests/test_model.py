"""A model of the contract, and a machine that plays application and server against both.

Hypothesis draws what an application does, step by step, and in which order a server
begins, pulls, closes and drops up to three of its responses.  The same steps go to a real
`SessionMiddleware` and to the model below, which is the contract's short form; after every
action of the server the two must agree on what left, what is durable and what was called.

HYPOTHESIS_PROFILE=thorough tries thousands of examples instead of a fixed few hundred.
"""

from __future__ import annotations

import gc
import io
import itertools
import logging
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from wsgiref.util import FileWrapper

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sessionscope import Outcome, SessionMiddleware, TransactionDoomed, on_commit, session_scope
from sessionscope.engines import make_engine
from sqlalchemy import Engine, delete, insert, select
from sqlalchemy.exc import (
    IntegrityError,
    PendingRollbackError,
    SQLAlchemyError,
    StatementError,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import Server, debts, environ, in_thread, make_tables, names, refuse_commit

from models import Item

pytestmark = pytest.mark.long

PROFILES = {
    "ci": settings(
        max_examples=200,
        stateful_step_count=30,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    ),
    "thorough": settings(
        max_examples=5000,
        stateful_step_count=30,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    ),
}


# What an application may do.  The steps that have no parameter are words.


@dataclass(frozen=True)
class Head:
    """start_response(); *beyond* is how far the Content-Length is off, None for no length."""

    status: str
    beyond: int | None = None
    replaces: bool = False


@dataclass(frozen=True)
class Chunk:
    size: int


@dataclass(frozen=True)
class Write:
    size: int


@dataclass(frozen=True)
class Raise:
    kind: type[BaseException]


@dataclass(frozen=True)
class Scope:
    """The steps in a session_scope, whose failure the application may handle."""

    steps: tuple[Step, ...]
    handled: bool


@dataclass(frozen=True)
class Nested:
    """The steps as a request of its own to the same middleware, made by the application."""

    shape: str
    status: str
    steps: tuple[Step, ...]

    def script(self) -> Script:
        return Script("POST", self.shape, (Head(self.status), *self.steps), ())


Step = str | Head | Chunk | Write | Raise | Scope | Nested

WORK = [
    "add",
    "add, flush",
    "read",
    "on_commit",
    "on_commit, fail",
    "savepoint",
    "release",
    "back",  # to the savepoint
    "back to the first",
    "swallow",  # an error of a statement
    "swallow in flush",
    "swallow, all undone",  # an error that SQLite answers with ROLLBACK
    "owe",  # what COMMIT will refuse
    "commit",
    "commit or rollback",
    "rollback",
    "close",
    "remove",
]

WHOLE = ("list", "tuple", "file")
HANDLED = (SQLAlchemyError, ValueError, LookupError, RuntimeError)


@dataclass(frozen=True)
class Script:
    """One request, and what the application does with it."""

    method: str
    shape: str
    steps: tuple[Step, ...]
    closing: tuple[Step, ...]
    """What the iterable's close() does, where the shape has one."""

    def length(self, head: Head) -> int | None:
        return None if head.beyond is None else max(0, total(self.steps) + head.beyond)


def total(steps: tuple[Step, ...]) -> int:
    size = 0
    for step in steps:
        if isinstance(step, (Chunk, Write)):
            size += step.size
        elif isinstance(step, (Scope, Nested)):
            size += total(step.steps)
    return size


# The model.


class Fails(Exception):
    """What the application, or the middleware, raises here."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind


@dataclass
class Unit:
    """A session: the work of its transaction, by savepoint, and what is durable of it."""

    durable: list[str] = field(default_factory=list)
    work: list[tuple[str, str, int]] = field(default_factory=list)
    depth: int = 0
    open: bool = False
    used: bool = False
    broken: bool = False  # a flush failed, and nobody rolled back since
    undone: bool = False  # SQLite rolled back by itself
    abandoned: bool = False  # by remove(), after an error
    wrote: bool = False  # in this transaction
    begun: bool = False  # this transaction, on a connection
    thrown_away: bool = False
    lost_writes: bool = False
    committed: bool = False

    def begin(self) -> None:
        if not self.open:
            self.abandoned = self.wrote = self.begun = False
        self.open = True

    def use(self) -> None:
        if self.broken:
            raise Fails(PendingRollbackError)
        self.begin()
        self.used = self.begun = True

    def note(self, kind: str, name: str = "") -> None:
        self.work.append((kind, name, self.depth))

    def back(self, depth: int) -> None:
        self.work = [entry for entry in self.work if entry[2] < depth]
        self.depth, self.broken = max(depth - 1, 0), False

    def release(self) -> None:
        self.depth -= 1
        self.work = [(kind, name, min(at, self.depth)) for kind, name, at in self.work]

    def rollback(self) -> None:
        if self.open:
            self.back(0)
            self.open = self.undone = False

    def throw_away(self) -> None:
        self.thrown_away |= self.open
        self.lost_writes |= self.open and self.wrote
        self.rollback()

    def remove(self) -> None:
        """Keep what was done, unless an error has spoiled it."""
        if self.open and (self.broken or self.undone):
            self.rollback()
            self.abandoned = True

    def commit(self) -> list[str]:
        """Make the work durable, or say why not; the callbacks that are due."""
        if self.broken:
            raise Fails(PendingRollbackError)
        kept: dict[str, list[str]] = {"row": [], "callback": [], "debt": []}
        for kind, name, _ in self.work:
            kept[kind].append(name)
        self.used |= bool(kept["row"])
        self.begun = (self.begun and self.open) or bool(kept["row"])
        self.abandoned = False
        if self.undone:
            raise Fails(TransactionDoomed)
        if kept["debt"]:
            raise Fails(IntegrityError)
        self.durable += kept["row"]
        self.work, self.depth, self.open = [], 0, False
        self.committed |= self.begun
        return kept["callback"]


@dataclass
class Place:
    """Code that runs with a unit of its own, and what it finds in the registry."""

    unit: Unit
    joinable: bool

    def commit(self, harmless: bool = False) -> list[str]:
        if (self.unit.thrown_away and not harmless) or self.unit.broken or self.unit.abandoned:
            raise Fails(TransactionDoomed)
        return self.unit.commit()

    def leave(self) -> None:
        self.unit.rollback()


class Model:
    """What the contract says of all requests so far."""

    def __init__(self) -> None:
        self.units: list[Unit] = []  # in the order in which their sessions are made
        self.ran: list[str] = []
        self.done = 0
        self.outcomes: dict[str, tuple[str | None, set[str], set[Any]]] = {}

    def new_unit(self) -> Unit:
        self.units.append(Unit())
        return self.units[-1]

    def place(self, joinable: bool) -> Place:
        return Place(self.new_unit(), joinable)

    def play(
        self, steps: tuple[Step, ...], place: Place, response: Response | None
    ) -> Iterator[bytes]:
        for step in steps:
            self.done += 1
            match step:
                case Head():
                    if response is not None:
                        response.start(step)
                case Chunk(size):
                    yield letters(self.done, size)
                case Write(size):
                    if response is not None and response.head is not None:
                        response.written.append(letters(self.done, size))
                case Raise(kind):
                    raise Fails(kind)
                case Scope(inner, handled):
                    try:
                        yield from self.scope(inner, response)
                    except Fails as failure:
                        if not (handled and issubclass(failure.kind, HANDLED)):
                            raise
                case Nested():
                    yield from self.nested(step, place)
                case "on_commit" | "on_commit, fail":
                    place.unit.note("callback", str(self.done))
                case "remove":
                    place.unit.remove()
                case _:
                    self.work(step, place.unit)

    def work(self, step: str, unit: Unit) -> None:
        match step:
            case "add" | "add, flush" if not unit.broken:
                unit.begin()
                unit.wrote = True
                unit.note("row", str(self.done))
                if step == "add, flush":
                    unit.use()
            case "read" | "swallow":
                unit.use()
            case "swallow in flush":
                unit.use()
                unit.wrote, depth = True, unit.depth
                unit.back(depth)
                unit.depth, unit.broken = depth, True
            case "swallow, all undone":
                if not unit.depth:
                    unit.use()
                    unit.undone = True
            case "owe":
                unit.use()
                unit.wrote = True
                unit.note("debt")
            case "savepoint":
                unit.use()
                unit.depth += 1
            case "release":
                if unit.depth:
                    unit.use()
                    unit.release()
            case "back" | "back to the first":
                if unit.depth:
                    unit.back(unit.depth if step == "back" else 1)
            case "commit" | "commit or rollback":
                try:
                    self.ran += unit.commit()
                except Fails:
                    if step == "commit":
                        raise
                    unit.rollback()
            case "rollback":
                unit.rollback()
            case "close":
                unit.throw_away()

    def scope(self, steps: tuple[Step, ...], response: Response | None) -> Iterator[bytes]:
        place = self.place(joinable=False)
        try:
            yield from self.play(steps, place, response)
            self.ran += place.commit()
        finally:
            place.leave()

    def nested(self, step: Nested, place: Place) -> Iterator[bytes]:
        if place.joinable:
            self.done += 1
            body = self.play(step.script().steps, place, None)
            yield from list(body) if step.shape in WHOLE else body
            return
        response = Response(self, step.script())
        try:
            response.begin()
            while (chunk := response.pull()) is not None:
                yield chunk
        finally:
            response.close()


class Response:
    """What a server sees of one request, and when."""

    def __init__(self, model: Model, script: Script) -> None:
        self.model, self.script = model, script
        model.done += 1
        self.path = f"/{model.done}"
        self.place = model.place(joinable=True)
        self.app = model.play(script.steps, self.place, self)
        self.head: Head | None = None
        self.head_sent = self.returned = self.settled = self.durable = self.closed = False
        self.leaves = False  # the server has the body
        self.used = False
        self.errors: set[Any] = {None}
        self.written: list[bytes] = []
        self.leaving: Iterator[bytes] = iter(())
        self.first: list[bytes | None] = []

    def start(self, head: Head) -> None:
        if head.replaces and self.head_sent:
            raise Fails(LookupError)
        if self.head is not None and not head.replaces:
            raise Fails(AssertionError)
        self.head, self.written = head, []

    def begin(self) -> None:
        """The head, and the first chunk that has bytes, are known before anything leaves."""
        try:
            if self.script.shape in WHOLE:
                body = list(self.ended(self.app))
                if self.script.shape == "file":
                    body = [b"".join(body)] if any(body) else []
                elif self.written:
                    body = [*self.take_written(), *body]
                if not self.written:
                    self.settle()
                    self.leaving = iter(body)
                    self.close()
                    return
                self.app = (chunk for chunk in body)
            self.leaving = self.release()
            self.first = [next(self.leaving, None)]
            self.head_sent, self.leaves = self.head is not None, True
        except Fails:
            try:
                self.close()
            except Fails as failure:
                if not issubclass(failure.kind, Exception):
                    raise
            raise

    def pull(self) -> bytes | None:
        return self.first.pop() if self.first else next(self.leaving, None)

    def ended(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """What the application gives, and when that has ended."""
        chunk: bytes | None = b""
        while chunk is not None:
            try:
                chunk = next(chunks, None)
            except Fails as failure:
                self.roll_back({failure.kind})
                if self.leaves:
                    self.report()
                raise
            self.returned = True
            if chunk is not None:
                yield chunk

    def chunks(self) -> Iterator[bytes]:
        for chunk in self.ended(self.app):
            yield from self.take_written()
            yield chunk
        self.settle()
        yield from self.take_written()

    def take_written(self) -> list[bytes]:
        written, self.written = self.written, []
        return written

    def release(self) -> Iterator[bytes]:
        """The chunk that completes the response leaves when the work is durable."""
        head, held, size = None, b"", 0
        for chunk in self.chunks():
            if self.head is not head:
                head, held, size = self.head, b"", 0
            length = self.length()
            if not chunk:
                if self.head_sent and not held:
                    yield chunk
            elif length is None or size < length:
                size += len(chunk)
                if length is None or size < length:
                    yield chunk
                else:
                    held = chunk
        if held:
            yield held

    def length(self) -> int | None:
        if self.head is None:
            return None
        if self.script.method == "HEAD" or self.head.status[:3] in ("204", "304"):
            return 0
        return self.script.length(self.head)

    def settle(self) -> None:
        unit = self.place.unit
        harmless = unit.thrown_away and not unit.lost_writes and self.script.method != "POST"
        if self.head is None or self.head.status[0] not in "23":
            self.roll_back({None})
            self.report()
            return
        try:
            self.model.ran += self.place.commit(harmless)
        except Fails as failure:
            self.roll_back({failure.kind})
            raise
        self.settled = self.durable = True
        self.used = self.place.unit.used
        self.report()

    def roll_back(self, errors: set[Any]) -> None:
        if not self.settled:
            self.settled, self.errors, self.used = True, errors, self.place.unit.used
        self.place.unit.rollback()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        errors: set[Any] = {None}
        try:
            self.app.close()  # type: ignore[attr-defined]
            if self.script.shape == "closing" and self.returned:
                for _ in self.model.play(self.script.closing, self.place, None):
                    pass
        except Fails as failure:
            errors.add(failure.kind)
            raise
        finally:
            self.roll_back(errors)
            self.place.leave()
            self.report()

    def drop(self) -> None:
        self.closed = True
        self.app.close()  # type: ignore[attr-defined]
        self.place.leave()

    def report(self) -> None:
        if self.path not in self.model.outcomes:
            actions = {"commit" if self.place.unit.committed else "rollback"}
            if not self.durable:
                actions.add("rollback")
            if not self.used:
                actions = {"none"}
            status = None if self.head is None else self.head.status
            self.model.outcomes[self.path] = (status, actions, self.errors)


def letters(number: int, size: int) -> bytes:
    return bytes([97 + number % 26]) * size


# The same steps, for real.


class OwnDatabases(sessionmaker[Session]):
    """Gives each session a database of its own, so that none waits for another.

    In memory there is one connection to each, so what can be seen while no session has
    it is durable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.idle: list[Engine] = []
        self.taken: list[Engine] = []

    def __call__(self, **local: Any) -> Session:
        self.taken.append(self.idle.pop() if self.idle else self.make())
        return super().__call__(bind=self.taken[-1], **local)

    def make(self) -> Engine:
        engine = make_engine("sqlite://")
        make_tables(engine)
        return engine

    def give_back(self) -> None:
        while self.taken:
            engine = self.taken.pop()
            with engine.begin() as connection:
                connection.execute(delete(debts))
                connection.execute(delete(Item))
            self.idle.append(engine)

    def throw_away(self) -> None:
        while self.taken:
            self.taken.pop().dispose()


def checked_out(engine: Engine) -> int:
    return engine.pool.checkedout()  # type: ignore[attr-defined,no-any-return]


class Application:
    """A WSGI application that does what the script in its environ says."""

    def __init__(self, databases: OwnDatabases) -> None:
        self.registry = scoped_session(databases)
        self.middleware = SessionMiddleware(self, self.registry, observer=self.observe)
        self.ran: list[str] = []
        self.done = 0
        self.outcomes: dict[str, list[tuple[str | None, str, Any]]] = {}

    def observe(self, outcome: Outcome) -> None:
        assert not self.registry.registry.has()
        # Not the error itself, whose traceback would keep alive what a server drops.
        kind = None if outcome.error is None else type(outcome.error)
        self.outcomes.setdefault(outcome.path, []).append((outcome.status, outcome.action, kind))

    def request(self, script: Script) -> dict[str, Any]:
        self.done += 1
        more = {"script": script, "wsgi.file_wrapper": FileWrapper}
        return environ(script.method, f"/{self.done}", **more)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        assert self.registry() is environ["sessionscope.session"]
        script: Script = environ["script"]
        steps = self.play(script.steps, script, start_response)
        match script.shape:
            case "list":
                return list(steps)
            case "tuple":
                return tuple(steps)
            case "file":
                return FileWrapper(io.BytesIO(b"".join(steps)))
            case "closing":
                closing = self.play(script.closing, script, None)
                return Closing(steps, closing)
            case _:
                return steps

    def play(self, steps: tuple[Step, ...], script: Script, start_response: Any) -> Iterator[bytes]:
        write: Any = None
        for step in steps:
            self.done += 1
            match step:
                case Head():
                    write = self.start(step, script, start_response)
                case Chunk(size):
                    yield letters(self.done, size)
                case Write(size):
                    if write is not None:
                        write(letters(self.done, size))
                case Raise(kind):
                    raise kind
                case Scope(inner, handled):
                    try:
                        with session_scope(self.registry):
                            yield from self.play(inner, script, start_response)
                    except HANDLED:
                        if not handled:
                            raise
                case Nested():
                    yield from self.nested(step)
                case "on_commit" | "on_commit, fail":
                    on_commit(self.registry, self.callback(step))
                case "remove":
                    self.registry.remove()
                case _:
                    self.work(step, self.registry())

    def start(self, head: Head, script: Script, start_response: Any) -> Any:
        length = script.length(head)
        headers = [] if length is None else [("Content-Length", str(length))]
        if not head.replaces:
            return start_response(head.status, headers)
        try:
            raise LookupError
        except LookupError:
            return start_response(head.status, headers, sys.exc_info())

    def nested(self, step: Nested) -> Iterator[bytes]:
        server = Server(self.middleware)
        try:
            yield from server.begin(self.request(step.script()))
        finally:
            server.finish()

    def callback(self, step: str) -> Callable[[], None]:
        name = str(self.done)

        def called() -> None:
            assert not self.registry.registry.has()
            self.ran.append(name)
            if step == "on_commit, fail":
                raise ValueError

        return called

    def work(self, step: str, session: Session) -> None:
        savepoint = session.get_nested_transaction()
        same = [{"id": -1, "name": "one"}, {"id": -1, "name": "two"}]
        twice = insert(Item.__table__).values(same)  # type: ignore[arg-type]
        match step:
            case "add" | "add, flush" if session.is_active:
                session.add(Item(name=str(self.done)))
                if step == "add, flush":
                    session.flush()
            case "read":
                session.scalars(select(Item)).all()
            case "swallow":
                with suppress(IntegrityError):
                    session.execute(twice)
            case "swallow in flush":
                session.connection()  # fails where a flush failed before
                session.add(Item(name=object()))
                with suppress(StatementError):
                    session.flush()
            case "swallow, all undone":
                if savepoint is None:
                    with suppress(IntegrityError):
                        session.execute(twice.prefix_with("OR ROLLBACK"))
            case "owe":
                refuse_commit(session)
            case "savepoint":
                session.begin_nested()
                session.connection()
            case "release":
                if savepoint is not None:
                    savepoint.commit()
            case "back":
                if savepoint is not None:
                    savepoint.rollback()
            case "back to the first":
                if savepoint is not None:
                    while savepoint.parent is not None and savepoint.parent.nested:
                        savepoint = savepoint.parent
                    savepoint.rollback()
            case "commit":
                session.commit()
            case "commit or rollback":
                try:
                    session.commit()
                except SQLAlchemyError:
                    session.rollback()
            case "rollback":
                session.rollback()
            case "close":
                session.close()


class Closing:
    """An iterable that was begun in the call, and whose close() does more than end it."""

    def __init__(self, steps: Iterator[bytes], closing: Iterator[bytes]) -> None:
        self.steps, self.closing, self.closed = steps, closing, False
        self.first = [chunk for _, chunk in zip(range(1), steps, strict=False)]

    def __iter__(self) -> Iterator[bytes]:
        yield from self.first
        yield from self.steps

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        self.steps.close()  # type: ignore[attr-defined]
        for _ in self.closing:
            pass


# The machine.


def phrases(*more: Any, size: int) -> st.SearchStrategy[tuple[Step, ...]]:
    """Steps one by one, and some that only tell something together."""
    step = st.one_of(GOOD, GOOD, GOOD, GOOD, CHUNK, CHUNK, CHUNK, st.sampled_from(WORK), *more)
    phrase = st.one_of(step.map(lambda step: (step,)), st.sampled_from(TOGETHER))
    return st.lists(phrase, max_size=size).map(lambda parts: tuple(itertools.chain(*parts)))


TOGETHER: list[tuple[Step, ...]] = [
    ("savepoint", "on_commit", "add", "back"),
    ("savepoint", "on_commit", "savepoint", "on_commit", "back to the first"),
    ("savepoint", "savepoint", "on_commit", "release", "back"),
    ("savepoint", "on_commit", "release", "savepoint", "back"),
    ("savepoint", "swallow in flush", "back"),
    ("add", "on_commit", "rollback"),
    ("read", "on_commit", "rollback"),
    ("swallow, all undone", "rollback", "add"),
    ("add", "swallow"),
    ("add", "swallow, all undone"),
    ("commit", "remove", "add"),
    ("swallow in flush", "remove"),
    ("swallow in flush", "remove", "add"),
    ("add", "swallow, all undone", "remove"),
    ("add", "swallow, all undone", "remove", "add"),
    ("read", "close", "add", "close"),
    ("read", "remove"),
    ("add", "remove"),
    ("read", "close"),
    ("owe", "commit or rollback"),
    ("add", Chunk(1), Chunk(1), "add"),
    ("add", Chunk(2), "add"),
]
AGAIN = Head("200 OK", 0, replaces=True)
FIRST: list[tuple[Step, ...]] = [("add", Chunk(2), AGAIN, Chunk(1)), (Write(1), AGAIN)]
LAST: list[tuple[Step, ...]] = [
    (Write(1),),
    ("add", "swallow, all undone"),
    (Chunk(1), "add"),
    ("on_commit", "owe"),
    ("read", "remove"),
    (Scope(("add", Chunk(1), "add"), False),),
]
STATUS = st.sampled_from(
    ["200 OK", "200 OK", "200 OK", "204 No Content", "302 Found", "404 No", "500 Oops"]
)
GOOD = st.sampled_from(["add", "add, flush", "on_commit", "savepoint", "release"])
CHUNK = st.builds(Chunk, st.integers(0, 3))
RAISE = st.builds(Raise, st.sampled_from([ValueError, SystemExit]))
NESTED = st.builds(
    Nested,
    st.sampled_from(["list", "generator"]),
    STATUS,
    phrases(RAISE, size=3),
)
SCOPE = st.builds(
    Scope,
    phrases(RAISE, NESTED, size=3),
    st.booleans(),
)
HEAD = st.builds(Head, STATUS, st.sampled_from([None, None, None, 0, 0, 0, -1, -2, 1]))
REPLACED = st.builds(Head, STATUS, st.none() | st.just(0), st.sampled_from([True, True, False]))
WRITE = st.builds(Write, st.integers(1, 2))
STEPS = phrases(SCOPE, NESTED, REPLACED | RAISE, WRITE, WRITE, size=6)
STEPS = st.one_of(
    STEPS,
    STEPS,
    st.builds(operator.add, st.sampled_from(FIRST), STEPS),
    st.builds(operator.add, STEPS, st.sampled_from(LAST)),
)


def insert_head(steps: tuple[Step, ...], head: Step | None, at: int) -> tuple[Step, ...]:
    return steps if head is None else (*steps[:at], head, *steps[at:])


SCRIPT = st.builds(
    Script,
    st.sampled_from(["GET", "GET", "POST", "POST", "POST", "HEAD"]),
    st.sampled_from(["list", "tuple", "file"] + ["generator", "closing"] * 4),
    st.builds(insert_head, STEPS, HEAD | HEAD | HEAD | st.none(), st.sampled_from([0, 0, 0, 1, 2])),
    phrases(RAISE, size=2),
)


@dataclass
class Exchange:
    """One request, as the server sees it and as the model does."""

    server: Server
    response: Response
    body: Iterator[bytes] = field(default_factory=lambda: iter(()))
    ended: bool = False

    def complete(self) -> bool:
        """Tell whether a client would take what has left for a whole success."""
        reply, head = self.server.reply, self.response.head
        if reply.status is None or reply.status[0] not in "23":
            return False
        lengths = [int(value) for _, value in reply.headers]
        if self.response.script.method == "HEAD" or reply.status.startswith("204"):
            lengths = [0]
        assert head is not None
        return any(len(reply.content) >= length for length in lengths) or (
            self.ended and not lengths
        )


class Machine(RuleBasedStateMachine):
    databases: OwnDatabases

    def __init__(self) -> None:
        super().__init__()
        self.app = Application(self.databases)
        self.model = Model()
        self.open: list[Exchange] = []
        self.parked: Session | None = None
        self.passed = False
        self.seen: dict[Engine, tuple[bool, int]] = {}  # what need not be looked at again

    # What the server does.

    @precondition(lambda self: len(self.open) < 3)
    @rule(script=SCRIPT)
    def begin(self, script: Script) -> None:
        request = self.app.request(script)
        exchange = Exchange(Server(self.app.middleware), Response(self.model, script))

        def begin() -> None:
            exchange.body = exchange.server.begin(request)

        if self.same(begin, exchange.response.begin):
            self.open.append(exchange)
        else:
            assert exchange.server.reply.status is None, "a head left before an error"
            assert not self.closes(exchange)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2), elsewhere=st.booleans())
    def pull(self, which: int, elsewhere: bool) -> None:
        self.pull_one(self.open[which % len(self.open)], elsewhere)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2))
    def pull_all(self, which: int) -> None:
        exchange = self.open[which % len(self.open)]
        while exchange in self.open and not exchange.ended:
            self.pull_one(exchange, False)
        self.end(exchange)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2), twice=st.booleans())
    def close(self, which: int, twice: bool) -> None:
        exchange = self.open[which % len(self.open)]
        self.end(exchange)
        if twice:
            exchange.server.finish()

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2), really=st.integers(0, 3))
    def drop(self, which: int, really: int) -> None:
        if really == 0:
            exchange = self.open.pop(which % len(self.open))
            exchange.response.drop()
            del exchange
            gc.collect()

    @rule()
    def park(self) -> None:
        """A session that is none of ours waits in the registry, or goes."""
        if self.parked is None:
            self.model.new_unit().open = True
            self.parked = self.app.registry()
            refuse_commit(self.parked)
        else:
            assert self.parked.in_transaction(), "a session that is not ours was touched"
            self.parked = None
            self.app.registry.remove()

    # How it does it.

    def pull_one(self, exchange: Exchange, elsewhere: bool) -> None:
        got: list[bytes | None] = []

        def pull() -> None:
            got.append(next(exchange.body, None))

        def wanted() -> None:
            got.append(exchange.response.pull())

        if not self.same(lambda: in_thread(pull) if elsewhere else pull(), wanted):
            self.end(exchange)
            return
        [chunk, expected] = got
        assert chunk == expected
        if chunk is None:
            exchange.ended = True
        elif exchange.server.reply.status is None:
            self.end(exchange)  # as PEP 3333 has it
        else:
            exchange.server.write(chunk)
        if exchange.complete():
            self.check_receipt(exchange.response)

    def check_receipt(self, response: Response) -> None:
        """The promise itself: a complete success exists only where the work is durable."""
        unit = response.place.unit
        assert response.durable or not unit.wrote
        assert not unit.open or response.closed
        self.agree()

    def end(self, exchange: Exchange) -> None:
        if exchange in self.open:
            self.open.remove(exchange)
            self.closes(exchange)

    def closes(self, exchange: Exchange) -> bool:
        if exchange.server.reply.body is None:
            return False
        return self.same(exchange.server.finish, exchange.response.close)

    def same(self, real: Callable[[], object], model: Callable[[], object]) -> bool:
        """Do it really and in the model: both fail in the same way, or neither does."""
        self.passed = False
        kind: type[BaseException] | None = None
        wanted: type[BaseException] | None = None
        raised: BaseException | None = None
        try:
            real()
        except (Exception, SystemExit) as error:
            raised, kind = error, type(error)
        try:
            model()
        except Fails as failure:
            wanted = failure.kind
        if kind is not wanted:
            raise AssertionError(f"{raised!r} instead of {wanted}") from raised
        return kind is None

    # What holds after everything that it did.

    @invariant()
    def agree(self) -> None:
        self.passed = False
        app, model = self.app, self.model
        in_registry = app.registry.registry() if app.registry.registry.has() else None
        assert in_registry is self.parked, "the registry holds what it should not"
        assert app.done == model.done, "the application is at another step"
        assert app.ran == model.ran, "other callbacks ran"
        assert len(self.databases.taken) == len(model.units), "a session too many, or too few"
        for engine, unit in zip(self.databases.taken, model.units, strict=True):
            state = (unit.open, len(unit.durable))
            if checked_out(engine):
                assert unit.open, "a connection was not returned"
            elif unit.open or self.seen.get(engine) != state:
                self.seen[engine] = state
                assert sorted(names(engine), key=str) == sorted(unit.durable), "other rows"
        self.passed = True

    @invariant()
    def tell(self) -> None:
        """The observer is told once of each request, at its end."""
        told = self.app.outcomes
        assert all(len(outcomes) == 1 for outcomes in told.values())
        for path, (status, actions, errors) in self.model.outcomes.items():
            [(told_status, action, error)] = told[path]
            assert told_status == status
            assert action in actions
            assert error in errors

    def teardown(self) -> None:
        try:
            if self.passed:
                if self.parked is not None:
                    self.park()
                while self.open:
                    self.pull_all(0)
                self.seen.clear()
                self.agree()
                self.tell()
                assert not any(map(checked_out, self.databases.taken))
                self.databases.give_back()
        finally:
            self.app.registry.remove()
            self.databases.throw_away()


@pytest.fixture
def databases() -> Iterator[OwnDatabases]:
    """Databases in memory, made as they are needed, and no log of all that goes wrong."""
    made = OwnDatabases()
    logging.disable(logging.CRITICAL)
    yield made
    logging.disable(logging.NOTSET)
    for engine in made.idle:
        engine.dispose()


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
def test_the_middleware_does_what_the_model_says(databases: OwnDatabases) -> None:
    """Whatever application and server do, in any order, middleware and model agree."""

    class Play(Machine):
        pass

    Play.databases = databases
    profile = PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "ci")]
    run_state_machine_as_test(Play, settings=profile)
