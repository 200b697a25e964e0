"""What may be durable is never done again: every way to commit without the middleware."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pymysql
import pytest
from sessionscope import SessionMiddleware, engines, on_commit, session_scope
from sessionscope.engines import make_engine
from sqlalchemy import Engine, create_engine, event, insert
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError
from support import environ, names, serve_once, text

import middleware
from models import Item

Registry = scoped_session[Session]
Work = Callable[[Registry], object]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.0)


@contextmanager
def plain_engine(engine: Engine) -> Iterator[Engine]:
    """The same database as users make an engine for it."""
    url = engine.url
    made = create_engine(url.set(drivername=url.drivername.replace("+immediate", "")))
    yield made
    made.dispose()


def add(registry: Registry, name: str = "x") -> None:
    registry.execute(insert(Item).values(name=name))


def calls_until_stale(
    registry: Registry, work: Work, method: str = "POST", reader: Engine | None = None
) -> int:
    """How often a request is tried that meets a transient error after *work*."""
    calls: list[int] = []

    def both() -> None:
        calls.append(1)
        work(registry)
        raise StaleDataError("again, please")

    app = SessionMiddleware(text(b"", before=both), registry, attempts=3, reader=reader)
    with pytest.raises(StaleDataError):
        serve_once(app, environ(method))
    return len(calls)


def connection_commit(registry: Registry) -> None:
    add(registry)
    registry.connection().commit()


def driver_commit(registry: Registry) -> None:
    add(registry)
    registry.connection().connection.commit()


def driver_commit_and_a_read(registry: Registry) -> None:
    driver_commit(registry)
    registry.execute(sql("SELECT 1"))


def commit_as_text(registry: Registry) -> None:
    add(registry)
    registry.execute(sql("COMMIT"))


def commit_as_text_and_go_on(registry: Registry) -> None:
    add(registry)
    registry.execute(sql("COMMIT"))
    with suppress(DBAPIError):
        add(registry, "later")


def session_commit(registry: Registry) -> None:
    add(registry)
    registry.commit()


def scope(registry: Registry) -> None:
    with session_scope(registry) as session:
        session.execute(insert(Item).values(name="scope"))


def callback(registry: Registry) -> None:
    on_commit(registry, lambda: None)
    registry.commit()


def session_of_its_own(registry: Registry) -> None:
    with registry.session_factory() as session:
        session.execute(insert(Item).values(name="own"))
        session.commit()


COMMITS = {
    work.__name__: work
    for work in (
        connection_commit,
        driver_commit,
        driver_commit_and_a_read,
        commit_as_text,
        commit_as_text_and_go_on,
        session_commit,
        scope,
        callback,
        session_of_its_own,
    )
}


@pytest.mark.parametrize("work", COMMITS.values(), ids=COMMITS)
@pytest.mark.parametrize("mode", ["ours", "plain"])
def test_what_was_committed_is_not_done_again(mode: str, work: Work, any_engine: Engine) -> None:
    """After a COMMIT of any kind a transient error is the server's."""
    with plain_engine(any_engine) if mode == "plain" else nullcontext(any_engine) as engine:
        assert calls_until_stale(scoped_session(sessionmaker(engine)), work) == 1


@pytest.mark.parametrize("work", [add, lambda registry: registry.execute(sql("SELECT 1"))])
@pytest.mark.parametrize("mode", ["ours", "plain"])
def test_what_was_not_committed_is_done_again(mode: str, work: Work, any_engine: Engine) -> None:
    """A read or a write alone doesn't keep a request from being repeated."""
    with plain_engine(any_engine) if mode == "plain" else nullcontext(any_engine) as engine:
        assert calls_until_stale(scoped_session(sessionmaker(engine)), work) == 3


def test_mariadb_a_rollback_as_text_is_no_commit(mariadb: Engine) -> None:
    """After ROLLBACK as text nothing is durable, and the request is repeated."""

    def work(registry: Registry) -> None:
        add(registry)
        registry.execute(sql("ROLLBACK"))

    assert calls_until_stale(scoped_session(sessionmaker(mariadb)), work) == 3


