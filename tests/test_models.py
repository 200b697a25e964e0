"""What the engines promise: real transactions on each database, and a reader beside the writer."""

from __future__ import annotations

import re
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import databases
import pytest
from databases import until_one_waits
from processes import run_python
from sessionscope import SessionMiddleware, engines
from sessionscope.databases import is_unavailable
from sessionscope.engines import make_engine, make_reader
from sqlalchemy import Connection, Engine, event, func, insert, inspect, make_url, select, update
from sqlalchemy import text as sql
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, TimeoutError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import PATIENCE, environ, names, serve_once, text

import models
from models import Item
from web.database import WrongTable, check_tables, create_tables, make_probe

Registry = scoped_session[Session]


@contextmanager
def engine_for(url: str, make: Callable[..., Engine | None] = make_engine) -> Iterator[Engine]:
    engine = make(url)
    assert engine is not None
    yield engine
    engine.dispose()


@pytest.fixture
def reader(sqlite_url: str, engine: Engine) -> Iterator[Engine]:
    """The reader beside the writer *engine*."""
    with engine_for(sqlite_url, make_reader) as made:
        yield made


def item(name: str) -> Any:
    return insert(Item).values(name=name)


def tell_when_it_begins(engine: Engine, statement: str) -> threading.Event:
    """An event that is set when a connection of *engine* sends *statement*."""
    sent = threading.Event()

    def trace(seen: str) -> None:
        if seen.startswith(statement):
            sent.set()

    @event.listens_for(engine, "connect", insert=True)
    def watch(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.set_trace_callback(trace)

    return sent


# URLs.


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgresql://host/db", "psycopg"),
        ("postgresql+psycopg://host/db", "psycopg"),
        ("mysql://host/db", "pymysql"),
        ("mariadb://host/db", "pymysql"),
        ("mysql+pymysql://host/db", "pymysql"),
        ("sqlite:///items.db", "pysqlite"),
    ],
)
def test_a_url_needs_no_driver(url: str, driver: str) -> None:
    """PostgreSQL means psycopg 3, MySQL and MariaDB mean PyMySQL."""
    with engine_for(url) as engine:
        assert engine.dialect.driver == driver


@pytest.mark.parametrize("make", [make_engine, make_reader])
def test_what_is_no_url_is_refused(make: Callable[[str], Engine | None]) -> None:
    """A text that is no URL is an ArgumentError."""
    with pytest.raises(ArgumentError):
        make("items.db")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:items?mode=memory&cache=shared&uri=true",
        "sqlite:///file::memory:?uri=true",
    ],
)
def test_memory_has_no_reader(url: str) -> None:
    """A database in memory belongs to one connection, which serves everything."""
    assert make_reader(url) is None


# SQLite in a file.


@pytest.mark.parametrize(
    ("setting", "value"),
    [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("busy_timeout", 10_000)],
)
@pytest.mark.parametrize("which", ["engine", "reader"])
def test_settings_of_sqlite(
    setting: str, value: object, which: str, request: pytest.FixtureRequest
) -> None:
    """Both engines use WAL, flush at each COMMIT, check foreign keys and wait for a lock."""
    with request.getfixturevalue(which).connect() as connection:
        assert connection.scalar(sql(f"PRAGMA {setting}")) == value


