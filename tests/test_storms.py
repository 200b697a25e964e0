"""Conflicts by the hundred: hardly a request is refused, none is lost and none done twice.

The counts are printed; ``pytest -rP`` shows them.
"""

from __future__ import annotations

import json
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from threading import Barrier
from typing import Any, TypeVar, cast

import pytest
from clusters import GaleraCluster
from conflicts import Counter, Request, change, leave, prepared, values, witness
from processes import Client, serve
from sessionscope.engines import make_engine
from sqlalchemy import Engine, insert, update
from sqlalchemy import text as sql
from sqlalchemy.exc import SQLAlchemyError
from support import PATIENCE, names

from models import Item

pytestmark = pytest.mark.long

CLIENTS = 8
"""How many are at it at once; the service has as many threads."""

T = TypeVar("T")


def crowd(clients: int, task: Callable[[int], T]) -> list[T]:
    """Do a task for each of many clients at once; what it returns for each."""
    start = Barrier(clients)

    def run(client: int) -> T:
        start.wait(PATIENCE)
        return task(client)

    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(run, range(clients)))


# The service itself, with a database that fails three of ten inserts.

EACH = 200
"""Items that a client creates: a request meets five conflicts, and is refused, once in 400."""


def check_that_the_service_weathers(engine: Engine, what: str) -> None:
    """Create items from many clients; hold what they were told against what is stored."""

    def create(client: int) -> list[tuple[str, int, bytes]]:
        wanted = [f"{client}-{number}" for number in range(EACH)]
        with Client(server) as connection:
            return [
                (name, *connection.send("POST", "/", json.dumps({"name": name}).encode()))
                for name in wanted
            ]

    url = engine.url.render_as_string(hide_password=False)
    with serve("--database-url", url, "--log-level", "info") as server:
        answers = [answer for each in crowd(CLIENTS, create) for answer in each]
    refused = [content for _, status, content in answers if status == 503]
    acknowledged = [name for name, status, _ in answers if status == 200]
    stored = names(engine)
    print(
        f"{what}: {len(answers)} requests, {server.log.count('failed, again:')} conflicts "
        f"replayed, {len(acknowledged)} acknowledged, {len(refused)} refused, "
        f"{len({*acknowledged} - {*stored})} lost, {len(stored) - len({*stored})} doubled"
    )
    assert sorted(map(str, stored)) == sorted(acknowledged)
    assert len(refused) + len(acknowledged) == len(answers)
    assert len(refused) <= len(answers) / 100
    assert set(refused) <= {b'{"error": "the database is not available"}\n'}


@pytest.fixture
def postgresql(postgresql: Engine) -> Iterator[Engine]:
    """What a test adds to it is dropped."""
    yield postgresql
    with postgresql.begin() as connection:
        connection.execute(sql("DROP FUNCTION fail() CASCADE"))
        connection.execute(sql("DROP SEQUENCE tries"))


@pytest.mark.parametrize("when", ["IMMEDIATE", "DEFERRED"], ids=["statement", "COMMIT"])
def test_postgresql_a_storm_of_conflicts(when: str, postgresql: Engine) -> None:
    """Of clients who meet conflicts at the statement or at COMMIT hardly one is refused."""
    with postgresql.begin() as connection:
        # Which tries fail is fixed, and a sequence is not undone with them.
        connection.execute(sql("CREATE SEQUENCE tries"))
        connection.execute(
            sql("""
            CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
            DECLARE try bigint := nextval('tries'); BEGIN
            IF hashint8(try) & 1023 < 0.3 * 1024 THEN RAISE EXCEPTION 'no'
            USING ERRCODE = CASE try % 2 WHEN 0 THEN '40001' ELSE '40P01' END; END IF;
            RETURN NULL; END $$
            """)
        )
        connection.execute(
            sql(f"""
            CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON items
            DEFERRABLE INITIALLY {when} FOR EACH ROW EXECUTE FUNCTION fail()
            """)
        )
    check_that_the_service_weathers(postgresql, f"PostgreSQL, 40001 and 40P01, {when}")


@pytest.fixture
def mariadb(mariadb: Engine) -> Iterator[Engine]:
    """What a test adds to it is dropped; its trigger goes with the table."""
    yield mariadb
    with mariadb.begin() as connection:
        connection.execute(sql("DROP SEQUENCE tries"))


def test_mariadb_a_storm_of_conflicts(mariadb: Engine) -> None:
    """Of clients who meet deadlocks at the statement hardly one is refused."""
    with mariadb.begin() as connection:
        connection.execute(sql("CREATE SEQUENCE tries"))
        connection.execute(
            sql("""
            CREATE TRIGGER fail BEFORE INSERT ON items FOR EACH ROW
            IF CRC32(NEXTVAL(tries)) % 10 < 3
            THEN SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213; END IF
            """)
        )
    # No trigger can fail COMMIT here; another node can, see the last tests.
    check_that_the_service_weathers(mariadb, "MariaDB, 1213")