@pytest.mark.parametrize(("method", "calls"), [("POST", 1), ("GET", 3)])
def test_a_statement_in_autocommit_is_durable(method: str, calls: int, any_engine: Engine) -> None:
    """What ran in AUTOCOMMIT is not done again, unless the method is safe."""
    with plain_engine(any_engine) as plain:
        engine = plain.execution_options(isolation_level="AUTOCOMMIT")
        assert calls_until_stale(scoped_session(sessionmaker(engine)), add, method) == calls


@pytest.mark.parametrize(("method", "calls"), [("POST", 1), ("GET", 3)])
def test_a_statement_of_a_reader_is_repeated(method: str, calls: int, any_engine: Engine) -> None:
    """What a safe method does on the reader is done again, since a reader refuses to write."""
    registry: Registry = scoped_session(sessionmaker(any_engine))
    with plain_engine(any_engine) as plain:
        assert calls_until_stale(registry, commit_as_text, method, reader=plain) == calls


@pytest.mark.parametrize(
    "factory",
    [
        lambda engine: sessionmaker(engine),
        lambda engine: sessionmaker(binds={Item: engine}),
        lambda engine: lambda: Session(engine),
    ],
    ids=["bind", "binds", "function"],
)
def test_a_reader_that_is_also_the_writer_is_none(
    factory: Callable[[Engine], Any], any_engine: Engine
) -> None:
    """Where reading and writing have one engine, a COMMIT of a safe method counts."""
    registry: Registry = scoped_session(factory(any_engine))
    assert calls_until_stale(registry, commit_as_text, "GET", reader=any_engine) == 1


def test_autocommit_by_execution_option(any_engine: Engine) -> None:
    """So is what ran on a connection that the view put into AUTOCOMMIT."""

    def work(registry: Registry) -> None:
        registry.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        add(registry)

    with plain_engine(any_engine) as engine:
        assert calls_until_stale(scoped_session(sessionmaker(engine)), work) == 1