def test_a_second_writer_is_stopped_at_begin(
    engine: Engine, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction takes the write lock before its first statement."""
    monkeypatch.setattr(engines, "BUSY_TIMEOUT", 0)
    with engine_for(sqlite_url) as second, second.connect() as connection:
        with engine.begin(), pytest.raises(OperationalError, match="database is locked") as caught:
            connection.begin()
        assert caught.value.statement is None


def test_a_second_writer_waits_its_turn(engine: Engine, sqlite_url: str) -> None:
    """A transaction that begins during another one waits, and then sees what that one wrote."""
    with engine_for(sqlite_url) as second, ThreadPoolExecutor() as threads:
        waiting = tell_when_it_begins(second, "BEGIN IMMEDIATE")
        with engine.begin() as connection:
            connection.execute(item("first"))
            seen = threads.submit(names, second)
            assert waiting.wait(PATIENCE)
        assert seen.result(PATIENCE) == ["first"]


def test_a_process_writes_on_one_connection(sqlite_url: str) -> None:
    """Threads that write wait for their process's one writer, however many there may be."""
    engine = make_engine(sqlite_url, pool_size=8)
    assert engine.pool.size() == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("which", ["engine", "reader"])
def test_a_select_is_in_the_transaction(which: str, request: pytest.FixtureRequest) -> None:
    """A transaction that only reads is one for the database too."""
    with request.getfixturevalue(which).connect() as connection:
        connection.execute(select(Item))
        assert connection.connection.dbapi_connection.in_transaction


def test_ddl_is_in_the_transaction(engine: Engine) -> None:
    """A table made in a transaction goes with its rollback."""
    with engine.connect() as connection:
        connection.execute(sql("CREATE TABLE brief (id INTEGER)"))
        connection.rollback()
    assert not inspect(engine).has_table("brief")


def test_a_reader_waits_for_no_writer(engine: Engine, reader: Engine) -> None:
    """During a transaction that writes, readers see what was there before it."""
    with engine.begin() as connection:
        connection.execute(item("soon"))
        assert names(reader) == []
    assert names(reader) == ["soon"]


def test_a_writer_waits_for_no_reader(engine: Engine, reader: Engine) -> None:
    """A writer commits while a reader is in a transaction, which goes on seeing one state."""
    with reader.connect() as connection:
        count = select(func.count()).select_from(Item)
        assert connection.scalar(count) == 0
        with engine.begin() as writer:
            writer.execute(item("new"))
        assert connection.scalar(count) == 0


def test_a_reader_cannot_write(reader: Engine) -> None:
    """The database refuses what a reader tries to write."""
    with (
        reader.connect() as connection,
        pytest.raises(OperationalError, match="attempt to write a readonly database"),
    ):
        connection.execute(item("gone"))


def test_a_fresh_file_is_opened_by_many(sqlite_url: str, tmp_path: Path) -> None:
    """Where another one writes to a file that is not in WAL yet, the first connection waits."""
    with engine_for(sqlite_url) as engine, ThreadPoolExecutor() as threads:
        waiting = tell_when_it_begins(engine, "BEGIN EXCLUSIVE")
        other = sqlite3.connect(tmp_path / "items.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        connecting = threads.submit(engine.connect)
        connecting.add_done_callback(lambda _: waiting.set())
        assert waiting.wait(PATIENCE)
        other.execute("COMMIT")
        other.close()
        with connecting.result(PATIENCE) as connection:
            assert connection.scalar(sql("PRAGMA journal_mode")) == "wal"


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A file that would have to be turned to WAL, but may only be read, is an error."""
    (tmp_path / "items.db").touch()
    url = f"sqlite:///file:{tmp_path}/items.db?mode=ro&uri=true"
    with (
        engine_for(url) as engine,
        pytest.raises(OperationalError, match="attempt to write a readonly database"),
    ):
        engine.connect()


# SQLite in memory.


def test_threads_take_turns_in_memory() -> None:
    """Many threads share the one database in memory, one transaction at a time."""
    with engine_for("sqlite://") as engine, ThreadPoolExecutor(8) as threads:
        create_tables(engine)
        together = threading.Barrier(8)

        def read_then_write(_: int) -> None:
            together.wait(PATIENCE)
            with Session(engine) as session, session.begin():
                count = session.scalar(select(func.count()).select_from(Item))
                session.add(Item(name=str(count)))

        assert list(threads.map(read_then_write, range(8))) == [None] * 8
        assert names(engine) == [str(number) for number in range(8)]


# PostgreSQL and MariaDB.


def test_mariadb_refuses_a_lost_update(mariadb_url: str) -> None:
    """A row that another one changed since it was read cannot be overwritten (error 1020)."""
    with engine_for(mariadb_url) as engine:
        create_tables(engine)
        try:
            with engine.begin() as connection:
                connection.execute(item("old"))
            with engine.connect() as late, engine.connect() as early:
                assert late.scalar(sql("SELECT @@innodb_snapshot_isolation")) == 1
                assert late.scalar(select(Item.name)) == "old"
                early.execute(update(Item).values(name="new"))
                early.commit()
                with pytest.raises(OperationalError, match="1020"):
                    late.execute(update(Item).values(name="lost"))
            assert names(engine) == ["new"]
        finally:
            models.Base.metadata.drop_all(engine)


def test_mariadb_stores_any_text(mariadb_url: str) -> None:
    """Names are Unicode also in a database whose character set is not."""
    url = mariadb_url.removesuffix("/tests")
    databases.execute(f"{url}/mysql", "CREATE DATABASE latin CHARACTER SET latin1")
    with engine_for(f"{url}/latin") as engine:
        create_tables(engine)
        with engine.begin() as connection:
            connection.execute(item("\U0001f600" * 16))
        assert names(engine) == ["\U0001f600" * 16]
    databases.execute(f"{url}/mysql", "DROP DATABASE latin")


# Servers.


@pytest.fixture(params=["postgresql", "mariadb"])
def server_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a database server that has the tables."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    with engine_for(url) as engine:
        create_tables(engine)
        yield url
        models.Base.metadata.drop_all(engine)


def test_the_reader_of_a_server_cannot_write(server_url: str) -> None:
    """The database refuses what a reader tries to write, and keeps nothing of it."""
    with engine_for(server_url, make_reader) as reader, engine_for(server_url) as writer:
        with reader.connect() as connection, pytest.raises(DBAPIError, match=r"(?i)read.only"):
            connection.execute(item("no"))
        assert names(writer) == []


def test_a_reader_sees_each_commit_at_once(server_url: str) -> None:
    """Each statement of a server's reader is a transaction, and sees what is durable by then."""
    with (
        engine_for(server_url, make_reader) as reader,
        engine_for(server_url) as writer,
        reader.connect() as connection,
    ):
        assert connection.scalar(select(func.count(Item.id))) == 0
        with writer.begin() as other:
            other.execute(item("new"))
        assert connection.scalar(select(func.count(Item.id))) == 1


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://x@{}/x?connect_timeout=2",
        "mysql://x@{}/x?connect_timeout=1&read_timeout=1",
        "mariadb://x@/x?host={}&connect_timeout=1&read_timeout=1",
    ],
)
def test_a_server_that_says_nothing_is_given_up(url: str) -> None:
    """One that accepts a connection and then keeps silent costs a thread seconds, not its life."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with engine_for(url.format(address)) as engine, pytest.raises(OperationalError):
            engine.connect()


def test_mariadb_tries_one_host_after_the_other(mariadb_url: str) -> None:
    """Of several hosts in a URL the first that serves is used."""
    url = make_url(mariadb_url)
    several = f"mariadb://root@/tests?host=127.0.0.1:1&host=127.0.0.1:{url.port}"
    with engine_for(several) as engine, engine.connect() as connection:
        assert connection.scalar(sql("SELECT @@port")) == url.port


def test_mariadb_tells_the_last_host_that_failed() -> None:
    """Where no host serves, the error is the last one's."""
    with (
        engine_for("mariadb://root@/x?host=127.0.0.1:1&host=127.0.0.1:2") as engine,
        pytest.raises(OperationalError, match="refused"),
    ):
        engine.connect()


