"""Conflicts of two requests, on the engines that have them: each is replayed, with one effect.

Nothing here is simulated.  Two transactions get in each other's way, at a point that is
fixed and not waited for, and the database itself refuses one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import pytest
from clusters import GaleraCluster
from conflicts import (
    Counter,
    Holder,
    Request,
    Work,
    add_one,
    change,
    change_after,
    code,
    leave,
    meanwhile,
    on_call,
    prepared,
    together,
    values,
    witness,
)
from databases import Node, until
from sessionscope import CommitOutcomeUnknown, TransactionDoomed
from sessionscope.engines import make_engine
from sqlalchemy import Engine, create_engine, event, func, insert, make_url, select, update
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from support import PATIENCE, names, refuse_commit

from models import Item


@pytest.fixture
def postgresql(postgresql_url: str) -> Iterator[Engine]:
    """It looks for a deadlock soon, and not after the usual second."""
    soon = make_url(postgresql_url).update_query_dict({"options": "-c deadlock_timeout=10ms"})
    with prepared(make_engine(soon)) as engine:
        yield engine


@pytest.fixture
def mariadb(mariadb_url: str) -> Iterator[Engine]:
    with prepared(make_engine(mariadb_url)) as engine:
        yield engine


def deferred_sqlite(url: str, journal: str) -> Engine:
    """An engine that begins as a reader, and does not wait for a lock."""
    options = {"isolation_level": None, "timeout": 0, "check_same_thread": False}
    engine = create_engine(make_url(url).set(drivername="sqlite+deferred"), connect_args=options)

    @event.listens_for(engine, "connect")
    def configure(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.execute(f"PRAGMA journal_mode={journal}")

    return engine


@pytest.fixture
def sqlite_wal(sqlite_url: str) -> Iterator[Engine]:
    with prepared(deferred_sqlite(sqlite_url, "WAL")) as engine:
        yield engine


@pytest.fixture
def sqlite_journal(sqlite_url: str) -> Iterator[Engine]:
    with prepared(deferred_sqlite(sqlite_url, "DELETE")) as engine:
        yield engine


# A row that has changed since it was read.


def check_that_no_update_is_lost(engine: Engine, error: object) -> None:
    """Of two requests that read the same value the second to write is made again."""
    refused, rival = witness(engine), Request(engine, change)
    request = Request(engine, change_after(rival.send))
    request.send()
    assert refused == [("UPDATE", error)]
    assert (request.attempts, values(engine)) == (2, [2, 0])


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_postgresql_an_update_of_a_changed_row(level: str, postgresql: Engine) -> None:
    """Where the snapshot must hold, an UPDATE of a row that changed is replayed (40001)."""
    engine = postgresql.execution_options(isolation_level=level)
    check_that_no_update_is_lost(engine, "40001")


def test_mariadb_an_update_of_a_changed_row(mariadb: Engine) -> None:
    """With the service's settings an UPDATE of a row that changed is replayed (1020)."""
    check_that_no_update_is_lost(mariadb, 1020)


def test_sqlite_a_write_after_a_read_that_is_stale(sqlite_wal: Engine) -> None:
    """A deferred transaction that may not write any more, for it has read, is replayed."""
    check_that_no_update_is_lost(sqlite_wal, "SQLITE_BUSY_SNAPSHOT")


# What is read and what is written are not the same row.


def test_postgresql_write_skew_is_refused_by_commit(postgresql: Engine) -> None:
    """Of two doctors who leave at once one is refused by COMMIT, is asked again and stays."""
    engine = postgresql.execution_options(isolation_level="SERIALIZABLE")
    Request(engine, lambda session, _: session.execute(update(Counter).values(value=1))).send()
    refused, rival = witness(engine), Request(engine, leave(2))
    request = Request(engine, leave(1, before_commit=rival.send))
    request.send()
    assert refused == [("COMMIT", "40001")]
    assert (request.attempts, values(engine)) == (2, [1, 0])


# Each waits for the other, or for one that does not finish.


def check_that_a_deadlock_is_resolved(engine: Engine, error: object) -> None:
    """Of two requests that lock two rows in opposite order one is made again."""
    both_hold_one = threading.Barrier(2)

    def lock(first: int, second: int) -> Work:
        def work(session: Session, attempt: int) -> None:
            add_one(session, first)
            if attempt == 1:
                both_hold_one.wait(PATIENCE)
            add_one(session, second)

        return work

    refused = witness(engine)
    requests = [Request(engine, lock(1, 2)), Request(engine, lock(2, 1))]
    together(*requests)
    assert set(refused) == {("UPDATE", error)}
    assert sum(request.attempts for request in requests) == 2 + len(refused)
    assert values(engine) == [2, 2]


