"""What is promised is kept with each driver, whatever that says of its errors, or does not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cache
from typing import Any

import pytest
from conflicts import Base, Counter, Holder, Request, add_one, change_after, values
from databases import execute, until, until_one_waits
from links import Cut, Link, linked
from sessionscope import CommitOutcomeUnknown, TransactionDoomed
from sessionscope.engines import make_engine, make_reader
from sqlalchemy import (
    Engine,
    String,
    TypeDecorator,
    bindparam,
    delete,
    insert,
    make_url,
    select,
    update,
)
from sqlalchemy import text as sql
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, StatementError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError
from support import PATIENCE, drop_tables, make_tables, names, refuse_commit

import middleware
from models import Item

POSTGRESQL = ["postgresql+psycopg", "postgresql+psycopg2", "postgresql+pg8000"]
MARIADB = ["mariadb+pymysql", "mariadb+mysqldb", "mariadb+mariadbconnector"]

on_postgresql = pytest.mark.parametrize("driver", POSTGRESQL, indirect=True)
on_mariadb = pytest.mark.parametrize("driver", MARIADB, indirect=True)

Work = Callable[[Session, int], object]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.0)


@pytest.fixture(params=[*POSTGRESQL, *MARIADB])
def driver(request: pytest.FixtureRequest) -> str:
    """What a URL begins with, for each driver in turn; CI requires all of them."""
    name: str = request.param
    try:
        make_url(f"{name}://").get_dialect().import_dbapi()
    except ImportError as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"left out, no driver {name} here: {missing}")
    return name


@pytest.fixture
def server(driver: str, request: pytest.FixtureRequest) -> URL:
    """The server that *driver* is for, reached by the driver that the other tests use."""
    return make_url(request.getfixturevalue(f"{driver.partition('+')[0]}_url"))


@pytest.fixture(scope="module")
def prepared() -> Iterator[Callable[[URL], Engine]]:
    """Make the tables on a server when a test first wants it, and drop them at the end."""
    with ExitStack() as stack:

        @cache
        def prepared(url: URL) -> Engine:
            engine = make_engine(url)
            stack.callback(engine.dispose)
            stack.callback(drop_tables, engine)
            stack.callback(Base.metadata.drop_all, engine)
            make_tables(engine)
            Base.metadata.create_all(engine)
            return engine

        yield prepared


@pytest.fixture
def outside(prepared: Callable[[URL], Engine], server: URL) -> Engine:
    """No item, two counters at 0, and an engine to see what is durable."""
    engine = prepared(server)
    with engine.begin() as connection:
        connection.execute(delete(Item))
        connection.execute(delete(Counter))
        connection.execute(insert(Counter), [{"id": key, "value": 0} for key in (1, 2)])
    return engine


@pytest.fixture
def engine(driver: str, server: URL, outside: Engine) -> Iterator[Engine]:
    """An engine with the driver, and one connection, so that requests follow on each other."""
    made = make_engine(server.set(drivername=driver), pool_size=1)
    yield made
    assert made.pool.checkedout() == 0  # type: ignore[attr-defined]
    made.dispose()


@pytest.fixture
def link(server: URL, outside: Engine) -> Iterator[Link]:
    with linked(server.render_as_string(hide_password=False)) as made:
        yield made


@pytest.fixture
def linked_engine(driver: str, link: Link) -> Iterator[Engine]:
    """An engine with the driver, connected over a link that can be cut."""
    made = make_engine(link.url.set(drivername=driver), pool_size=1)
    made.connect().close()
    yield made
    assert made.pool.checkedout() == 0  # type: ignore[attr-defined]
    made.dispose()


def adds(name: str) -> Work:
    return lambda session, attempt: session.execute(insert(Item).values(name=name))


def action(request: Request) -> str:
    (outcome,) = request.outcomes
    return outcome.action


# COMMIT and ROLLBACK.


def test_the_status_decides(engine: Engine, outside: Engine) -> None:
    """A 409 leaves nothing, and a 200 after it on the same connection commits."""
    Request(engine, adds("refused"), status="409 Conflict").send()
    Request(engine, adds("kept")).send()
    assert names(outside) == ["kept"]


@on_postgresql
def test_a_refused_commit_is_a_failure_and_leaves_nothing(engine: Engine, outside: Engine) -> None:
    """What COMMIT refuses is rolled back, with the driver's error, and no later request has it."""

    def work(session: Session, attempt: int) -> None:
        adds("gone")(session, attempt)
        refuse_commit(session)

    refused = Request(engine, work)
    with pytest.raises(DBAPIError, match="debts_item_id_fkey"):  # pg8000's is no IntegrityError
        refused.send()
    Request(engine, adds("kept")).send()
    assert (action(refused), names(outside)) == ("rollback", ["kept"])


