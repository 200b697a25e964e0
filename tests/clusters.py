"""Private clusters for the tests: a PostgreSQL primary with two replicas, three Galera nodes.

Each node is a `databases.Node`, to be killed, paused and started.  What takes more than
one node, such as a promotion and the way back from it, is a method of the cluster.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from databases import (
    MariaDB,
    Missing,
    Node,
    Place,
    PostgreSQL,
    execute,
    find,
    place_for,
    postgresql_programs,
    until,
)
from sqlalchemy.exc import SQLAlchemyError

NAMES = ("node1", "node2", "node3")

READY = {"wsrep_local_state_comment": "Synced", "wsrep_cluster_status": "Primary"}
"""Status of a Galera node that answers, in the part of the cluster that has the majority."""


def hosts(nodes: Sequence[Node]) -> str:
    """The query of a URL that names all *nodes*."""
    return "&".join(f"host=127.0.0.1:{node.port}" for node in nodes)


class PostgreSQLCluster:
    """A primary and two replicas; COMMIT waits until one of them has applied it.

    https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION

    :ivar primary: the node that takes writes.
    :ivar replicas: the nodes that follow it; one that a promotion left behind is not among
        them until it is brought back by `rejoin`.
    """

    def __init__(self, programs: Path, place: Place) -> None:
        self.nodes = [
            PostgreSQL(programs, place.room(name), self._settings(name)) for name in NAMES
        ]
        self.primary = self.nodes[0]
        self.replicas: list[PostgreSQL] = []

    @staticmethod
    def _settings(name: str) -> dict[str, str]:
        return {
            "synchronous_commit": "remote_apply",
            "cluster_name": name,  # what a replica calls itself
            "wal_keep_size": "64MB",
            "wal_retrieve_retry_interval": "100ms",
        }

    @property
    def url(self) -> str:
        """All nodes; a connection is one to the primary."""
        return self._url("read-write")

    @property
    def reader_url(self) -> str:
        """All nodes; a connection is one to a replica, as long as there is one."""
        return self._url("prefer-standby")

    def _url(self, attributes: str) -> str:
        options = f"target_session_attrs={attributes}&connect_timeout=3"
        return f"postgresql+psycopg://tests@/postgres?{hosts(self.nodes)}&{options}"

    def start(self) -> None:
        self.primary.initialize()
        self.primary.start()
        self._wait_for_one_of(NAMES)
        for node in self.nodes[1:]:
            self.rejoin(node)

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def freshest(self) -> PostgreSQL:
        """The replica to promote when the primary is gone: it has every acknowledged write.

        COMMIT has waited for one replica only, so the other may have less.
        """
        assert not self.primary.running, "the primary still sends"
        return max(self._awake(), key=self._received)

    def promote(self, node: PostgreSQL) -> None:
        """Make the replica *node* the primary; return when it takes writes.

        The old primary is killed where it still runs: two would take writes.  The other
        replica follows the new primary, and COMMIT waits for it; with no other left it
        waits for nobody.  A replica that is down or paused is left behind.
        """
        self.primary.kill()
        others = [other for other in self._awake() if other is not node]
        ahead = [other for other in others if self._received(other) > self._received(node)]
        self._wait_for_one_of(NAMES if others else (), primary=node)
        node.execute("SELECT pg_promote()")
        until(lambda: not self._in_recovery(node), f"{node} to take writes")
        self.primary, self.replicas = node, []
        for other in others:
            if other in ahead:  # its history is another one
                self.rejoin(other)
            else:
                self._follow(other)

    def rejoin(self, node: PostgreSQL) -> None:
        """Make *node* a replica, of a fresh copy of the primary; return when it streams."""
        assert node is not self.primary
        node.kill()
        shutil.rmtree(node.data, ignore_errors=True)
        options = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        copy = node.programs / "pg_basebackup"
        node.place.run(copy, "-d", self._source(), "-D", node.data, *options)
        node.start()
        self._await_stream(node)
        self._wait_for_one_of(NAMES)

    def heal(self) -> None:
        """Have a primary and two replicas again, whatever was done to them."""
        for node in self.nodes:
            node.resume()
        self.primary.heal()
        for node in self.nodes:
            if node is not self.primary and not self._streams(node):
                self.rejoin(node)

    def _awake(self) -> list[PostgreSQL]:
        return [node for node in self.replicas if node.running and not node.paused]

    def _follow(self, node: PostgreSQL) -> None:
        self._set(node, "primary_conninfo", self._source())
        self._await_stream(node)

    def _source(self) -> str:
        return f"host=127.0.0.1 port={self.primary.port} user=tests"

    def _await_stream(self, node: PostgreSQL) -> None:
        until(lambda: self._streams(node), f"{node} to stream")
        if node not in self.replicas:
            self.replicas.append(node)

    def _streams(self, node: PostgreSQL) -> bool:
        name = node.place.folder.name
        streams = f"application_name = '{name}' AND state = 'streaming'"
        query = f"SELECT 1 FROM pg_stat_replication WHERE {streams}"
        return node.running and bool(self.primary.execute(query))

    def _wait_for_one_of(self, names: Sequence[str], *, primary: PostgreSQL | None = None) -> None:
        """Have COMMIT wait for one replica of these *names*; for nobody if there are none."""
        value = f"ANY 1 ({', '.join(names)})" if names else ""
        primary = primary or self.primary
        self._set(primary, "synchronous_standby_names", value)
        # The checkpointer tells the others; when it has done this, it has done that.
        primary.execute("CHECKPOINT")

    @staticmethod
    def _set(node: PostgreSQL, name: str, value: str) -> None:
        node.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        node.execute("SELECT pg_reload_conf()")
        until(lambda: node.execute(f"SHOW {name}") == [(value,)], f"{node} to reload")

    @staticmethod
    def _in_recovery(node: PostgreSQL) -> bool:
        return node.execute("SELECT pg_is_in_recovery()") == [(True,)]

    @staticmethod
    def _received(node: PostgreSQL) -> int:
        """The position in the log up to which a replica has it, when nothing more comes."""
        streams = "SELECT 1 FROM pg_stat_wal_receiver WHERE status = 'streaming'"
        until(lambda: not node.execute(streams), f"{node} to notice that the primary is gone")
        position = "greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())"
        [(received,)] = node.execute(f"SELECT {position} - '0/0'::pg_lsn")
        return int(received)


@contextmanager
def postgresql_cluster() -> Iterator[PostgreSQLCluster]:
    """Run a PostgreSQL primary and two synchronous streaming replicas."""
    with place_for("postgres") as place:
        cluster = PostgreSQLCluster(postgresql_programs(place.folder), place)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.close()


class GaleraNode(MariaDB):
    """One node of a Galera cluster.

    :param group_port: where the nodes talk with each other.
    :param group_ports: those of all nodes.
    """

    def __init__(self, place: Place, group_port: int, group_ports: Sequence[int]) -> None:
        here = "127.0.0.1"
        provider = {
            "gmcast.listen_addr": f"tcp://{here}:{group_port}",
            "ist.recv_addr": f"{here}:{place.port()}",
            "gcache.size": "16M",
            # A dead node holds the others up for 2 seconds, not for 6.
            "evs.keepalive_period": "PT0.3S",
            "evs.inactive_check_period": "PT0.2S",
            "evs.suspect_timeout": "PT1S",
            "evs.inactive_timeout": "PT3S",
            "evs.install_timeout": "PT3S",
        }
        options = {
            "wsrep-on": "ON",
            "wsrep-provider": galera_library(),
            "wsrep-cluster-name": "tests",
            "wsrep-cluster-address": "gcomm://" + ",".join(f"{here}:{p}" for p in group_ports),
            "wsrep-node-name": place.folder.name,
            "wsrep-node-address": f"{here}:{group_port}",
            "wsrep-sst-method": "rsync",
            "wsrep-sst-receive-address": f"{here}:{place.port()}",
            "wsrep-provider-options": ";".join(f"{k}={v}" for k, v in provider.items()),
            "binlog-format": "ROW",
            "innodb-autoinc-lock-mode": "2",
        }
        super().__init__(place, [f"--{name}={value}" for name, value in options.items()])

    def bootstrap(self) -> None:
        """Start as the first node of a new cluster, with the data that is here."""
        self.launch([*self.command, "--wsrep-new-cluster"])
        self.wait_until_ready()

    def is_ready(self) -> bool:
        return READY.items() <= self.status().items()

    def status(self) -> dict[str, str]:
        """What it says of itself and the cluster, or nothing while it answers nobody.

        https://mariadb.com/kb/en/galera-cluster-status-variables/
        """
        try:
            return dict(execute(f"{self.server_url}/mysql", "SHOW STATUS LIKE 'wsrep%'"))
        except SQLAlchemyError:
            return {}

    def forget_cluster(self) -> None:
        """Forget which cluster this was, so that the next one is another or a new one."""
        for name in ("grastate.dat", "gvwstate.dat"):
            (self.data / name).unlink(missing_ok=True)


def galera_library() -> Path:
    for library in Path("/usr").glob("lib*/galera*/libgalera_smm.so"):
        return library
    raise Missing("Galera's library libgalera_smm.so is not installed")


class GaleraCluster:
    """Three nodes that all take writes; a state transfer is a copy by rsync.

    https://mariadb.com/kb/en/galera-cluster/
    """

    def __init__(self, place: Place) -> None:
        find("rsync")  # the script of the state transfer needs both
        find("ss")
        ports = {name: place.port() for name in NAMES}
        self.nodes = [
            GaleraNode(place.room(name), port, [*ports.values()]) for name, port in ports.items()
        ]

    @property
    def url(self) -> str:
        """All nodes; a connection is one to any of them."""
        return f"mariadb+pymysql://root@/tests?{hosts(self.nodes)}"

    def start(self) -> None:
        self.nodes[0].initialize()
        self.nodes[0].bootstrap()
        self.nodes[0].create_database()
        for node in self.nodes[1:]:
            node.place.make("data")
            node.start()

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def heal(self) -> None:
        """Have three nodes in one cluster again, whatever was done to them."""
        for node in self.nodes:
            node.resume()
        if not self._has_majority():
            self._restart()
        for node in self.nodes:
            if not node.running:
                node.start()
        self.settle()

    def settle(self) -> None:
        """Wait until the nodes that run are one cluster, and all of them know that.

        For a moment they believe that a node that was killed is still there, and that one that
        was paused has missed nothing; a statement fails when they find out during it.
        """
        until(self._is_settled, "the nodes that run to be one cluster")

    def _is_settled(self) -> bool:
        running = [node for node in self.nodes if node.running]
        whole = {**READY, "wsrep_cluster_size": str(len(running))}
        with suppress(SQLAlchemyError):
            for node in running:  # all have to answer to what one writes, or are found out
                node.execute("CREATE DATABASE IF NOT EXISTS settled")
            return all(whole.items() <= node.status().items() for node in running)
        return False

    def _has_majority(self) -> bool:
        running = [node for node in self.nodes if node.running]
        if len(running) < 2:  # it may not know yet that it is alone
            return False
        try:
            until(lambda: any(node.is_ready() for node in running), "a majority", seconds=30)
        except TimeoutError:
            return False
        return True

    def _restart(self) -> None:
        """Start a new cluster with the data of a node that runs, if there is one."""
        first = next((node for node in self.nodes if node.running), self.nodes[0])
        for node in self.nodes:
            node.kill()
            node.forget_cluster()
        first.bootstrap()


@contextmanager
def galera_cluster() -> Iterator[GaleraCluster]:
    """Run a Galera cluster of three nodes with an empty database."""
    with place_for("mysql") as place:
        cluster = GaleraCluster(place)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.close()