# Whether the database can serve.


@pytest.mark.parametrize(
    "url",
    ["postgresql://x@127.0.0.1:1/x", "mariadb://x@127.0.0.1:1/x", "sqlite:////no/such/folder/x"],
)
def test_a_database_that_is_not_there_is_unavailable(url: str) -> None:
    """A server that refuses connections, or a file that cannot be opened."""
    with engine_for(url) as engine, pytest.raises(OperationalError) as caught:
        engine.connect()
    assert is_unavailable(caught.value)


def test_a_pool_without_a_connection_is_unavailable(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is one whose connections are all in use for longer than one may wait."""
    monkeypatch.setattr(engines, "POOL_TIMEOUT", 0.01)
    with engine_for(sqlite_url) as engine, engine.connect(), pytest.raises(TimeoutError) as caught:
        engine.connect()
    assert is_unavailable(caught.value)


def test_a_locked_database_is_unavailable(
    engine: Engine, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is a database that another one keeps locked."""
    monkeypatch.setattr(engines, "BUSY_TIMEOUT", 0)
    with engine.begin(), engine_for(sqlite_url) as second, pytest.raises(DBAPIError) as caught:
        second.connect().begin()
    assert is_unavailable(caught.value)


def test_a_session_that_was_ended_is_unavailable(postgresql_url: str) -> None:
    """So is a server whose operator ends a session."""
    ended = sql("SELECT pg_terminate_backend(pg_backend_pid())")
    with engine_for(postgresql_url) as engine, pytest.raises(DBAPIError) as caught:
        engine.connect().execute(ended)
    assert is_unavailable(caught.value)


def test_a_mistake_is_not_unavailable(any_engine: Engine) -> None:
    """SQL that is wrong, a constraint and an error of Python's will not be better later."""
    with any_engine.connect() as connection:
        for statement in ("SELECT nothing", "INSERT INTO items (id) VALUES (1), (1)"):
            with pytest.raises(DBAPIError) as caught:
                connection.execute(sql(statement))
            assert not is_unavailable(caught.value)
            connection.rollback()
    assert not is_unavailable(ValueError())


def test_a_probe_of_what_serves_is_silent(any_engine: Engine, any_url: str) -> None:
    """A probe returns as long as items can be read and written, and leaves none."""
    probe = make_probe(make_url(any_url), make_url(any_url))
    for _ in range(2):
        probe()
    make_probe(make_url("sqlite://"))()
    assert names(any_engine) == []


def test_a_probe_uses_no_id(any_engine: Engine, any_url: str) -> None:
    """The item that is created after a probe has the id that it would have had without."""
    make_probe(make_url(any_url))()
    with any_engine.begin() as connection:
        assert connection.execute(item("first")).inserted_primary_key == (1,)


def test_a_probe_waits_for_no_writer(engine: Engine, sqlite_url: str) -> None:
    """While another one writes to a SQLite file, a probe returns all the same."""
    with engine.begin() as connection:
        connection.execute(item("new"))
        make_probe(make_url(sqlite_url))()


def test_a_probe_tells_what_is_wrong(tmp_path: Path) -> None:
    """A probe raises where the table, the file or the server is not there."""
    for url in (f"sqlite:///{tmp_path}/empty.db", "postgresql://x@127.0.0.1:1/x"):
        with pytest.raises(OperationalError):
            make_probe(make_url(url))()


def test_a_probe_reads_where_requests_read(engine: Engine, sqlite_url: str) -> None:
    """A probe raises where the reader is not there, although items can be written."""
    reader = make_url("postgresql://x@127.0.0.1:1/x")
    with pytest.raises(OperationalError):
        make_probe(make_url(sqlite_url), reader)()


def test_a_table_without_a_column_is_not_ready(any_engine: Engine, any_url: str) -> None:
    """A probe raises where the table lacks a column that the service uses."""
    with any_engine.begin() as connection:
        connection.execute(sql("DROP INDEX ix_items_name" + ON.get(any_engine.dialect.name, "")))
        connection.execute(sql("ALTER TABLE items DROP COLUMN name"))
    with pytest.raises(DBAPIError):
        make_probe(make_url(any_url))()


ON = {"mariadb": " ON items"}


@pytest.mark.parametrize("any_url", ["postgresql"], indirect=True)
def test_a_server_that_only_reads_is_not_ready(any_engine: Engine, any_url: str) -> None:
    """A probe raises where the server takes no writes, although items can be read."""
    with any_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sql("ALTER DATABASE postgres SET default_transaction_read_only = on"))
        try:
            with pytest.raises(DBAPIError, match="read-only"):
                make_probe(make_url(any_url))()
        finally:
            connection.execute(sql("ALTER DATABASE postgres RESET default_transaction_read_only"))
    make_probe(make_url(any_url))()


