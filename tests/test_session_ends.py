"""Whoever looks sees a session end as usual; steps are left out only where nobody does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event, insert, inspect, select, update
from sqlalchemy.exc import InvalidRequestError, SQLAlchemyError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.orm.exc import DetachedInstanceError
from support import make_tables, names, serve_once, text

from middleware import SessionMiddleware
from models import Item, make_engine

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


Items = list[Item]


def add(registry: Registry, items: Items) -> None:
    items.append(Item(name="new"))
    registry.add(items[-1])


def add_again(registry: Registry, items: Items) -> None:
    registry.add_all(items[-1:])


def read(registry: Registry, items: Items) -> None:
    items.extend(registry.scalars(select(Item).order_by(Item.id)))


def change(registry: Registry, items: Items) -> None:
    for item in items[-1:]:
        item.name = "changed"


def change_rows(registry: Registry, items: Items) -> None:
    registry.execute(update(Item).values(name="all alike"))


def remove(registry: Registry, items: Items) -> None:
    if items and items[-1] in registry and inspect(items[-1]).persistent:
        registry.delete(items[-1])


def flush(registry: Registry, items: Items) -> None:
    registry.flush()


def savepoint(registry: Registry, items: Items) -> None:
    registry.begin_nested()


def forget(registry: Registry, items: Items) -> None:
    items.clear()


STEPS = [add, add_again, read, change, change_rows, remove, flush, savepoint, forget]
STATUSES = ["200 OK", "404 Not Found"]
HEARD = [
    "after_transaction_create",
    "after_begin",
    "after_flush",
    "after_transaction_end",
    "transient_to_pending",
    "pending_to_transient",
    "pending_to_persistent",
    "persistent_to_transient",
    "persistent_to_deleted",
    "deleted_to_persistent",
    "persistent_to_detached",
    "detached_to_persistent",
]
Request = tuple[list[Callable[[Registry, Items], None]], str]


def end_by_hand(registry: Registry, status: str, work: Callable[[], object]) -> None:
    session = registry()
    try:
        work()
        if status == "404 Not Found":
            session.rollback()
        elif session.in_transaction():
            session.commit()
    except BaseException:
        session.rollback()
        raise
    finally:
        registry.remove()
        del session


def what_becomes_of(
    requests: list[Request], end: Callable[[Registry, str, Callable[[], object]], None]
) -> list[object]:
    """What is to be seen after each of *requests*: error, objects, rows and what hooks heard."""
    engine = make_engine("sqlite://")
    make_tables(engine)
    registry = scoped_session(sessionmaker(engine, expire_on_commit=False))
    items: Items = []
    heard: list[str] = []
    for hook in HEARD:
        event.listen(registry.session_factory, hook, lambda *_, hook=hook: heard.append(hook))
    seen: list[object] = []
    for steps, status in requests:

        def work(steps: Any = steps) -> None:
            for step in steps:
                step(registry, items)

        error = None
        try:
            end(registry, status, work)
        except SQLAlchemyError as raised:
            error = type(raised)
        states = [inspect(item) for item in items]
        seen += [(one.transient, one.detached, one.expired, one.dict.get("name")) for one in states]
        seen += [error, names(engine), sorted(heard)]
        heard.clear()
    engine.dispose()
    return seen


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(STEPS), max_size=6), st.sampled_from(STATUSES)),
        min_size=1,
        max_size=3,
    )
)
def test_all_is_as_if_written_by_hand(requests: list[Request]) -> None:
    """Rows, kept objects and what hooks hear are as after commit() or rollback(), and close()."""
    assert what_becomes_of(requests, serve) == what_becomes_of(requests, end_by_hand)