# Errors that are swallowed.


def repeat_a_key(session: Session) -> None:
    with suppress(IntegrityError):
        session.execute(insert(Counter).values(id=1, value=0))


@on_postgresql
def test_postgresql_a_swallowed_error_is_no_success(engine: Engine, outside: Engine) -> None:
    """After any swallowed error a 200 is refused, and no later request has its work."""

    def work(session: Session, attempt: int) -> None:
        adds("gone")(session, attempt)
        repeat_a_key(session)

    with pytest.raises(TransactionDoomed) as caught:
        Request(engine, work).send()
    assert isinstance(caught.value.__cause__, IntegrityError)
    Request(engine, adds("kept")).send()
    assert names(outside) == ["kept"]


@on_postgresql
def test_postgresql_an_older_savepoint_makes_it_sound(engine: Engine, outside: Engine) -> None:
    """Back at a savepoint that is older than the error, the transaction is as good as before."""

    def work(session: Session, attempt: int) -> None:
        adds("kept")(session, attempt)
        savepoint = session.begin_nested()
        repeat_a_key(session)
        savepoint.rollback()

    Request(engine, work).send()
    assert names(outside) == ["kept"]


@on_mariadb
def test_mariadb_a_plain_error_dooms_nothing(engine: Engine, outside: Engine) -> None:
    """A constraint error undoes its own statement only, and the rest is committed."""

    def work(session: Session, attempt: int) -> None:
        adds("kept")(session, attempt)
        repeat_a_key(session)

    Request(engine, work).send()
    assert names(outside) == ["kept"]


def test_a_swallowed_conflict_is_no_success(engine: Engine, outside: Engine) -> None:
    """A row that changed since it was read undoes the transaction, so a 200 is refused."""

    def work(session: Session, attempt: int) -> None:
        adds("gone")(session, attempt)
        session.execute(select(Counter.value)).all()
        rival_adds_one(outside)
        with suppress(DBAPIError):
            add_one(session)

    with pytest.raises(TransactionDoomed):
        Request(repeatable(engine), work, attempts=1).send()
    assert (names(outside), values(outside)) == ([], [1, 0])


@on_mariadb
def test_mariadb_a_swallowed_deadlock_is_no_success(engine: Engine, outside: Engine) -> None:
    """After a deadlock a 200 is refused, though COMMIT would keep what came after it."""

    def work(session: Session, attempt: int) -> None:
        adds("before")(session, attempt)
        with suppress(DBAPIError):
            lose_a_deadlock(session, outside)
        adds("after")(session, attempt)

    with pytest.raises(TransactionDoomed):
        Request(engine, work, attempts=1).send()
    assert names(outside) == []


# Conflicts, which are tried again.


def repeatable(engine: Engine) -> Engine:
    return engine.execution_options(isolation_level="REPEATABLE READ")


def rival_adds_one(outside: Engine) -> None:
    with outside.begin() as connection:
        connection.execute(update(Counter).where(Counter.id == 1).values(value=1))


def test_a_lost_update_is_repeated(engine: Engine, outside: Engine) -> None:
    """A row that changed since it was read is read again, and no update is lost."""
    request = Request(repeatable(engine), change_after(lambda: rival_adds_one(outside)))
    request.send()
    assert (request.attempts, values(outside)) == (2, [2, 0])


def lose_a_deadlock(session: Session, outside: Engine) -> None:
    """Wait for another transaction that waits for this one, and be the one that is ended."""
    with outside.connect() as other:
        # MariaDB ends the one that wrote less, PostgreSQL the one that looks first.
        other.execute(insert(Item), [{"name": "other"} for _ in range(50)])
        add_one(other, 2)  # type: ignore[arg-type]
        if outside.dialect.name == "postgresql":
            other.execute(sql("SET LOCAL deadlock_timeout = '1h'"))
            session.execute(sql("SET LOCAL deadlock_timeout = '10ms'"))
        add_one(session, 1)
        waiting = threading.Thread(target=add_one, args=(other, 1), daemon=True)
        waiting.start()
        try:
            until_one_waits(outside.url)
            add_one(session, 2)
        finally:
            waiting.join(PATIENCE)
            other.rollback()


