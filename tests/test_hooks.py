"""Hooks of the user: they come as by hand, and what they swallow, translate or raise is seen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock
from warnings import catch_warnings, simplefilter

import pytest
from sessionscope import Outcome, SessionMiddleware, TransactionDoomed, on_commit, session_scope
from sessionscope.engines import make_engine
from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, make_url, select
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.orm.exc import FlushError
from support import (
    environ,
    make_tables,
    names,
    refuse_commit,
    serve_once,
    text,
)

from models import Item

Registry = scoped_session[Session]


def post(
    registry: Registry, work: Callable[[], object], status: str = "200 OK", **options: Any
) -> None:
    app = text(b"fine", status=status, before=work)
    serve_once(SessionMiddleware(app, registry, **options), environ("POST"))


def add(registry: Registry, name: str) -> None:
    registry.execute(insert(Item).values(name=name))


# What hooks see.


@pytest.mark.parametrize("late", [True, False], ids=["late", "of the maker"])
def test_a_before_commit_hook_sees_what_is_not_flushed(
    late: bool, registry: Registry, outside: Engine
) -> None:
    """session.new, dirty and deleted are full in a user's before_commit, as by hand."""
    seen: list[tuple[int, int, int]] = []
    with session_scope(registry) as session:
        session.add_all([Item(id=1, name="one"), Item(id=2, name="two")])

    def look(session: Session) -> None:
        seen.append((len(session.new), len(session.dirty), len(session.deleted)))

    def work() -> None:
        first, second = registry.scalars(select(Item).order_by(Item.id))
        if late:
            event.listen(registry(), "before_commit", look)
        registry.add(Item(name="three"))
        first.name = "changed"
        registry.delete(second)

    if not late:
        event.listen(registry.session_factory, "before_commit", look)
    post(registry, work)
    assert seen == [(1, 1, 1)]
    assert names(outside) == ["changed", "three"]


def test_an_object_that_outlives_its_request_is_expired(registry: Registry) -> None:
    """expire_on_commit is honoured: a kept object shows no old values."""
    kept: list[Item] = []

    def work() -> None:
        kept.append(Item(name="old"))
        registry.add(kept[0])

    post(registry, work)
    state = inspect(kept[0])
    assert (state.detached, state.expired) == (True, True)


def test_deleted_objects_are_detached_with_an_event(registry: Registry) -> None:
    """deleted_to_detached comes for an object that a request deleted."""
    heard: list[str | None] = []
    event.listen(
        registry.session_factory, "deleted_to_detached", lambda _, item: heard.append("detached")
    )
    with session_scope(registry) as session:
        session.add(Item(id=1, name="one"))
    kept: list[Item] = []

    def work() -> None:
        kept.append(registry.get_one(Item, 1))
        registry.delete(kept[0])

    post(registry, work)
    assert heard == ["detached"]


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(("status", "method"), [("200 OK", "commit"), ("409 No", "rollback")])
def test_patched_methods_are_called(
    used: bool, status: str, method: str, registry: Registry
) -> None:
    """mock.patch.object(Session, ...) sees the calls; an unused session is only closed."""
    original = getattr(Session, method)
    with (
        mock.patch.object(Session, method, autospec=True, side_effect=original) as ended,
        mock.patch.object(Session, "close", autospec=True, side_effect=Session.close) as close,
    ):
        post(registry, (lambda: add(registry, "x")) if used else (lambda: None), status)
    assert (ended.call_count, close.call_count) == (int(used), 1)


@pytest.mark.parametrize("status", ["200 OK", "409 Conflict"])
def test_core_work_in_a_joined_transaction(status: str, engine: Engine) -> None:
    """In a transaction from outside a 4xx takes Core writes back, as Session.rollback() does."""
    with engine.connect() as connection:
        transaction = connection.begin()
        registry: Registry = scoped_session(sessionmaker(connection))
        post(registry, lambda: add(registry, "inner"), status)
        assert transaction.is_active is (status == "200 OK")
        connection.rollback()
    assert names(engine) == []


# Hooks that swallow an error.


def undo_all(connection: Connection | Session) -> None:
    """Have SQLite undo the transaction, and swallow its error."""
    with suppress(IntegrityError):
        connection.execute(insert(Item).prefix_with("OR ROLLBACK").values(id=1, name="twice"))


