"""The ledger, on each engine: the service under load while everything beneath it fails.

What it finds is printed.  Another and longer run is
``LEDGER_SEED=7 LEDGER_SECONDS=300 pytest tests/test_ledger.py``.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
from clusters import GaleraCluster, PostgreSQLCluster
from databases import INNODB_PAUSE, Node, until
from ledger import (
    KEYED,
    THREADS,
    Entry,
    Faults,
    Load,
    MariaDBStore,
    PostgreSQLStore,
    Service,
    SQLiteStore,
    Store,
    audit,
    kill_processes,
    play,
    rows_everywhere,
    use_all_connections,
)
from links import Cut, Link, linked

pytestmark = pytest.mark.long

SEED = int(os.environ.get("LEDGER_SEED", "1"))

USUAL = {"200", "503 Retry-After", "503 Commit-Outcome", "cut off", "no connection"}
"""What a client without a key may be told."""

Keep = Callable[..., None]


def in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {counts[name]}" for name in sorted(counts))


@pytest.fixture
def keep(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Keep:
    """Keep a ledger of *service* while there are *faults*, and print what it comes to.

    Fails where the books are wrong, where the service answers anything but 200 and 503, where
    a client with a key is left without its answer, and where anything stays open in *store*.
    """

    def keep(service: Service, store: Store, faults: Faults, seconds: float) -> None:
        seconds = float(os.environ.get("LEDGER_SECONDS", seconds))
        began = time.monotonic()
        with service:
            with Load(service.port, keyed=KEYED) as load:
                injected = play(load, faults, SEED, seconds)
            took, entries = time.monotonic() - began, load.entries
            entries += leave_nothing_open(service, store)
        rows = rows_everywhere(store)
        once = {entry.name for entry in load.keyed_entries}
        balance = audit(entries, [row for row in rows if row[1] not in once])
        keyed = audit(load.keyed_entries, [row for row in rows if row[1] in once])
        answers = Counter(entry.answer for entry in entries)
        repeated = sum(load.answers.values(), Counter[str]())
        with capsys.disabled():
            print(
                f"\n{request.node.name}, seed {SEED}, {took:.0f} s: {balance}; "
                f"answers: {in_words(answers)}; faults: {in_words(injected)}"
                f"\nwith keys: {keyed}; answers: {in_words(repeated)}"
            )
        assert balance.is_right, balance
        assert answers.keys() <= USUAL
        assert keyed.is_right, keyed
        assert (keyed.refused, keyed.unknown) == (0, 0)
        of_keys = {"200 replayed", "409 Retry-After", "503 Commit-Outcome Retry-After"}
        assert repeated.keys() <= {*USUAL, *of_keys}
        assert store.keys() == (len(once), len(once))

    return keep


def leave_nothing_open(service: Service, store: Store) -> list[Entry]:
    """Find the service able to use all its connections, and to let go of them."""
    entries = []
    if not isinstance(store, SQLiteStore):
        entries = use_all_connections(service.port, store)
    until(lambda: not store.open_work(), "all transactions to be over", pause=INNODB_PAUSE)
    until(lambda: store.connections() <= THREADS, "abandoned connections to be closed")
    assert service.stop() == 0
    until(lambda: not store.connections(), "all connections to be closed")
    return entries


def restart(server: Node) -> None:
    server.stop()
    server.start()


def crash(server: Node) -> None:
    server.kill()
    server.start()


def stall(server: Node, chance: random.Random) -> None:
    server.pause()
    time.sleep(chance.uniform(0.1, 1))
    server.resume()


def cut_off(link: Link) -> Faults:
    """What can befall a COMMIT on its way, and its answer on the way back."""

    def cut(when: Cut) -> Callable[[random.Random], None]:
        def do(chance: random.Random) -> None:
            link.cut = when
            time.sleep(chance.uniform(0.1, 0.3))
            link.cut = None

        return do

    return {f"COMMIT cut off {when}": cut(when) for when in get_args(Cut)}


def test_sqlite(tmp_path: Path, keep: Keep) -> None:
    """On SQLite the books are right while the service is killed and others lock the file."""
    store = SQLiteStore(tmp_path / "items.db")
    service = Service("--database-url", f"sqlite:///{store.path}")

    def lock(chance: random.Random) -> None:
        with closing(sqlite3.connect(store.path, timeout=60, isolation_level=None)) as rival:
            rival.execute("BEGIN IMMEDIATE")
            time.sleep(chance.uniform(0.1, 1))

    faults = {
        "service killed": lambda _: service.kill(),
        "service paused": lambda chance: service.pause(chance.uniform(0.1, 1)),
        "file locked": lock,
    }
    keep(service, store, faults, seconds=10)


def postgresql_faults(store: PostgreSQLStore) -> Faults:
    """What can befall a primary."""

    def terminate(chance: random.Random) -> None:
        for _ in range(20):
            backends = store.backends()
            store.terminate(chance.sample(backends, min(2, len(backends))))

    return {
        "backends terminated": terminate,
        "backends killed": lambda _: kill_processes(store.primary(), store.backends()),
        "server stopped": lambda _: restart(store.primary()),
        "server killed": lambda _: crash(store.primary()),
        "server paused": lambda chance: stall(store.primary(), chance),
    }


def test_postgresql(postgresql_node: Node, keep: Keep) -> None:
    """On PostgreSQL the books are right while server, backends and network fail."""
    store = PostgreSQLStore(lambda: postgresql_node)
    store.empty()
    with linked(postgresql_node.url) as link:
        service = Service("--database-url", link.url.render_as_string(hide_password=False))
        faults = {
            **postgresql_faults(store),
            **cut_off(link),
            "service killed": lambda _: service.kill(),
        }
        keep(service, store, faults, seconds=20)
    store.empty()


def cluster_faults(cluster: PostgreSQLCluster, store: PostgreSQLStore) -> Faults:
    """What can befall a primary and its replicas."""
    waits = "wait_event = 'SyncRep'"

    def pause_replicas() -> None:
        for replica in cluster.replicas:
            replica.pause()
        until(lambda: bool(store.backends(waits)), "COMMIT to wait for a replica")

    def resume_replicas() -> None:
        for replica in cluster.replicas:
            replica.resume()

    def terminate_waiting(_: random.Random) -> None:
        pause_replicas()
        store.terminate(store.backends(waits))
        [(written,)] = cluster.primary.execute("SELECT pg_current_wal_lsn()")
        resume_replicas()
        behind = f"SELECT 1 FROM pg_stat_replication WHERE replay_lsn < '{written}'"
        until(lambda: not cluster.primary.execute(behind), "the replicas to catch up")

    def fail_over(_: random.Random) -> None:
        old = cluster.primary
        old.kill()
        cluster.promote(cluster.freshest())
        cluster.rejoin(old)

    def fail_over_while_waiting(chance: random.Random) -> None:
        pause_replicas()
        cluster.primary.kill()
        resume_replicas()
        fail_over(chance)

    def lose_replica(chance: random.Random) -> None:
        chance.choice(cluster.replicas).kill()
        cluster.heal()

    return {
        "waiting backends terminated": terminate_waiting,
        "primary killed": fail_over,
        "primary killed in COMMIT": fail_over_while_waiting,
        "replica killed": lose_replica,
    }


def test_postgresql_cluster(postgresql_cluster: PostgreSQLCluster, keep: Keep) -> None:
    """With replicas the books are right while any of the servers fail, and are promoted."""
    cluster = postgresql_cluster
    store = PostgreSQLStore(lambda: cluster.primary)
    store.empty()
    service = Service("--database-url", cluster.url, "--reader-url", cluster.reader_url)
    faults = {
        **postgresql_faults(store),
        **cluster_faults(cluster, store),
        "service killed": lambda _: service.kill(),
    }
    keep(service, store, faults, seconds=20)
    store.empty()


def mariadb_faults(store: MariaDBStore) -> Faults:
    """What can befall a MariaDB server, or any node of a cluster."""
    nodes = store.nodes

    def kill_connections(chance: random.Random) -> None:
        for _ in range(5):
            clients = store.clients()
            store.terminate(chance.sample(clients, min(2, len(clients))))

    return {
        "connections killed": kill_connections,
        "server stopped": lambda chance: restart(chance.choice(nodes)),
        "server killed": lambda chance: crash(chance.choice(nodes)),
        "server paused": lambda chance: stall(chance.choice(nodes), chance),
    }


def test_mariadb(mariadb_node: Node, keep: Keep) -> None:
    """On MariaDB the books are right while server, connections and network fail."""
    store = MariaDBStore(mariadb_node)
    store.empty()
    with linked(mariadb_node.url) as link:
        service = Service("--database-url", link.url.render_as_string(hide_password=False))
        faults = {
            **mariadb_faults(store),
            **cut_off(link),
            "service killed": lambda _: service.kill(),
        }
        keep(service, store, faults, seconds=20)
    store.empty()


def test_galera(galera_cluster: GaleraCluster, keep: Keep) -> None:
    """On Galera the books are right on all nodes while any of them fail and are cut off."""
    nodes = galera_cluster.nodes
    store = MariaDBStore(*nodes)
    store.empty()
    service = Service("--database-url", f"{galera_cluster.url}&read_timeout=4&connect_timeout=2")

    def isolate(chance: random.Random) -> None:
        node, other = chance.sample(nodes, 2)
        node.pause()
        until(lambda: other.execute(SIZE)[0][1] == "2", "the others to go on without it")

    def healed(fault: Callable[[random.Random], object]) -> Callable[[random.Random], None]:
        def do(chance: random.Random) -> None:
            fault(chance)
            galera_cluster.heal()  # or the next would be one too many

        return do

    harm = {**mariadb_faults(store), "node cut off": isolate}
    faults = {kind: healed(fault) for kind, fault in harm.items()}
    faults["service killed"] = lambda _: service.kill()
    keep(service, store, faults, seconds=20)
    store.empty()


SIZE = "SHOW STATUS LIKE 'wsrep_cluster_size'"


def test_the_audit() -> None:
    """The audit finds what was lost, changed, doubled, stored though refused, or invented."""
    entries = [
        Entry("kept", "acknowledged", "200", 1),
        Entry("lost", "acknowledged", "200", 2),
        Entry("moved", "acknowledged", "200", 3),
        Entry("twice", "acknowledged", "200", 5),
        Entry("refused", "refused", "503"),
        Entry("stored", "refused", "503"),
        Entry("perhaps", "unknown", "cut off"),
        Entry("perhaps not", "unknown", "cut off"),
    ]
    names = ["kept", "moved", "twice", "twice", "stored", "perhaps", "invented"]
    rows = [(1 if name == "kept" else number, name) for number, name in enumerate(names, 3)]
    balance = audit(entries, rows)
    assert [entry.name for entry in balance.lost] == ["lost", "moved"]
    assert balance.doubled == ["twice"]
    assert [entry.name for entry in balance.refused_but_stored] == ["stored"]
    assert balance.invented == ["invented"]
    assert (balance.acknowledged, balance.refused) == (4, 2)
    assert (balance.unknown, balance.unknown_but_stored) == (2, 1)
    assert not balance.is_right
    assert audit(entries[:1], rows[:1]).is_right
