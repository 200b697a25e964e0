"""A server dies, and comes back or is replaced: what clients are told then, and that it is true."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from clusters import GaleraCluster, PostgreSQLCluster, hosts
from databases import Node, until
from ledger import (
    THREADS,
    Load,
    MariaDBStore,
    PostgreSQLStore,
    Service,
    audit,
    kill_processes,
    last_checkpoint,
    rows_everywhere,
    store_of,
    use_all_connections,
)
from sessionscope import CommitOutcomeUnknown, SessionMiddleware, confirm
from sessionscope.engines import make_engine
from sqlalchemy import Connection, Engine, event
from sqlalchemy import text as sql
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import PATIENCE, Answer, environ, fetch, serve_once, text

from models import Base, Item
from web.database import create_tables

pytestmark = pytest.mark.long


def engine_on(server: Node | PostgreSQLCluster) -> Iterator[Engine]:
    engine = make_engine(server.url)
    create_tables(engine)
    yield engine
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    server.heal()
    engine.dispose()
    Base.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def node_engine(postgresql_node: Node) -> Iterator[Engine]:
    """An engine like the service's, and the tables, on one PostgreSQL server."""
    yield from engine_on(postgresql_node)


@pytest.fixture
def cluster_engine(postgresql_cluster: PostgreSQLCluster) -> Iterator[Engine]:
    """The same on whichever server of the cluster takes writes."""
    yield from engine_on(postgresql_cluster)


# The service lives on.


def post(service: Service) -> Answer:
    return fetch(service.port, "POST")


def listed(service: Service) -> list[str]:
    answer = fetch(service.port)
    assert answer.status == 200, answer
    return [item["name"] for item in json.loads(answer.content)["items"]]


def test_a_promotion_needs_no_restart(
    postgresql_cluster: PostgreSQLCluster, cluster_engine: Engine
) -> None:
    """Without a primary writes are refused for now and reads go on; with a new one all is well."""
    cluster = postgresql_cluster
    store = PostgreSQLStore(lambda: cluster.primary)
    with Service("--database-url", cluster.url, "--reader-url", cluster.reader_url) as service:
        entries = use_all_connections(service.port, store)
        before = sorted(entry.name for entry in entries)
        until(lambda: sorted(listed(service)) == before, "the items to reach the replicas")
        cluster.primary.kill()
        for _ in range(THREADS):
            answer = post(service)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert sorted(listed(service)) == before
        cluster.promote(cluster.freshest())
        entries += use_all_connections(service.port, store)
    assert {entry.verdict for entry in entries} == {"acknowledged"}
    assert audit(entries, store.rows()[0]).is_right


@pytest.fixture(params=["postgresql", "mariadb"])
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """A server of each kind, without items, that the test may stop and kill."""
    node: Node = request.getfixturevalue(f"{request.param}_node")
    yield node
    node.heal()
    store_of(node).empty()


@pytest.mark.parametrize("end", [Node.stop, Node.kill])
def test_stale_connections_are_not_noticed(end: Callable[[Node], None], node: Node) -> None:
    """When the server was restarted, requests that get a connection of before succeed."""
    store = store_of(node)
    with Service("--database-url", node.url) as service:
        entries = use_all_connections(service.port, store)
        end(node)
        node.start()
        entries += use_all_connections(service.port, store)
    assert {entry.verdict for entry in entries} == {"acknowledged"}
    assert audit(entries, store.rows()[0]).is_right
    assert "attempt 1 of 5 failed" in service.process.log


def test_galera_nodes_may_fail(galera_cluster: GaleraCluster) -> None:
    """When the node in use dies or stands still, writes go on at another, and it may come back."""
    store = MariaDBStore(*galera_cluster.nodes)
    url = f"{galera_cluster.url}&read_timeout=4&connect_timeout=2"
    with Service("--database-url", url) as service, Load(service.port) as load:
        load.wait_for(100)
        in_use = store.clients()[0][0]
        in_use.kill()
        load.wait_for(100)
        in_use.start()
        load.wait_for(100)
        in_use = store.clients()[0][0]
        in_use.pause()
        load.wait_for(100)
        galera_cluster.heal()
        load.wait_for(100)
    balance = audit(load.entries, rows_everywhere(store))
    store.empty()
    assert balance.is_right, balance