def test_a_deadlock_is_repeated(engine: Engine, outside: Engine) -> None:
    """The request that lost a deadlock is made again, and has its effect once."""

    def work(session: Session, attempt: int) -> None:
        if attempt == 1:
            lose_a_deadlock(session, outside)
        add_one(session, 1)

    request = Request(engine, work)
    request.send()
    assert (request.attempts, values(outside)) == (2, [1, 0])


def take(session: Session) -> None:
    """Lock the first counter, or fail at once."""
    session.scalars(select(Counter).where(Counter.id == 1).with_for_update(nowait=True)).all()


@on_mariadb
def test_mariadb_a_lock_timeout_is_repeated(engine: Engine, outside: Engine) -> None:
    """A lock that was not to be had is asked for again."""

    def work(session: Session, attempt: int) -> None:
        if attempt == 1:
            with Holder(outside, lambda other, _: add_one(other)):
                take(session)
        add_one(session)

    request = Request(engine, work)
    request.send()
    assert (request.attempts, values(outside)) == (2, [2, 0])


@on_mariadb
def test_mariadb_a_swallowed_lock_timeout_dooms_nothing(engine: Engine, outside: Engine) -> None:
    """A lock that was not to be had undoes no other statement, and the rest is committed."""

    def work(session: Session, attempt: int) -> None:
        adds("kept")(session, attempt)
        with Holder(outside, lambda other, _: add_one(other)), suppress(DBAPIError):
            take(session)

    Request(engine, work).send()
    assert names(outside) == ["kept"]


@on_postgresql
def test_postgresql_a_lock_timeout_is_a_failure(engine: Engine, outside: Engine) -> None:
    """A lock that was not to be had is the error that the server gets, at once."""

    def work(session: Session, attempt: int) -> None:
        with Holder(outside, lambda other, _: add_one(other)):
            take(session)

    request = Request(engine, work)
    with pytest.raises(DBAPIError):
        request.send()
    assert (action(request), request.calls) == ("rollback", 1)


@on_postgresql
@pytest.mark.parametrize("when", ["IMMEDIATE", "DEFERRED"])
def test_postgresql_a_conflict_at_commit_is_repeated(
    when: str, engine: Engine, outside: Engine
) -> None:
    """A serialization failure that only COMMIT tells of is one like any other."""

    def work(session: Session, attempt: int) -> None:
        if attempt == 1:
            trigger(session, when, "RAISE EXCEPTION 'again' USING ERRCODE = '40001'")
        adds("once")(session, attempt)

    request = Request(engine, work)
    request.send()
    assert (request.attempts, names(outside)) == (2, ["once"])


def trigger(session: Session, when: str, action: str) -> None:
    """Have *action* happen at each insert of this transaction, or at its COMMIT."""
    session.execute(
        sql(f"""
        CREATE FUNCTION pg_temp.act() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN {action}; RETURN NULL; END $$
        """)
    )
    session.execute(
        sql(f"""
        CREATE CONSTRAINT TRIGGER act AFTER INSERT ON items
        DEFERRABLE INITIALLY {when} FOR EACH ROW EXECUTE FUNCTION pg_temp.act()
        """)
    )


# Connections that are lost.

NUMBER = {"postgresql": "SELECT pg_backend_pid()", "mariadb": "SELECT connection_id()"}
KILL = {"postgresql": "SELECT pg_terminate_backend({})", "mariadb": "KILL {}"}
GONE = {
    "postgresql": "SELECT NOT EXISTS (SELECT 1 FROM pg_stat_activity WHERE pid = {})",
    "mariadb": "SELECT NOT EXISTS (SELECT 1 FROM information_schema.processlist WHERE id = {})",
}


def kill(session: Session, outside: Engine) -> None:
    """Have the server end the session's connection, and return when it has."""
    name = outside.dialect.name
    number = session.scalar(sql(NUMBER[name]))
    with outside.connect() as connection:
        connection.execute(sql(KILL[name].format(number)))
    until(lambda: bool(execute(outside.url, GONE[name].format(number))[0][0]), "it to be gone")