FULL = """
import resource, signal, sys
from sqlalchemy import make_url
from web.database import make_probe

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
probe = make_probe(make_url(sys.argv[1]))
probe()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
try:
    probe()
except Exception as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
"""


def test_a_full_disk_is_not_ready(engine: Engine, sqlite_url: str) -> None:
    """A probe raises where the file cannot grow, although items can be read."""
    done = run_python("-c", FULL, sqlite_url)
    assert (done.stdout, done.stderr) == ("OperationalError\n", "")


# Tables.


def test_tables_are_made_once(any_url: str) -> None:
    """Making the tables again changes nothing of what they hold."""
    with engine_for(any_url) as engine:
        try:
            create_tables(engine)
            with engine.begin() as connection:
                connection.execute(item("kept"))
            create_tables(engine)
            assert names(engine) == ["kept"]
        finally:
            models.Base.metadata.drop_all(engine)


def test_postgresql_makes_tables_once(postgresql_url: str) -> None:
    """Who makes the tables while another one is just about to commit them waits, and succeeds."""
    made, waited = threading.Event(), threading.Event()
    with (
        engine_for(postgresql_url) as first,
        engine_for(postgresql_url) as second,
        ThreadPoolExecutor() as threads,
    ):

        @event.listens_for(first, "commit")
        def hold(connection: Connection) -> None:
            made.set()
            assert waited.wait(PATIENCE)

        try:
            attempts = [threads.submit(create_tables, first)]
            assert made.wait(PATIENCE)
            attempts.append(threads.submit(create_tables, second))
            until_one_waits(postgresql_url)
            waited.set()
            assert [attempt.result(PATIENCE) for attempt in attempts] == [None, None]
        finally:
            waited.set()
            models.Base.metadata.drop_all(second)