@pytest.mark.parametrize("own", [False, True], ids=["ours", "own commit"])
@pytest.mark.parametrize("kind", ["connection", "engine", "class"])
def test_a_commit_hook_that_swallows_an_error_dooms(
    own: bool, kind: str, registry: Registry, engine: Engine, outside: Engine
) -> None:
    """An error that a hook of the engine's commit swallowed makes no success, and no user's
    after_commit hears of a commit."""
    heard: list[str] = []
    event.listen(registry.session_factory, "after_commit", lambda session: heard.append("commit"))
    with session_scope(registry) as session:
        session.add(Item(id=1, name="one"))
    heard.clear()
    target: list[Any] = []

    def work() -> None:
        add(registry, "gone")
        target.append(
            {"connection": registry.connection(), "engine": engine, "class": Engine}[kind]
        )
        event.listen(target[0], "commit", undo_all)
        if own:
            registry.commit()

    try:
        with pytest.raises(TransactionDoomed):
            post(registry, work)
    finally:
        event.remove(target[0], "commit", undo_all)
    assert (names(outside), heard) == (["one"], [])


def test_a_commit_hook_that_swallows_an_error_on_postgresql(postgresql_registry: Registry) -> None:
    """On PostgreSQL any error that a hook of COMMIT swallowed makes no success."""
    engine = postgresql_registry.session_factory.kw["bind"]

    def fail(connection: Connection) -> None:
        with suppress(DBAPIError):
            connection.execute(sql("SELECT nonsense"))

    def work() -> None:
        add(postgresql_registry, "gone")
        event.listen(engine, "commit", fail)

    seen: list[Outcome] = []
    with pytest.raises(TransactionDoomed):
        post(postgresql_registry, work, observer=seen.append)
    event.remove(engine, "commit", fail)
    assert [outcome.action for outcome in seen] == ["rollback"]
    assert names(engine) == []


@pytest.mark.parametrize("own", [False, True], ids=["ours", "own commit"])
@pytest.mark.parametrize("when", ["before", "in the view", "in the transaction"])
def test_a_hook_of_the_maker_that_swallows_an_error_on_postgresql(
    when: str, own: bool, postgresql_registry: Registry
) -> None:
    """A before_commit hook of all sessions that swallowed an error makes no success."""
    maker = postgresql_registry.session_factory

    def fail(session: Session) -> None:
        with suppress(DBAPIError):
            session.execute(sql("SELECT nonsense"))

    def listen(now: str) -> None:
        if now == when:
            event.listen(maker, "before_commit", fail)

    def work() -> None:
        listen("in the view")
        postgresql_registry.add(Item(name="gone"))
        listen("in the transaction")
        if own:
            postgresql_registry.commit()

    listen("before")
    with pytest.raises((TransactionDoomed, DBAPIError)):
        post(postgresql_registry, work)
    assert names(maker.kw["bind"]) == []


def test_a_late_hook_that_swallows_before_an_own_commit(
    registry: Registry, outside: Engine
) -> None:
    """A before_commit hook given after the first statement is checked at an own commit, too."""
    with session_scope(registry) as session:
        session.add(Item(id=1, name="one"))

    def work() -> None:
        add(registry, "gone")
        event.listen(registry(), "before_commit", undo_all)
        registry.commit()

    with pytest.raises(TransactionDoomed):
        post(registry, work)
    assert names(outside) == ["one"]


# Errors that a listener hides, raises or translates.


@pytest.fixture
def postgresql_registry(postgresql: Engine) -> Registry:
    return scoped_session(sessionmaker(postgresql))


class Translated(Exception):
    """What a listener makes of a driver's error."""


def raising(context: Any) -> None:
    raise Translated from context.original_exception


def returning(context: Any) -> Exception:
    return Translated()


@pytest.mark.parametrize("listener", [raising, returning])
def test_a_translated_error_that_undid_all_is_no_success(
    listener: Callable[[Any], Any], registry: Registry, engine: Engine, outside: Engine
) -> None:
    """An error is judged by what the driver raised, not by what a listener made of it."""
    with session_scope(registry) as session:
        session.add(Item(id=1, name="one"))
    event.listen(engine, "handle_error", listener)

    def work() -> None:
        add(registry, "before")
        with suppress(Translated):
            registry.execute(insert(Item).prefix_with("OR ROLLBACK").values(id=1, name="x"))
        add(registry, "after")

    with pytest.raises(TransactionDoomed) as caught:
        post(registry, work)
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert names(outside) == ["one"]


