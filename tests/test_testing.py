"""Tests of real requests that leave nothing: what `isolated` promises, on each engine."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote
from wsgiref.validate import validator

import pytest
from sessionscope import (
    SessionMiddleware,
    TransactionDoomed,
    on_commit,
    pytest_plugin,
    session_scope,
    testing,
)
from sessionscope.engines import make_engine, make_reader
from sessionscope.testing import isolated
from sqlalchemy import Connection, Engine, create_engine, delete, insert, inspect, select
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import SingletonThreadPool, StaticPool
from support import PATIENCE, drop_tables, environ, fetch, make_tables, names, serving, text
from webtest import TestApp

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

Registry = scoped_session[Session]

ROOT = Path(testing.__file__).parents[1]


def found(connection: Connection | Session | Registry) -> list[str | None]:
    """The names of the items that *connection* sees."""
    return list(connection.scalars(select(Item.name).order_by(Item.id)))


def item_app(registry: Registry) -> WSGIApplication:
    """POST /<name> adds an item, and answers with the status in the query; GET / tells all."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            registry.add(Item(name=environ["PATH_INFO"][1:]))
        answer = ",".join(map(str, found(registry))).encode()
        start_response(
            unquote(environ["QUERY_STRING"]) or "200 OK", [("Content-Type", "text/plain")]
        )
        return [answer]

    return app


def client_of(registry: Registry, **options: Any) -> TestApp:
    return TestApp(validator(SessionMiddleware(item_app(registry), registry, **options)))


def post_twice(registry: Registry) -> None:
    """A commit that stays and a rollback that does not."""
    client = client_of(registry)
    client.post("/lamp", status=200)
    client.post("/chair?409%20Conflict", status=409)


def run(work: Callable[[], object], registry: Registry, **options: Any) -> None:
    """Have a request do *work* and answer 200."""
    app = SessionMiddleware(text(b"", before=work), registry, **options)
    TestApp(validator(app)).post("/", status=200)


@pytest.fixture
def elsewhere(any_url: str, any_engine: Engine) -> Iterator[Engine]:
    """Other connections to the same database, which see only what is durable."""
    engine = create_engine(any_url)
    yield engine
    engine.dispose()


# A test with a client.


def test_requests_commit_and_roll_back(any_registry: Registry) -> None:
    """What a request commits is there for the next one, and what another rolls back is not."""
    with isolated(any_registry) as connection:
        post_twice(any_registry)
        assert client_of(any_registry).get("/").text == "lamp"
        assert found(connection) == ["lamp"]


def test_nothing_leaves_the_block(any_registry: Registry, elsewhere: Engine) -> None:
    """Another connection sees nothing of it, neither during the block nor after it."""
    with isolated(any_registry):
        post_twice(any_registry)
        assert names(elsewhere) == []
    assert names(elsewhere) == []


def test_a_failing_test_leaves_nothing(any_registry: Registry, elsewhere: Engine) -> None:
    """An exception leaves the block as it is, and all is undone all the same."""
    with pytest.raises(ZeroDivisionError), isolated(any_registry):
        post_twice(any_registry)
        raise ZeroDivisionError
    assert names(elsewhere) == []


def test_a_request_that_raises_is_rolled_back(any_registry: Registry) -> None:
    """An exception of the application takes with it what its request did, and no more."""

    def work() -> None:
        any_registry.add(Item(name="gone"))
        any_registry.flush()
        raise ZeroDivisionError

    with isolated(any_registry) as connection:
        client_of(any_registry).post("/lamp")
        with pytest.raises(ZeroDivisionError):
            run(work, any_registry)
        assert found(connection) == ["lamp"]


def test_a_savepoint_of_the_application(any_registry: Registry) -> None:
    """A savepoint that the application takes and rolls back is one, inside the others."""

    def work() -> None:
        any_registry.add(Item(name="kept"))
        with suppress(ZeroDivisionError), any_registry.begin_nested():
            any_registry.add(Item(name="gone"))
            any_registry.flush()
            raise ZeroDivisionError

    with isolated(any_registry) as connection:
        run(work, any_registry)
        assert found(connection) == ["kept"]


