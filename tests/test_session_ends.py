"""Whoever looks sees a session end as usual; steps are left out only where nobody does."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from typing import Any

import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine
from sqlalchemy import (
    Connection,
    Engine,
    NestedTransaction,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy import text as sql
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.events import ConnectionEvents, DialectEvents
from sqlalchemy.exc import IntegrityError, InvalidRequestError, SQLAlchemyError
from sqlalchemy.orm import (
    DeclarativeBase,
    InstanceState,
    Mapped,
    Session,
    SessionEvents,
    SessionTransaction,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.orm.exc import DetachedInstanceError
from sqlalchemy.pool import PoolResetState
from sqlalchemy.pool.events import PoolEvents
from support import (
    debts,
    drop_tables,
    environ,
    names,
    refuse_commit,
    serve_once,
    text,
)

from models import Base, Item

Registry = scoped_session[Session]

ENDS = [("200 OK", ["kept"]), ("404 Not Found", [])]

HOOKS = [
    ("200 OK", "before_commit"),
    ("200 OK", "after_commit"),
    ("404 Not Found", "after_rollback"),
    ("404 Not Found", "after_soft_rollback"),
]


def serve(registry: Registry, status: str, work: Callable[[], object] | None = None) -> None:
    """Serve a request that inserts a row, without an object, or does some other *work*."""
    work = work or (lambda: registry.execute(insert(Item).values(name="kept")))
    serve_once(SessionMiddleware(text(b"", status=status, before=work), registry))


@pytest.mark.parametrize(("status", "hook"), HOOKS)
def test_a_hook_of_the_sessionmaker_is_called_once(status: str, hook: str, engine: Engine) -> None:
    """A hook that all sessions have is called once for the end of a request's transaction."""
    factory, calls = sessionmaker(engine), []
    event.listen(factory, hook, lambda *_: calls.append(hook))
    serve(scoped_session(factory), status)
    assert calls == [hook]


@pytest.mark.parametrize(("status", "hook"), HOOKS)
def test_a_hook_of_the_session_is_called_once(status: str, hook: str, registry: Registry) -> None:
    """So is a hook that a view gives to its session, before or after it used it."""
    calls = []

    def work() -> None:
        event.listen(registry(), hook, lambda *_: calls.append(1))
        registry.execute(select(Item))
        event.listen(registry(), hook, lambda *_: calls.append(2))

    serve(registry, status, work)
    assert sorted(calls) == [1, 2]


def test_a_session_that_was_kept_is_committed_by_hand(registry: Registry, outside: Engine) -> None:
    """A session with a hook that outlives its request is its keeper's, hook and all."""
    kept: list[Session] = []
    calls: list[str] = []

    def work() -> None:
        kept.append(registry())
        event.listen(kept[0], "before_commit", lambda _: calls.append("before"))
        kept[0].add(Item(name="in the request"))

    serve(registry, "200 OK", work)
    with kept[0] as session:
        session.add(Item(name="by hand"))
        session.commit()
    assert names(outside) == ["in the request", "by hand"]
    assert calls == ["before", "before"]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("status", "method"), [("200 OK", "commit"), ("404 Not Found", "rollback")]
)
def test_a_method_that_a_class_overrides_is_called(
    status: str, method: str, streamed: bool, engine: Engine
) -> None:
    """Session classes with an own commit(), rollback() or close() find them called."""
    calls = []

    class Noting(Session):
        def commit(self) -> None:
            calls.append("commit")
            super().commit()

        def rollback(self) -> None:
            calls.append("rollback")
            super().rollback()

        def close(self) -> None:
            calls.append("close")
            super().close()

    registry = scoped_session(sessionmaker(engine, class_=Noting))

    def app(environ: Any, start_response: Any) -> Any:
        registry.execute(select(Item))
        start_response(status, [])
        return iter([b"body"]) if streamed else [b"body"]

    serve_once(SessionMiddleware(app, registry))
    assert calls == [method, "close"]