# A COMMIT whose answer was lost.


class Post:
    """Requests that create an item on *engine*, as the service does."""

    def __init__(self, engine: Engine, *, confirm: bool = True) -> None:
        self.registry: scoped_session[Session] = scoped_session(sessionmaker(engine))
        self.calls = 0
        app = text(b"fine", before=self.work)
        self.app = SessionMiddleware(app, self.registry, attempts=5, confirm=confirm)

    def work(self) -> None:
        self.calls += 1
        self.registry.add(Item(name="mine"))

    def send(self) -> bytes:
        return serve_once(self.app, environ("POST")).content


def items(node: Node) -> list[str]:
    """The names of the items, as one server has them."""
    return [name for (name,) in node.execute("SELECT name FROM items ORDER BY id")]


def before_commit(engine: Engine, harm: Callable[[int, int], object]) -> None:
    """Do *harm* right before the next COMMIT, when what is needed to confirm it was taken.

    It is told the process id of the backend, and the transaction's id.
    """

    @event.listens_for(engine, "commit", once=True)
    def commit(connection: Connection) -> None:
        ids = connection.execute(sql("SELECT pg_backend_pid(), pg_current_xact_id()::text")).one()
        harm(ids[0], int(ids[1]))


def own_process(node: Node, name: str) -> int:
    """The id of one of PostgreSQL's own processes."""
    query = f"SELECT pid FROM pg_stat_activity WHERE backend_type = '{name}'"
    [(pid,)] = node.execute(query)
    return int(pid)


def use_up(node: Node, id: int) -> None:
    """Have others write until a transaction of theirs was given this id; it is committed."""
    insert = "INSERT INTO items (name) VALUES ('other') RETURNING pg_current_xact_id()::text"
    while int(node.execute(insert)[0][0]) < id:
        pass
    assert node.execute(f"SELECT pg_xact_status('{id}')") == [("committed",)]


def test_an_id_that_a_crash_gave_to_another_is_not_believed(
    postgresql_node: Node, node_engine: Engine
) -> None:
    """An id that reads committed after a crash may be another's, so the outcome is unknown."""
    post = Post(node_engine)
    writer = own_process(postgresql_node, "walwriter")
    os.kill(writer, signal.SIGSTOP)  # or it might write the log, and so use the id up

    def crash(backend: int, id: int) -> None:
        kill_processes(postgresql_node, [backend, writer])
        use_up(postgresql_node, id)

    before_commit(node_engine, crash)
    with pytest.raises(CommitOutcomeUnknown):
        post.send()
    assert set(items(postgresql_node)) == {"other"}
    assert post.calls == 1


def test_an_id_that_a_promotion_gave_to_another_is_not_believed(
    postgresql_cluster: PostgreSQLCluster, cluster_engine: Engine
) -> None:
    """It is not believed on a promoted replica, even where the last checkpoint is the same."""
    cluster, old = postgresql_cluster, postgresql_cluster.primary
    post = Post(cluster_engine)
    old.execute("CHECKPOINT")
    last = last_checkpoint(old)
    until(lambda: {*map(checkpoint, cluster.replicas)} == {last}, "the checkpoint to arrive")
    old.execute(PAGES)
    os.kill(own_process(old, "walwriter"), signal.SIGSTOP)

    def fail_over(_: int, id: int) -> None:
        old.kill()
        cluster.promote(cluster.freshest())
        use_up(cluster.primary, id)
        assert last_checkpoint(cluster.primary) == last

    before_commit(cluster_engine, fail_over)
    with pytest.raises(CommitOutcomeUnknown):
        post.send()
    assert set(items(cluster.primary)) == {"other"}
    assert post.calls == 1
    cluster.primary.execute("DROP TABLE pages")


