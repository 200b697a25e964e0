"""A request that the database asks to make again is made again, where that is safe."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import pytest
from sessionscope import (
    CommitOutcomeUnknown,
    Outcome,
    SessionMiddleware,
    TransactionDoomed,
    engines,
    on_commit,
    session_scope,
)
from sessionscope.engines import make_engine
from sqlalchemy import Connection, Engine, create_engine, event, insert, select, update
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError
from support import (
    PATIENCE,
    environ,
    fetch,
    names,
    serve_once,
    serving,
    text,
)

import middleware
from models import Item

Registry = scoped_session[Session]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.0)


class Rival:
    """Another connection that holds SQLite's write lock for the first attempts."""

    def __init__(self, engine: Engine, registry: Registry, attempts: int) -> None:
        self.registry = registry
        self.left = attempts
        self.calls = 0
        self.connection: Connection = engine.connect()
        self.connection.begin()

    def work(self) -> None:
        """Create an item: SQLITE_BUSY as long as the lock is held."""
        self.calls += 1
        if self.left == 0:
            self.connection.rollback()
        self.left -= 1
        self.registry.execute(insert(Item).values(name=f"call {self.calls}"))


@pytest.fixture
def impatient(sqlite_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine on the same file that does not wait for the lock."""
    monkeypatch.setattr(engines, "BUSY_TIMEOUT", 0.0)
    made = make_engine(sqlite_url)
    yield made
    made.dispose()


@pytest.fixture
def rival(engine: Engine, impatient: Engine) -> Iterator[Callable[..., Rival]]:
    made: list[Rival] = []

    def make(attempts: int = 1) -> Rival:
        made.append(Rival(engine, scoped_session(sessionmaker(impatient)), attempts))
        return made[-1]

    yield make
    for each in made:
        each.connection.close()
        assert not each.registry.registry.has()


def test_a_busy_database_is_asked_again(rival: Callable[..., Rival], outside: Engine) -> None:
    """A request that met a lock is tried again, and has one effect."""
    busy = rival(2)
    app = SessionMiddleware(text(b"fine", before=busy.work), busy.registry, attempts=3)
    assert serve_once(app, environ("POST")).content == b"fine"
    assert names(outside) == ["call 3"]


def test_by_default_nothing_is_repeated(rival: Callable[..., Rival]) -> None:
    """Without attempts the first failure is what the server sees."""
    busy = rival(1)
    with pytest.raises(OperationalError, match="locked"):
        serve_once(SessionMiddleware(text(b"", before=busy.work), busy.registry))
    assert busy.calls == 1


def test_after_the_last_attempt_the_server_sees_its_failure(rival: Callable[..., Rival]) -> None:
    """The last attempt's exception leaves as it would have without attempts."""
    busy = rival(9)
    app = SessionMiddleware(text(b"", before=busy.work), busy.registry, attempts=3)
    with pytest.raises(OperationalError, match="locked"):
        serve_once(app)
    assert busy.calls == 3


def test_an_error_page_is_taken_back(rival: Callable[..., Rival], outside: Engine) -> None:
    """Where a framework made a 5xx page of the error, the page is dropped and all repeated."""
    busy = rival(1)

    def app(environ: Any, start_response: Any) -> Any:
        try:
            busy.work()
        except DBAPIError:
            start_response("500 Internal Server Error", [])
            return [b"sorry"]
        start_response("200 OK", [])
        return [b"fine"]

    assert serve_once(SessionMiddleware(app, busy.registry, attempts=2)).content == b"fine"
    assert names(outside) == ["call 2"]


@pytest.mark.parametrize("attempts", [1, 2])
def test_the_last_error_page_is_the_clients(attempts: int, rival: Callable[..., Rival]) -> None:
    """After the last attempt the client gets the framework's page."""
    busy = rival(9)

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        with suppress(DBAPIError):
            busy.work()
        start_response("503 Service Unavailable", [])
        yield b"sorry"

    app_ = SessionMiddleware(app, busy.registry, attempts=attempts)
    assert serve_once(app_).content == b"sorry"
    assert busy.calls == attempts


def test_a_page_that_is_no_server_error_is_not_taken_back(rival: Callable[..., Rival]) -> None:
    """A 4xx is the application's own answer, whatever it swallowed."""
    busy = rival(9)

    def app(environ: Any, start_response: Any) -> Any:
        with suppress(DBAPIError):
            busy.work()
        start_response("409 Conflict", [])
        return [b"sorry"]

    serve_once(SessionMiddleware(app, busy.registry, attempts=3))
    assert busy.calls == 1


def test_an_error_page_for_another_reason_is_not_taken_back(registry: Registry) -> None:
    """A 5xx in which the database had no part is delivered at once."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        registry.execute(select(Item))

    serve_once(SessionMiddleware(text(b"", status="500 Oops", before=work), registry, attempts=3))
    assert len(calls) == 1


def test_the_pause_is_random_and_bounded(
    rival: Callable[..., Rival], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pause is drawn from nothing to a bound that doubles, and does not grow for ever."""
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.25)
    bounds: list[float] = []

    def uniform(low: float, high: float) -> float:
        assert low == 0
        bounds.append(high)
        return 0.0

    monkeypatch.setattr(random, "uniform", uniform)
    busy = rival(9)
    app = SessionMiddleware(text(b"", before=busy.work), busy.registry, attempts=8)
    with pytest.raises(OperationalError):
        serve_once(app)
    assert bounds == [0.5, 1, 2, 4, 8, 8, 8]


