"""Callbacks after the COMMIT, the observer, and units of work outside HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from sessionscope import (
    Outcome,
    SessionMiddleware,
    TransactionDoomed,
    on_commit,
    session_scope,
)
from sessionscope.engines import make_engine
from sqlalchemy import Engine, create_engine, event, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import Server, environ, make_tables, names, refuse_commit, serve_once, text

from models import Item
from web.database import create_tables

Registry = scoped_session[Session]


@pytest.fixture
def ran() -> list[str]:
    """What the callbacks of the test have done, in order."""
    return []


def run(registry: Registry, work: Callable[[], object], status: str = "200 OK") -> None:
    serve_once(SessionMiddleware(text(b"", status=status, before=work), registry), environ("POST"))


def test_callbacks_run_in_order_once_after_commit(
    registry: Registry, outside: Engine, ran: list[str]
) -> None:
    """Callbacks run in their order, once, when the work is already durable."""

    def work() -> None:
        registry.add(Item(name="durable"))
        on_commit(registry, lambda: ran.append(f"first sees {names(outside)}"))
        on_commit(registry(), lambda: ran.append("second"))

    run(registry, work)
    assert ran == ["first sees ['durable']", "second"]


def test_a_callback_that_cannot_be_called_is_refused(registry: Registry) -> None:
    """The result of a call, instead of a function, is refused where it is registered."""
    with (
        session_scope(registry) as session,
        pytest.raises(TypeError, match="callback must be callable, not None"),
    ):
        on_commit(session, print())  # type: ignore[arg-type]


def test_callbacks_run_before_the_completing_byte_leaves(
    registry: Registry, ran: list[str]
) -> None:
    """When the last chunk leaves, the callbacks have run."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "6")])
        registry.add(Item(name="x"))
        on_commit(registry, lambda: ran.append("called"))
        yield b"one"
        yield b"two"

    body = Server(SessionMiddleware(app, registry)).begin()
    assert (next(body), ran) == (b"one", [])
    assert (next(body), ran) == (b"two", ["called"])


def test_callbacks_without_work_run_when_the_response_succeeds(
    registry: Registry, ran: list[str]
) -> None:
    """Where nothing had to be committed, success alone is what a callback waits for."""
    run(registry, lambda: on_commit(registry, lambda: ran.append("called")))
    assert ran == ["called"]


@pytest.mark.parametrize("worked", [True, False])
def test_a_rollback_drops_callbacks(worked: bool, registry: Registry, ran: list[str]) -> None:
    """A response that rolls back runs none."""

    def work() -> None:
        if worked:
            registry.add(Item(name="x"))
        on_commit(registry, lambda: ran.append("called"))

    run(registry, work, "404 Not Found")
    assert ran == []


def test_the_apps_rollback_drops_those_registered_before_it(
    registry: Registry, ran: list[str]
) -> None:
    """What was registered before the application's own rollback is gone; later ones run."""

    def work() -> None:
        registry.add(Item(name="x"))
        on_commit(registry, lambda: ran.append("before"))
        registry.rollback()
        on_commit(registry, lambda: ran.append("after"))
        registry.add(Item(name="y"))

    run(registry, work)
    assert ran == ["after"]


def test_the_apps_commit_runs_them(registry: Registry, ran: list[str]) -> None:
    """A COMMIT of the application's own runs what was registered before it, at once."""

    def work() -> None:
        registry.add(Item(name="x"))
        on_commit(registry, lambda: ran.append("called"))
        registry.commit()
        ran.append("afterwards")

    run(registry, work, "500 Oops")
    assert ran == ["called", "afterwards"]