# They keep the checkpoint that follows a promotion busy for half a minute.
PAGES = "CREATE TABLE pages AS SELECT repeat('x', 1000) FROM generate_series(1, 2000)"


def checkpoint(node: Node) -> str | None:
    node.execute("CHECKPOINT")
    return last_checkpoint(node)


@contextmanager
def paused(nodes: Sequence[Node]) -> Iterator[None]:
    for node in nodes:
        node.pause()
    try:
        yield
    finally:
        for node in nodes:
            node.resume()


def wait_for_commit(cluster: PostgreSQLCluster) -> list[int]:
    """Wait until a COMMIT waits for a replica; the process ids of the backends that do."""
    waiting: list[int] = []

    def found() -> bool:
        waiting.extend(PostgreSQLStore(lambda: cluster.primary).backends("wait_event = 'SyncRep'"))
        return bool(waiting)

    until(found, "COMMIT to wait for a replica")
    return waiting


def test_a_commit_that_waits_for_a_replica_is_waited_for(
    postgresql_cluster: PostgreSQLCluster, cluster_engine: Engine
) -> None:
    """Nothing is answered before a replica has the work, and nobody cuts the waiting short."""
    cluster = postgresql_cluster
    with ThreadPoolExecutor() as threads:
        with paused(cluster.replicas):
            answer = threads.submit(Post(cluster_engine).send)
            wait_for_commit(cluster)
            assert not answer.done()
        assert answer.result(PATIENCE) == b"fine"
    assert ["mine"] in map(items, cluster.replicas)


@pytest.mark.parametrize("confirm", [True, False])
def test_a_commit_that_was_terminated_while_it_waited(
    confirm: bool, postgresql_cluster: PostgreSQLCluster, cluster_engine: Engine
) -> None:
    """It is a success where that is confirmed, unknown otherwise, and never made again."""
    cluster, post = postgresql_cluster, Post(cluster_engine, confirm=confirm)
    with ThreadPoolExecutor() as threads:
        with paused(cluster.replicas):
            answer = threads.submit(post.send)
            PostgreSQLStore(lambda: cluster.primary).terminate(wait_for_commit(cluster))
        if confirm:
            assert answer.result(PATIENCE) == b"fine"
        else:
            with pytest.raises(CommitOutcomeUnknown):
                answer.result(PATIENCE)
    assert items(cluster.primary) == ["mine"]
    assert post.calls == 1


def test_a_standby_is_not_believed(
    postgresql_cluster: PostgreSQLCluster,
    cluster_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replica that says committed is asked again, until it is promoted."""
    monkeypatch.setattr(confirm, "PATIENCE", PATIENCE)
    cluster = postgresql_cluster
    any_of_them = f"{hosts([cluster.primary, *cluster.replicas])}&connect_timeout=3"
    engine = make_engine(f"postgresql+psycopg://tests@/postgres?{any_of_them}")
    asked: list[str] = []

    @event.listens_for(engine, "after_cursor_execute")
    def note(_1: object, _2: object, statement: str, *_: object) -> None:
        asked.extend(["again"] * ("pg_xact_status" in statement))

    with ThreadPoolExecutor() as threads:
        with paused(cluster.replicas):
            answer = threads.submit(Post(engine).send)
            wait_for_commit(cluster)
            sent = "SELECT bool_and(sent_lsn = pg_current_wal_flush_lsn()) FROM pg_stat_replication"
            until(lambda: cluster.primary.execute(sent) == [(True,)], "the log to be sent")
            cluster.primary.kill()
        until(lambda: list(map(items, cluster.replicas)) == [["mine"]] * 2, "it to be replayed")
        asked.clear()
        until(lambda: len(asked) > 1, "the replica to be asked twice")
        assert not answer.done()
        cluster.promote(cluster.freshest())
        with pytest.raises(CommitOutcomeUnknown):
            answer.result(PATIENCE)
    engine.dispose()
    assert items(cluster.primary) == ["mine"]