# What each engine calls transient.


@pytest.fixture
def postgresql(postgresql: Engine) -> Iterator[Engine]:
    """PostgreSQL with the tables, and a sequence that counts tries."""
    with postgresql.begin() as connection:
        connection.execute(sql("CREATE SEQUENCE tries"))
    yield postgresql
    with postgresql.begin() as connection:
        connection.execute(sql("DROP SEQUENCE tries"))
        connection.execute(sql("DROP FUNCTION IF EXISTS fail() CASCADE"))


def fail_first(engine: Engine, code: str, when: str) -> None:
    """Have the first insert fail with *code*; a sequence is not undone with it."""
    with engine.begin() as connection:
        connection.execute(
            sql(f"""
            CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('tries') = 1 THEN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END IF;
            RETURN NULL; END $$
            """)
        )
        connection.execute(
            sql(f"""
            CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON items
            DEFERRABLE INITIALLY {when} FOR EACH ROW EXECUTE FUNCTION fail()
            """)
        )


@pytest.mark.parametrize("code", ["40001", "40P01"])
@pytest.mark.parametrize("when", ["IMMEDIATE", "DEFERRED"])
@pytest.mark.parametrize("swallowed", [True, False])
def test_postgresql_conflicts_are_repeated(
    code: str, when: str, swallowed: bool, postgresql: Engine
) -> None:
    """A conflict at the statement or at COMMIT, swallowed or not, is repeated to success."""
    fail_first(postgresql, code, when)
    registry: Registry = scoped_session(sessionmaker(postgresql))

    def work() -> None:
        registry.add(Item(name="once"))
        try:
            registry.flush()
        except DBAPIError:
            if not swallowed:
                raise

    app = SessionMiddleware(text(b"fine", before=work), registry, attempts=2)
    assert serve_once(app, environ("POST")).content == b"fine"
    assert names(postgresql) == ["once"]


@pytest.mark.parametrize("code", ["23505", "57014"])
def test_postgresql_other_errors_are_not_repeated(code: str, postgresql: Engine) -> None:
    """An error that is no conflict is what the server sees at once."""
    fail_first(postgresql, code, "IMMEDIATE")
    registry: Registry = scoped_session(sessionmaker(postgresql))
    app = text(b"", before=lambda: registry.execute(insert(Item).values(name="x")))
    with pytest.raises(DBAPIError):
        serve_once(SessionMiddleware(app, registry, attempts=3))
    assert names(postgresql) == []


def test_postgresql_the_statement_after_a_swallowed_conflict(postgresql: Engine) -> None:
    """An error that only says that the transaction is aborted is repeated for the first one."""
    fail_first(postgresql, "40001", "IMMEDIATE")
    registry: Registry = scoped_session(sessionmaker(postgresql))

    def work() -> None:
        with suppress(DBAPIError):
            registry.execute(insert(Item).values(name="x"))
        registry.execute(select(Item))

    serve_once(SessionMiddleware(text(b"", before=work), registry, attempts=2))
    assert names(postgresql) == ["x"]