def test_a_stream(any_registry: Registry) -> None:
    """A stream commits at its end, and rolls back where the client hangs up before."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        for name in ("first", "second"):
            any_registry.add(Item(name=name))
            any_registry.flush()
            yield name.encode()

    with isolated(any_registry) as connection:
        wrapped = SessionMiddleware(app, any_registry)
        body: Any = wrapped(environ(), lambda *head: bytearray().extend)
        assert next(iter(body)) == b"first"
        body.close()
        assert found(connection) == []
        assert TestApp(wrapped).get("/").text == "firstsecond"
        assert found(connection) == ["first", "second"]


def test_callbacks_run(any_registry: Registry) -> None:
    """on_commit callbacks run after a request that commits, once, and see its work."""
    seen: list[object] = []

    def work() -> None:
        any_registry.add(Item(name="lamp"))
        on_commit(any_registry, lambda: seen.append(found(any_registry)))

    with isolated(any_registry):
        run(work, any_registry, commit_when=lambda *response: False)
        assert seen == []
        run(work, any_registry)
        assert seen == [["lamp"]]


def test_a_doomed_transaction(any_engine: Engine, any_registry: Registry) -> None:
    """A swallowed error dooms where it dooms in production, and only its own request."""

    def work() -> None:
        any_registry.execute(insert(Item).values(name="chair"))
        with suppress(DBAPIError):
            any_registry.execute(sql("SELECT * FROM there_is_no_such_table"))

    with isolated(any_registry) as connection:
        client_of(any_registry).post("/lamp")
        if any_engine.dialect.name == "postgresql":
            with pytest.raises(TransactionDoomed):
                run(work, any_registry)
            assert found(connection) == ["lamp"]
        else:
            run(work, any_registry)
            assert found(connection) == ["lamp", "chair"]
        client_of(any_registry).post("/table")
    assert names(any_engine) == []


def test_attempts(any_registry: Registry) -> None:
    """A request that failed for now is made again, and the failed attempt leaves nothing."""
    attempts: list[Item] = []

    def work() -> None:
        item = Item(name="chair")
        any_registry.add(item)
        any_registry.flush()
        attempts.append(item)
        if len(attempts) == 1:
            any_registry.connection().execute(delete(Item))
            item.name = "stale"

    with isolated(any_registry) as connection:
        client_of(any_registry).post("/lamp")
        run(work, any_registry, attempts=2)
        assert (len(attempts), found(connection)) == (2, ["lamp", "chair"])


def test_the_reader_is_left_aside(any_registry: Registry, any_url: str) -> None:
    """A middleware with reader= has its safe requests see what the others commit."""
    reader = make_reader(any_url) or make_engine(any_url)
    with isolated(any_registry):
        client = client_of(any_registry, reader=reader)
        client.post("/lamp")
        assert client.get("/").text == "lamp"
    assert reader.pool.checkedout() == 0  # type: ignore[attr-defined]
    reader.dispose()


def test_real_servers(any_registry: Registry, elsewhere: Engine) -> None:
    """Requests to a real server, one after another, are isolated in its threads, too."""
    app = SessionMiddleware(item_app(any_registry), any_registry)
    with serving(app) as port, isolated(any_registry) as connection:
        for name in ("lamp", "chair", "table"):
            assert fetch(port, "POST", f"/{name}").status == 200
        assert fetch(port, "POST", "/gone?404%20Not%20Found").status == 404
        assert fetch(port).content == b"lamp,chair,table"
        assert found(connection) == ["lamp", "chair", "table"]
        assert names(elsewhere) == []
    assert names(elsewhere) == []


def test_threads_take_turns(any_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes while another one is at work waits for the end of that one."""
    monkeypatch.setattr(testing, "PATIENCE", 10 * PATIENCE)
    arrived = threading.Barrier(2)
    order: list[str] = []

    def work() -> None:
        arrived.wait(PATIENCE)
        for name in ("begin", "go on", "end"):
            any_registry.execute(insert(Item).values(name=name))
            order.append(name)

    app = SessionMiddleware(text(b"", before=work), any_registry)
    with serving(app) as port, isolated(any_registry) as connection:
        with ThreadPoolExecutor() as clients:
            answers = [clients.submit(fetch, port, "POST") for _ in range(2)]
        assert [answer.result().status for answer in answers] == [200, 200]
        assert order == found(connection) == ["begin", "go on", "end"] * 2