def test_a_connection_that_was_killed_is_replaced(engine: Engine, outside: Engine) -> None:
    """A connection found dead before COMMIT was sent costs an attempt, not the request."""

    def work(session: Session, attempt: int) -> None:
        adds("once")(session, attempt)
        if attempt == 1:
            kill(session, outside)
            session.scalar(sql("SELECT 1"))

    request = Request(engine, work)
    request.send()
    assert (request.attempts, names(outside)) == (2, ["once"])


def test_a_connection_that_died_unnoticed_is_no_success(engine: Engine, outside: Engine) -> None:
    """Work on a connection whose death the application swallowed is no success."""

    def work(session: Session, attempt: int) -> None:
        adds("gone")(session, attempt)
        kill(session, outside)
        with suppress(DBAPIError, OSError):  # pg8000 lets through what its socket raises
            session.scalar(sql("SELECT 1"))

    with pytest.raises(TransactionDoomed):
        Request(engine, work, attempts=1).send()
    assert names(outside) == []


def test_a_connection_that_commit_finds_dead_leaves_it_unknown(
    engine: Engine, outside: Engine
) -> None:
    """Whether a COMMIT on a dead connection arrived nobody can tell, so it is not repeated."""

    def work(session: Session, attempt: int) -> None:
        adds("gone")(session, attempt)
        kill(session, outside)

    request = Request(engine, work)
    with pytest.raises(CommitOutcomeUnknown):
        request.send()
    assert (action(request), request.calls) == ("unknown", 1)
    Request(engine, adds("kept")).send()
    assert names(outside) == ["kept"]


CUTS: list[Cut] = ["before it arrives", "before its answer"]


@pytest.mark.parametrize("cut", CUTS)
def test_a_connection_cut_in_commit_leaves_it_unknown(
    cut: Cut, linked_engine: Engine, link: Link
) -> None:
    """A COMMIT whose answer does not come is neither success nor failure, and not repeated."""
    request = Request(linked_engine, adds("perhaps"))
    link.cut = cut
    with pytest.raises(CommitOutcomeUnknown) as caught:
        request.send()
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert (action(request), request.calls) == ("unknown", 1)


@on_postgresql
@pytest.mark.parametrize(("cut", "calls"), [("before it arrives", 2), ("before its answer", 1)])
def test_postgresql_is_asked_what_became_of_it(
    cut: Cut, calls: int, linked_engine: Engine, link: Link, outside: Engine
) -> None:
    """With confirm a COMMIT that was done is a success, and one that was not is repeated."""

    def work(session: Session, attempt: int) -> None:
        if attempt == 2:
            link.cut = None
        adds("once")(session, attempt)

    request = Request(linked_engine, work, confirm=True)
    link.cut = cut
    request.send()
    assert (request.calls, action(request), names(outside)) == (calls, "commit", ["once"])


@on_postgresql
def test_postgresql_a_connection_ended_in_commit_leaves_it_unknown(
    engine: Engine, outside: Engine
) -> None:
    """A server that ends the connection while COMMIT runs has not said what became of it."""

    def work(session: Session, attempt: int) -> None:
        trigger(session, "DEFERRED", "PERFORM pg_terminate_backend(pg_backend_pid())")
        adds("perhaps")(session, attempt)

    request = Request(engine, work)
    with pytest.raises(CommitOutcomeUnknown):
        request.send()
    assert (action(request), request.calls) == ("unknown", 1)


# What may be durable already.


def calls_until_stale(engine: Engine, work: Work) -> int:
    """How often a request is tried that meets a transient error after *work*."""

    def both(session: Session, attempt: int) -> None:
        work(session, attempt)
        raise StaleDataError("again, please")

    request = Request(engine, both)
    with pytest.raises(StaleDataError):
        request.send()
    return request.calls


def commit_as_text(session: Session, attempt: int) -> None:
    adds("x")(session, attempt)
    session.execute(sql("COMMIT"))


def commit_of_the_connection(session: Session, attempt: int) -> None:
    adds("x")(session, attempt)
    session.connection().commit()


AUTOCOMMIT: Any = {"isolation_level": "AUTOCOMMIT"}