def test_postgresql_a_connection_found_dead_is_replaced(postgresql: Engine) -> None:
    """A connection that died before COMMIT was sent costs an attempt, not the request."""
    registry: Registry = scoped_session(sessionmaker(postgresql))
    calls: list[int] = []

    def work() -> None:
        registry.execute(insert(Item).values(name="once"))
        calls.append(1)
        if len(calls) == 1:
            registry.execute(sql("SELECT pg_terminate_backend(pg_backend_pid())"))

    serve_once(SessionMiddleware(text(b"", before=work), registry, attempts=2))
    assert names(postgresql) == ["once"]


def test_postgresql_write_skew_is_resolved(postgresql: Engine) -> None:
    """Of two serializable requests that skew each other one is repeated, and sees the other."""
    engine = postgresql.execution_options(isolation_level="SERIALIZABLE")
    registry: Registry = scoped_session(sessionmaker(engine))
    both_read = threading.Barrier(2)
    firsts = threading.local()

    def work() -> None:
        count = len(registry.scalars(select(Item)).all())
        if not hasattr(firsts, "read"):
            firsts.read = True
            both_read.wait(PATIENCE)
        registry.add(Item(name=f"saw {count}"))

    app = SessionMiddleware(text(b"", before=work), registry, attempts=5)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: serve_once(app, environ("POST")), range(2)))
    assert sorted(map(str, names(postgresql))) == ["saw 0", "saw 1"]


@pytest.fixture
def mariadb(mariadb: Engine) -> Engine:
    """MariaDB with the tables, and one item."""
    with mariadb.begin() as connection:
        connection.execute(insert(Item).values(id=1, name="one"))
    return mariadb


def test_mariadb_a_lost_update_is_repeated(mariadb: Engine) -> None:
    """A row that changed since it was read (1020) is read again, and no update is lost."""
    registry: Registry = scoped_session(sessionmaker(mariadb))
    calls: list[str | None] = []

    def work() -> None:
        item = registry.get_one(Item, 1)
        calls.append(item.name)
        if len(calls) == 1:
            with mariadb.begin() as other:
                other.execute(update(Item).values(name="other"))
        item.name = f"{item.name}+"

    serve_once(SessionMiddleware(text(b"", before=work), registry, attempts=2), environ("POST"))
    assert (calls, names(mariadb)) == (["one", "other"], ["other+"])