def test_a_refusal_in_autocommit_is_warned_of_once(
    sqlite_url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """In AUTOCOMMIT a refused request keeps what it wrote, and the log says so once."""
    auto = create_engine(sqlite_url, isolation_level="AUTOCOMMIT")
    registry: Registry = scoped_session(sessionmaker(auto))
    app = SessionMiddleware(text(b"", status="409 No", before=lambda: add(registry)), registry)
    for _ in range(2):
        serve_once(app, environ("POST"))
    assert names(engine) == ["x", "x"]
    assert caplog.text.count("is in AUTOCOMMIT, so a request that is rolled back keeps") == 1
    auto.dispose()


DDL = [
    "TRUNCATE TABLE items",
    "CREATE TABLE other (id INTEGER)",
    "LOCK TABLES items WRITE",
    "SET autocommit = 1",
]


@pytest.mark.parametrize("statement", DDL)
def test_mariadb_commits_by_itself_at_ddl(statement: str, mariadb: Engine) -> None:
    """TRUNCATE, DDL and the like commit on MariaDB, so such a request is not repeated."""

    def work(registry: Registry) -> None:
        add(registry)
        registry.execute(sql(statement))

    assert calls_until_stale(scoped_session(sessionmaker(mariadb)), work) == 1
    with mariadb.begin() as connection:
        connection.execute(sql("UNLOCK TABLES"))
        connection.execute(sql("DROP TABLE IF EXISTS other"))


@pytest.mark.parametrize(
    "chained",
    ["COMMIT AND CHAIN", "COMMIT; BEGIN", "END; BEGIN", "SELECT 1; /* a */ COMMIT; BEGIN"],
)
def test_postgresql_commits_that_begin_again(chained: str, postgresql: Engine) -> None:
    """A COMMIT as text after which another transaction is open is seen all the same."""

    def work(registry: Registry) -> None:
        add(registry)
        registry.connection().exec_driver_sql(chained)

    assert calls_until_stale(scoped_session(sessionmaker(postgresql)), work) == 1


# Statements that fail when something of them is durable.

POSTGRESQL_PROCEDURE = """
    CREATE PROCEDURE add_and_fail() LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO items (name) VALUES ('kept'); COMMIT; {failure}; END $$
    """
MARIADB_PROCEDURE = """
    CREATE OR REPLACE PROCEDURE add_and_fail() BEGIN
    INSERT INTO items (name) VALUES ('kept'); COMMIT;
    SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213; END
    """
CUT_OFF = "PERFORM pg_terminate_backend(pg_backend_pid())"
CONFLICT = "RAISE EXCEPTION 'again' USING ERRCODE = '40001'"


def calls_until_success(registry: Registry, work: Callable[[], object]) -> int:
    """How often a request is tried until *work* raises nothing transient, or for good."""
    calls: list[int] = []

    def counted() -> None:
        calls.append(1)
        work()

    with suppress(DBAPIError):
        serve_once(
            SessionMiddleware(text(b"", before=counted), registry, attempts=3), environ("POST")
        )
    return len(calls)


@pytest.mark.parametrize("failure", [CUT_OFF, CONFLICT])
def test_postgresql_a_procedure_that_commits_and_fails(failure: str, postgresql: Engine) -> None:
    """A CALL in AUTOCOMMIT that fails after its own COMMIT is not made again."""
    with postgresql.begin() as connection:
        connection.execute(sql(POSTGRESQL_PROCEDURE.format(failure=failure)))
    auto = postgresql.execution_options(isolation_level="AUTOCOMMIT")
    registry: Registry = scoped_session(sessionmaker(auto))
    calls = calls_until_success(registry, lambda: registry.execute(sql("CALL add_and_fail()")))
    assert (calls, names(postgresql)) == (1, ["kept"])
    with postgresql.begin() as connection:
        connection.execute(sql("DROP PROCEDURE add_and_fail"))


@pytest.mark.parametrize("mode", ["REPEATABLE READ", "AUTOCOMMIT"])
def test_mariadb_a_procedure_that_commits_and_fails(mode: str, mariadb: Engine) -> None:
    """A CALL that fails with a deadlock after its own COMMIT is not made again."""
    with mariadb.begin() as connection:
        connection.execute(sql(MARIADB_PROCEDURE))
    registry: Registry = scoped_session(
        sessionmaker(mariadb.execution_options(isolation_level=mode))
    )
    calls = calls_until_success(registry, lambda: registry.execute(sql("CALL add_and_fail()")))
    assert (calls, names(mariadb)) == (1, ["kept"])
    with mariadb.begin() as connection:
        connection.execute(sql("DROP PROCEDURE add_and_fail"))


def test_postgresql_a_commit_as_text_whose_reply_is_lost(postgresql: Engine) -> None:
    """A connection that is lost in a COMMIT as text is not one that was found dead."""
    registry: Registry = scoped_session(sessionmaker(postgresql))

    def work() -> None:
        add(registry, "kept")
        registry.connection().exec_driver_sql(
            "COMMIT; SELECT pg_terminate_backend(pg_backend_pid())"
        )

    assert (calls_until_success(registry, work), names(postgresql)) == (1, ["kept"])


def test_postgresql_several_statements_of_which_one_commits(postgresql: Engine) -> None:
    """A text that fails after the COMMIT in it is not sent again."""
    registry: Registry = scoped_session(sessionmaker(postgresql))
    several = f"INSERT INTO items (name) VALUES ('kept'); COMMIT; DO $$ BEGIN {CONFLICT}; END $$"
    calls = calls_until_success(registry, lambda: registry.connection().exec_driver_sql(several))
    assert (calls, names(postgresql)) == (1, ["kept"])


def test_postgresql_a_block_that_fails_is_repeated(postgresql: Engine) -> None:
    """The END of a block is no COMMIT."""
    registry: Registry = scoped_session(sessionmaker(postgresql))
    block = sql(f"DO $$ BEGIN {CONFLICT}; END $$")
    assert calls_until_success(registry, lambda: registry.execute(block)) == 3


@pytest.mark.parametrize("first", ["USE tests", "DO 1", "# a\nSELECT 1", "SET @a = 1"])
def test_mariadb_a_connection_found_dead_at_any_statement(first: str, mariadb: Engine) -> None:
    """A first statement that commits nothing does not keep a stale connection's request back."""
    registry: Registry = scoped_session(sessionmaker(mariadb))
    with mariadb.connect() as connection:
        number = connection.scalar(sql("SELECT CONNECTION_ID()"))
    with make_engine(mariadb.url, pool_size=1).begin() as other:
        other.execute(sql(f"KILL {number}"))
        other.engine.dispose()

    def work() -> None:
        registry.execute(sql(first))
        add(registry, "kept")

    assert (calls_until_success(registry, work), names(mariadb)) == (2, ["kept"])


def test_a_session_of_its_own_that_only_read_and_was_cut_off(postgresql: Engine) -> None:
    """A ROLLBACK that finds a connection dead is not a COMMIT of unknown outcome."""
    registry: Registry = scoped_session(sessionmaker(postgresql))

    def work() -> None:
        with registry.session_factory() as own:
            number = own.scalar(sql("SELECT pg_backend_pid()"))
            with postgresql.connect() as killer:
                killer.execute(sql(f"SELECT pg_terminate_backend({number}, 5000)"))

    assert calls_until_success(registry, work) == 3


def test_rows_of_many_that_failed_in_autocommit(engine: Engine, sqlite_url: str) -> None:
    """In AUTOCOMMIT an executemany that is BUSY at its last row has kept the others."""
    auto = create_engine(sqlite_url, isolation_level="AUTOCOMMIT", connect_args={"timeout": 0})
    registry: Registry = scoped_session(sessionmaker(auto))
    rival = sqlite3.connect(engine.url.database or "", isolation_level=None)
    rows: list[str] = []

    def lock_at_the_last(statement: str) -> None:
        if statement.startswith("INSERT"):
            rows.append(statement)
            if len(rows) == 3:
                rival.execute("BEGIN IMMEDIATE")

    def work() -> None:
        driver: Any = registry.connection().connection.dbapi_connection
        driver.set_trace_callback(lock_at_the_last)
        try:
            registry.execute(insert(Item), [{"name": name} for name in "abc"])
        finally:
            driver.set_trace_callback(None)
            if rival.in_transaction:
                rival.rollback()

    assert (calls_until_success(registry, work), names(engine)) == (1, ["a", "b"])
    rival.close()
    auto.dispose()


def test_mariadb_two_phases_of_a_session_of_its_own(mariadb: Engine) -> None:
    """The reply to XA COMMIT may be lost, too: what it committed is not done again."""
    registry: Registry = scoped_session(sessionmaker(mariadb))

    @event.listens_for(mariadb, "after_cursor_execute")
    def lose_the_reply(connection: Any, cursor: Any, statement: str, *_: object) -> None:
        if statement.startswith("XA COMMIT"):
            raise pymysql.OperationalError(2013, "Lost connection to server during query")

    def work() -> None:
        with Session(mariadb, twophase=True) as own:
            own.add(Item(name="kept"))
            own.commit()

    assert (calls_until_success(registry, work), names(mariadb)) == (1, ["kept"])


COMMENTS = "SELECT 1; " + "/**/" * 5000


@pytest.mark.parametrize(
    "statement",
    ["SELECT 1 AS commit", "/* COMMIT */ SELECT 1", "SELECT(1)", pytest.param(COMMENTS, id="many")],
)
def test_a_read_that_looks_like_something_else_is_repeated(
    statement: str, any_engine: Engine
) -> None:
    """Neither a name nor a comment makes a statement a COMMIT."""
    registry: Registry = scoped_session(sessionmaker(any_engine))
    if "AS commit" in statement and any_engine.dialect.name != "postgresql":
        statement = statement.replace("commit", "`commit`")
    assert calls_until_stale(registry, lambda _: registry.execute(sql(statement))) == 3


# What something inside made durable, and then failed.


def failed_scope(inner: Registry) -> None:
    with suppress(ZeroDivisionError), session_scope(inner):
        add(inner)
        raise ZeroDivisionError


def rolled_back_scope(inner: Registry) -> None:
    with session_scope(inner) as session:
        add(inner)
        session.rollback()


def refused_request(inner: Registry) -> None:
    app = text(b"", status="409 No", before=lambda: add(inner))
    serve_once(SessionMiddleware(app, inner), environ("POST"))


@pytest.mark.parametrize("inside", [failed_scope, rolled_back_scope, refused_request])
@pytest.mark.parametrize(("mode", "calls"), [("AUTOCOMMIT", 1), ("SERIALIZABLE", 3)])
def test_what_failed_inside_is_not_done_again_if_it_is_durable(
    mode: Any, calls: int, inside: Work, any_engine: Engine
) -> None:
    """In AUTOCOMMIT its statements stay, so the request around it is not repeated."""
    registry: Registry = scoped_session(sessionmaker(any_engine))
    with plain_engine(any_engine) as plain:
        inner = scoped_session(sessionmaker(plain.execution_options(isolation_level=mode)))
        assert calls_until_stale(registry, lambda _: inside(inner)) == calls
    assert len(names(any_engine)) == (1 if mode == "AUTOCOMMIT" else 0)


def test_a_scope_that_failed_after_a_commit_as_text(any_engine: Engine) -> None:
    """What a scope inside committed as text and then failed is not done again."""

    def work(inner: Registry) -> None:
        with suppress(ZeroDivisionError), session_scope(inner):
            commit_as_text(inner)
            raise ZeroDivisionError

    registry: Registry = scoped_session(sessionmaker(any_engine))
    with plain_engine(any_engine) as plain:
        inner = scoped_session(sessionmaker(plain))
        assert calls_until_stale(registry, lambda _: work(inner)) == 1
    assert names(any_engine) == ["x"]


# SQLite's legacy driver mode: RELEASE of the outermost savepoint is a COMMIT.


@pytest.fixture
def legacy(sqlite_url: str, engine: Engine) -> Iterator[Registry]:
    """A registry on a plain create_engine(), whose driver leaves out BEGIN before a savepoint."""
    made = create_engine(sqlite_url)
    yield scoped_session(sessionmaker(made))
    made.dispose()


def in_session_savepoint(registry: Registry) -> None:
    with registry.begin_nested():
        add(registry, "in a savepoint")


def in_session_savepoint_after_a_read(registry: Registry) -> None:
    registry.execute(sql("SELECT 1"))
    in_session_savepoint(registry)


def in_a_nested_savepoint(registry: Registry) -> None:
    with registry.begin_nested(), registry.begin_nested():
        add(registry, "in a savepoint")


@pytest.mark.parametrize(
    "work", [in_session_savepoint, in_session_savepoint_after_a_read, in_a_nested_savepoint]
)
def test_a_savepoint_of_the_session_is_taken_back(
    work: Work, legacy: Registry, outside: Engine
) -> None:
    """A 4xx takes back what a session's savepoint held, and such a request is repeated."""
    app = text(b"", status="409 No", before=lambda: work(legacy))
    serve_once(SessionMiddleware(app, legacy), environ("POST"))
    assert names(outside) == []
    assert calls_until_stale(legacy, work) == 3
    assert names(outside) == []


def in_connection_savepoint(registry: Registry) -> None:
    with registry.connection().begin_nested():
        add(registry, "in a savepoint")


def savepoint_as_text(registry: Registry) -> None:
    registry.execute(sql("SAVEPOINT one"))
    add(registry)
    registry.execute(sql("RELEASE one"))


@pytest.mark.parametrize("work", [in_connection_savepoint, savepoint_as_text])
def test_other_savepoints_may_be_durable(work: Work, legacy: Registry) -> None:
    """A savepoint of the bare Connection, or as text, keeps a request from being repeated."""
    assert calls_until_stale(legacy, work) == 1


def test_a_savepoint_of_the_session_commits(legacy: Registry, outside: Engine) -> None:
    """On 200 the work of a savepoint is committed with the rest."""
    app = text(b"", before=lambda: in_session_savepoint(legacy))
    serve_once(SessionMiddleware(app, legacy), environ("POST"))
    assert names(outside) == ["in a savepoint"]


# What an attempt has recovered from.


def make_stale(registry: Registry) -> None:
    item = Item(id=1, name="x")
    registry.add(item)
    registry.flush()
    registry.execute(sql("DELETE FROM items"))
    item.name = "stale"
    registry.flush()


def test_an_error_that_was_recovered_from_is_not_repeated(
    registry: Registry, outside: Engine
) -> None:
    """BUSY, rollback(), a second try that goes well and a 502 on purpose: one call."""
    calls: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        calls.append(1)
        with suppress(StaleDataError):
            make_stale(registry)
        registry.rollback()
        add(registry)
        start_response("502 Bad Gateway", [])
        return [b"upstream"]

    serve_once(SessionMiddleware(app, registry, attempts=3), environ("POST"))
    assert len(calls) == 1


def test_an_error_page_after_a_stale_row_in_a_savepoint_is_repeated(registry: Registry) -> None:
    """A stale row that took back a savepoint only is one even behind the framework's page."""
    calls: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        calls.append(1)
        with suppress(StaleDataError), registry.begin_nested():
            make_stale(registry)
        start_response("500 Internal Server Error", [])
        return [b"sorry"]

    serve_once(SessionMiddleware(app, registry, attempts=3), environ("POST"))
    assert len(calls) == 3


def test_an_error_that_a_savepoint_took_back_hides_no_other(
    registry: Registry, outside: Engine
) -> None:
    """An expected error in a savepoint does not keep a later conflict from being repeated."""
    calls: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        calls.append(1)
        with suppress(IntegrityError), registry.begin_nested():
            registry.execute(insert(Item), [{"id": 7}, {"id": 7}])
        if len(calls) < 3:
            with suppress(StaleDataError):
                make_stale(registry)
            start_response("500 Internal Server Error", [])
            return [b"sorry"]
        add(registry, "kept")
        start_response("200 OK", [])
        return [b"fine"]

    serve_once(SessionMiddleware(app, registry, attempts=3), environ("POST"))
    assert (len(calls), names(outside)) == (3, ["kept"])


@pytest.mark.parametrize("depth", [1, 2])
def test_an_error_that_a_savepoint_took_back_is_over_when_the_view_goes_on(
    depth: int, registry: Registry
) -> None:
    """A view that goes on after a conflict in a savepoint, and fails on purpose: one call."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        with suppress(StaleDataError), ExitStack() as savepoints:
            for _ in range(depth):
                savepoints.enter_context(registry.begin_nested())
            make_stale(registry)
        add(registry)

    app = SessionMiddleware(text(b"", status="502 No", before=work), registry, attempts=3)
    serve_once(app, environ("POST"))
    assert len(calls) == 1


# What happens in a view around a conflict, of which the client sees an error page only.


def conflict(registry: Registry) -> None:
    with suppress(DBAPIError):
        registry.execute(sql("SELECT conflict()"))


def duplicate(registry: Registry) -> None:
    with suppress(IntegrityError):
        registry.execute(insert(Item), [{"id": 7}, {"id": 7}])


def conflict_then_duplicate_in_savepoint(registry: Registry) -> None:
    conflict(registry)
    with registry.begin_nested():
        duplicate(registry)


def duplicate_then_conflict(registry: Registry) -> None:
    duplicate(registry)
    conflict(registry)


def conflict_in_savepoint_then_read(registry: Registry) -> None:
    with suppress(DBAPIError), registry.begin_nested():
        registry.execute(sql("SELECT conflict()"))
    registry.execute(sql("SELECT 1"))


@pytest.mark.parametrize(
    "work",
    [
        conflict_then_duplicate_in_savepoint,
        duplicate_then_conflict,
        conflict_in_savepoint_then_read,
    ],
)
def test_the_error_behind_a_page_is_the_one_that_counts(
    work: Work, registry: Registry, engine: Engine
) -> None:
    """A page is taken back for a conflict, whatever expected errors come before or after it."""
    calls: list[int] = []
    busy = sqlite3.OperationalError("database is locked")
    busy.sqlite_errorname = "SQLITE_BUSY"  # as its driver sets it

    @event.listens_for(engine, "do_execute")
    def raise_busy(cursor: object, statement: str, *_: object) -> None:
        if "conflict()" in statement:
            raise busy

    def counted() -> None:
        calls.append(1)
        work(registry)

    app = text(b"sorry", status="500 Internal Server Error", before=counted)
    serve_once(SessionMiddleware(app, registry, attempts=3), environ("POST"))
    assert len(calls) == 3


def test_a_refused_begin_elsewhere_is_not_behind_a_page(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page for an error of the session is not taken back because another database is busy."""
    monkeypatch.setattr(engines, "BUSY_TIMEOUT", 0.0)
    rival, other = (make_engine(f"sqlite:///{tmp_path}/other.db") for _ in range(2))
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        duplicate(registry)
        with pytest.raises(DBAPIError), other.begin():
            raise AssertionError("unreachable")

    app = text(b"sorry", status="500 Internal Server Error", before=work)
    with rival.begin():
        serve_once(SessionMiddleware(app, registry, attempts=3), environ("POST"))
    assert len(calls) == 1
    for engine in (rival, other):
        engine.dispose()


def test_an_error_that_is_handled_outside_is_none_of_the_request(registry: Registry) -> None:
    """A request that is made while somebody handles a stale row, and fails on purpose: one call."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        add(registry)

    app = SessionMiddleware(text(b"", status="502 No", before=work), registry, attempts=3)
    try:
        raise StaleDataError
    except StaleDataError:
        serve_once(app, environ("POST"))
    assert len(calls) == 1


def test_an_error_page_after_a_rollback_is_repeated(registry: Registry) -> None:
    """An error that the framework's page hides is one even after its teardown rolled back."""
    calls: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        calls.append(1)
        with suppress(StaleDataError):
            make_stale(registry)
        registry.remove()
        start_response("500 Internal Server Error", [])
        return [b"sorry"]

    serve_once(SessionMiddleware(app, registry, attempts=3), environ("POST"))
    assert len(calls) == 3


class Translated(Exception):
    """What a listener makes of a driver's error."""


@pytest.mark.parametrize("raises", [True, False])
def test_a_translated_conflict_is_repeated(
    raises: bool, sqlite_url: str, engine: Engine, outside: Engine
) -> None:
    """BUSY that a handle_error listener translated is tried again all the same."""
    impatient = create_engine(sqlite_url, connect_args={"timeout": 0})
    registry: Registry = scoped_session(sessionmaker(impatient))

    @event.listens_for(impatient, "handle_error")
    def translate(context: Any) -> Any:
        if raises:
            raise Translated
        return Translated()

    rival = engine.connect()
    rival.begin()
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        if len(calls) == 3:
            rival.close()
        add(registry)

    serve_once(SessionMiddleware(text(b"", before=work), registry, attempts=3), environ("POST"))
    assert (len(calls), names(outside)) == (3, ["x"])
    impatient.dispose()


def test_a_refused_begin_under_binds_is_repeated(
    sqlite_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BUSY at the first BEGIN of an engine that is reached through binds= is tried again."""
    monkeypatch.setattr(engines, "BUSY_TIMEOUT", 0.0)
    impatient = make_engine(sqlite_url)
    registry: Registry = scoped_session(sessionmaker(binds={Item: impatient}))
    rival = engine.connect()
    rival.begin()
    calls: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            rival.close()
        try:
            add(registry)
        except DBAPIError:
            start_response("500 Oops", [])
            return [b"sorry"]
        start_response("200 OK", [])
        return [b"fine"]

    application = SessionMiddleware(app, registry, attempts=2)
    assert serve_once(application, environ("POST")).content == b"fine"
    impatient.dispose()


def test_a_body_that_the_app_closed_is_not_read_again(registry: Registry) -> None:
    """A request whose rewindable body was closed is not repeated; its own error is shown."""
    request = environ("POST")

    def work() -> None:
        request["wsgi.input"].close()
        raise StaleDataError

    app = SessionMiddleware(text(b"", before=work), registry, attempts=3)
    with pytest.raises(StaleDataError):
        serve_once(app, request)