@pytest.mark.parametrize(("status", "kept"), ENDS)
def test_a_session_that_must_not_be_used_again_is_not(
    status: str, kept: list[str], engine: Engine, outside: Engine
) -> None:
    """With close_resets_only=False a session is of no use after its request."""
    registry = scoped_session(sessionmaker(engine, close_resets_only=False))
    sessions: list[Session] = []

    def work() -> None:
        sessions.append(registry())
        registry.add(Item(name="kept"))

    serve(registry, status, work)
    with pytest.raises(InvalidRequestError, match="closed"):
        sessions[0].connection()
    assert names(outside) == kept


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize(("status", "kept"), ENDS)
def test_objects_that_outlive_their_request_belong_to_no_session(
    status: str, kept: list[str], flush: bool, registry: Registry, outside: Engine
) -> None:
    """An object that is kept is detached after COMMIT, and new again after ROLLBACK."""
    items = [Item(name="kept")]
    sessions: list[Session] = []

    def work() -> None:
        sessions.append(registry())
        registry.add(items[0])
        if flush:
            registry.flush()

    serve(registry, status, work)
    state = inspect(items[0])
    assert (state.detached, state.transient) == (bool(kept), not kept)
    assert not sessions[0].in_transaction()
    assert list(sessions[0]) == []
    assert names(outside) == kept


def test_an_object_that_was_rolled_back_can_be_added_again(
    registry: Registry, outside: Engine
) -> None:
    """An object that one request wrote in vain is stored by the next that adds it."""
    item = Item(name="kept")

    def work() -> None:
        registry.add(item)
        registry.flush()

    serve(registry, "409 Conflict", work)
    assert names(outside) == []
    serve(registry, "200 OK", work)
    assert names(outside) == ["kept"]


def flushed(registry: Registry, item: Item) -> None:
    item.name = "changed"
    registry.flush()


def unflushed(registry: Registry, item: Item) -> None:
    item.name = "changed"


def in_bulk(registry: Registry, item: Item) -> None:
    registry.execute(update(Item).values(name="changed"))


@pytest.mark.parametrize("change", [flushed, unflushed, in_bulk])
def test_an_object_does_not_keep_what_was_rolled_back(
    change: Callable[[Registry, Item], object], registry: Registry
) -> None:
    """An object that is kept after a ROLLBACK doesn't show what was never stored."""
    serve(registry, "200 OK")
    items: list[Item] = []

    def work() -> None:
        items.extend(registry.scalars(select(Item)))
        change(registry, items[0])

    serve(registry, "404 Not Found", work)
    with pytest.raises(DetachedInstanceError):
        print(items[0].name)


def test_a_deletion_that_was_rolled_back_is_none(registry: Registry, outside: Engine) -> None:
    """An object whose deletion was rolled back is stored still, and hooks are told."""
    serve(registry, "200 OK")
    items: list[Item] = []
    told: list[object] = []

    def work() -> None:
        event.listen(registry(), "deleted_to_persistent", lambda _, item: told.append(item))
        items.extend(registry.scalars(select(Item)))
        registry.delete(items[0])
        registry.flush()

    serve(registry, "404 Not Found", work)
    assert told == items
    assert names(outside) == ["kept"]


def test_an_object_read_for_a_404_belongs_to_no_session(
    registry: Registry, outside: Engine
) -> None:
    """An object that a request read before it rolled back is detached afterwards."""
    serve(registry, "200 OK")
    items: list[Item] = []
    serve(registry, "404 Not Found", lambda: items.extend(registry.scalars(select(Item))))
    assert inspect(items[0]).detached


@pytest.mark.parametrize(("status", "kept"), [("200 OK", ["outer", "inner"]), ("404 No", [])])
def test_an_open_savepoint_ends_with_its_transaction(
    status: str, kept: list[str], registry: Registry, outside: Engine
) -> None:
    """Work in a savepoint that was never released shares the fate of the rest."""

    def work() -> None:
        registry.add(Item(name="outer"))
        registry.begin_nested()
        registry.add(Item(name="inner"))

    serve(registry, status, work)
    assert names(outside) == kept


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_each_transaction_that_began_is_seen_to_end(
    status: str, used: bool, registry: Registry
) -> None:
    """The end of every transaction is told to hooks, also of an open savepoint, used or not."""
    open_ones: list[Any] = []

    def work() -> None:
        event.listen(registry(), "after_transaction_create", lambda _, one: open_ones.append(one))
        event.listen(registry(), "after_transaction_end", lambda _, one: open_ones.remove(one))
        registry.execute(select(Item))
        registry.begin_nested()
        if used:
            registry.execute(select(Item))
        assert len(open_ones) == 2

    serve(registry, status, work)
    assert open_ones == []


