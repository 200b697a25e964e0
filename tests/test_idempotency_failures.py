"""Repeats of requests around which the line, the server or a node of the database failed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from clusters import GaleraCluster, PostgreSQLCluster
from databases import until
from keyed_service import (
    Service,
    bind_of,
    code,
    in_step,
    is_replay,
    prepared,
    rows,
)
from links import Cut, Link, linked
from sessionscope import CommitOutcomeUnknown
from sessionscope.engines import make_engine
from sqlalchemy import create_engine, event, make_url
from sqlalchemy import text as sql
from support import PATIENCE, names

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.long


# A COMMIT whose answer is lost.


@pytest.fixture(params=["postgresql", "mariadb"])
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    url: str = request.getfixturevalue(f"{request.param}_url")
    with prepared(make_engine(url)), linked(url) as made:
        yield made


@pytest.mark.parametrize("cut", ["before it arrives", "while it runs", "before its answer"])
def test_a_commit_whose_answer_was_lost(cut: Cut, link: Link) -> None:
    """The repeat gets the response if COMMIT took effect, and else is carried out: once."""
    engine = create_engine(link.url, pool_size=1, max_overflow=0)
    service, outside = Service(engine), create_engine(link.target)
    engine.connect().close()  # PyMySQL's greeting speaks of AUTOCOMMIT
    link.cut = cut
    with pytest.raises(CommitOutcomeUnknown):
        service.post()
    link.cut = None
    repeat = service.post()
    assert code(repeat) == 201
    assert [repeat.content] == [name.encode() for name in names(outside) if name]
    if cut != "while it runs":
        assert service.calls == (2 if cut == "before it arrives" else 1)
    assert len(rows(outside)) == 1
    engine.dispose()
    outside.dispose()


# A cluster of PostgreSQL.


@pytest.fixture
def cluster(postgresql_cluster: PostgreSQLCluster) -> Iterator[PostgreSQLCluster]:
    """A primary and two synchronous replicas, with the tables."""
    with prepared(make_engine(postgresql_cluster.url)) as engine:
        yield postgresql_cluster
        postgresql_cluster.heal()
        engine.dispose()


@pytest.fixture
def clustered(cluster: PostgreSQLCluster) -> Iterator[Service]:
    engine = make_engine(cluster.url)
    yield Service(engine)
    engine.dispose()


def waits_for_replica(cluster: PostgreSQLCluster) -> bool:
    query = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    return bool(cluster.primary.execute(query))


def test_a_commit_that_waits_for_a_standby(cluster: PostgreSQLCluster, clustered: Service) -> None:
    """Meanwhile repeats are refused, in this process and in another, and then replayed."""
    url = make_url(cluster.url).update_query_dict({"options": "-c lock_timeout=200"})
    engine = make_engine(url)
    other = Service(engine)
    with ThreadPoolExecutor() as threads:
        for replica in cluster.replicas:
            replica.pause()
        first = threads.submit(clustered.post)
        until(lambda: waits_for_replica(cluster), "COMMIT to wait")
        refused = other.post()
        assert not first.done()
        for replica in cluster.replicas:
            replica.resume()
        assert code(refused) == 409
        reply = first.result(PATIENCE)  # until then its key is locked
        assert is_replay(other.post(), reply)
    assert (clustered.calls, other.calls) == (1, 0)
    engine.dispose()


def test_a_promotion_between_request_and_repeat(
    cluster: PostgreSQLCluster, clustered: Service
) -> None:
    """What was answered is there on the promoted standby: work, key and response."""
    first = clustered.post()
    cluster.primary.kill()
    cluster.promote(cluster.freshest())
    assert is_replay(clustered.post(), first)
    assert names(bind_of(clustered)) == [first.content.decode()]


def test_a_promotion_while_commit_waits(cluster: PostgreSQLCluster, clustered: Service) -> None:
    """What was not answered is there with its row, or neither is: the repeat is right."""
    with ThreadPoolExecutor() as threads:
        for replica in cluster.replicas:
            replica.pause()
        first = threads.submit(clustered.post)
        until(lambda: waits_for_replica(cluster), "COMMIT to wait")
        cluster.primary.kill()
        for replica in cluster.replicas:
            replica.resume()
        with pytest.raises(CommitOutcomeUnknown):
            first.result(PATIENCE)
    cluster.promote(cluster.freshest())
    there = names(bind_of(clustered))
    assert len(rows(bind_of(clustered))) == len(there)
    repeat = clustered.post()
    assert clustered.calls == 2 - len(there)
    assert names(bind_of(clustered)) == [repeat.content.decode()]


# A cluster of Galera.


@pytest.fixture
def galera(galera_cluster: GaleraCluster) -> Iterator[list[Service]]:
    """A service on each of two nodes."""
    engines = [make_engine(node.url) for node in galera_cluster.nodes[:2]]
    with prepared(make_engine(galera_cluster.nodes[2].url)):
        for engine in engines:
            assert rows(engine) == []  # not before the tables are there
        yield [Service(engine, sessions={"attempts": 9}) for engine in engines]
        galera_cluster.heal()
        for engine in engines:
            engine.dispose()


def test_galera_two_nodes_at_once(galera: list[Service]) -> None:
    """Of one key that both nodes get at the same instant one work stays, for 150 keys."""
    pairs = in_step(galera, 150)
    assert {code(reply) for pair in pairs for reply in pair} == {201}
    assert all(one.content == other.content for one, other in pairs)
    made = sorted(one.content.decode() for one, _ in pairs)
    assert sorted(name or "" for name in names(bind_of(galera[0]))) == made
    for service in galera:
        repeats = [service.post(f"{number}") for number in range(150)]
        assert [reply.content for reply in repeats] == [one.content for one, _ in pairs]


@pytest.mark.parametrize("sync", [0, 7])
def test_galera_a_node_that_lags_behind(
    sync: int, galera: list[Service], galera_cluster: GaleraCluster
) -> None:
    """A repeat at a node that has not applied the first yet gets the response all the same."""
    here, there = galera
    engine = bind_of(there)

    @event.listens_for(engine, "connect")
    def configure(dbapi_connection: Any, _record: object) -> None:
        with dbapi_connection.cursor() as cursor:
            cursor.execute(f"SET SESSION wsrep_sync_wait = {sync}")

    engine.dispose()
    holder = create_engine(galera_cluster.nodes[1].url, isolation_level="AUTOCOMMIT")
    with holder.connect() as connection, ThreadPoolExecutor() as threads:
        connection.execute(sql("SET GLOBAL wsrep_desync = ON"))  # or it would hold up the others
        connection.execute(sql("FLUSH TABLES WITH READ LOCK"))
        try:
            first = here.post()
            repeat = threads.submit(there.post)
            waiting = sql(
                "SELECT count(*) FROM information_schema.processlist "
                "WHERE info LIKE 'INSERT IGNORE%' AND info NOT LIKE '%processlist%'"
            )
            until(lambda: bool(connection.scalar(waiting)), "the repeat to wait")
        finally:
            connection.execute(sql("UNLOCK TABLES"))
            connection.execute(sql("SET GLOBAL wsrep_desync = OFF"))
        assert is_replay(repeat.result(PATIENCE), first)
    assert names(bind_of(here)) == [first.content.decode()]
    holder.dispose()


def test_galera_a_node_that_is_killed(galera: list[Service], galera_cluster: GaleraCluster) -> None:
    """The response is there on the other nodes."""
    here, there = galera
    first = here.post()
    galera_cluster.nodes[0].kill()
    galera_cluster.settle()
    assert is_replay(there.post(), first)
    assert names(bind_of(there)) == [first.content.decode()]
