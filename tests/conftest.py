"""Fixtures: real databases, a registry on each, and the proof that nothing was left open."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TypeVar

import clusters
import databases
import pytest
from sessionscope.engines import make_engine
from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import drop_tables, make_tables

CI = os.environ.get("CI") == "true"
"""CI requires every database server; elsewhere the tests of a missing one are skipped."""


SERVERS = {
    "galera_cluster": "galera",
    "postgresql_cluster": "postgresql-cluster",
    "postgresql_node": "nodes",
    "mariadb_node": "nodes",
    "gunicorn": "gunicorn",
    "sent": "sent",
    "sockets": "sockets",
}
"""Servers that tests pause and kill, or that start for long: one worker runs those of one."""


MODULES = [
    "test_attack.py",
    "test_docs.py",
    "test_examples.py",
    "test_idempotency_kills.py",
    "test_idempotency_servers.py",
    "test_page.py",
    "test_pgbouncer.py",
    "test_servers.py",
    "test_waitress_server.py",
]
"""Modules that prepare once, for long, what all of their tests look at: one worker runs each."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests before pytest-xdist looks at their groups."""
    for item in items:
        if item.path.name in MODULES:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
            continue
        for fixture, group in SERVERS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(group))
                break


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a long test, and the processes that it starts, at full speed: coverage doubles it.

    The others have to cover every line.
    """
    config = os.environ.get("COVERAGE_PROCESS_CONFIG")
    if config is None or item.get_closest_marker("long") is None:
        return (yield)
    tracer, tracer_of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    del os.environ["COVERAGE_PROCESS_CONFIG"]
    try:
        return (yield)
    finally:
        os.environ["COVERAGE_PROCESS_CONFIG"] = config
        threading.settrace(tracer_of_threads)
        sys.settrace(tracer)


@pytest.fixture(autouse=True, scope="module")
def _collections_are_short() -> None:
    """Keep what is there before the tests of a module from the collector."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_is_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have a connection or a file that a test left open found at once, and that test fail."""
    yield
    request.node.funcargs.clear()  # fixtures have closed theirs by now, or never will
    gc.collect()


Server = TypeVar(
    "Server",
    databases.Node,
    databases.PgBouncer,
    clusters.PostgreSQLCluster,
    clusters.GaleraCluster,
)


def running(name: str, server: AbstractContextManager[Server]) -> Iterator[Server]:
    """What a session-scoped fixture does to have *server* run."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(server)
        except databases.Missing as missing:
            if CI:
                raise
            pytest.skip(f"left out, no {name} here: {missing}")


def healthy(server: Server) -> Iterator[Server]:
    """What a fixture does to lend *server* to a test that may pause or kill it."""
    yield server
    server.heal()


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """An empty PostgreSQL database that all tests share; none of them hurts the server."""
    for node in running("PostgreSQL", databases.postgresql()):
        yield node.url


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[str]:
    """An empty MariaDB database that all tests share; none of them hurts the server."""
    for node in running("MariaDB", databases.mariadb()):
        yield node.url


@pytest.fixture(scope="session")
def running_postgresql_node() -> Iterator[databases.Node]:
    yield from running("PostgreSQL", databases.postgresql())


@pytest.fixture
def postgresql_node(running_postgresql_node: databases.Node) -> Iterator[databases.Node]:
    """A PostgreSQL server that the test may pause, stop, kill and start."""
    yield from healthy(running_postgresql_node)


@pytest.fixture(scope="session")
def running_mariadb_node() -> Iterator[databases.Node]:
    yield from running("MariaDB", databases.mariadb())


@pytest.fixture
def mariadb_node(running_mariadb_node: databases.Node) -> Iterator[databases.Node]:
    """A MariaDB server that the test may pause, stop, kill and start."""
    yield from healthy(running_mariadb_node)


@pytest.fixture(scope="session")
def running_postgresql_cluster() -> Iterator[clusters.PostgreSQLCluster]:
    yield from running("PostgreSQL", clusters.postgresql_cluster())


@pytest.fixture
def postgresql_cluster(
    running_postgresql_cluster: clusters.PostgreSQLCluster,
) -> Iterator[clusters.PostgreSQLCluster]:
    """A PostgreSQL primary and two synchronous replicas, to be hurt by the test."""
    yield from healthy(running_postgresql_cluster)


@pytest.fixture(scope="session")
def running_galera_cluster() -> Iterator[clusters.GaleraCluster]:
    yield from running("Galera", clusters.galera_cluster())


@pytest.fixture
def galera_cluster(
    running_galera_cluster: clusters.GaleraCluster,
) -> Iterator[clusters.GaleraCluster]:
    """Three Galera nodes, to be hurt by the test."""
    yield from healthy(running_galera_cluster)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/items.db"


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def any_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, for each engine in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


def engine_at(url: str) -> Iterator[Engine]:
    engine = make_engine(url)
    make_tables(engine)
    yield engine
    left = engine.pool.checkedout()  # type: ignore[attr-defined]
    engine.dispose()
    outside = make_engine(url)
    drop_tables(outside)
    outside.dispose()
    assert left == 0, "a connection was not returned to its pool"


@pytest.fixture
def engine(sqlite_url: str) -> Iterator[Engine]:
    """A SQLite file with the tables; at the end no connection may be out."""
    yield from engine_at(sqlite_url)


@pytest.fixture
def any_engine(any_url: str) -> Iterator[Engine]:
    """The same on each engine in turn."""
    yield from engine_at(any_url)


@pytest.fixture
def postgresql(postgresql_url: str) -> Iterator[Engine]:
    """The same on PostgreSQL."""
    yield from engine_at(postgresql_url)


@pytest.fixture
def mariadb(mariadb_url: str) -> Iterator[Engine]:
    """The same on MariaDB."""
    yield from engine_at(mariadb_url)


@pytest.fixture
def outside(sqlite_url: str, engine: Engine) -> Iterator[Engine]:
    """A second engine on the same file, to see what is durable."""
    second = make_engine(sqlite_url)
    yield second
    second.dispose()


def registry_for(engine: Engine) -> Iterator[scoped_session[Session]]:
    registry = scoped_session(sessionmaker(engine))
    yield registry
    left = registry.registry.has()
    registry.remove()
    assert not left, "a session was left in the registry"


@pytest.fixture
def registry(engine: Engine) -> Iterator[scoped_session[Session]]:
    """A registry on the SQLite file; at the end it must be empty."""
    yield from registry_for(engine)


@pytest.fixture
def any_registry(any_engine: Engine) -> Iterator[scoped_session[Session]]:
    """The same on each engine in turn."""
    yield from registry_for(any_engine)