def test_postgresql_a_deadlock(postgresql: Engine) -> None:
    """The victim of a deadlock is replayed (40P01), and both requests have their effect."""
    check_that_a_deadlock_is_resolved(postgresql, "40P01")


def test_mariadb_a_deadlock(mariadb: Engine) -> None:
    """The victim of a deadlock is replayed (1213), and both requests have their effect."""
    check_that_a_deadlock_is_resolved(mariadb, 1213)


def test_mariadb_a_lock_that_was_not_given_up_in_time(mariadb: Engine) -> None:
    """A request that waited in vain for a lock is replayed (1205)."""
    refused = witness(mariadb)
    with Holder(mariadb, lambda session, _: add_one(session)) as holder:

        def work(session: Session, attempt: int) -> None:
            if attempt == 2:
                holder.finish()
            session.execute(sql("SET innodb_lock_wait_timeout = 0"))
            add_one(session)

        request = Request(mariadb, work)
        request.send()
    assert refused == [("UPDATE", 1205)]
    assert (request.attempts, values(mariadb)) == (2, [2, 0])


def test_sqlite_a_reader_that_keeps_the_file_from_being_written(sqlite_journal: Engine) -> None:
    """With a rollback journal, a COMMIT that a reader is in the way of is replayed."""
    refused = witness(sqlite_journal)
    with Holder(sqlite_journal, lambda session, _: on_call(session)) as reader:

        def work(session: Session, attempt: int) -> None:
            if attempt == 2:
                reader.finish()
            add_one(session)

        request = Request(sqlite_journal, work)
        request.send()
    assert refused == [("COMMIT", "SQLITE_BUSY")]
    assert (request.attempts, values(sqlite_journal)) == (2, [1, 0])


# A connection that is found dead.


def end_backend(engine: Engine, pid: int) -> None:
    """Have PostgreSQL end a connection, as an operator does; return when it is gone."""
    with engine.begin() as connection:
        assert connection.scalar(select(func.pg_terminate_backend(pid, 60_000)))


def backend(session: Session) -> int:
    """The process that serves this connection."""
    pid: int = session.scalars(select(func.pg_backend_pid())).one()
    return pid


def test_postgresql_a_connection_ended_between_two_statements(postgresql: Engine) -> None:
    """A connection that the next statement finds ended is replaced, and all replayed (57P01)."""
    refused = witness(postgresql)

    def work(session: Session, attempt: int) -> None:
        add_one(session, 1)
        if attempt == 1:
            meanwhile(partial(end_backend, postgresql, backend(session)))
        add_one(session, 2)

    request = Request(postgresql, work)
    request.send()
    assert refused == [("UPDATE", "57P01")]
    assert (request.attempts, values(postgresql)) == (2, [1, 1])


def test_mariadb_a_connection_ended_between_two_statements(mariadb: Engine) -> None:
    """A connection that the next statement finds killed is replaced, and all replayed."""
    refused = witness(mariadb)

    def kill(number: int) -> None:
        known = sql("SELECT 1 FROM information_schema.processlist WHERE id = :id")
        with mariadb.connect() as connection:
            connection.execute(sql("KILL :id"), {"id": number})
            until(lambda: not connection.scalar(known, {"id": number}), "the connection to end")

    def work(session: Session, attempt: int) -> None:
        add_one(session, 1)
        if attempt == 1:
            meanwhile(partial(kill, session.scalars(select(func.connection_id())).one()))
        add_one(session, 2)

    request = Request(mariadb, work)
    request.send()
    assert refused in ([("UPDATE", 2006)], [("UPDATE", 2013)])
    assert (request.attempts, values(mariadb)) == (2, [1, 1])


def add_one_and_lose_connection(engine: Engine) -> Work:
    """At the first attempt the connection has ended when COMMIT shall be sent."""

    def work(session: Session, attempt: int) -> None:
        add_one(session)
        if attempt == 1:
            meanwhile(partial(end_backend, engine, backend(session)))

    return work


def test_postgresql_a_connection_ended_before_commit(postgresql: Engine) -> None:
    """The question that confirm=True asks before COMMIT finds it ended, and all is replayed."""
    refused = witness(postgresql)
    request = Request(postgresql, add_one_and_lose_connection(postgresql), confirm=True)
    request.send()
    assert refused == [("SELECT", "57P01")]
    assert (request.attempts, values(postgresql)) == (2, [1, 0])