@pytest.mark.parametrize("number", [1205, 1213, 1020])
def test_mariadb_conflicts_are_repeated(number: int, mariadb: Engine) -> None:
    """Lock timeouts, deadlocks and changed rows are repeated by their number."""
    registry: Registry = scoped_session(sessionmaker(mariadb))
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        if len(calls) == 1:
            registry.execute(
                sql(f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'no'")
            )
        registry.add(Item(name="two"))

    serve_once(SessionMiddleware(text(b"", before=work), registry, attempts=2), environ("POST"))
    assert names(mariadb) == ["one", "two"]


def test_a_stale_row_is_read_again(registry: Registry, outside: Engine) -> None:
    """SQLAlchemy's StaleDataError is a conflict like those of the database."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        item = Item(name="kept")
        registry.add(item)
        registry.flush()
        if len(calls) == 1:
            registry.execute(sql("DELETE FROM items"))
            item.name = "stale"
            registry.flush()

    app = SessionMiddleware(text(b"", before=work), registry, attempts=2)
    serve_once(app, environ("POST"))
    assert names(outside) == ["kept"]
    calls.clear()
    with pytest.raises(StaleDataError):
        serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))


@pytest.mark.parametrize("status", ["500 Internal Server Error", "200 OK"])
def test_a_stale_row_that_was_swallowed_is_read_again(
    status: str, registry: Registry, outside: Engine
) -> None:
    """So it is where a framework made a page of it, or the application went on regardless."""
    calls: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        calls.append(1)
        item = Item(name="kept")
        registry.add(item)
        registry.flush()
        if len(calls) == 1:
            registry.execute(sql("DELETE FROM items"))
            item.name = "stale"
            with suppress(StaleDataError):
                registry.flush()
        start_response(status if len(calls) == 1 else "200 OK", [])
        return [b"fine"]

    assert serve_once(SessionMiddleware(app, registry, attempts=2)).content == b"fine"
    assert names(outside) == ["kept"]


def test_a_page_that_is_taken_back_has_no_outcome(rival: Callable[..., Rival]) -> None:
    """The observer is told once of a request, also where an iterator of a page is taken back."""
    busy = rival(1)
    outcomes: list[Outcome] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        try:
            busy.work()
        except DBAPIError:
            start_response("500 Internal Server Error", [])
            return iter([b"sorry"])
        start_response("200 OK", [])
        return iter([b"fine"])

    wrapped = SessionMiddleware(app, busy.registry, attempts=2, observer=outcomes.append)
    assert serve_once(wrapped).content == b"fine"
    assert [(outcome.action, outcome.attempts) for outcome in outcomes] == [("commit", 2)]


# What is never repeated.


def refuse_to_repeat(app: Any, registry: Registry, expected: type[BaseException]) -> None:
    with pytest.raises(expected):
        serve_once(SessionMiddleware(app, registry, attempts=3), environ("POST"))


@pytest.mark.parametrize("raised", [LookupError, KeyboardInterrupt])
def test_another_error_is_not_repeated(
    raised: type[BaseException], rival: Callable[..., Rival]
) -> None:
    """What the application makes of the error, if it is no 5xx page, is its own affair."""
    busy = rival(9)

    def work() -> None:
        with suppress(DBAPIError):
            busy.work()
        raise raised

    refuse_to_repeat(text(b"", before=work), busy.registry, raised)
    assert busy.calls == 1


def test_nothing_is_repeated_once_a_byte_has_left(rival: Callable[..., Rival]) -> None:
    """A conflict in the middle of a stream tears the stream."""
    busy = rival(9)

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"left"
        busy.work()

    refuse_to_repeat(app, busy.registry, OperationalError)
    assert busy.calls == 1


def test_a_stream_is_repeated_while_nothing_has_left(
    rival: Callable[..., Rival], outside: Engine
) -> None:
    """A conflict before the first chunk is repeated, the iterable closed before that."""
    busy = rival(1)
    events: list[str] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            busy.work()
            yield b"fine"

        def close(self) -> None:
            events.append("closed")

    def app(environ: Any, start_response: Any) -> Any:
        events.append("called")
        start_response("200 OK", [])
        return Body()

    assert serve_once(SessionMiddleware(app, busy.registry, attempts=2)).content == b"fine"
    assert events == ["called", "closed", "called", "closed"]
    assert names(outside) == ["call 2"]


def commit_own(registry: Registry, other: Registry) -> None:
    registry.commit()


def commit_in_a_scope(registry: Registry, other: Registry) -> None:
    with session_scope(other) as session:
        session.execute(select(Item))


def commit_in_a_request(registry: Registry, other: Registry) -> None:
    app = text(b"", before=lambda: other.scalars(select(Item)).all())
    serve_once(SessionMiddleware(app, other))


@pytest.mark.parametrize("commit", [commit_own, commit_in_a_scope, commit_in_a_request])
def test_nothing_is_repeated_after_anything_was_committed(
    commit: Callable[[Registry, Registry], None], postgresql: Engine
) -> None:
    """After a COMMIT inside the request, of whatever registry, it is not made again."""
    registry: Registry = scoped_session(sessionmaker(postgresql))
    other: Registry = scoped_session(sessionmaker(postgresql))
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        registry.execute(insert(Item).values(name="x"))
        commit(registry, other)
        registry.execute(sql("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END $$"))

    refuse_to_repeat(text(b"", before=work), registry, OperationalError)
    assert len(calls) == 1


def test_a_released_savepoint_is_no_commit(rival: Callable[..., Rival], outside: Engine) -> None:
    """Releasing a savepoint commits nothing, and hinders no further attempt."""
    busy = rival(1)

    def work() -> None:
        with suppress(StopIteration), busy.registry.begin_nested():
            busy.work()

    serve_once(SessionMiddleware(text(b"", before=work), busy.registry, attempts=2))
    assert names(outside) == ["call 2"]


@pytest.fixture
def cut_off(postgresql: Engine) -> Registry:
    """A registry whose every COMMIT of an item is cut off by the server."""
    with postgresql.begin() as connection:
        connection.execute(
            sql("""
            CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$
            """)
        )
        connection.execute(
            sql("""
            CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON items
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()
            """)
        )
    return scoped_session(sessionmaker(postgresql))


def test_an_unknown_outcome_is_not_repeated(cut_off: Registry) -> None:
    """A COMMIT whose answer was lost is never sent again."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        cut_off.execute(insert(Item).values(name="x"))

    refuse_to_repeat(text(b"", before=work), cut_off, CommitOutcomeUnknown)
    assert len(calls) == 1


@pytest.mark.parametrize("rolled_back", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
def test_an_unknown_outcome_that_became_a_page_is_not_repeated(
    rolled_back: bool, streamed: bool, cut_off: Registry
) -> None:
    """An own COMMIT whose answer was lost is not made again for the 5xx page it became."""
    calls: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        calls.append(1)
        cut_off.execute(insert(Item).values(name="x"))
        with suppress(DBAPIError):
            cut_off.commit()
        if rolled_back:
            cut_off.rollback()
        start_response("503 Service Unavailable", [])
        return iter([b"sorry", b"!"]) if streamed else [b"sorry"]

    serve_once(SessionMiddleware(app, cut_off, attempts=3), environ("POST"))
    assert len(calls) == 1


def test_the_unknown_outcome_of_a_session_of_its_own_is_not_repeated(cut_off: Registry) -> None:
    """Nor is one in which a session that nothing of ours runs lost the answer to its COMMIT."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        with cut_off.session_factory() as session:
            session.execute(insert(Item).values(name="x"))
            session.commit()

    refuse_to_repeat(text(b"", before=work), cut_off, DBAPIError)
    assert len(calls) == 1


def test_an_inner_unknown_outcome_is_not_repeated(cut_off: Registry) -> None:
    """Nor is a request in which a session_scope lost the answer to its COMMIT."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        with suppress(CommitOutcomeUnknown), session_scope(cut_off) as session:
            session.execute(insert(Item).values(name="x"))
        raise StaleDataError

    refuse_to_repeat(text(b"", before=work), cut_off, StaleDataError)
    assert len(calls) == 1


def test_nothing_is_repeated_after_a_callback_ran(rival: Callable[..., Rival]) -> None:
    """A page that commit_when lets succeed has had its callbacks, and is not taken back."""
    busy = rival(9)
    ran: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        with suppress(DBAPIError):
            busy.work()
        busy.registry.rollback()
        on_commit(busy.registry, lambda: ran.append(busy.calls))
        start_response("503 Service Unavailable", [])
        return [b"sorry"]

    always = SessionMiddleware(app, busy.registry, attempts=3, commit_when=lambda *_: True)
    serve_once(always, environ("POST"))
    assert (busy.calls, ran) == (1, [1])


def test_work_thrown_away_is_not_repeated(registry: Registry) -> None:
    """A mistake of the application's would only be made again."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        registry.add(Item(name="x"))
        registry().close()

    refuse_to_repeat(text(b"", before=work), registry, TransactionDoomed)
    assert len(calls) == 1


def test_callbacks_run_for_the_attempt_that_succeeded(rival: Callable[..., Rival]) -> None:
    """on_commit is the cure for what must not be done twice."""
    busy = rival(2)
    ran: list[int] = []

    def work() -> None:
        on_commit(busy.registry, lambda: ran.append(busy.calls))
        busy.work()

    serve_once(SessionMiddleware(text(b"", before=work), busy.registry, attempts=3))
    assert ran == [3]


# The request as it was.


def test_the_environ_is_as_it_was_at_entry(rival: Callable[..., Rival]) -> None:
    """The server's own dict is set back: what an attempt added, changed or deleted is undone."""
    busy = rival(1)
    request = environ("POST", "/path", **{"mine": "kept", "gone": "there"})
    seen: list[tuple[Any, ...]] = []

    def app(environ: Any, start_response: Any) -> Any:
        assert environ is request
        seen.append((environ["PATH_INFO"], environ.get("gone"), environ.get("added")))
        environ["PATH_INFO"], environ["added"] = "/changed", True
        environ.pop("gone")
        return text(b"", before=busy.work)(environ, start_response)

    serve_once(SessionMiddleware(app, busy.registry, attempts=2), request)
    assert seen == [("/path", "there", None)] * 2


class Unseekable:
    """An input like a socket's: read once, no seek, and no more than what is there."""

    def __init__(self, content: bytes) -> None:
        self.file = io.BytesIO(content)

    def read(self, *size: int) -> bytes:
        return self.file.read(*size)

    def readline(self, *size: int) -> bytes:
        return self.file.readline(*size)

    def readlines(self, *hint: int) -> list[bytes]:
        return self.file.readlines(*hint)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.file)


class Pipe(Unseekable):
    """An input that counts what was read, and says that it cannot go back."""

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self.file.tell()


def read_all(stream: Any) -> list[bytes]:
    return [stream.read()]


def read_pieces(stream: Any) -> list[bytes]:
    return [
        stream.read(7),
        stream.readline(),
        stream.readline(3),
        stream.read(10**9),
        stream.read(1),
    ]


def read_lines(stream: Any) -> list[bytes]:
    return list(stream)


def read_readlines(stream: Any) -> list[bytes]:
    return stream.readlines()  # type: ignore[no-any-return]


READERS = [read_all, read_pieces, read_lines, read_readlines]
LINES = b"first line\nsecond line\nthird line without an end"


@pytest.mark.parametrize("kind", [io.BytesIO, Unseekable, Pipe])
@pytest.mark.parametrize("first", [*READERS, lambda stream: stream.read(4), lambda stream: None])
@pytest.mark.parametrize("second", READERS)
@pytest.mark.parametrize(
    "content", [LINES, LINES.replace(b" ", b" " * 20_000) * 10, b""], ids=["short", "long", "empty"]
)
def test_the_body_is_read_again_from_its_beginning(
    kind: Any, first: Any, second: Any, content: bytes, rival: Callable[..., Rival]
) -> None:
    """However much of the body an attempt read, the next reads all of it, byte for byte."""
    busy = rival(1)
    got: list[list[bytes]] = []

    def app(environ: Any, start_response: Any) -> Any:
        read = first if not got and busy.calls == 0 else second
        got.append(read(environ["wsgi.input"]))
        return text(b"", before=busy.work)(environ, start_response)

    request = {**environ("POST"), "wsgi.input": kind(content)}
    serve_once(SessionMiddleware(app, busy.registry, attempts=2), request)
    assert got[1] == second(kind(content))


class Blocks(Unseekable):
    """An input that iterates over blocks, as eventlet's does."""

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.read, b"")