def test_a_rollback_to_a_savepoint_drops_those_registered_since(
    registry: Registry, ran: list[str]
) -> None:
    """Those registered since the savepoint was taken are dropped, at any depth."""

    def work() -> None:
        on_commit(registry, lambda: ran.append("before"))
        outer = registry.begin_nested()
        on_commit(registry, lambda: ran.append("in outer"))
        inner = registry.begin_nested()
        on_commit(registry, lambda: ran.append("in inner"))
        inner.commit()
        on_commit(registry, lambda: ran.append("in outer again"))
        third = registry.begin_nested()
        on_commit(registry, lambda: ran.append("in third"))
        assert third.is_active
        outer.rollback()
        on_commit(registry, lambda: ran.append("after"))
        registry.add(Item(name="x"))

    run(registry, work)
    assert ran == ["before", "after"]


def test_released_savepoints_keep_their_callbacks(registry: Registry, ran: list[str]) -> None:
    """What was registered inside a savepoint that was released runs with the COMMIT."""

    def work() -> None:
        with registry.begin_nested():
            with registry.begin_nested():
                on_commit(registry, lambda: ran.append("inner"))
            on_commit(registry, lambda: ran.append("outer"))
        assert ran == []

    run(registry, work)
    assert ran == ["inner", "outer"]