def test_postgresql_a_connection_that_commit_finds_ended(postgresql: Engine) -> None:
    """Where COMMIT itself finds it ended, it could have been done: that is not replayed."""
    refused = witness(postgresql)
    request = Request(postgresql, add_one_and_lose_connection(postgresql))
    with pytest.raises(CommitOutcomeUnknown):
        request.send()
    assert refused == [("COMMIT", "57P01")]
    assert (request.calls, values(postgresql)) == (1, [0, 0])


def test_postgresql_a_connection_ended_for_being_idle(postgresql: Engine) -> None:
    """A connection that idled too long in its transaction is replaced, and all replayed."""
    refused = witness(postgresql)

    def is_gone(pid: int) -> bool:
        with postgresql.connect() as connection:
            activity = sql("SELECT FROM pg_stat_activity WHERE pid = :pid")
            return connection.execute(activity, {"pid": pid}).one_or_none() is None

    def work(session: Session, attempt: int) -> None:
        add_one(session, 1)
        pid = backend(session)
        if attempt == 1:
            session.execute(sql("SET LOCAL idle_in_transaction_session_timeout = 100"))
            until(lambda: is_gone(pid), "PostgreSQL to lose its patience")
        add_one(session, 2)

    request = Request(postgresql, work)
    request.send()
    # What comes with the answer to an earlier statement is but a notice to libpq.
    assert refused in ([("UPDATE", "25P03")], [("UPDATE", None)])
    assert (request.attempts, values(postgresql)) == (2, [1, 1])


@pytest.fixture(params=["postgresql", "mariadb"])
def node(request: pytest.FixtureRequest) -> Node:
    found: Node = request.getfixturevalue(f"{request.param}_node")
    return found


@pytest.mark.parametrize("end", [Node.stop, Node.kill])
def test_a_restart_of_the_server_fails_no_request(end: Callable[[Node], None], node: Node) -> None:
    """When every connection of the pool is dead, each request succeeds all the same."""
    all_connected = threading.Barrier(4)

    def create(session: Session, _: int) -> None:
        session.execute(insert(Item).values(name="old"))
        all_connected.wait(PATIENCE)

    # Eight connect at once to a server that has just started, on a machine that may be busy.
    with prepared(make_engine(f"{node.url}?connect_timeout=60")) as engine:
        together(*(Request(engine, create) for _ in range(4)))
        end(node)
        node.start()
        refused = witness(engine)
        requests = [Request(engine, add_item(f"new {n}"), attempts=2) for n in range(8)]
        together(*requests)
        assert {sent for sent, _ in refused} == {"INSERT"}
        assert sum(request.attempts for request in requests) == 8 + len(refused)
        assert sorted(map(str, names(engine))) == [*(f"new {n}" for n in range(8)), *["old"] * 4]


def add_item(name: str) -> Work:
    return lambda session, _: session.execute(insert(Item).values(name=name))


# Galera: the first to commit wins, on whatever node, and the others learn of it at any time.


@dataclass
class Galera:
    """Two nodes of a cluster, each with an engine of its own."""

    here: Engine
    there: Engine

    def overtake(self) -> None:
        """Change the counter on the other node; return when this one knows of it."""
        Request(self.there, lambda session, _: add_one(session)).send()
        assert values(self.here) == [1, 0]  # wsrep_sync_wait: not before it is applied


@pytest.fixture
def galera(galera_cluster: GaleraCluster) -> Iterator[Galera]:
    here, there = (make_engine(node.url) for node in galera_cluster.nodes[:2])
    with prepared(here):
        assert values(there) == [0, 0]  # to write does not wait for the tables, to read does
        yield Galera(here, there)
    there.dispose()


NEXT: dict[str, Work] = {
    "SELECT": lambda session, _: on_call(session),
    "UPDATE": lambda session, _: add_one(session, 2),
    "COMMIT": lambda session, _: None,
}


def overtaken(galera: Galera, then: Work) -> Work:
    """Change the counter, be overtaken at the first attempt, and go on as if nothing were."""

    def work(session: Session, attempt: int) -> None:
        add_one(session)
        if attempt == 1:
            meanwhile(galera.overtake)
        then(session, attempt)

    return work


@pytest.mark.parametrize("then", NEXT)
def test_galera_an_abort_by_another_node(then: str, galera: Galera) -> None:
    """A transaction that another node's has aborted learns of it later, and is replayed."""
    refused = witness(galera.here)
    request = Request(galera.here, overtaken(galera, NEXT[then]))
    request.send()
    assert refused == [(then, 1213)]
    assert (request.attempts, values(galera.here)[0]) == (2, 2)