def test_lines_are_lines_whatever_the_server_iterates_over(rival: Callable[..., Rival]) -> None:
    """readlines() has lines, at each attempt."""
    busy = rival(1)
    got: list[list[bytes]] = []

    def app(environ: Any, start_response: Any) -> Any:
        got.append(environ["wsgi.input"].readlines())
        return text(b"", before=busy.work)(environ, start_response)

    request = {**environ("POST"), "wsgi.input": Blocks(LINES)}
    serve_once(SessionMiddleware(app, busy.registry, attempts=2), request)
    assert got == [LINES.splitlines(keepends=True)] * 2


def test_a_body_already_begun_is_rewound_to_where_it_was(rival: Callable[..., Rival]) -> None:
    """An input that was partly read before it came to us is replayed from there."""
    busy = rival(1)
    got: list[bytes] = []
    stream = io.BytesIO(b"before, after")
    stream.seek(8)

    def app(environ: Any, start_response: Any) -> Any:
        got.append(environ["wsgi.input"].read())
        return text(b"", before=busy.work)(environ, start_response)

    request = {**environ("POST"), "wsgi.input": stream}
    serve_once(SessionMiddleware(app, busy.registry, attempts=2), request)
    assert got == [b"after", b"after"]


def test_a_body_is_replayed_under_the_validator(rival: Callable[..., Rival]) -> None:
    """Attempts keep to the rules of PEP 3333 on both sides."""
    busy = rival(1)
    got: list[bytes] = []

    def app(environ: Any, start_response: Any) -> Any:
        got.append(environ["wsgi.input"].read(5))
        return text(b"", before=busy.work)(environ, start_response)

    wrapped = validator(SessionMiddleware(validator(app), busy.registry, attempts=2))
    request = {**environ("POST"), "wsgi.input": io.BytesIO(b"hello"), "CONTENT_LENGTH": "5"}
    serve_once(wrapped, request)
    assert got == [b"hello", b"hello"]