def test_a_turn_that_does_not_come(
    any_registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A request in another thread fails, and says why, where the test's own session stays open."""
    monkeypatch.setattr(testing, "PATIENCE", 0.0)
    app = SessionMiddleware(item_app(any_registry), any_registry)
    with serving(app) as port, isolated(any_registry) as connection:
        assert found(any_registry) == []
        assert fetch(port, "POST", "/lamp").status == 500
        assert "a session that begins before a request must end before it" in caplog.text
        any_registry.remove()
        assert fetch(port, "POST", "/chair").status == 200
        assert found(connection) == ["chair"]


def test_ids(any_registry: Registry) -> None:
    """Ids are unique in a block; only SQLite starts with the same in the next one."""
    ids: list[list[int]] = []
    for _ in range(2):
        with isolated(any_registry) as connection:
            post_twice(any_registry)
            client_of(any_registry).post("/chair")
            ids.append(list(connection.scalars(select(Item.id).order_by(Item.id))))
    sqlite = connection.dialect.name == "sqlite"
    assert [len(found) for found in ids] == [2, 2]
    assert set(ids[0]).isdisjoint(ids[1]) is not sqlite


def test_confirm(any_registry: Registry) -> None:
    """A middleware with confirm=True finds its COMMIT confirmed by the savepoint."""
    with isolated(any_registry) as connection:
        client_of(any_registry, confirm=True).post("/lamp", status=200)
        assert found(connection) == ["lamp"]


def test_ddl(any_engine: Engine, any_registry: Registry) -> None:
    """A table that a request makes is gone afterwards; on MariaDB the request fails instead."""

    def work() -> None:
        any_registry.execute(sql("CREATE TABLE fresh (id INTEGER)"))

    with isolated(any_registry), ExitStack() as expected:
        if any_engine.dialect.name == "mariadb":
            expected.enter_context(pytest.raises(OperationalError, match="SAVEPOINT"))
        run(work, any_registry)
    left = inspect(any_engine).has_table("fresh")
    with any_engine.begin() as connection:
        connection.execute(sql("DROP TABLE IF EXISTS fresh"))
    assert left is (any_engine.dialect.name == "mariadb")


# The test's own sessions.


def test_rows_for_requests(any_registry: Registry, elsewhere: Engine) -> None:
    """What the test commits through the registry, or does on the connection, requests find."""
    with isolated(any_registry) as connection:
        any_registry.add(Item(name="lamp"))
        any_registry.commit()
        connection.execute(insert(Item).values(name="chair"))
        any_registry.add(Item(name="gone"))
        any_registry.rollback()
        assert client_of(any_registry).get("/").text == "lamp,chair"
    assert names(elsewhere) == []


def test_a_session_scope(any_engine: Engine, any_registry: Registry) -> None:
    """A session_scope commits and rolls back like a request, also inside of one."""

    def work() -> None:
        any_registry.add(Item(name="outer"))
        any_registry.flush()
        with session_scope(any_registry) as session:
            session.add(Item(name="inner"))

    with isolated(any_registry) as connection:
        run(work, any_registry)
        with pytest.raises(ZeroDivisionError), session_scope(any_registry) as session:
            session.add(Item(name="gone"))
            session.flush()
            raise ZeroDivisionError
        assert found(connection) == ["outer", "inner"]
    assert names(any_engine) == []


def test_sessions_of_the_factory(any_registry: Registry, elsewhere: Engine) -> None:
    """Sessions that the sessionmaker makes outside the registry are isolated, too."""
    with isolated(any_registry) as connection:
        with any_registry.session_factory.begin() as session:
            session.add(Item(name="lamp"))
        assert found(connection) == ["lamp"]
    assert names(elsewhere) == []


def test_a_session_left_open(any_registry: Registry, elsewhere: Engine) -> None:
    """Sessions left open at the end are closed, whoever has them, and leave nothing."""
    with isolated(any_registry):
        lamp = Item(name="lamp")
        any_registry.add(lamp)
        any_registry.flush()
        other = any_registry.session_factory()
        other.execute(insert(Item).values(name="chair"))
        client_of(any_registry).post("/table")
    assert lamp not in any_registry()
    assert not other.in_transaction()
    any_registry.remove()
    assert names(elsewhere) == []


def test_a_session_from_before(any_registry: Registry, elsewhere: Engine) -> None:
    """A session that the registry holds before is set aside, untouched, and put back."""
    before = any_registry()
    lamp = Item(name="lamp")
    before.add(lamp)
    with isolated(any_registry):
        assert any_registry() is not before
        client_of(any_registry).post("/chair")
    assert any_registry() is before
    assert lamp in before.new
    before.commit()
    any_registry.remove()
    assert names(elsewhere) == ["lamp"]


def test_a_rollback_that_takes_too_much_warns(any_registry: Registry) -> None:
    """A session that began before a request and is closed after it takes back its commit."""
    with isolated(any_registry) as connection:
        assert found(any_registry) == []
        client_of(any_registry).post("/lamp")
        with any_registry.begin_nested():
            pass  # its own savepoints change nothing of that
        with pytest.warns(UserWarning, match="must end before it"):
            any_registry.remove()
        assert found(connection) == []


def test_a_session_that_takes_nothing_back_does_not_warn(any_registry: Registry) -> None:
    """It ends before a request, or commits after it, or the request did not commit either."""

    def work() -> None:
        with any_registry.begin_nested():
            any_registry.add(Item(name="gone"))

    with isolated(any_registry) as connection:
        assert found(any_registry) == []
        any_registry.remove()
        client_of(any_registry).post("/lamp")
        assert found(any_registry) == ["lamp"]
        client_of(any_registry).post("/chair")
        any_registry.commit()
        assert found(any_registry) == ["lamp", "chair"]
        run(work, any_registry, commit_when=lambda *response: False)
        any_registry.remove()
        assert found(connection) == ["lamp", "chair"]


# What is there afterwards.


def test_the_registry_is_as_it_was(any_registry: Registry, elsewhere: Engine) -> None:
    """After the block the registry makes the sessions that it made before, in its own class."""
    factory = any_registry.session_factory
    before = (factory.class_, dict(factory.kw), any_registry.registry)
    with suppress(ZeroDivisionError), isolated(any_registry):
        any_registry.configure(expire_on_commit=False, info={"of": "the block"})
        raise ZeroDivisionError
    assert (factory.class_, factory.kw, any_registry.registry) == before
    with session_scope(any_registry) as session:
        session.add(Item(name="lamp"))
    assert names(elsewhere) == ["lamp"]


def test_blocks_may_be_nested(any_registry: Registry, elsewhere: Engine) -> None:
    """An inner block undoes its own part, and the outer one goes on as before."""
    with isolated(any_registry) as outer:
        client_of(any_registry).post("/lamp")
        with isolated(any_registry) as inner:
            client_of(any_registry).post("/chair")
            any_registry.add(Item(name="left open"))
            any_registry.flush()
            assert found(inner) == ["lamp", "chair", "left open"]
        assert client_of(any_registry).get("/").text == "lamp"
        client_of(any_registry).post("/table")
        assert found(outer) == ["lamp", "table"]
    assert names(elsewhere) == []


def test_two_registries(any_registry: Registry, sqlite_url: str, tmp_path: Path) -> None:
    """Registries on two databases are isolated side by side."""
    engine = make_engine(f"sqlite:///{tmp_path}/other.db")
    make_tables(engine)
    other: Registry = scoped_session(sessionmaker(engine))
    with isolated(any_registry) as first, isolated(other) as second:
        client_of(any_registry).post("/lamp")
        client_of(other).post("/chair")
        assert (found(first), found(second)) == (["lamp"], ["chair"])
    assert names(engine) == []
    engine.dispose()


def test_a_lost_connection(any_engine: Engine, any_registry: Registry) -> None:
    """A connection that is lost in the block fails the requests, and not the end of it."""
    with isolated(any_registry) as connection:
        client_of(any_registry).post("/lamp")
        connection.invalidate()
        with pytest.raises(Exception, match="reconnect"):
            client_of(any_registry).get("/")
    assert names(any_engine) == []


def test_a_registry_on_a_connection(any_engine: Engine) -> None:
    """Where the registry is bound to a Connection, that one is used, and stays open."""
    with any_engine.connect() as connection:
        registry: Registry = scoped_session(sessionmaker(connection))
        with isolated(registry) as same:
            assert same is connection
            post_twice(registry)
        assert not connection.in_transaction()
        connection.execute(insert(Item).values(name="own"))
        with isolated(registry):
            post_twice(registry)
        assert found(connection) == ["own"]


# The arguments of the sessionmaker stay in force.


def test_options_of_sessions(any_engine: Engine, elsewhere: Engine) -> None:
    """Class, expire_on_commit, info and all else are those of production."""

    class Own(Session):
        pass

    registry = scoped_session(
        sessionmaker(any_engine, class_=Own, expire_on_commit=False, info={"own": 1})
    )
    with isolated(registry):
        session = registry()
        lamp = Item(name="lamp")
        session.add(lamp)
        session.commit()
        assert isinstance(session, Own)
        assert session.info == {"own": 1}
        assert "name" in vars(lamp)
    assert names(elsewhere) == []


@pytest.fixture
def two_engines(tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    first, second = (make_engine(f"sqlite:///{tmp_path}/{name}.db") for name in ("a", "b"))
    for engine in (first, second):
        make_tables(engine)
    yield first, second
    for engine in (first, second):
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        engine.dispose()


def test_binds(two_engines: tuple[Engine, Engine]) -> None:
    """With binds= each table stays in its database, and nothing is left in either."""
    first, second = two_engines
    registry: Registry = scoped_session(sessionmaker(first, binds={Item: second}))
    with isolated(registry) as connection:
        post_twice(registry)
        with session_scope(registry) as session:
            session.execute(sql("INSERT INTO items (name) VALUES ('chair')"))
            assert found(session) == ["lamp"]
        assert found(connection) == ["chair"]
    assert (names(first), names(second)) == ([], [])


def test_binds_alone(two_engines: tuple[Engine, Engine]) -> None:
    """Without a bind the connection is that of the first of binds, and of nothing else."""
    engine, _ = two_engines
    registry: Registry = scoped_session(sessionmaker(binds={Item: engine}))
    with isolated(registry) as connection:
        post_twice(registry)
        assert found(connection) == ["lamp"]
        with pytest.raises(UnboundExecutionError), session_scope(registry) as session:
            session.execute(sql("SELECT 1"))
    assert names(engine) == []


def test_an_own_get_bind(two_engines: tuple[Engine, Engine]) -> None:
    """What a session's own get_bind() chooses is isolated as well."""
    first, second = two_engines

    class Routed(Session):
        def get_bind(self, mapper: Any = None, **options: Any) -> Engine:
            return first if mapper is None else second

    registry: Registry = scoped_session(sessionmaker(class_=Routed))
    with isolated(registry) as connection:
        post_twice(registry)
        assert found(registry) == ["lamp"]
        assert found(connection) == []
    assert (names(first), names(second)) == ([], [])


def test_two_phases(any_engine: Engine, elsewhere: Engine) -> None:
    """A registry with twophase=True, which no savepoint knows, is isolated like another."""
    registry: Registry = scoped_session(sessionmaker(any_engine, twophase=True))
    with isolated(registry):
        post_twice(registry)
        assert client_of(registry).get("/").text == "lamp"
    assert names(elsewhere) == []


def test_own_scopes(any_engine: Engine, elsewhere: Engine) -> None:
    """A registry with a scopefunc keeps it, and what it holds in its scopes."""
    scope = "first"
    registry: Registry = scoped_session(sessionmaker(any_engine), scopefunc=lambda: scope)
    before = registry()
    with isolated(registry):
        here = registry()
        scope = "second"
        assert registry() is not here
        post_twice(registry)
        scope = "first"
        assert registry() is here
    assert registry() is before
    assert names(elsewhere) == []


def test_other_factories_are_refused(engine: Engine) -> None:
    """A registry whose factory is no sessionmaker can't be isolated, and is told so."""
    registry: Any = scoped_session(lambda: Session(engine))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a registry with a sessionmaker"):
        isolated(registry).__enter__()


# SQLite, whose driver begins late.


@pytest.fixture(params=["file", "memory", "static"])
def plain(request: pytest.FixtureRequest, sqlite_url: str) -> Iterator[Engine]:
    """Engines that know nothing of us: on a file and in memory, as create_engine makes them."""
    if request.param == "file":
        engine = create_engine(sqlite_url)
    elif request.param == "memory":
        engine = create_engine("sqlite://")
    else:
        unchecked = {"check_same_thread": False}
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args=unchecked)
    make_tables(engine)
    yield engine
    drop_tables(engine)
    engine.dispose()


def test_sqlite_a_plain_engine(plain: Engine) -> None:
    """Nothing leaks where the driver begins no transaction before the first savepoint."""
    registry: Registry = scoped_session(sessionmaker(plain))
    with isolated(registry):
        assert client_of(registry).get("/").text == ""
        post_twice(registry)
        assert client_of(registry).get("/").text == "lamp"
    assert names(plain) == []


def test_sqlite_the_driver_is_as_it_was(plain: Engine) -> None:
    """The driver's settings are not touched, and it is in no transaction afterwards."""
    registry: Registry = scoped_session(sessionmaker(plain))
    with plain.connect() as connection:
        driver: Any = connection.connection.dbapi_connection
        before = driver.isolation_level
    with isolated(registry):
        post_twice(registry)
    assert (driver.isolation_level, driver.in_transaction) == (before, False)
    with session_scope(registry) as session:
        session.add(Item(name="lamp"))
    assert names(plain) == ["lamp"]


def test_sqlite_a_transaction_that_is_undone(plain: Engine) -> None:
    """Where SQLite undoes its whole transaction, what comes after does not leak."""
    registry: Registry = scoped_session(sessionmaker(plain))

    def work() -> None:
        with suppress(IntegrityError):
            registry.execute(sql("INSERT OR ROLLBACK INTO items (id) VALUES (1), (1)"))

    with isolated(registry):
        client_of(registry).post("/lamp")
        with pytest.raises(TransactionDoomed):
            run(work, registry)
        client_of(registry).post("/chair")
        assert client_of(registry).get("/").text == "chair"
    assert names(plain) == []


def test_sqlite_in_another_thread(plain: Engine) -> None:
    """In another thread a request succeeds where the driver allows it, and fails elsewhere."""
    registry: Registry = scoped_session(sessionmaker(plain))
    allowed = not isinstance(plain.pool, SingletonThreadPool)
    app = SessionMiddleware(item_app(registry), registry)
    with serving(app) as port, isolated(registry) as connection:
        assert fetch(port, "POST", "/lamp").status == (200 if allowed else 500)
        assert found(connection) == (["lamp"] if allowed else [])
    assert names(plain) == []


# pytest.

MYAPP = """
from pathlib import Path

from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import (
    DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker
)
from sessionscope import SessionMiddleware

class Base(DeclarativeBase): ...

class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)

engine = create_engine(f"sqlite:///{Path(__file__).with_name('items.db')}")
Base.metadata.create_all(engine)
Session = scoped_session(sessionmaker(engine))

def app(environ, start_response):
    if environ["REQUEST_METHOD"] == "POST":
        Session.add(Item())
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"%d" % Session.scalar(select(func.count(Item.id)))]

application = SessionMiddleware(app, Session)
"""

FAILING = """
import webtest
from myapp import Session, application
from sqlalchemy import text

def test_that_fails(sessionscope_isolate):
    connection = sessionscope_isolate(Session)
    webtest.TestApp(application).post("/items")
    assert connection.scalar(text("SELECT count(*) FROM items")) == 2
"""


def example(module: ModuleType) -> str:
    """The code in a module's docstring."""
    after = str(module.__doc__).partition("::\n")[2].splitlines()
    code = takewhile(lambda line: line[:1] in ("", " "), after)
    return textwrap.dedent("\n".join(code))


def run_pytest(folder: Path, source: str) -> str:
    """What pytest prints of *source* in a project where the library is installed."""
    (folder / "sessionscope").symlink_to(ROOT)
    (folder / "myapp.py").write_text(MYAPP, "utf-8")
    (folder / "test_myapp.py").write_text(source, "utf-8")
    options = ["-W", "error", "-W", "ignore:'cgi' is deprecated:DeprecationWarning"]
    command = [sys.executable, "-m", "pytest", "-p", "sessionscope.pytest_plugin", *options]
    # Only the plugin that is named, also where it is installed.
    alone = {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "--rootdir", folder, folder / "test_myapp.py"],
        cwd=ROOT,  # where coverage finds what it measures
        env={**os.environ, **alone},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize("module", [testing, pytest_plugin], ids=lambda module: module.__name__)
def test_the_example_of_the_manual(module: ModuleType, tmp_path: Path) -> None:
    """The example in the docstring of each module passes, twice, and leaves no row."""
    code = example(module)
    assert " 2 passed" in run_pytest(
        tmp_path, f"{code}\n{code.replace('def test_', 'def test_2_')}"
    )
    assert rows(tmp_path) == 0


def test_the_fixture(tmp_path: Path) -> None:
    """With the fixture a test that fails, as this one does, leaves nothing either."""
    assert "assert 1 == 2" in run_pytest(tmp_path, FAILING)
    assert rows(tmp_path) == 0


def rows(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "items.db")) as connection:
        (count,) = connection.execute("SELECT count(*) FROM items").fetchone()
        return int(count)
