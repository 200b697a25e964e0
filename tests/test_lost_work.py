"""Ways in which work was once lost under a complete success; each stays closed."""

from __future__ import annotations

import gc
import io
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from typing import Any

import pytest
from greenlet import greenlet
from sessionscope import (
    Outcome,
    SessionMiddleware,
    TransactionDoomed,
    attempt,
    on_commit,
    session_scope,
)
from sqlalchemy import Engine, create_engine, event, insert, select
from sqlalchemy import text as sql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, object_session, scoped_session, sessionmaker
from sqlalchemy.pool import QueuePool
from support import PATIENCE, Server, environ, names, refuse_commit, serve_once, text

from models import Item

Registry = scoped_session[Session]


def post(
    work: Callable[[], object], registry: Registry, status: str = "200 OK", **options: Any
) -> None:
    app = text(b"fine", status=status, before=work)
    serve_once(SessionMiddleware(app, registry, **options), environ("POST"))


def add(registry: Registry, name: str = "x") -> None:
    registry.add(Item(name=name))
    registry.flush()


def undo_everything(registry: Registry) -> None:
    """Have SQLite roll the whole transaction back, and swallow its error."""
    with suppress(IntegrityError):
        registry.execute(insert(Item).prefix_with("OR ROLLBACK").values(id=1))


@pytest.fixture
def taken(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Item).values(id=1, name="taken"))


# What the application closes.


def test_a_session_closed_in_a_greenlet_of_its_own_is_no_success(
    registry: Registry, outside: Engine
) -> None:
    """A greenlet that runs close() and nothing else has no line to be named, but loses work."""

    def work() -> None:
        add(registry)
        greenlet(registry().close).switch()

    with pytest.raises(TransactionDoomed, match="a thread or greenlet closed the session"):
        post(work, registry)
    assert names(outside) == []


@pytest.mark.usefixtures("taken")
def test_an_empty_commit_after_an_error_and_remove_is_no_success(registry: Registry) -> None:
    """A view whose flush failed, and that only removes and commits, has swallowed the error."""

    def work() -> None:
        with suppress(IntegrityError):
            registry.add(Item(id=1, name="twice"))
            registry.flush()
        registry.remove()
        registry.commit()

    with pytest.raises(TransactionDoomed, match="a database error was swallowed"):
        post(work, registry)


# What the application commits itself.


@pytest.mark.usefixtures("taken")
def test_an_own_commit_of_a_doomed_transaction_is_refused(
    registry: Registry, outside: Engine
) -> None:
    """commit() in the application refuses a doomed transaction, and runs no callback."""
    ran: list[str] = []

    def work() -> None:
        add(registry)
        on_commit(registry, lambda: ran.append("called"))
        undo_everything(registry)
        registry.commit()

    with pytest.raises(TransactionDoomed):
        post(work, registry)
    assert (names(outside), ran) == (["taken"], [])


@pytest.mark.usefixtures("taken")
def test_a_refused_own_commit_that_is_swallowed_is_refused_again(
    registry: Registry, outside: Engine
) -> None:
    """Swallowing the refusal of an own commit does not turn it into a success."""

    def work() -> None:
        add(registry)
        undo_everything(registry)
        with suppress(TransactionDoomed):
            registry.commit()

    with pytest.raises(TransactionDoomed):
        post(work, registry)
    assert names(outside) == ["taken"]


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("early", [True, False])
def test_a_hook_before_commit_that_swallows_an_error_is_seen(
    early: bool, registry: Registry, outside: Engine
) -> None:
    """An error swallowed in a before_commit hook dooms the transaction like any other."""

    def work() -> None:
        if not early:
            add(registry)
        event.listen(registry(), "before_commit", lambda session: undo_everything(registry))
        if early:
            add(registry)

    with pytest.raises(TransactionDoomed):
        post(work, registry)
    assert names(outside) == ["taken"]


def test_the_last_of_several_hooks_is_seen(taken: None, engine: Engine, outside: Engine) -> None:
    """So does one that is added after others, of a class with a hook of its own."""

    class Hooked(Session):
        pass

    event.listen(Hooked, "before_commit", lambda session: None)
    registry: Registry = scoped_session(sessionmaker(engine, class_=Hooked))

    def work() -> None:
        add(registry)
        event.listen(registry(), "before_commit", lambda session: undo_everything(registry))

    with pytest.raises(TransactionDoomed):
        post(work, registry)
    assert names(outside) == ["taken"]