def test_a_table_that_fits_is_accepted(any_engine: Engine) -> None:
    """The tables that the service makes are those of its model."""
    check_tables(any_engine)


def test_a_table_that_is_missing_is_named(any_url: str) -> None:
    """A database without the table is refused, where the service may not make it."""
    words = r"is no table items; run [^,]*, start with --create-tables, or"
    with engine_for(any_url) as engine, pytest.raises(WrongTable, match=words):
        check_tables(engine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("ALTER TABLE items DROP COLUMN name", "the column items.name is missing"),
        (
            "ALTER TABLE items ADD COLUMN price INTEGER NOT NULL",
            "the column items.price is required, but the service does not know it",
        ),
        ("ALTER TABLE items ADD COLUMN price INTEGER NOT NULL DEFAULT 0", ""),
        ("ALTER TABLE items ADD COLUMN price INTEGER", ""),
    ],
)
def test_a_difference_is_named(change: str, words: str, any_engine: Engine) -> None:
    """A table that the service cannot use is refused by name, with what to do about it."""
    name = any_engine.dialect.name
    with any_engine.begin() as connection:
        connection.execute(sql("DROP INDEX ix_items_name" + ON.get(name, "")))
        if name == "sqlite" and change.endswith("NOT NULL"):  # it cannot add such a column
            connection.execute(sql("DROP TABLE items"))
            change = "CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT, price INT NOT NULL)"
        connection.execute(sql(change))
    if not words:
        check_tables(any_engine)
        return
    with pytest.raises(WrongTable) as caught:
        check_tables(any_engine)
    assert str(caught.value).startswith(words)
    assert "alembic upgrade head" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("name VARCHAR(8)", "name has 8 characters, not 16"),
        ("name INTEGER", "name is INTEGER, not VARCHAR(16)"),
        ("name TEXT", ""),
    ],
)
def test_another_type_is_named(column: str, words: str, tmp_path: Path) -> None:
    """A column of another kind, or one that is too short, is refused; a wider one is not."""
    with engine_for(f"sqlite:///{tmp_path}/items.db") as engine:
        with engine.begin() as connection:
            connection.execute(sql(f"CREATE TABLE items (id INTEGER PRIMARY KEY, {column})"))
        create_tables(engine)
        if words:
            with pytest.raises(WrongTable, match=re.escape(words)):
                check_tables(engine)
        else:
            check_tables(engine)