def test_a_body_over_a_socket_is_replayed(rival: Callable[..., Rival], outside: Engine) -> None:
    """Through a real server the second attempt reads the same body."""
    busy = rival(1)
    got: list[bytes] = []

    def app(environ: Any, start_response: Any) -> Any:
        got.append(environ["wsgi.input"].read())
        return text(b"fine", before=busy.work)(environ, start_response)

    with serving(SessionMiddleware(app, busy.registry, attempts=2)) as port:
        assert fetch(port, "POST", "/", b"hello").content == b"fine"
    assert got == [b"hello", b"hello"]
    assert names(outside) == ["call 2"]


def test_the_outcome_tells_the_attempts(
    rival: Callable[..., Rival], caplog: pytest.LogCaptureFixture
) -> None:
    """One outcome comes for all attempts, and a warning for each repetition."""
    busy = rival(2)
    seen: list[Outcome] = []
    app = text(b"", before=busy.work)
    serve_once(SessionMiddleware(app, busy.registry, attempts=5, observer=seen.append))
    assert [(outcome.attempts, outcome.action) for outcome in seen] == [(3, "commit")]
    assert [r.getMessage()[:40] for r in caplog.records if r.levelname == "WARNING"] == [
        "GET /: attempt 1 of 5 failed, retrying: ",
        "GET /: attempt 2 of 5 failed, retrying: ",
    ]