@pytest.mark.parametrize("listener", [raising, returning])
def test_a_translated_refusal_of_commit_is_a_plain_failure(
    listener: Callable[[Any], Any], registry: Registry, engine: Engine, outside: Engine
) -> None:
    """A deferred constraint whose error was translated is a rollback, and nothing is unknown."""
    event.listen(engine, "handle_error", listener)
    seen: list[Outcome] = []
    with pytest.raises(Translated):
        post(registry, lambda: refuse_commit(registry), observer=seen.append)
    assert [outcome.action for outcome in seen] == ["rollback"]


@pytest.mark.parametrize("mode", ["explicit", "legacy"])
def test_a_hidden_error_that_undid_all_is_no_success(
    mode: str, registry: Registry, sqlite_url: str, outside: Engine
) -> None:
    """Where skip_user_error_events hides an error from every listener, the driver tells."""
    with session_scope(registry) as session:
        session.add(Item(id=1, name="one"))
    legacy = create_engine(sqlite_url)
    if mode == "legacy":
        registry.configure(bind=legacy)

    def work() -> None:
        registry.add(Item(name="before"))
        registry.flush()
        with suppress(DBAPIError):
            registry.connection(execution_options={}).execution_options(
                skip_user_error_events=True
            ).execute(insert(Item).prefix_with("OR ROLLBACK").values(id=1, name="x"))

    with pytest.raises(TransactionDoomed):
        post(registry, work)
    legacy.dispose()
    assert names(outside) == ["one"]


def test_an_error_while_rows_are_fetched_is_no_failed_commit(
    registry: Registry, outside: Engine
) -> None:
    """An error that comes with a row undoes nothing on SQLite, and what was done is kept."""

    def work() -> None:
        add(registry, "kept")
        rows = registry.execute(
            sql("SELECT abs(x) FROM (SELECT 1 AS x UNION ALL SELECT :least)"), {"least": -(2**63)}
        )
        with suppress(DBAPIError):
            rows.all()
        add(registry, "after")

    post(registry, work)
    assert names(outside) == ["kept", "after"]


def test_an_error_while_rows_are_fetched_from_postgresql(postgresql_registry: Registry) -> None:
    """An error of a server-side cursor, swallowed, aborts the transaction like any other."""

    def work() -> None:
        postgresql_registry.add(Item(name="gone"))
        postgresql_registry.flush()
        rows = postgresql_registry.execute(
            sql("SELECT 1 / (n - 2) FROM generate_series(1, 3) AS n"),
            execution_options={"stream_results": True, "max_row_buffer": 1},
        )
        with suppress(DBAPIError):
            rows.all()

    with pytest.raises(TransactionDoomed):
        post(postgresql_registry, work)
    assert names(postgresql_registry.session_factory.kw["bind"]) == []


# Hooks that raise.