def test_a_callback_that_raises_is_logged_and_spoils_nothing(
    registry: Registry, ran: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the response nor the other callbacks suffer from one that raises."""

    def work() -> None:
        registry.add(Item(name="x"))
        on_commit(registry, lambda: 1 / 0)
        on_commit(registry, lambda: ran.append("second"))

    run(registry, work)
    assert ran == ["second"]
    assert "on_commit callback" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_callbacks_open_sessions_of_their_own_that_are_removed(
    registry: Registry, engine: Engine, outside: Engine
) -> None:
    """In a callback the registry gives a session of the callback's own, removed after it."""
    seen: list[Session] = []

    def callback() -> None:
        seen.append(registry())
        registry.add(Item(name="lost"))
        registry.flush()

    def work() -> None:
        seen.append(registry())
        registry.add(Item(name="kept"))
        on_commit(registry, callback)
        registry.commit()
        assert registry() is seen[0]

    run(registry, work)
    assert seen[0] is not seen[1]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert names(outside) == ["kept"]


def test_a_refused_commit_runs_no_callback(registry: Registry, ran: list[str]) -> None:
    """A COMMIT that failed runs none."""

    def work() -> None:
        on_commit(registry, lambda: ran.append("called"))
        refuse_commit(registry)

    with pytest.raises(IntegrityError):
        run(registry, work)
    assert ran == []


def test_a_session_thrown_away_runs_no_callback(registry: Registry, ran: list[str]) -> None:
    """A session that the application closed with its work takes its callbacks along."""

    def work() -> None:
        registry.add(Item(name="x"))
        on_commit(registry, lambda: ran.append("called"))
        registry().close()

    with pytest.raises(TransactionDoomed):
        run(registry, work)
    assert ran == []


def test_a_session_that_nothing_runs_is_refused(registry: Registry, engine: Engine) -> None:
    """on_commit refuses a session, or a registry, that nothing of ours runs."""
    with pytest.raises(RuntimeError, match="no session that a SessionMiddleware"):
        on_commit(registry, print)
    with Session(engine) as session, pytest.raises(RuntimeError):
        on_commit(session, print)
    kept = []
    run(registry, lambda: kept.append(registry()))
    with pytest.raises(RuntimeError):
        on_commit(kept[0], print)


def test_after_commit_hooks_that_raise_undo_nothing(
    registry: Registry, outside: Engine, ran: list[str]
) -> None:
    """An exception from a hook after COMMIT propagates; the work and the callbacks stand."""
    outcomes: list[Outcome] = []

    def work() -> None:
        event.listen(registry(), "after_commit", lambda session: 1 / 0)
        registry.add(Item(name="kept"))
        on_commit(registry, lambda: ran.append("called"))

    app = SessionMiddleware(text(b"", before=work), registry, observer=outcomes.append)
    with pytest.raises(ZeroDivisionError):
        serve_once(app)
    assert names(outside) == ["kept"]
    assert ran == ["called"]
    assert [(outcome.action, type(outcome.error)) for outcome in outcomes] == [
        ("commit", ZeroDivisionError)
    ]


def test_before_commit_hooks_that_raise_roll_back(registry: Registry, outside: Engine) -> None:
    """An exception from a hook before COMMIT propagates, and nothing is committed."""

    def work() -> None:
        registry.add(Item(name="gone"))
        registry.flush()
        event.listen(registry(), "before_commit", lambda session: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        run(registry, work)
    assert names(outside) == []


# The observer.


def use(registry: Registry) -> object:
    return registry.scalars(select(Item)).all()


@pytest.mark.parametrize(
    ("status", "used", "action"),
    [
        ("200 OK", True, "commit"),
        ("404 Not Found", True, "rollback"),
        ("200 OK", False, "none"),
        ("500 Oops", False, "none"),
    ],
)
def test_the_observer_gets_one_outcome(
    status: str, used: bool, action: str, registry: Registry, engine: Engine
) -> None:
    """Once per request, with the session gone, the observer is told what became of it."""
    seen: list[Outcome] = []

    def observer(outcome: Outcome) -> None:
        assert not registry.registry.has()
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        seen.append(outcome)

    app = text(b"", status=status, before=lambda: use(registry) if used else None)
    serve_once(SessionMiddleware(app, registry, observer=observer), environ("PUT", "/a b"))
    [outcome] = seen
    assert outcome == Outcome("PUT", "/a%20b", status, action, 1, outcome.seconds, None)  # type: ignore[arg-type]
    assert outcome.seconds >= 0
    with pytest.raises(FrozenInstanceError):
        outcome.action = "commit"  # type: ignore[misc]


def test_the_observer_is_told_of_an_own_rollback(registry: Registry) -> None:
    """What the application itself rolled back is no commit, whatever it answers."""
    seen: list[Outcome] = []

    def work() -> None:
        registry.add(Item(name="no"))
        registry.flush()
        registry.rollback()

    serve_once(SessionMiddleware(text(b"", before=work), registry, observer=seen.append))
    assert [outcome.action for outcome in seen] == ["rollback"]


def test_the_observer_is_told_of_exceptions(registry: Registry) -> None:
    """What the application raised is in the outcome."""
    seen: list[Outcome] = []

    def app(environ: Any, start_response: Any) -> Any:
        use(registry)
        raise LookupError("from the app")

    with pytest.raises(LookupError):
        serve_once(SessionMiddleware(app, registry, observer=seen.append))
    assert [(o.action, o.status, type(o.error)) for o in seen] == [("rollback", None, LookupError)]


class NeedsSession(Exception):
    """An exception whose repr() reads an attribute that must be loaded."""

    def __repr__(self) -> str:
        return f"about {self.args[0].name}"


@pytest.mark.parametrize("streamed", [False, True])
def test_an_exception_that_cannot_be_shown_is_told(streamed: bool, registry: Registry) -> None:
    """An exception whose repr() needs the session, which is gone by then, is the server's."""
    outcomes: list[Outcome] = []

    def app(environ: Any, start_response: Any) -> Any:
        item = Item(name="x")
        registry.add(item)
        registry.commit()
        start_response("200 OK", [])
        if streamed:
            yield b"one"
        raise NeedsSession(item)

    managed = SessionMiddleware(
        app if streamed else lambda *request: list(app(*request)),
        registry,
        observer=outcomes.append,
    )
    with pytest.raises(NeedsSession):
        serve_once(managed)
    assert [type(outcome.error) for outcome in outcomes] == [NeedsSession]


def test_a_server_that_refuses_the_head_makes_no_second_outcome(registry: Registry) -> None:
    """The observer is told once, also if start_response raises after the COMMIT."""
    outcomes: list[Outcome] = []

    def refuse(*_head: object) -> Any:
        raise BrokenPipeError

    app = text(b"", before=lambda: registry.add(Item(name="x")))
    with pytest.raises(BrokenPipeError):
        SessionMiddleware(app, registry, observer=outcomes.append)(environ(), refuse)
    assert [outcome.action for outcome in outcomes] == ["commit"]


def test_the_observer_is_told_of_a_refused_commit(registry: Registry) -> None:
    """A COMMIT that failed is a rollback with an error."""
    seen: list[Outcome] = []
    app = text(b"", before=lambda: refuse_commit(registry))
    with pytest.raises(IntegrityError):
        serve_once(SessionMiddleware(app, registry, observer=seen.append))
    assert [(o.action, o.status, type(o.error)) for o in seen] == [
        ("rollback", "200 OK", IntegrityError)
    ]


@pytest.mark.parametrize(("raised", "action"), [(SystemExit, "unknown"), (ValueError, "rollback")])
def test_the_observer_is_told_of_an_interrupted_commit(
    raised: type[BaseException], action: str, registry: Registry, engine: Engine
) -> None:
    """A hook that refuses is a rollback; after an interrupt nobody knows how far COMMIT came."""
    seen: list[Outcome] = []

    def interrupt(connection: object) -> None:
        raise raised("from a hook of COMMIT")

    def work() -> None:
        use(registry)
        event.listen(engine, "commit", interrupt, once=True)

    app = text(b"", before=work)
    with pytest.raises(raised):
        serve_once(SessionMiddleware(app, registry, observer=seen.append))
    assert [(o.action, type(o.error)) for o in seen] == [(action, raised)]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_the_observer_of_a_stream_is_told_at_its_end(registry: Registry) -> None:
    """For a stream the outcome comes when it ends, or when the client hangs up."""
    seen: list[Outcome] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        use(registry)
        yield b"one"
        yield b"two"

    application = SessionMiddleware(app, registry, observer=seen.append)
    server = Server(application)
    body = server.begin()
    assert (next(body), seen) == (b"one", [])
    assert list(body) == [b"two"]
    assert [outcome.action for outcome in seen] == ["commit"]
    server.finish()
    broken_off = Server(application)
    next(broken_off.begin())
    broken_off.finish()
    assert [outcome.action for outcome in seen] == ["commit", "rollback"]


def test_the_observer_is_told_what_close_raised(registry: Registry) -> None:
    """What the iterable's close() raises when the client hangs up is in the outcome."""
    seen: list[Outcome] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            use(registry)
            yield b"one"

        def close(self) -> None:
            raise OSError("from close")

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Body()

    server = Server(SessionMiddleware(app, registry, observer=seen.append))
    server.begin()
    with pytest.raises(OSError, match="from close"):
        server.finish()
    assert [(outcome.action, type(outcome.error)) for outcome in seen] == [("rollback", OSError)]


def test_an_observer_that_raises_changes_nothing(
    registry: Registry, outside: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """An observer's exception is logged; the response and the work stand."""

    def observer(outcome: Outcome) -> None:
        registry.add(Item(name="lost"))
        raise LookupError("no metrics")

    app = text(b"fine", before=lambda: registry.add(Item(name="kept")))
    reply = serve_once(SessionMiddleware(app, registry, observer=observer))
    assert reply.content == b"fine"
    assert names(outside) == ["kept"]
    assert "the observer failed" in caplog.text


def test_a_joined_request_has_no_outcome_of_its_own(registry: Registry) -> None:
    """Only the outermost request is observed."""
    seen: list[Outcome] = []
    inner = SessionMiddleware(text(b""), registry, observer=seen.append)
    serve_once(SessionMiddleware(inner, registry, observer=seen.append))
    assert len(seen) == 1


def test_a_refused_commit_is_logged_with_its_traceback(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has an ERROR with the traceback for a COMMIT that failed."""
    with pytest.raises(IntegrityError):
        run(registry, lambda: refuse_commit(registry))
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (record.name, record.getMessage()) == ("sessionscope", "POST /: the commit failed")
    assert record.exc_info


# Units of work outside HTTP.


def test_a_scope_commits_at_its_end(registry: Registry, outside: Engine) -> None:
    """session_scope commits when its block ends, and leaves nothing in the registry."""
    with session_scope(registry) as session:
        assert registry() is session
        session.add(Item(name="kept"))
    assert names(outside) == ["kept"]
    assert not registry.registry.has()


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_a_scope_rolls_back_on_any_exception(
    raised: type[BaseException], registry: Registry, outside: Engine
) -> None:
    """session_scope rolls back whatever is raised in it, and lets it through."""
    with pytest.raises(raised), session_scope(registry) as session:
        session.add(Item(name="gone"))
        session.flush()
        raise raised
    assert names(outside) == []


def test_a_scope_reports_a_refused_commit(
    registry: Registry, outside: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A COMMIT that fails at the end of a scope is raised and logged."""
    with pytest.raises(IntegrityError), session_scope(registry) as session:
        session.add(Item(name="gone"))
        refuse_commit(session)
    assert names(outside) == []
    assert "the commit failed" in caplog.text


def test_a_scope_inside_a_request_is_a_transaction_of_its_own(
    registry: Registry, memory: Registry
) -> None:
    """Inside a request a scope has a new session; the request's is put back after it."""

    def work() -> None:
        mine = memory()
        with session_scope(memory) as session:
            assert memory() is session
            assert session is not mine
            session.execute(insert(Item).values(name="scope"))
        assert memory() is mine

    run(memory, work, "500 Oops")
    with session_scope(memory) as session:
        assert session.scalars(select(Item.name)).all() == ["scope"]


@pytest.fixture
def memory() -> Iterator[Registry]:
    """A registry on a database in memory."""
    engine = make_engine("sqlite://")
    create_tables(engine)
    yield scoped_session(sessionmaker(engine))
    engine.dispose()


def test_a_scope_on_the_connection_of_the_request() -> None:
    """SQLite in memory has one connection per thread: a scope's COMMIT is the request's, too."""
    engine = create_engine("sqlite://")
    registry: Registry = scoped_session(sessionmaker(engine))
    make_tables(engine)

    def work() -> None:
        registry.add(Item(name="request"))
        registry.flush()
        with session_scope(registry) as session:
            session.add(Item(name="scope"))

    serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    assert names(engine) == ["request", "scope"]
    engine.dispose()


@pytest.mark.parametrize("scope_follows", [False, True])
@pytest.mark.parametrize("core", [False, True])
def test_a_scope_that_rolls_back_the_connection_of_the_request(
    core: bool, scope_follows: bool
) -> None:
    """What such a scope took back with it is lost, whatever comes afterwards."""
    engine = create_engine("sqlite://")
    registry: Registry = scoped_session(sessionmaker(engine))
    make_tables(engine)

    def work() -> None:
        if core:
            registry.execute(insert(Item).values(name="request"))
        else:
            registry.add(Item(name="request"))
            registry.flush()
        with suppress(LookupError), session_scope(registry) as session:
            session.execute(insert(Item).values(name="taken back"))
            raise LookupError
        if scope_follows:
            with session_scope(registry) as session:
                session.add(Item(name="scope"))
        registry.execute(insert(Item).values(name="request, again"))

    with pytest.raises(TransactionDoomed):
        serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    assert names(engine) == (["scope"] if scope_follows else [])
    engine.dispose()


def test_a_scope_that_gets_the_session_of_the_request_is_refused(engine: Engine) -> None:
    """A factory that returns the same session twice cannot serve a scope in a request."""
    session = Session(engine)
    registry: Registry = scoped_session(lambda: session)  # type: ignore[arg-type]

    def work() -> None:
        with session_scope(registry):
            raise AssertionError("unreachable")

    app = SessionMiddleware(text(b"", before=work), registry)
    with pytest.raises(RuntimeError, match="returned a session that is in use already"):
        serve_once(app)


def test_a_scope_that_stays_open_across_chunks_keeps_its_session(
    registry: Registry, outside: Engine
) -> None:
    """A generator that yields inside a scope finds the scope's session when it goes on."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        mine = registry()
        with session_scope(registry) as session:
            yield b"one"
            assert registry() is session
            session.add(Item(name="scope"))
            yield b"two"
        assert registry() is mine
        registry.add(Item(name="request"))

    assert serve_once(SessionMiddleware(app, registry)).chunks == [b"one", b"two"]
    assert names(outside) == ["scope", "request"]


def test_a_scope_runs_callbacks(registry: Registry, ran: list[str]) -> None:
    """on_commit works in a scope as in a request."""
    with session_scope(registry) as session:
        session.add(Item(name="x"))
        on_commit(registry, lambda: ran.append("called"))
        assert ran == []
    assert ran == ["called"]


def test_a_scope_whose_session_was_closed_is_doomed(registry: Registry) -> None:
    """A scope that threw its work away is no success, whether or not it wrote."""
    with pytest.raises(TransactionDoomed), session_scope(registry) as session:
        session.execute(select(Item))
        session.close()


@pytest.mark.parametrize(("end", "called"), [("commit", ["called"]), ("rollback", [])])
def test_a_savepoint_of_the_connection_drops_callbacks(
    end: str, called: list[str], registry: Registry, ran: list[str]
) -> None:
    """A rollback to a savepoint taken on the Connection drops what was registered in it."""

    def work() -> None:
        savepoint = registry.connection().begin_nested()
        on_commit(registry, lambda: ran.append("called"))
        with registry.connection().begin_nested():
            use(registry)
        registry.connection().begin_nested().rollback()
        getattr(savepoint, end)()

    run(registry, work)
    assert ran == called


def test_a_callback_may_put_a_session_into_the_registry(
    registry: Registry, outside: Engine
) -> None:
    """A callback finds no session of the request, and its own is closed after it."""

    def callback() -> None:
        assert not registry.registry.has()
        registry(autoflush=False)
        registry.remove()
        registry.add(Item(name="by the callback"))
        registry.commit()

    run(registry, lambda: on_commit(registry, callback))
    assert names(outside) == ["by the callback"]


def test_what_a_callback_does_not_commit_is_warned_of(
    registry: Registry, outside: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Work that a callback left uncommitted, in its session or the request's, is dropped."""

    def work() -> None:
        mine = registry()
        on_commit(registry, lambda: registry.add(Item(name="in its own")))
        on_commit(registry, lambda: mine.add(Item(name="in the request's")))
        use(registry)

    run(registry, work)
    assert names(outside) == []
    assert "a callback or an observer must commit what it writes" in caplog.text
    assert "an on_commit callback used the session of the request" in caplog.text


def test_a_callback_of_a_callback_waits_for_the_next_commit(
    registry: Registry, ran: list[str]
) -> None:
    """on_commit(registry) in a callback means the request's session, and its next COMMIT."""

    def work() -> None:
        on_commit(registry, lambda: on_commit(registry, lambda: ran.append("called")))
        use(registry)
        registry.commit()
        assert ran == []
        use(registry)

    run(registry, work)
    assert ran == ["called"]


def test_a_callback_may_commit_in_the_session_of_the_request(
    registry: Registry, outside: Engine
) -> None:
    """What a callback commits itself stands, whatever session it does it in."""

    def work() -> None:
        mine = registry()

        def callback() -> None:
            mine.add(Item(name="committed"))
            mine.commit()

        on_commit(registry, callback)
        use(registry)

    run(registry, work)
    assert names(outside) == ["committed"]