@pytest.mark.parametrize("first", ["plain", "made"])
def test_sessions_of_related_classes_commit_alike(
    first: str, engine: Engine, outside: Engine
) -> None:
    """A Session and a class derived from it serve requests in either order."""
    plain_factory: Any = lambda: Session(engine)  # noqa: E731
    registries: list[Registry] = [
        scoped_session(plain_factory),
        scoped_session(sessionmaker(engine)),
    ]
    if first == "made":
        registries.reverse()

    for registry in registries:

        def work(registry: Registry = registry) -> None:
            add(registry)
            registry.commit()

        post(work, registry)
    assert names(outside) == ["x", "x"]


def test_first_use_in_many_threads_at_once(engine: Engine, outside: Engine) -> None:
    """Many threads whose first requests come together all commit."""
    registry = scoped_session(sessionmaker(engine))
    together = threading.Barrier(8)

    def work() -> None:
        together.wait(PATIENCE)
        registry.add(Item(name="x"))
        registry.commit()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: post(work, registry), range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len(names(outside)) == 8


def test_threads_that_share_a_connection_do_not_forget_each_other(
    sqlite_url: str, outside: Engine
) -> None:
    """A thread that gets the connection which another has just returned is still watched.

    Each request swallows an error that undid its first INSERT, so none may succeed.
    """
    options = {"check_same_thread": False}
    one = create_engine(
        sqlite_url, poolclass=QueuePool, pool_size=1, max_overflow=0, connect_args=options
    )
    registry = scoped_session(sessionmaker(one))
    with session_scope(registry) as session:
        session.add(Item(id=1))

    def work() -> None:
        add(registry)
        with suppress(IntegrityError):
            registry.execute(insert(Item).prefix_with("OR ROLLBACK").values(id=1))
        add(registry)

    def refused(_: int) -> bool:
        try:
            post(work, registry)
        except TransactionDoomed:
            return True
        return False

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as threads:
            assert all(threads.map(refused, range(1500)))
    finally:
        sys.setswitchinterval(interval)
    assert len(names(outside)) == 1
    one.dispose()


# Sessions that took the place of the request's.


def replace_then_work(registry: Registry, start_response: Any) -> None:
    registry(info={})
    add(registry)
    registry.remove()
    start_response("200 OK", [])


def replace_start_work(registry: Registry, start_response: Any) -> None:
    registry(info={})
    start_response("200 OK", [])
    add(registry)


def only_pending(registry: Registry, start_response: Any) -> None:
    registry(info={})
    registry.add(Item(name="x"))
    start_response("200 OK", [])