def swallow(session: Session, attempt: int) -> None:
    """Take no notice of an error, and create an item."""
    with suppress(DBAPIError):
        on_call(session)
    session.add(Item(name="after"))


def test_galera_an_abort_that_was_swallowed_is_replayed(galera: Galera) -> None:
    """Where the application took no notice of the abort, all is replayed, not only the rest."""
    request = Request(galera.here, overtaken(galera, swallow))
    request.send()
    assert (request.attempts, values(galera.here), names(galera.here)) == (2, [2, 0], ["after"])


def test_galera_an_abort_that_was_swallowed_is_no_success(galera: Galera) -> None:
    """With a single attempt it is doomed, and what came after is not committed either."""
    with pytest.raises(TransactionDoomed) as caught:
        Request(galera.here, overtaken(galera, swallow), attempts=1).send()
    assert code(getattr(caught.value.__cause__, "orig", None)) == 1213
    assert (values(galera.here), names(galera.here)) == ([1, 0], [])


def test_galera_an_abort_that_rollback_tells(galera: Galera) -> None:
    """Where even ROLLBACK is refused, the response stands and nothing is left in the registry."""
    refused = witness(galera.here)
    request = Request(galera.here, overtaken(galera, NEXT["COMMIT"]), status="409 Conflict")
    assert request.send().status == "409 Conflict"
    assert refused == [("ROLLBACK", 1213)]
    assert (request.calls, values(galera.here)) == (1, [1, 0])


def test_galera_a_certification_failure(galera: Galera) -> None:
    """Of two nodes that commit the same row at once one is refused, and the request replayed."""
    refused = [*map(witness, (galera.here, galera.there))]
    failures, rounds = certification_failures(galera), count(1)

    def one_has_failed() -> bool:
        commit_at_once(galera.here, galera.there)
        assert values(galera.here) == values(galera.there) == [2 * next(rounds), 0]
        return certification_failures(galera) > failures

    until(one_has_failed, "two commits to meet")
    assert ("COMMIT", 1213) in [conflict for each in refused for conflict in each]


def commit_at_once(*engines: Engine) -> None:
    """Change the same row through each engine, and commit when all have."""
    all_have = threading.Barrier(len(engines))

    def work(session: Session, attempt: int) -> None:
        add_one(session)
        if attempt == 1:
            all_have.wait(PATIENCE)

    together(*(Request(engine, work, attempts=9) for engine in engines))


def certification_failures(galera: Galera) -> int:
    query = sql("SHOW STATUS LIKE 'wsrep_local_cert_failures'")
    with galera.here.connect() as here, galera.there.connect() as there:
        return sum(int(each.execute(query).one()[1]) for each in (here, there))


# What another attempt would not cure.


def take_too_long(session: Session, _: int) -> None:
    session.execute(sql("SET LOCAL statement_timeout = 1"))
    session.execute(select(func.pg_sleep(PATIENCE)))


def name_twice(session: Session, _: int) -> None:
    """Break a rule that is only looked at by COMMIT."""
    session.execute(sql("ALTER TABLE items ADD UNIQUE (name) DEFERRABLE INITIALLY DEFERRED"))
    session.execute(insert(Item), [{"name": "twice"}, {"name": "twice"}])


HOPELESS: dict[tuple[str, str], Work] = {
    ("COMMIT", "23503"): lambda session, _: refuse_commit(session),
    ("COMMIT", "23505"): name_twice,
    ("SELECT", "57014"): take_too_long,
}


@pytest.mark.parametrize("where", HOPELESS, ids="-".join)
def test_postgresql_what_is_no_conflict_is_not_replayed(
    where: tuple[str, str], postgresql: Engine
) -> None:
    """A broken rule or a statement that took too long is refused once, and nothing stays."""
    refused, request = witness(postgresql), Request(postgresql, HOPELESS[where])
    with pytest.raises(DBAPIError):
        request.send()
    assert (refused, request.calls) == ([where], 1)
    assert names(postgresql) == []


def test_postgresql_a_lock_timeout_is_not_replayed(postgresql: Engine) -> None:
    """A wait for a lock that the application itself has limited is refused once (55P03)."""
    refused = witness(postgresql)

    def work(session: Session, _: int) -> None:
        session.execute(sql("SET LOCAL lock_timeout = 1"))
        add_one(session)

    with Holder(postgresql, lambda session, _: add_one(session)):
        request = Request(postgresql, work)
        with pytest.raises(DBAPIError):
            request.send()
    assert (refused, request.calls) == ([("UPDATE", "55P03")], 1)
    assert values(postgresql) == [1, 0]