def test_another_collation_is_named(postgresql_url: str) -> None:
    """A column that is not compared by code point is refused: a search would miss names."""
    with engine_for(postgresql_url) as engine:
        with engine.begin() as connection:
            connection.execute(sql("CREATE TABLE items (id SERIAL PRIMARY KEY, name VARCHAR(16))"))
        create_tables(engine)
        try:
            with pytest.raises(WrongTable, match="name has the collation None, not C"):
                check_tables(engine)
        finally:
            models.Base.metadata.drop_all(engine)


# The reader under the middleware.


def bind_of(registry: scoped_session[Any], reader: Engine, method: str) -> object:
    """What the session of a request is bound to."""
    seen: list[object] = []
    app = text(b"", before=lambda: seen.append(registry().get_bind(Item)))
    serve_once(SessionMiddleware(app, registry, reader=reader), environ(method))
    return seen.pop()


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE"])
def test_a_safe_method_reads(method: str, registry: Registry, reader: Engine) -> None:
    """The session of a safe method is bound to the reader."""
    assert bind_of(registry, reader, method) is reader


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "get", ""])
def test_another_method_writes(
    method: str, registry: Registry, engine: Engine, reader: Engine
) -> None:
    """The session of any other method is bound as the registry has it."""
    assert bind_of(registry, reader, method) is engine


def test_a_get_that_writes_is_refused_by_the_database(
    registry: Registry, outside: Engine, reader: Engine
) -> None:
    """What a safe request tries to write is the database's error."""
    app = text(b"", before=lambda: registry.execute(item("gone")))
    with pytest.raises(OperationalError, match="readonly"):
        serve_once(SessionMiddleware(app, registry, reader=reader))
    assert names(outside) == []


def test_a_joined_request_stays_with_the_outer(
    registry: Registry, engine: Engine, reader: Engine
) -> None:
    """A GET inside a POST sees what the POST has not committed yet."""
    seen = []
    inner = SessionMiddleware(
        text(b"", before=lambda: seen.append(registry.scalar(select(Item.name)))),
        registry,
        reader=reader,
    )

    def work() -> None:
        registry.execute(item("new"))
        serve_once(inner, environ("GET"))

    serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    assert seen == ["new"]


def test_a_connection_goes_before_the_reader(engine: Engine, reader: Engine) -> None:
    """A registry that is bound to a Connection, as tests do, ignores the reader."""
    with engine.connect() as connection:
        registry = scoped_session(sessionmaker(connection))
        assert bind_of(registry, reader, "GET") is connection


def test_binds_go_before_the_reader(engine: Engine, reader: Engine) -> None:
    """What a session's binds= say of a class goes before the reader."""
    registry = scoped_session(sessionmaker(binds={Item: engine}))
    assert bind_of(registry, reader, "GET") is engine


def test_get_bind_goes_before_the_reader(engine: Engine, reader: Engine) -> None:
    """What a session's own get_bind() says goes before the reader."""

    class Routed(Session):
        def get_bind(self, *args: Any, **options: Any) -> Engine:
            return engine

    registry = scoped_session(sessionmaker(class_=Routed))
    assert bind_of(registry, reader, "GET") is engine


FORK = """
import os, sys
from sqlalchemy import text
from sessionscope.engines import make_engine

engine = make_engine(sys.argv[1])
with engine.connect() as connection:
    mine = connection.connection.dbapi_connection
child = os.fork()
with engine.begin() as connection:
    same = connection.connection.dbapi_connection is mine
    connection.execute(text("SELECT 1"))
if child == 0:
    os._exit(same)
_, status = os.waitpid(child, 0)
print(same, os.waitstatus_to_exitcode(status))
engine.dispose()
"""


def test_a_fork_shares_no_connection(any_url: str) -> None:
    """A child process opens connections of its own, and its parent keeps those that it has."""
    done = run_python("-c", FORK, any_url)
    assert (done.stdout, done.stderr) == ("True 0\n", "")