# Rows that everybody wants.


def hammer(requests: Sequence[Request], times: int) -> Tally[str]:
    """Send each request many times, all of them at once; count how they ended."""

    def send(client: int) -> list[str]:
        request = requests[client]
        request.outcomes.clear()
        for _ in range(times):
            with suppress(SQLAlchemyError):  # the outcome tells
                request.send()
        return [outcome.action for outcome in request.outcomes]

    return Tally(ending for endings in crowd(len(requests), send) for ending in endings)


def told(what: str, ended: Tally[str], conflicts: Sequence[tuple[str, object]]) -> None:
    places = ", ".join(f"{n} x {code} at {at}" for (at, code), n in Tally(conflicts).items())
    print(
        f"{what}: {ended['commit']} commits, {ended['rollback']} refused, "
        f"{ended['unknown']} unknown; conflicts: {places}"
    )


def test_postgresql_a_rule_for_many_rows_is_kept(postgresql_url: str) -> None:
    """Of doctors who leave all at once, again and again, one always stays on call."""
    with prepared(make_engine(postgresql_url), counters=CLIENTS) as engine:
        serializable = engine.execution_options(isolation_level="SERIALIZABLE")
        conflicts, total = witness(serializable), Tally[str]()
        doctors = [Request(serializable, leave(key + 1), attempts=9) for key in range(CLIENTS)]
        for _ in range(40):
            with engine.begin() as connection:
                connection.execute(update(Counter).values(value=1))
            ended = hammer(doctors, 1)
            assert sum(values(engine)) == max(1, ended["rollback"])
            total += ended
        told("write skew", total, conflicts)
        assert total["unknown"] == 0
        assert ("COMMIT", "40001") in conflicts


def test_mariadb_no_update_is_lost(mariadb_url: str) -> None:
    """Of many who read and write the same row at once, none overwrites another's update."""
    with prepared(make_engine(mariadb_url)) as engine:
        conflicts = witness(engine)
        ended = hammer([Request(engine, change, attempts=30) for _ in range(CLIENTS)], 100)
        told("read, modify and write on MariaDB", ended, conflicts)
        assert values(engine)[0] == ended["commit"]
        assert ended["commit"] >= 0.99 * ended.total()
        assert ended["unknown"] == 0
        assert ("UPDATE", 1020) in conflicts


@pytest.fixture
def nodes(galera_cluster: GaleraCluster) -> Iterator[list[Engine]]:
    """An engine for each node of a cluster."""
    with ExitStack() as stack:
        engines = [make_engine(node.url) for node in galera_cluster.nodes]
        for engine in engines:
            stack.callback(engine.dispose)
        stack.enter_context(prepared(engines[0]))
        yield engines


def test_galera_a_row_that_all_nodes_want(nodes: list[Engine]) -> None:
    """A row that is changed on three nodes at once has exactly the acknowledged changes."""
    witnesses = [witness(engine) for engine in nodes]
    ended = hammer([Request(each, change, attempts=30) for each in [*nodes, *nodes]], 100)
    conflicts = [conflict for each in witnesses for conflict in each]
    told("a row on three nodes", ended, conflicts)
    assert {values(engine)[0] for engine in nodes} == {ended["commit"]}
    assert ended["commit"] >= 0.99 * ended.total()
    assert ended["unknown"] == 0
    assert ("COMMIT", 1213) in conflicts


def test_galera_what_one_node_acknowledged_all_show(nodes: list[Engine]) -> None:
    """A request finds what was acknowledged just before, whichever node it asks."""
    read: list[int] = []
    for number in range(100):
        writer, reader = nodes[number % 3], nodes[(number + 1) % 3]
        Request(writer, change).send()
        Request(reader, lambda session, _: read.append(session.get_one(Counter, 1).value)).send()
    stale = sum(value <= number for number, value in enumerate(read))
    print(f"read on another node: {stale} stale of {len(read)}")
    assert stale == 0


def test_galera_what_one_node_acknowledged_all_can_change(nodes: list[Engine]) -> None:
    """A request changes what was acknowledged just before, whichever node it asks."""

    def create_and_rename(number: int) -> int:
        """How many rows a second node found to rename."""
        changed: list[int] = []
        rename = update(Item).where(Item.name == str(number)).values(name="renamed")
        create = insert(Item).values(name=str(number))
        Request(nodes[number % 3], lambda session, _: session.execute(create)).send()
        Request(
            nodes[(number + 1) % 3],
            lambda session, _: changed.append(cast(Any, session.execute(rename)).rowcount),
        ).send()
        return changed[-1]

    missed = [create_and_rename(number) for number in range(100)].count(0)
    print(f"changed on another node: {missed} missed of 100")
    assert missed == 0