def write_by_core(registry: Registry, start_response: Any) -> None:
    registry(info={})
    registry.execute(insert(Item).values(name="x"))
    registry.remove()
    start_response("200 OK", [])


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize(
    "lose", [replace_then_work, replace_start_work, only_pending, write_by_core]
)
def test_work_in_another_session_of_the_registry_is_no_success(
    lose: Callable[[Registry, Any], None], method: str, registry: Registry, outside: Engine
) -> None:
    """Work in a session that the app put in the request's place is refused, removed or not."""

    def app(environ: Any, start_response: Any) -> Any:
        lose(registry, start_response)
        return [b"fine"]

    with pytest.raises(TransactionDoomed):
        serve_once(SessionMiddleware(app, registry), environ(method))
    assert names(outside) == []


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_read_in_another_session_is_fine(
    method: str, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that only read in a session that it put there itself succeeds."""

    def work() -> None:
        registry(info={})
        registry.scalars(select(Item)).all()

    app = SessionMiddleware(text(b"", before=work), registry)
    assert serve_once(app, environ(method)).status == "200 OK"
    assert caplog.text == ""


@pytest.mark.parametrize("before_the_head", [True, False])
def test_work_in_a_scope_that_ends_inside_the_app_is_kept(
    before_the_head: bool, engine: Engine, outside: Engine
) -> None:
    """Whatever the registry's scope is meanwhile, the code of a request has its session."""
    scope = ContextVar("scope", default="server")
    registry = scoped_session(sessionmaker(engine), scopefunc=scope.get)

    def app(environ: Any, start_response: Any) -> Any:
        token = scope.set("app")
        add(registry)
        if before_the_head:
            registry.remove()
            scope.reset(token)
            start_response("200 OK", [])
        else:
            start_response("200 OK", [])
            registry.remove()
            scope.reset(token)
        return [b"fine"]

    assert serve_once(SessionMiddleware(app, registry), environ("POST")).content == b"fine"
    assert names(outside) == ["x"]


def test_a_scope_whose_session_was_replaced_is_no_success(
    registry: Registry, outside: Engine
) -> None:
    """A session_scope refuses, too, what was done in a session that took its place."""
    with pytest.raises(TransactionDoomed), session_scope(registry):
        registry(info={})
        add(registry)
        registry.remove()
    assert names(outside) == []


def test_another_sessions_commit_is_not_ours(registry: Registry, outside: Engine) -> None:
    """The COMMIT of a session put into the registry runs none of the request's callbacks."""
    ran: list[str] = []

    def work() -> None:
        on_commit(registry, lambda: ran.append("called"))
        mine = registry()
        other = registry.session_factory(info=dict(mine.info))
        registry.registry.set(other)
        add(registry, "theirs")
        registry.commit()
        assert ran == []
        other.close()
        registry.registry.set(mine)

    post(work, registry)
    assert (names(outside), ran) == (["theirs"], ["called"])


def test_a_scope_closed_by_the_garbage_collector_disturbs_nobody(
    registry: Registry, outside: Engine
) -> None:
    """A scope in a stream that was dropped does not touch the registry of a later request."""

    def stream(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        with session_scope(registry):
            yield b"one"
            yield b"two"

    server = Server(SessionMiddleware(stream, registry))
    server.begin()
    cycle = [server]
    cycle.append(cycle)  # type: ignore[arg-type]
    del server, cycle

    def work() -> None:
        mine = registry()
        gc.collect()
        assert registry() is mine
        add(registry, "kept")

    post(work, registry)
    assert names(outside) == ["kept"]


# Heads and chunks that say one thing to us and another to the client.


def test_a_header_list_changed_after_start_response(registry: Registry) -> None:
    """A length that is appended to the list afterwards reaches neither us nor the server."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        headers: list[tuple[str, str]] = []
        start_response("200 OK", headers)
        headers.append(("Content-Length", "4"))
        yield b"fine"

    assert serve_once(SessionMiddleware(app, registry)).headers == []


@pytest.mark.parametrize("chunk", [memoryview(array("I", [1, 2])), bytearray(8)])
def test_a_chunk_is_counted_in_bytes(chunk: Any, registry: Registry) -> None:
    """A chunk whose len() is not its bytes is held all the same when it completes the body."""

    def app(environ: Any, start_response: Any) -> Iterator[Any]:
        start_response("200 OK", [("Content-Length", "8")])
        yield chunk
        refuse_commit(registry)

    with pytest.raises(IntegrityError):
        SessionMiddleware(app, registry)(environ(), lambda *head: None)  # type: ignore[arg-type]


def test_bytes_written_before_a_file_are_sent(registry: Registry) -> None:
    """What write() was given goes in front of a body made by the server's file wrapper."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])(b"written, ")
        return environ["wsgi.file_wrapper"](io.BytesIO(b"and read"))

    from wsgiref.util import FileWrapper

    request = {**environ(), "wsgi.file_wrapper": FileWrapper}
    assert serve_once(SessionMiddleware(app, registry), request).content == b"written, and read"


def test_a_path_that_is_not_latin_1_hides_no_exception(registry: Registry) -> None:
    """A path that no server would send changes neither the outcome nor the exception."""
    seen: list[Outcome] = []

    def app(environ: Any, start_response: Any) -> Any:
        raise LookupError("from the app")

    with pytest.raises(LookupError):
        serve_once(SessionMiddleware(app, registry, observer=seen.append), environ(path="/\u2603"))
    assert [outcome.path for outcome in seen] == ["/%3F"]


# Callbacks.


def test_a_flush_that_failed_in_a_savepoint_drops_its_callbacks(
    registry: Registry, outside: Engine
) -> None:
    """A savepoint that is rolled back because a flush failed takes its callbacks along."""
    ran: list[str] = []

    def work() -> None:
        on_commit(registry, lambda: ran.append("before"))
        with suppress(IntegrityError), registry.begin_nested():
            on_commit(registry, lambda: ran.append("inside"))
            registry.add_all([Item(id=1, name="a"), Item(id=2, name="b")])
            registry.flush()
            registry.execute(insert(Item).values(id=1, name="twice"))

    post(work, registry)
    assert (ran, names(outside)) == (["before"], [])


def test_a_session_on_a_users_connection_leaves_that_open(engine: Engine) -> None:
    """Whatever happens after COMMIT, a Connection that the user owns is left as it is."""
    with engine.connect() as connection:
        outer = connection.begin()
        registry: Registry = scoped_session(
            sessionmaker(connection, join_transaction_mode="create_savepoint")
        )

        def work() -> None:
            item = Item(name="x")
            registry.add(item)
            session = registry()
            on_commit(registry, lambda: session.refresh(item))

        post(work, registry)
        assert outer.is_active
        event.listen(registry.session_factory, "after_commit", lambda session: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            post(lambda: add(registry), registry)
        assert outer.is_active
        assert not connection.closed
        outer.rollback()


def test_a_callback_that_exits_leaves_the_work_committed(
    registry: Registry, outside: Engine
) -> None:
    """A BaseException from a callback propagates, and the outcome is still a commit."""
    seen: list[Outcome] = []

    def work() -> None:
        add(registry)
        on_commit(registry, sys.exit)

    with pytest.raises(SystemExit):
        post(work, registry, observer=seen.append)
    assert (names(outside), [outcome.action for outcome in seen]) == (["x"], ["commit"])


# SQLite's own ways.


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_statements_after_a_lost_transaction_are_not_kept(
    status: str, registry: Registry, outside: Engine
) -> None:
    """What follows the loss of a SQLite transaction is rolled back, not committed one by one."""

    def work() -> None:
        undo_everything(registry)
        registry.execute(insert(Item).values(name="after"))

    with suppress(TransactionDoomed):
        post(work, registry, status)
    assert names(outside) == ["taken"]


def test_autocommit_has_no_transaction_to_lose(sqlite_url: str, engine: Engine) -> None:
    """On a connection in AUTOCOMMIT a constraint error dooms nothing."""
    auto = create_engine(sqlite_url, isolation_level="AUTOCOMMIT")
    registry: Registry = scoped_session(sessionmaker(auto))

    def work() -> None:
        registry.execute(insert(Item).values(id=7, name="kept"))
        with suppress(IntegrityError):
            registry.execute(insert(Item).values(id=7, name="twice"))

    post(work, registry)
    assert names(engine) == ["kept"]
    auto.dispose()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has no autocommit before 3.12")
@pytest.mark.parametrize(("autocommit", "kept"), [(True, ["first", "last"]), (False, [])])
def test_sqlite_begins_as_its_driver_is_told(
    autocommit: bool, kept: list[str], sqlite_url: str, engine: Engine
) -> None:
    """In the driver's own AUTOCOMMIT no error undoes other work; without it, all is undone."""
    plain = create_engine(sqlite_url, connect_args={"autocommit": autocommit})
    registry: Registry = scoped_session(sessionmaker(plain))

    def work() -> None:
        registry.execute(insert(Item).values(id=7, name="first"))
        with suppress(IntegrityError):
            registry.execute(insert(Item).prefix_with("OR ROLLBACK").values(id=7))
        registry.execute(insert(Item).values(name="last"))

    with nullcontext() if kept else pytest.raises(TransactionDoomed):
        post(work, registry)
    assert names(engine) == kept
    plain.dispose()


def test_two_units_on_one_connection_both_learn_of_an_error(engine: Engine, taken: None) -> None:
    """An error on a connection that an inner scope shared dooms the outer unit too."""
    with engine.connect() as connection:
        registry: Registry = scoped_session(
            sessionmaker(connection, join_transaction_mode="rollback_only")
        )

        def work() -> None:
            add(registry)
            with session_scope(registry) as inner:
                inner.execute(sql("SELECT 1"))
            undo_everything(registry)

        with pytest.raises(TransactionDoomed):
            post(work, registry)
        connection.rollback()


# The observer.


def test_the_observer_comes_when_the_session_is_closed(registry: Registry) -> None:
    """When the observer is called, the session has let go of its objects."""
    items = [Item(name="x")]
    seen: list[Session | None] = []
    post(
        lambda: registry.add(items[0]),
        registry,
        observer=lambda outcome: seen.append(object_session(items[0])),
    )
    assert seen == [None]


# What a second reading found.


def test_a_savepoint_in_a_replaced_session_saves_nothing(
    registry: Registry, outside: Engine
) -> None:
    """Releasing a savepoint in a session that took the place commits nothing."""

    def work() -> None:
        registry(info={})
        registry.add(Item(name="lost"))
        with registry.begin_nested():
            add(registry, "in a savepoint")
        registry.remove()

    with pytest.raises(TransactionDoomed):
        post(work, registry)
    assert names(outside) == []


def test_work_after_a_read_that_was_thrown_away_counts(registry: Registry, outside: Engine) -> None:
    """A safe method that closed its session after a read, and then wrote, is committed."""

    def work() -> None:
        registry.scalars(select(Item)).all()
        registry.close()
        registry.execute(insert(Item).values(name="counted"))

    serve_once(SessionMiddleware(text(b"", before=work), registry))
    assert names(outside) == ["counted"]


def test_reading_after_an_own_commit_is_harmless(registry: Registry, outside: Engine) -> None:
    """A GET that wrote and committed, then read and removed the session, has lost nothing."""

    def work() -> None:
        add(registry, "kept")
        registry.commit()
        registry.scalars(select(Item)).all()
        registry.remove()

    assert serve_once(SessionMiddleware(text(b"", before=work), registry)).status == "200 OK"
    assert names(outside) == ["kept"]


def test_a_commit_that_hides_its_failure_is_not_believed(engine: Engine, outside: Engine) -> None:
    """A Session class whose commit() swallows what COMMIT said makes no success."""

    class Optimist(Session):
        def commit(self) -> None:
            try:
                super().commit()
            except IntegrityError:
                super().rollback()

    registry: Registry = scoped_session(sessionmaker(engine, class_=Optimist))
    with pytest.raises(TransactionDoomed, match="nothing was committed"):
        post(lambda: refuse_commit(registry), registry)


@pytest.mark.usefixtures("taken")
def test_an_own_commit_whose_hook_swallows_an_error_is_refused(
    registry: Registry, outside: Engine
) -> None:
    """The application's own commit() is checked after its own hooks, too."""

    def work() -> None:
        event.listen(registry(), "before_commit", lambda session: undo_everything(registry))
        add(registry)
        registry.commit()

    with pytest.raises(TransactionDoomed):
        post(work, registry)
    assert names(outside) == ["taken"]


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("way", ["an error hook", "the driver's cursor"])
def test_an_error_that_we_were_not_told_of_is_seen(
    way: str, registry: Registry, engine: Engine, outside: Engine
) -> None:
    """A SQLite transaction that is gone is seen to be gone, whoever hid the error."""

    def convert(context: Any) -> None:
        raise LookupError("converted")

    def work() -> None:
        add(registry)
        if way == "an error hook":
            with suppress(LookupError):
                registry.execute(insert(Item).prefix_with("OR ROLLBACK").values(id=1))
        else:
            driver: Any = registry.connection().connection.dbapi_connection
            with suppress(driver.IntegrityError):
                driver.execute("INSERT OR ROLLBACK INTO items (id) VALUES (1)")

    if way == "an error hook":
        event.listen(engine, "handle_error", convert)
    with pytest.raises(TransactionDoomed):
        post(work, registry)
    assert names(outside) == ["taken"]


def open_scope(registry: Registry) -> Any:
    """A response, suspended inside a session_scope."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        with session_scope(registry) as session:
            yield b"one"
            session.add(Item(name="of the scope"))
            yield b"two"

    server = Server(SessionMiddleware(app, registry))
    return server, server.begin()


def test_a_scope_closed_by_the_garbage_collector_leaves_plain_code_alone(
    registry: Registry, outside: Engine
) -> None:
    """A session that no middleware runs is not touched by a scope that is closed late."""
    cycle: list[Any] = [open_scope(registry)]
    cycle.append(cycle)
    registry.add(Item(name="plain work"))
    del cycle
    gc.collect()
    registry.commit()
    registry.remove()
    assert names(outside) == ["plain work"]


def test_a_suspended_scope_is_not_blamed_for_another_request(
    registry: Registry, outside: Engine
) -> None:
    """What a second request of the thread does with its session is its own affair."""
    server, body = open_scope(registry)

    def work() -> None:
        registry.remove()
        registry.scalars(select(Item)).all()
        registry.remove()

    serve_once(SessionMiddleware(text(b"", before=work), registry))
    assert list(body) == [b"one", b"two"]
    server.finish()
    assert names(outside) == ["of the scope"]


def test_a_refused_commit_and_a_removed_session_leave_nothing(
    sqlite_url: str, engine: Engine, outside: Engine
) -> None:
    """What an own COMMIT refused is not committed by the next user of the connection."""
    plain = create_engine(sqlite_url)

    @event.listens_for(plain, "connect")
    def configure(connection: Any, record: object) -> None:
        connection.execute("PRAGMA foreign_keys = ON")

    registry: Registry = scoped_session(sessionmaker(plain))

    def refused() -> None:
        registry.add(Item(name="refused"))
        refuse_commit(registry)
        with suppress(IntegrityError):
            registry.commit()
        registry.remove()

    def second() -> None:
        registry.execute(sql("DELETE FROM debts"))
        registry.add(Item(name="second"))

    post(refused, registry, "500 Oops")
    post(second, registry)
    assert names(outside) == ["second"]
    plain.dispose()


def test_a_callback_that_adds_itself_runs_once(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback that a callback adds waits for the next COMMIT, and is dropped without one."""
    ran: list[int] = []

    def work() -> None:
        session = registry()

        def callback() -> None:
            ran.append(len(ran))
            on_commit(session, callback)

        on_commit(session, callback)
        add(registry)
        registry.commit()
        assert ran == [0]
        add(registry)

    post(work, registry)
    assert ran == [0, 1]
    assert "no COMMIT followed" in caplog.text


def test_what_the_app_makes_of_its_environ_does_not_matter(
    registry: Registry, outside: Engine
) -> None:
    """The outcome tells the path of the request, whatever the application put there."""
    seen: list[Outcome] = []

    def app(environ: Any, start_response: Any) -> Any:
        environ["PATH_INFO"] = environ["SCRIPT_NAME"] = None
        return text(b"", before=lambda: refuse_commit(registry))(environ, start_response)

    with pytest.raises(IntegrityError):
        serve_once(SessionMiddleware(app, registry, observer=seen.append), environ("POST", "/mine"))
    assert [(outcome.path, outcome.action) for outcome in seen] == [("/mine", "rollback")]


@pytest.mark.parametrize("end", ["hang up", "raise"])
def test_a_long_stream_that_breaks_off_is_warned_of(
    end: str,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A transaction kept open too long is warned of at a stream's end, whatever that is."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        add(registry)
        yield b"one"
        raise LookupError

    server = Server(SessionMiddleware(app, registry))
    body = server.begin()
    next(body)
    monkeypatch.setattr(attempt, "LONG_TRANSACTION", 0.0)
    with suppress(LookupError):
        if end == "raise":
            next(body)
    server.finish()
    assert caplog.text.count("a stream has kept its transaction open") == 1


def test_a_list_of_another_class_is_handed_on(registry: Registry) -> None:
    """A subclass of list that iterates like one is whole, and handed on as it is."""

    class Page(list[bytes]):
        pass

    body = Page([b"one"])

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return body

    assert serve_once(SessionMiddleware(app, registry)).body is body


def test_a_hook_that_refuses_an_own_commit_that_is_swallowed(
    registry: Registry, engine: Engine, outside: Engine
) -> None:
    """A hook that raises before COMMIT is sent refuses it: nothing is unknown."""
    seen: list[Outcome] = []

    def interrupt(connection: object) -> None:
        raise OSError("before COMMIT")

    def work() -> None:
        add(registry)
        event.listen(engine, "commit", interrupt, once=True)
        with suppress(OSError):
            registry.commit()

    with pytest.raises(TransactionDoomed):
        post(work, registry, observer=seen.append)
    assert [outcome.action for outcome in seen] == ["rollback"]
    assert names(outside) == []


def test_a_connection_that_cannot_be_discarded_is_logged(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Where even discarding a connection raises, that is logged and the response stands."""

    class Clinging(Session):
        def close(self) -> None:
            raise OSError("not closed")

        def rollback(self) -> None:
            raise OSError("not rolled back")

    registry: Registry = scoped_session(sessionmaker(engine, class_=Clinging))

    def work() -> None:
        connection = registry.connection()
        event.listen(connection.engine, "rollback", refuse_once)

    def refuse_once(connection: object) -> None:
        raise OSError("no ROLLBACK")

    app = text(b"", status="404 Not Found", before=work)
    assert serve_once(SessionMiddleware(app, registry)).status == "404 Not Found"
    assert "a connection could not be discarded" in caplog.text
    event.remove(engine, "rollback", refuse_once)
    gc.collect()