@pytest.mark.parametrize("attempts", [0, -1])
def test_fewer_than_one_attempt_is_refused(attempts: int, registry: Registry) -> None:
    """attempts below 1 is refused when the middleware is made."""
    with pytest.raises(ValueError, match="attempts must be 1 or more"):
        SessionMiddleware(text(b""), registry, attempts=attempts)


def test_attempts_without_an_input(rival: Callable[..., Rival]) -> None:
    """A request whose environ has no wsgi.input can be repeated all the same."""
    busy = rival(1)
    request = environ()
    del request["wsgi.input"]
    app = SessionMiddleware(text(b"fine", before=busy.work), busy.registry, attempts=2)
    assert serve_once(app, request).content == b"fine"


def test_attempts_with_an_engine_per_table(engine: Engine, outside: Engine) -> None:
    """A registry that is bound by binds= alone can be tried too."""
    registry: Registry = scoped_session(sessionmaker(binds={Item: engine}))
    app = text(b"", before=lambda: registry.add(Item(name="kept")))
    serve_once(SessionMiddleware(app, registry, attempts=2))
    assert names(outside) == ["kept"]


@pytest.mark.parametrize("heard", ["after_cursor_execute", "reset"])
@pytest.mark.parametrize("bind", ["bind", "binds", "reader"])
def test_attempts_disturb_no_thread_in_a_listener(
    bind: str, heard: str, sqlite_url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Another thread may be in a listener of engine or pool while the first request runs."""
    plain = create_engine(sqlite_url)  # which has two connections
    options: dict[str, Any] = {"bind": plain} if bind == "bind" else {"binds": {Item: plain}}
    registry: Registry = scoped_session(sessionmaker(**({} if bind == "reader" else options)))
    app = text(b"fine", before=lambda: registry.execute(select(Item)))
    reader = plain if bind == "reader" else None
    application = SessionMiddleware(app, registry, attempts=2, reader=reader)
    inside, may_go_on = threading.Event(), threading.Event()
    main = threading.get_ident()

    @event.listens_for(plain, heard)
    def wait(*_: object) -> None:
        if threading.get_ident() != main:
            inside.set()
            assert may_go_on.wait(PATIENCE)

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(names, plain)
        assert inside.wait(PATIENCE)
        try:
            assert serve_once(application).content == b"fine"
        finally:
            may_go_on.set()
        assert other.result(PATIENCE) == []
    assert "Exception during reset" not in caplog.text
    plain.dispose()


def test_a_database_that_is_not_there_is_not_asked_again(tmp_path: Path) -> None:
    """A connection that cannot be made is no conflict; that is for the client to try later."""
    missing = make_engine(f"sqlite:///{tmp_path}/no/such/folder/items.db")
    registry: Registry = scoped_session(sessionmaker(missing))
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        registry.execute(select(Item))

    with pytest.raises(OperationalError):
        serve_once(SessionMiddleware(text(b"", before=work), registry, attempts=3))
    assert len(calls) == 1
    missing.dispose()