def test_work_that_a_hook_adds_at_the_flush_is_committed_too(
    registry: Registry, outside: Engine
) -> None:
    """A hook after the last flush may add more, which is flushed before the COMMIT."""

    def work() -> None:
        event.listen(registry(), "after_flush_postexec", follow, once=True)
        registry.add(Item(name="first"))

    def follow(session: Session, _context: object) -> None:
        session.add(Item(name="second"))

    serve(registry, "200 OK", work)
    assert names(outside) == ["first", "second"]


@pytest.mark.parametrize("mode", ["rollback_only", "conditional_savepoint"])
def test_a_transaction_from_outside_is_not_committed(
    mode: Any, engine: Engine, outside: Engine
) -> None:
    """A session that joined a transaction leaves the COMMIT to whoever began it."""
    with engine.connect() as connection:
        transaction = connection.begin()
        connection.execute(select(1))
        serve(scoped_session(sessionmaker(connection, join_transaction_mode=mode)), "200 OK")
        assert transaction.is_active
        transaction.rollback()
    assert names(outside) == []


def test_a_transaction_from_outside_that_is_handed_over_is_committed(
    engine: Engine, outside: Engine
) -> None:
    """A session that shall control the transaction it joins commits it."""
    with engine.connect() as connection:
        connection.begin()
        connection.execute(select(1))
        mode = "control_fully"
        serve(scoped_session(sessionmaker(connection, join_transaction_mode=mode)), "200 OK")
        assert names(outside) == ["kept"]


def test_a_savepoint_of_the_connection_that_was_released_dooms_nothing(
    sqlite_url: str, outside: Engine
) -> None:
    """What SQLite's driver commits at a RELEASE is kept, and the request is a success."""
    plain = create_engine(sqlite_url)
    registry = scoped_session(sessionmaker(plain))

    def work() -> None:
        savepoint = registry.connection().begin_nested()
        registry.add(Item(name="kept"))
        registry.flush()
        savepoint.commit()

    try:
        serve(registry, "200 OK", work)
    finally:
        plain.dispose()
    assert names(outside) == ["kept"]


# The rest plays random requests twice, with the middleware and as written by hand, and compares.


class Notes(DeclarativeBase):
    """What a session with two binds keeps in its second database."""


class Note(Notes):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


Thing = Item | Note


def events_of(*listeners: type) -> list[str]:
    names = (name for one in listeners for name in vars(one))
    return [name for name in names if not name.startswith("_") and name != "dispatch"]


SESSION_EVENTS = events_of(SessionEvents)
ENGINE_EVENTS = events_of(ConnectionEvents, DialectEvents)
POOL_EVENTS = events_of(PoolEvents)


def state_of(thing: Thing) -> InstanceState[Any]:
    state: InstanceState[Any] = inspect(thing, raiseerr=True)
    return state


def told(argument: object) -> object:
    """What two plays can have in common of an argument that a listener was given."""
    if isinstance(argument, SessionTransaction):
        return "root" if argument.parent is None else "nested" if argument.nested else "part"
    if isinstance(argument, Thing):
        return type(argument).__name__, state_of(argument).dict.get("name")
    if isinstance(argument, ExceptionContext):
        return type(argument.original_exception).__name__
    if isinstance(argument, PoolResetState):
        return argument.transaction_was_reset
    if isinstance(argument, str):
        return re.sub("_sa_[0-9a-f]{32}", "xid", argument)
    return None


@dataclass(frozen=True)
class Heard:
    """An event, and what whoever heard it saw of the session.

    :ivar where: the number of the database, None for an event of the session.
    """

    where: int | None
    name: str
    arguments: tuple[object, ...]
    view: tuple[object, ...]