def test_a_hook_that_raises_after_commit_undoes_nothing(
    registry: Registry, outside: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """The error of an after_commit hook is the server's; the row is kept, callbacks run."""
    ran: list[str] = []
    seen: list[Outcome] = []

    def work() -> None:
        add(registry, "kept")
        on_commit(registry, lambda: ran.append("called"))
        event.listen(registry(), "after_commit", lambda session: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        post(registry, work, observer=seen.append, attempts=3)
    assert (names(outside), ran) == (["kept"], ["called"])
    assert [(one.action, type(one.error)) for one in seen] == [("commit", ZeroDivisionError)]
    assert "committed, but a hook raised" in caplog.text


def test_a_hook_that_raises_before_ours_undoes_nothing_either(
    registry: Registry, outside: Engine
) -> None:
    """A user's after_commit hook that was put before ours changes nothing of that."""
    seen: list[Outcome] = []

    def fail(session: Session) -> None:
        raise Translated

    event.listen(Session, "after_commit", fail, insert=True)
    try:
        with pytest.raises(Translated):
            post(registry, lambda: add(registry, "kept"), observer=seen.append)
    finally:
        event.remove(Session, "after_commit", fail)
    assert [one.action for one in seen] == ["commit"]
    assert names(outside) == ["kept"]


@pytest.mark.parametrize("end", ["rollback", "close", "nothing"])
@pytest.mark.parametrize("status", ["200 OK", "409 Conflict"])
def test_a_refused_commit_never_reaches_the_next_request(
    end: str, status: str, registry: Registry, engine: Engine, outside: Engine
) -> None:
    """What a hook refused to commit, swallowed by the app, is not committed with the next work."""
    seen: list[Outcome] = []

    def refuse(connection: Connection) -> None:
        raise Translated

    def work() -> None:
        add(registry, "refused")
        event.listen(engine, "commit", refuse)
        with suppress(Translated):
            registry.commit()
        event.remove(engine, "commit", refuse)
        getattr(registry(), end, bool)()

    try:
        post(registry, work, status, observer=seen.append)
        accepted = True
    except TransactionDoomed:
        accepted = False
    assert accepted is (end == "rollback" or status != "200 OK")
    post(registry, lambda: add(registry, "next"))
    assert names(outside) == ["next"]
    assert [outcome.action for outcome in seen] == ["rollback"]


@pytest.mark.parametrize("end", ["rollback", "close", "nothing"])
def test_a_connection_whose_own_commit_failed_is_rolled_back(end: str, sqlite_url: str) -> None:
    """A Connection.commit() that met BUSY leaves no open transaction in the pool."""
    url = f"{sqlite_url}-with-a-rollback-journal"
    impatient = create_engine(url, connect_args={"timeout": 0}, pool_size=1, max_overflow=0)
    Item.metadata.create_all(impatient)
    other = create_engine(url)
    registry: Registry = scoped_session(sessionmaker(impatient))

    def work() -> None:
        add(registry, "refused")
        with other.connect() as reader:
            reader.exec_driver_sql("BEGIN")
            reader.execute(select(Item)).all()
            with pytest.raises(DBAPIError, match="locked"):
                registry.connection().commit()
        getattr(registry(), end, bool)()

    post(registry, work, "409 Conflict")
    post(registry, lambda: add(registry, "next"))
    assert names(other) == ["next"]
    impatient.dispose()
    other.dispose()


@pytest.mark.parametrize("end", ["swallowed", "rolled back"])
def test_a_hook_error_after_an_own_commit_is_no_loss(
    end: str, registry: Registry, outside: Engine
) -> None:
    """An after_commit hook that failed after an own commit, swallowed, leaves that a success."""

    def work() -> None:
        add(registry, "kept")
        event.listen(registry(), "after_commit", lambda session: 1 / 0, once=True)
        with suppress(ZeroDivisionError):
            registry.commit()
        if end == "rolled back":
            registry().close()

    post(registry, work)
    assert names(outside) == ["kept"]


def test_objects_that_were_added_and_expunged_are_no_loss(registry: Registry) -> None:
    """A session in which nothing is left to do commits, although it was begun."""

    def work() -> None:
        item = Item(name="x")
        registry.add(item)
        registry.expunge(item)

    post(registry, work)


# Answers of COMMIT that nobody was told of, and several connections.


def test_a_hidden_refusal_of_commit_is_a_plain_failure(registry: Registry, outside: Engine) -> None:
    """A COMMIT whose error skip_user_error_events hides is refused all the same."""
    seen: list[Outcome] = []

    def work() -> None:
        registry.connection(execution_options={"skip_user_error_events": True})
        add(registry, "gone")
        refuse_commit(registry)

    with pytest.raises(IntegrityError):
        post(registry, work, observer=seen.append)
    assert [outcome.action for outcome in seen] == ["rollback"]
    assert names(outside) == []


@pytest.mark.parametrize("attempts", [1, 3])
def test_one_of_two_own_commits_leaves_it_unknown(
    attempts: int, registry: Registry, engine: Engine, sqlite_url: str
) -> None:
    """If a hook refuses the second of two COMMITs, the first is durable whatever follows."""
    second = make_engine(f"{sqlite_url}-2")
    make_tables(second)
    commits: list[Connection] = []
    seen: list[Outcome] = []

    def refuse(connection: Connection) -> None:
        commits.append(connection)
        if len(commits) == 2:
            raise Translated

    for each in (engine, second):
        event.listen(each, "commit", refuse)

    def work() -> None:
        for each in (engine, second):
            registry.execute(insert(Item).values(name="x"), bind_arguments={"bind": each})
        with suppress(Translated):
            registry.commit()
        with catch_warnings():
            simplefilter("ignore")  # SQLAlchemy's, of the connection that is committed already
            registry.rollback()

    post(registry, work, "409 Conflict", observer=seen.append, attempts=attempts)
    for each in (engine, second):
        event.remove(each, "commit", refuse)
    assert [outcome.action for outcome in seen] == ["unknown"]
    assert sorted([names(engine), names(second)]) == [[], ["x"]]
    second.dispose()


def test_a_session_that_the_app_has_prepared(postgresql_registry: Registry) -> None:
    """With twophase=True an application may call prepare() itself, and remove() changes nothing."""
    postgresql_registry.configure(twophase=True)

    def work() -> None:
        add(postgresql_registry, "kept")
        postgresql_registry().prepare()
        postgresql_registry.remove()

    post(postgresql_registry, work)
    assert names(postgresql_registry.session_factory.kw["bind"]) == ["kept"]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
def test_a_refused_commit_on_postgresql_leaves_a_sound_connection(
    driver: str, postgresql_url: str, postgresql_registry: Registry
) -> None:
    """A hook that refuses COMMIT, and close(), leave no open transaction in the pool."""
    url = make_url(postgresql_url).set(drivername=f"postgresql+{driver}")
    engine = create_engine(url, pool_size=1, max_overflow=0)
    refuse_then_go_on(engine)
    assert names(engine) == ["next"]
    engine.dispose()


def test_a_refused_commit_on_mariadb_leaves_a_sound_connection(mariadb: Engine) -> None:
    """After a hook refused a COMMIT on MariaDB, the next request on its connection is sound."""
    engine = make_engine(mariadb.url, pool_size=1)
    refuse_then_go_on(engine)
    assert names(engine) == ["next"]
    engine.dispose()


def refuse_then_go_on(engine: Engine) -> None:
    registry: Registry = scoped_session(sessionmaker(engine))

    def refuse(connection: Connection) -> None:
        raise Translated

    def work() -> None:
        add(registry, "refused")
        event.listen(engine, "commit", refuse)
        with suppress(Translated):
            registry.commit()
        event.remove(engine, "commit", refuse)
        registry().close()

    post(registry, work, "409 Conflict")
    post(registry, lambda: add(registry, "next"))


def test_a_hook_that_adds_work_for_ever_is_refused(registry: Registry, outside: Engine) -> None:
    """After a hundred flushes Session.commit() gives up, and so does a request."""

    def work() -> None:
        event.listen(
            registry(), "after_flush_postexec", lambda session, _: session.add(Item(name="more"))
        )
        registry.add(Item(name="first"))

    with pytest.raises(FlushError):
        post(registry, work)
    assert names(outside) == []


def test_a_rollback_whose_hook_raised_loses_nothing(registry: Registry, outside: Engine) -> None:
    """An after_rollback hook that raised, and was caught, leaves the request sound."""

    def work() -> None:
        add(registry, "gone")
        event.listen(registry(), "after_rollback", lambda session: 1 / 0, once=True)
        with suppress(ZeroDivisionError):
            registry.rollback()
        add(registry, "kept")

    post(registry, work)
    assert names(outside) == ["kept"]


@pytest.mark.parametrize("mode", ["explicit", "legacy"])
def test_busy_before_anything_was_written_dooms_nothing(
    mode: str, sqlite_url: str, engine: Engine, outside: Engine
) -> None:
    """BUSY that came before the transaction held anything, swallowed and tried again, is fine."""
    impatient = create_engine(sqlite_url, connect_args={"timeout": 0})
    if mode == "explicit":

        @event.listens_for(impatient, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN")

        @event.listens_for(impatient, "connect")
        def configure(driver: Any, record: object) -> None:
            driver.isolation_level = None

    registry: Registry = scoped_session(sessionmaker(impatient))

    def work() -> None:
        with engine.begin(), pytest.raises(DBAPIError, match="locked"):
            add(registry, "refused")
        add(registry, "kept")

    post(registry, work)
    assert names(outside) == ["kept"]
    impatient.dispose()