def in_autocommit(session: Session, attempt: int) -> None:
    session.connection(execution_options=AUTOCOMMIT)
    adds("x")(session, attempt)


COMMITS = [commit_as_text, commit_of_the_connection, in_autocommit]


@pytest.mark.parametrize("work", COMMITS)
def test_what_may_be_durable_is_not_done_again(work: Work, engine: Engine) -> None:
    """After a COMMIT of any kind, or a statement in AUTOCOMMIT, nothing is repeated."""
    assert calls_until_stale(engine, work) == 1


def test_a_view_recovers_from_a_connection_that_was_lost(engine: Engine, outside: Engine) -> None:
    """rollback() in the view, after the server ended its connection, makes way for another."""

    def work(session: Session, attempt: int) -> None:
        adds("gone")(session, attempt)
        session.connection().invalidate()
        with pytest.raises(PendingRollbackError):
            adds("gone")(session, attempt)
        session.rollback()
        adds("kept")(session, attempt)

    assert Request(engine, work).send().content == b"fine"
    assert names(outside) == ["kept"]


def test_what_was_not_committed_is_done_again(engine: Engine, outside: Engine) -> None:
    """Work alone keeps no request from being repeated, and none of it stays."""
    assert calls_until_stale(engine, adds("x")) == 3
    assert names(outside) == []


@on_postgresql
def test_postgresql_ddl_is_done_again(engine: Engine) -> None:
    """A table that a transaction makes is part of it, and keeps no request from being repeated."""
    ddl: Any = sql("CREATE TABLE other (id integer)")
    assert calls_until_stale(engine, lambda session, _: session.execute(ddl)) == 3


@on_mariadb
def test_mariadb_ddl_is_not_done_again(engine: Engine) -> None:
    """What MariaDB commits by itself is not repeated."""
    ddl: Any = sql("TRUNCATE TABLE items")
    assert calls_until_stale(engine, lambda session, _: session.execute(ddl)) == 1


@pytest.mark.parametrize("then", [adds("kept"), lambda session, attempt: None])
def test_an_error_that_never_reached_the_server_dooms_nothing(
    then: Work, engine: Engine, outside: Engine
) -> None:
    """A value that cannot be sent undoes nothing, also in the first statement of a request."""

    class Refusing(TypeDecorator[str]):
        impl, cache_ok = String, True

        def process_bind_param(self, value: object, dialect: object) -> str:
            raise KeyError(3)

    def work(session: Session, attempt: int) -> None:
        with pytest.raises(StatementError, match="KeyError"):
            session.execute(select(bindparam("value", "red", Refusing)))
        then(session, attempt)

    assert Request(engine, work).send().content == b"fine"


@pytest.mark.parametrize("of", ["the engine", "the connection"])
def test_an_error_in_autocommit_dooms_nothing(of: str, engine: Engine, outside: Engine) -> None:
    """In AUTOCOMMIT a swallowed error undoes its own statement only."""

    def work(session: Session, attempt: int) -> None:
        if of == "the connection":
            session.connection(execution_options=AUTOCOMMIT)
        adds("kept")(session, attempt)
        repeat_a_key(session)

    own = engine.execution_options(**AUTOCOMMIT) if of == "the engine" else engine
    Request(own, work).send()
    assert names(outside) == ["kept"]


# What else is made of a URL.


def test_a_reader_cannot_write(driver: str, server: URL, outside: Engine) -> None:
    """The engine of safe requests reads, and refuses to write."""
    reader = make_reader(server.set(drivername=driver))
    assert reader is not None
    read = Request(reader, lambda session, _: session.scalars(select(Counter.value)).all())
    read.send()
    with pytest.raises(DBAPIError, match=r"(?i)read.only"):
        Request(reader, adds("x"), attempts=1).send()
    reader.dispose()
    assert names(outside) == []


@on_mariadb
def test_mariadb_of_several_hosts_one_that_serves_is_found(
    driver: str, server: URL, outside: Engine
) -> None:
    """A host that is down is passed over."""
    hosts = ("127.0.0.1:1", f"127.0.0.1:{server.port}")
    several = server.set(drivername=driver, host=None, port=None, query={"host": hosts})
    engine = make_engine(several)
    Request(engine, adds("kept")).send()
    engine.dispose()
    assert names(outside) == ["kept"]