class Ear:
    """Hears events for as long as one play lasts."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.session: Session | None = None
        self.listening: list[tuple[Any, str, Callable[..., None]]] = []

    def listen(self, target: Any, names: list[str], where: int | None = None) -> None:
        for name in names:
            listener = partial(self.hear, where, name)
            event.listen(target, name, listener)
            self.listening.append((target, name, listener))

    def hear(self, where: int | None, name: str, *arguments: object) -> None:
        self.heard.append(Heard(where, name, tuple(map(told, arguments)), self.view()))

    def view(self) -> tuple[object, ...]:
        one = self.session
        if one is None:
            return ()
        sizes = len(one.new), len(one.dirty), len(one.deleted)
        return *sizes, one.in_transaction(), one.in_nested_transaction()

    def close(self) -> None:
        for listening in self.listening:
            event.remove(*listening)


def in_order(heard: list[Heard], where: int) -> list[object]:
    """What was heard of the session and of one database.

    SQLAlchemy keeps the connections of a session, and the objects that change their state
    together, in sets.  So nothing is said of the order of two databases, or of two objects.
    """
    mine = [one for one in heard if one.where in (None, where)]
    found: list[object] = []
    for changes_of_state, group in groupby(mine, lambda one: "_to_" in one.name):
        together = list(group)
        if changes_of_state:
            found.append(sorted(((one.name, one.arguments) for one in together), key=repr))
            found.append(sorted(one.view for one in together))
        else:
            found += together
    return found


class OwnMethods(Session):
    """A session with methods of its own, which are heard."""

    def commit(self) -> None:
        self.info["ear"].hear(None, "commit()")
        super().commit()

    def rollback(self) -> None:
        if self.in_transaction():  # otherwise it does nothing, and need not be called
            self.info["ear"].hear(None, "rollback()")
        super().rollback()

    def close(self) -> None:
        self.info["ear"].hear(None, "close()")
        super().close()


@dataclass(frozen=True)
class Scene:
    """How the sessions of a play are made, and who listens.

    :ivar places: for each bind, what it is.
    """

    places: tuple[str, ...]
    mode: Any
    expire_on_commit: bool
    class_: type[Session]
    hooks: list[str]
    hooks_of_class: bool
    engines_heard: bool
    outer_commits: bool
    twophase: bool = False


@dataclass
class Kept:
    """What outlives a request, or a step of it."""

    ear: Ear
    things: list[Thing] = field(default_factory=list)
    savepoints: list[SessionTransaction | NestedTransaction] = field(default_factory=list)


Step = Callable[[Session, Kept], object]


def add(session: Session, kept: Kept) -> None:
    kept.things.append(Item(name="new"))
    session.add(kept.things[-1])


def add_note(session: Session, kept: Kept) -> None:
    kept.things.append(Note(name="new"))
    session.add(kept.things[-1])


def add_again(session: Session, kept: Kept) -> None:
    session.add_all(kept.things[-2:])


def read(session: Session, kept: Kept) -> None:
    kept.things.extend(session.scalars(select(Item).order_by(Item.id)))


def read_notes(session: Session, kept: Kept) -> None:
    kept.things.extend(session.scalars(select(Note).order_by(Note.id)))


def change(session: Session, kept: Kept) -> None:
    for thing in kept.things[-2:]:
        thing.name = "changed"


def remove(session: Session, kept: Kept) -> None:
    for thing in kept.things[-2:]:
        if thing in session and state_of(thing).persistent:
            session.delete(thing)


def forget(session: Session, kept: Kept) -> None:
    kept.things.clear()


def flush(session: Session, kept: Kept) -> None:
    session.flush()


def store(session: Session, kept: Kept) -> None:
    add(session, kept)
    session.flush()


def change_rows(session: Session, kept: Kept) -> None:
    session.execute(update(Item).values(name="all alike"))


def delete_rows(session: Session, kept: Kept) -> None:
    session.execute(delete(Item))


def insert_row(session: Session, kept: Kept) -> None:
    session.execute(insert(Item.__table__).values(name="core"))  # type: ignore[arg-type]


def insert_note(session: Session, kept: Kept) -> None:
    session.execute(insert(Note).values(name="core"))


def insert_as_text(session: Session, kept: Kept) -> None:
    session.execute(sql("INSERT INTO items (name) VALUES ('text')"))


def read_as_text(session: Session, kept: Kept) -> None:
    session.execute(sql("SELECT count(*) FROM items"))


def savepoint(session: Session, kept: Kept) -> None:
    kept.savepoints.append(session.begin_nested())


def savepoint_of_connection(session: Session, kept: Kept) -> None:
    kept.savepoints.append(session.connection().begin_nested())


def release(session: Session, kept: Kept) -> None:
    if kept.savepoints and kept.savepoints[-1].is_active:
        kept.savepoints[-1].commit()
        kept.savepoints.pop()


def go_back(session: Session, kept: Kept) -> None:
    if kept.savepoints and kept.savepoints[-1].is_active:
        kept.savepoints.pop().rollback()


def leave_savepoints(session: Session, kept: Kept) -> None:
    """Before a transaction ends: a Connection on which that is a savepoint keeps newer ones."""
    if isinstance(session.bind, Connection):
        while any(isinstance(one, NestedTransaction) for one in kept.savepoints):
            with suppress(InvalidRequestError):  # it is over already
                kept.savepoints.pop().rollback()
    kept.savepoints.clear()


def commit(session: Session, kept: Kept) -> None:
    leave_savepoints(session, kept)
    session.commit()


def roll_back(session: Session, kept: Kept) -> None:
    leave_savepoints(session, kept)
    session.rollback()


def listen_late(session: Session, kept: Kept) -> None:
    for name in ("before_commit", "after_commit", "after_rollback", "after_soft_rollback"):
        event.listen(session, name, partial(kept.ear.hear, None, f"late {name}"))


def listen_to_connection(session: Session, kept: Kept) -> None:
    for name in ("commit", "rollback"):
        event.listen(session.connection(), name, partial(kept.ear.hear, 0, f"late {name}"))


def add_at_commit(session: Session, kept: Kept) -> None:
    event.listen(session, "before_commit", lambda one: one.add(Item(name="at commit")))


def flush_at_commit(session: Session, kept: Kept) -> None:
    event.listen(session, "before_commit", lambda one: one.flush())


def add_at_flush(session: Session, kept: Kept) -> None:
    def follow(session: Session, _context: object) -> None:
        session.add(Item(name="at flush"))

    event.listen(session, "after_flush_postexec", follow, once=True)


def refuse_at_commit(session: Session, kept: Kept) -> None:
    def refuse(_session: Session) -> None:
        raise Broken

    event.listen(session, "before_commit", refuse)


def read_after_rollback(session: Session, kept: Kept) -> None:
    def look(session: Session, _previous: object) -> None:
        if session.is_active:
            session.execute(select(Item.name))

    event.listen(session, "after_soft_rollback", look)


def collide(session: Session, kept: Kept) -> None:
    session.execute(insert(Item).values(id=99, name="first"))
    session.execute(insert(Item).values(id=99, name="second"))


def collide_in_savepoint(session: Session, kept: Kept) -> None:
    with suppress(IntegrityError), session.begin_nested():
        collide(session, kept)


def be_refused(session: Session, kept: Kept) -> None:
    """Have COMMIT fail, where that is all: of two databases one may have committed.

    After a refused PREPARE, and after a COMMIT that was to end an outer transaction, what is
    left by hand depends on a ROLLBACK that fails, or is none.
    """
    alone = isinstance(session.bind, Engine) and session.get_bind(Note) is session.bind
    if alone and not session.twophase:
        refuse_commit(session)


ORM_STEPS: list[Step] = [
    *[add, store, add_note, add_again, read, read_notes, change, remove, forget, flush]
]
CORE_STEPS: list[Step] = [
    *[change_rows, delete_rows, insert_row, insert_note, insert_as_text, read_as_text]
]
HOOK_STEPS: list[Step] = [
    *[listen_late, listen_to_connection, add_at_commit, flush_at_commit, add_at_flush],
    read_after_rollback,
]
END_STEPS: list[Step] = [
    *[commit, roll_back, collide_in_savepoint, collide, be_refused, refuse_at_commit]
]


class Broken(Exception):
    """An error of the application."""


class Interrupted(BaseException):
    """Something that ends the application from outside."""


@dataclass(frozen=True)
class Request:
    """What a request does, and how it ends."""

    method: str
    steps: list[Step]
    end: str | type[BaseException]

    @property
    def status(self) -> str:
        return self.end if isinstance(self.end, str) else "200 OK"

    def work(self, session: Session, kept: Kept) -> None:
        kept.ear.session = session
        try:
            for step in self.steps:
                step(session, kept)
        finally:
            leave_savepoints(session, kept)
        if not isinstance(self.end, str):
            raise self.end


Work = Callable[[Session], None]
Way = Callable[[Registry, Request, Work], None]


def with_middleware(registry: Registry, request: Request, work: Work) -> None:
    app = text(b"", status=request.status, before=lambda: work(registry()))
    serve_once(SessionMiddleware(app, registry), environ(request.method))


def by_hand(registry: Registry, request: Request, work: Work) -> None:
    session = registry.session_factory()
    try:
        work(session)
        if request.status == "404 Not Found":
            session.rollback()
        elif session.in_transaction():
            session.commit()
    except BaseException:
        session.rollback()
        raise
    finally:
        session.close()


def configure_sqlite(driver: Any, _record: object) -> None:
    driver.execute("PRAGMA foreign_keys=ON")
    driver.execute("PRAGMA synchronous=OFF")  # no test of what a crash leaves


class Databases:
    """Two databases, each with an engine for the sessions and one that looks from outside."""

    def __init__(self, make: Callable[[str], Engine], *urls: str) -> None:
        self.begins = make is make_engine
        self.inside = [make(url) for url in urls]
        self.outside = [create_engine(url) for url in urls]
        for engine in (*self.inside, *self.outside):
            if engine.dialect.name == "sqlite":
                event.listen(engine, "connect", configure_sqlite)
        for engine in self.outside:
            Notes.metadata.create_all(engine)
            Base.metadata.create_all(engine)
            debts.create(engine, checkfirst=True)
        for engine in self.inside:
            engine.connect().close()  # what an engine does once, it has done

    def empty(self) -> None:
        """Leave neither rows nor connections of the last play."""
        for engine in self.inside:
            engine.dispose()
        for engine in self.outside:
            with engine.begin() as connection:
                for table in (debts, Item.__table__, Note.__table__):
                    connection.execute(sql(self.how_to_empty(engine, table)))
                if engine.dialect.name == "sqlite":
                    connection.execute(sql("DELETE FROM sqlite_sequence"))  # ids begin again

    def how_to_empty(self, engine: Engine, table: Any) -> str:
        if engine.dialect.name == "sqlite":
            return f"DELETE FROM {table}"
        return f"TRUNCATE {table} RESTART IDENTITY CASCADE"

    def rows(self) -> list[object]:
        found: list[object] = []
        for engine in self.outside:
            with engine.connect() as connection:
                found += [rows_seen_by(connection)]
        return found

    def close(self) -> None:
        for engine in self.outside:
            Notes.metadata.drop_all(engine)
            drop_tables(engine)
        for engine in (*self.inside, *self.outside):
            engine.dispose()


def rows_seen_by(connection: Connection) -> list[tuple[Any, ...]]:
    statements = (select(one.id, one.name).order_by(one.id) for one in (Item, Note))
    return [tuple(row) for statement in statements for row in connection.execute(statement)]


class Outside:
    """What is around the sessions of a play: the binds, and what was begun on them before."""

    def __init__(self, scene: Scene, databases: Databases) -> None:
        self.places = scene.places
        self.binds: list[Engine | Connection] = [
            engine if place == "engine" else engine.connect()
            for place, engine in zip(scene.places, databases.inside, strict=False)
        ]

    def connections(self) -> Iterator[tuple[str, Connection]]:
        for place, bind in zip(self.places, self.binds, strict=True):
            if isinstance(bind, Connection):
                yield place, bind

    def begin(self) -> None:
        """Begin again what the session of the last request ended."""
        for place, connection in self.connections():
            if place != "connection" and not connection.in_transaction():
                connection.begin()
                connection.execute(insert(Item).values(name="outer"))
            if place == "savepoint" and not connection.in_nested_transaction():
                connection.begin_nested()

    def states(self) -> list[object]:
        return [
            (one.in_transaction(), one.in_nested_transaction()) for _, one in self.connections()
        ]

    def end(self, commit: bool) -> list[object]:
        """End what is left of it; the error of each connection."""
        errors: list[object] = []
        for _, connection in self.connections():
            try:
                connection.commit() if commit else connection.rollback()
            except SQLAlchemyError as error:
                errors.append(type(error))
            connection.close()
        return errors


def begin_before_savepoints(factory: sessionmaker[Session]) -> None:
    """Have a Session's savepoint begin with the BEGIN that SQLite's driver leaves out.

    The middleware does so, see the contract.  SQLAlchemy knows nothing of it.
    """
    joined: list[Connection] = []

    def begin() -> None:
        for connection in joined:
            driver: Any = connection.connection.dbapi_connection
            if not driver.in_transaction:
                driver.execute("BEGIN")

    @event.listens_for(factory, "after_transaction_create")
    def created(_session: Session, transaction: SessionTransaction) -> None:
        if transaction.nested:
            begin()
        elif transaction.parent is None:
            joined.clear()

    @event.listens_for(factory, "after_begin")
    def begun(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        if not transaction.nested:
            joined.append(connection)
            if session.in_nested_transaction():
                begin()


def make_factory(scene: Scene, outside: Outside, ear: Ear) -> sessionmaker[Session]:
    return sessionmaker(
        outside.binds[0],
        binds={Note: outside.binds[-1]},
        class_=scene.class_,
        join_transaction_mode=scene.mode,
        expire_on_commit=scene.expire_on_commit,
        twophase=scene.twophase,
        info={"ear": ear},
    )


def listen(ear: Ear, scene: Scene, factory: Any, databases: Databases) -> None:
    ear.listen(scene.class_ if scene.hooks_of_class else factory, scene.hooks)
    if scene.engines_heard:
        for where in range(len(scene.places)):
            ear.listen(databases.inside[where], ENGINE_EVENTS, where)
            ear.listen(databases.inside[where].pool, POOL_EVENTS, where)


def looks_of(thing: Thing) -> tuple[object, ...]:
    state = state_of(thing)
    kind = state.transient, state.pending, state.persistent, state.deleted, state.detached
    values = {name: state.dict[name] for name in ("id", "name") if name in state.dict}
    return type(thing).__name__, kind, state.expired, sorted(state.expired_attributes), values


Seen = list[object]


def serve_and_look(
    way: Way, registry: Registry, request: Request, kept: Kept, look: Callable[[], Seen]
) -> Seen:
    """Serve one request; what there is to see after it."""
    error = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            way(registry, request, lambda session: request.work(session, kept))
        except (SQLAlchemyError, Broken, Interrupted) as raised:
            error = type(raised)
    kept.ear.session = None
    messages = sorted(re.sub(" at 0x[0-9a-f]+", "", str(one.message)) for one in warned)
    objects = list(map(looks_of, kept.things))
    return [("error", error), ("warnings", messages), ("objects", objects), *look()]


def play(way: Way, scene: Scene, requests: list[Request], databases: Databases) -> Seen:
    """Serve *requests* in that *way*; all there is to see, in order."""
    note(f"{requests}")
    databases.empty()
    kept = Kept(Ear())
    outside = Outside(scene, databases)
    factory = make_factory(scene, outside, kept.ear)
    if way is by_hand and not databases.begins:
        begin_before_savepoints(factory)
    listen(kept.ear, scene, factory, databases)
    registry = scoped_session(factory)

    def look() -> Seen:
        heard, kept.ear.heard = kept.ear.heard, []
        of_each = (in_order(heard, where) for where in range(len(scene.places)))
        return [*chain(*of_each), ("outer", outside.states()), ("rows", databases.rows())]

    seen: Seen = []
    gc.disable()  # which decides when an object or a session is gone that an error refers to
    try:
        for request in requests:
            outside.begin()
            seen += serve_and_look(way, registry, request, kept, look)
    finally:
        gc.enable()
        ends = outside.end(scene.outer_commits)
        kept.ear.close()
    return [*seen, ("ends", ends), *look()]


def compare(scene: Scene, requests: list[Request], databases: Databases) -> None:
    seen = play(with_middleware, scene, requests, databases)
    assert seen == play(by_hand, scene, requests, databases)


JOINED = ["connection", "transaction", "savepoint"]
PLACES = ["engine", *JOINED]
ENDS_OF_REQUESTS = ["200 OK", "404 Not Found", Broken, Interrupted]


def scenes(
    first: list[str], mode: str = "conditional_savepoint", twophase: bool = False
) -> st.SearchStrategy[Scene]:
    one = st.tuples(st.sampled_from(first))
    two = st.tuples(st.sampled_from(first), st.sampled_from(first if twophase else PLACES))
    some = st.lists(st.sampled_from(SESSION_EVENTS), max_size=2, unique=True)
    return st.builds(
        Scene,
        places=one | two,
        mode=st.just(mode),
        expire_on_commit=st.booleans(),
        class_=st.sampled_from([Session, OwnMethods]),
        hooks=st.just(SESSION_EVENTS) | some,
        hooks_of_class=st.booleans(),
        engines_heard=st.booleans(),
        outer_commits=st.booleans(),
        twophase=st.just(twophase),
    )


def some_steps() -> st.SearchStrategy[list[Step]]:
    """Steps of each kind, some in a savepoint that is left in one way or the other."""
    kinds = (ORM_STEPS, CORE_STEPS, HOOK_STEPS, END_STEPS)
    one = st.one_of(*(st.sampled_from(kind) for kind in kinds))
    beginning = st.sampled_from([savepoint, savepoint_of_connection])
    end = st.sampled_from([release, release, go_back, flush])
    block = st.tuples(beginning, one, one, end)
    return st.lists(one.map(lambda step: (step,)) | block, max_size=6).map(
        lambda parts: list(chain(*parts))
    )


def some_requests() -> st.SearchStrategy[list[Request]]:
    one = st.builds(
        Request,
        method=st.sampled_from(["GET", "POST"]),
        steps=some_steps(),
        end=st.sampled_from(ENDS_OF_REQUESTS),
    )
    return st.lists(one, min_size=1, max_size=3)


def random(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        derandomize=True,
        database=None,
        deadline=None,
    )


@pytest.fixture(scope="module", params=[make_engine, create_engine])
def sqlite(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Databases]:
    """Two SQLite files, with transactions that are real ones and with the driver's own."""
    folder = tmp_path_factory.mktemp("ends")
    urls = [f"sqlite:///{folder}/{name}.db" for name in ("first", "second")]
    with closing(Databases(request.param, *urls)) as databases:
        yield databases


@pytest.mark.long
@random(300)
@given(scene=scenes(["engine"]), requests=some_requests())
def test_a_session_of_an_engine_ends_as_by_hand(
    scene: Scene, requests: list[Request], sqlite: Databases
) -> None:
    """Events, rows and kept objects are as after commit() or rollback(), and close()."""
    compare(scene, requests, sqlite)


MODES = ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@random(150)
@given(data=st.data(), requests=some_requests())
def test_a_session_that_joins_a_transaction_ends_as_by_hand(
    data: st.DataObject, requests: list[Request], mode: str, sqlite: Databases
) -> None:
    """So it is where the session is bound to a Connection, whatever that is in already."""
    compare(data.draw(scenes(JOINED, mode)), requests, sqlite)


@pytest.fixture(scope="module")
def postgresql(postgresql_url: str) -> Iterator[Databases]:
    """Two engines of one PostgreSQL database, which may prepare transactions."""
    with closing(Databases(make_engine, postgresql_url, postgresql_url)) as databases:
        yield databases


@pytest.mark.long
@random(60)
@given(scene=scenes(["engine"], twophase=True), requests=some_requests())
def test_a_session_in_two_phases_ends_as_by_hand(
    scene: Scene, requests: list[Request], postgresql: Databases
) -> None:
    """So it is with twophase=True, where COMMIT is prepared first."""
    compare(scene, requests, postgresql)
