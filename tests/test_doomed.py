"""A COMMIT that would return although the work is lost is never sent.

What each engine does after an error that the application swallowed was tried on real
servers; these tests make it happen again.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pymysql
import pytest
from databases import until_one_waits
from sessionscope import (
    CommitOutcomeUnknown,
    Outcome,
    SessionMiddleware,
    TransactionDoomed,
    session_scope,
)
from sessionscope.engines import make_engine
from sqlalchemy import Engine, create_engine, event, insert, make_url, select, update
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import (
    PATIENCE,
    debts,
    environ,
    make_tables,
    names,
    refuse_commit,
    serve_once,
    text,
)

from models import Item

Registry = scoped_session[Session]


def post(work: Callable[[], object], registry: Registry, status: str = "200 OK") -> None:
    serve_once(
        SessionMiddleware(text(b"fine", status=status, before=work), registry), environ("POST")
    )


def add(registry: Registry, name: str) -> None:
    registry.execute(insert(Item).values(name=name))


def fail(registry: Registry) -> None:
    """Make a plain error of the database, and swallow it."""
    add(registry, "seven")
    key = registry.scalar(sql("SELECT max(id) FROM items"))
    with suppress(IntegrityError):
        registry.execute(insert(Item).values(id=key, name="twice"))


def fail_in_a_savepoint(registry: Registry) -> None:
    """Make work that is kept, and an error that a rollback to a savepoint after it takes back."""
    add(registry, "kept")
    savepoint = registry.begin_nested()
    fail(registry)
    savepoint.rollback()


# PostgreSQL: any error aborts the transaction, and COMMIT is answered with a ROLLBACK.


@pytest.fixture
def pg_registry(postgresql: Engine) -> Registry:
    return scoped_session(sessionmaker(postgresql))


def test_postgresql_a_swallowed_error_is_no_success(
    postgresql: Engine, pg_registry: Registry
) -> None:
    """After a swallowed error a 200 is refused, with the error as the cause."""
    with pytest.raises(TransactionDoomed) as caught:
        post(lambda: fail(pg_registry), pg_registry)
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert names(postgresql) == []


def test_postgresql_the_cause_is_the_first_error(postgresql: Engine, pg_registry: Registry) -> None:
    """Errors that only repeat that the transaction is aborted do not hide the first."""

    def work() -> None:
        fail(pg_registry)
        with suppress(DBAPIError):
            add(pg_registry, "afterwards")

    with pytest.raises(TransactionDoomed) as caught:
        post(work, pg_registry)
    assert isinstance(caught.value.__cause__, IntegrityError)


def test_postgresql_an_error_on_the_drivers_own_cursor_counts(
    postgresql: Engine, pg_registry: Registry
) -> None:
    """An error that never passed through SQLAlchemy dooms the transaction all the same."""

    def work() -> None:
        add(pg_registry, "gone")
        driver: Any = pg_registry.connection().connection.dbapi_connection
        with suppress(driver.ProgrammingError), driver.cursor() as cursor:
            cursor.execute("SELECT nonsense")

    with pytest.raises(TransactionDoomed):
        post(work, pg_registry)
    assert names(postgresql) == []


def test_postgresql_a_rollback_makes_it_sound(postgresql: Engine, pg_registry: Registry) -> None:
    """When the application rolled back after the error, what follows is committed."""

    def work() -> None:
        fail(pg_registry)
        pg_registry.rollback()
        add(pg_registry, "kept")

    post(work, pg_registry)
    assert names(postgresql) == ["kept"]


def test_postgresql_an_older_savepoint_makes_it_sound(
    postgresql: Engine, pg_registry: Registry
) -> None:
    """A rollback to a savepoint older than the error keeps what was before it."""

    def work() -> None:
        fail_in_a_savepoint(pg_registry)
        add(pg_registry, "too")

    post(work, pg_registry)
    assert names(postgresql) == ["kept", "too"]


def test_postgresql_a_commit_as_text_after_an_error_is_no_success(
    postgresql: Engine, pg_registry: Registry
) -> None:
    """COMMIT as text, which PostgreSQL answers with a ROLLBACK, saves nothing."""

    def work() -> None:
        fail(pg_registry)
        pg_registry.execute(sql("COMMIT"))

    with pytest.raises(TransactionDoomed):
        post(work, pg_registry)
    assert names(postgresql) == []


def test_postgresql_a_commit_as_text_after_a_savepoint_is_kept(
    postgresql: Engine, pg_registry: Registry
) -> None:
    """An error that a savepoint took back says nothing about a transaction that is over."""

    def work() -> None:
        fail_in_a_savepoint(pg_registry)
        pg_registry.execute(sql("COMMIT"))

    post(work, pg_registry)
    assert names(postgresql) == ["kept"]


def test_postgresql_a_failed_flush_is_no_success(postgresql: Engine, pg_registry: Registry) -> None:
    """A flush that failed and was swallowed is doomed, with its error as the cause."""

    def work() -> None:
        pg_registry.add(Item(name="longer than sixteen characters"))
        with suppress(DBAPIError):
            pg_registry.flush()

    with pytest.raises(TransactionDoomed) as caught:
        post(work, pg_registry)
    assert isinstance(caught.value.__cause__, DBAPIError)


def test_postgresql_a_doomed_savepoint_of_an_outer_transaction(
    postgresql: Engine,
) -> None:
    """Where the session joined an outer transaction, its own savepoint is what is doomed."""
    with postgresql.connect() as connection:
        outer = connection.begin()
        connection.execute(insert(Item).values(name="outer"))
        registry = scoped_session(
            sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
        )
        with pytest.raises(TransactionDoomed):
            post(lambda: fail(registry), registry)
        post(lambda: add(registry, "kept"), registry)
        outer.commit()
    assert names(postgresql) == ["outer", "kept"]


@pytest.fixture
def silent_registry(postgresql: Engine, postgresql_url: str) -> Iterator[Registry]:
    """A registry on a driver that does not tell the state of its transaction."""
    url = make_url(postgresql_url).set(drivername="postgresql+pg8000")
    engine = create_engine(url)
    yield scoped_session(sessionmaker(engine))
    engine.dispose()


def test_postgresql_with_a_driver_that_does_not_know_the_server_is_asked(
    postgresql: Engine, silent_registry: Registry
) -> None:
    """With pg8000, which does not know, a swallowed error is no success either."""
    with pytest.raises(TransactionDoomed):
        post(lambda: fail(silent_registry), silent_registry)
    assert names(postgresql) == []


def test_postgresql_with_a_driver_that_does_not_know_a_failed_release_heals_nothing(
    postgresql: Engine, silent_registry: Registry
) -> None:
    """With pg8000, too, a savepoint that cannot be released leaves the transaction doomed."""

    def work() -> None:
        add(silent_registry, "gone")
        with suppress(DBAPIError), silent_registry.begin_nested():
            fail(silent_registry)

    with pytest.raises(TransactionDoomed):
        post(work, silent_registry)
    assert names(postgresql) == []


def test_postgresql_with_a_driver_that_does_not_know_a_savepoint_heals(
    postgresql: Engine, silent_registry: Registry
) -> None:
    """With pg8000, too, a rollback to an older savepoint makes the transaction sound."""
    post(lambda: fail_in_a_savepoint(silent_registry), silent_registry)
    assert names(postgresql) == ["kept"]


def test_postgresql_a_lost_connection_is_no_success(
    postgresql: Engine, pg_registry: Registry
) -> None:
    """Work on a connection that died, unnoticed by the application, is no success."""

    def work() -> None:
        add(pg_registry, "gone")
        with suppress(DBAPIError):
            pg_registry.execute(sql("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(TransactionDoomed):
        post(work, pg_registry)
    assert names(postgresql) == []


def die_in_commit(registry: Registry) -> None:
    """Have the server end this connection while COMMIT runs."""
    registry.execute(
        sql("""
        CREATE FUNCTION pg_temp.die() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$
        """)
    )
    registry.execute(
        sql("""
        CREATE CONSTRAINT TRIGGER die AFTER INSERT ON items
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pg_temp.die()
        """)
    )
    add(registry, "perhaps")


def test_postgresql_a_connection_lost_in_commit_leaves_it_unknown(
    postgresql: Engine, pg_registry: Registry
) -> None:
    """A connection that dies while COMMIT runs is neither success nor failure."""
    with pytest.raises(CommitOutcomeUnknown) as caught:
        post(lambda: die_in_commit(pg_registry), pg_registry)
    assert isinstance(caught.value.__cause__, OperationalError)


def test_postgresql_an_own_commit_that_was_cut_off_is_recorded_as_unknown(
    postgresql: Engine, pg_registry: Registry
) -> None:
    """Where the application's own COMMIT was cut off, its exception stands, and so is told."""
    seen: list[Outcome] = []

    def work() -> None:
        die_in_commit(pg_registry)
        pg_registry.commit()

    app = SessionMiddleware(text(b"", before=work), pg_registry, observer=seen.append)
    with pytest.raises(OperationalError):
        serve_once(app, environ("POST"))
    assert [outcome.action for outcome in seen] == ["unknown"]


def test_postgresql_an_own_commit_that_was_refused_is_a_rollback(
    postgresql: Engine, pg_registry: Registry
) -> None:
    """Where the application's own COMMIT was refused, nothing is unknown, whatever it raises."""
    seen: list[Outcome] = []

    def work() -> None:
        refuse_commit(pg_registry)
        with suppress(IntegrityError):
            pg_registry.commit()
        raise LookupError("from the app")

    app = SessionMiddleware(text(b"", before=work), pg_registry, observer=seen.append)
    with pytest.raises(LookupError):
        serve_once(app, environ("POST"))
    assert [outcome.action for outcome in seen] == ["rollback"]


def test_postgresql_two_phases_prepare_before_they_commit(
    postgresql: Engine, postgresql_url: str
) -> None:
    """With twophase=True a refused PREPARE rolls both databases back: nothing is unknown."""
    second = make_engine(postgresql_url)
    registry = scoped_session(sessionmaker(binds={Item: postgresql, debts: second}, twophase=True))

    def work() -> None:
        registry.add(Item(name="gone"))
        registry.flush()
        registry.execute(insert(debts).values(item_id=-1))

    with pytest.raises(DBAPIError):
        post(work, registry)
    assert names(postgresql) == []
    second.dispose()


def test_postgresql_one_connection_in_two_phases_is_prepared_too(postgresql: Engine) -> None:
    """With twophase=True a session sends PREPARE, also where it has but one database."""
    prepared: list[object] = []
    event.listen(postgresql, "prepare_twophase", lambda _, xid: prepared.append(xid))
    registry = scoped_session(sessionmaker(postgresql, twophase=True))
    post(lambda: registry.add(Item(name="kept")), registry)
    assert (len(prepared), names(postgresql)) == (1, ["kept"])


# MariaDB and MySQL: a deadlock undoes the whole transaction, other errors their statement.


@pytest.fixture
def mariadb(mariadb: Engine) -> Engine:
    """MariaDB with the tables, and two items."""
    with mariadb.begin() as connection:
        connection.execute(insert(Item), [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}])
    return mariadb


@pytest.fixture
def maria_registry(mariadb: Engine) -> Registry:
    return scoped_session(sessionmaker(mariadb))


def test_mariadb_a_timeout_that_cannot_be_asked_about_stays_what_it_is(
    maria_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nobody can tell what a lock timeout undid, it is what the server sees all the same."""
    cursors: list[object] = []

    def work() -> None:
        driver: Any = maria_registry.connection().connection.dbapi_connection
        make_cursor = driver.cursor

        def cursor(*arguments: Any) -> Any:
            """The statement gets its cursor, and the question after it none."""
            if cursors:
                raise pymysql.err.InterfaceError(0, "")
            cursors.append(make_cursor(*arguments))
            return cursors[0]

        monkeypatch.setattr(driver, "cursor", cursor)
        maria_registry.execute(sql("SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1205"))

    with pytest.raises(DBAPIError) as caught:
        post(work, maria_registry)
    assert caught.value.orig is not None
    assert caught.value.orig.args[0] == 1205


def rename(connection: Any, key: int, name: str) -> None:
    connection.execute(update(Item).where(Item.id == key).values(name=name))


def deadlock(engine: Engine, registry: Registry) -> None:
    """Lose a deadlock against another connection, and swallow the error."""
    with engine.connect() as other:
        # The transaction that wrote less is the victim.
        other.execute(insert(Item), [{"name": "other"} for _ in range(50)])
        rename(other, 2, "other")
        rename(registry, 1, "mine")
        waiting = threading.Thread(target=rename, args=(other, 1, "other"), daemon=True)
        waiting.start()
        until_one_waits(engine.url)
        with suppress(OperationalError):
            rename(registry, 2, "mine")
        waiting.join(PATIENCE)
        other.rollback()


def test_mariadb_a_swallowed_deadlock_is_no_success(
    mariadb: Engine, maria_registry: Registry
) -> None:
    """After a swallowed deadlock a 200 is refused, though COMMIT would keep what came after."""

    def work() -> None:
        add(maria_registry, "before")
        deadlock(mariadb, maria_registry)
        add(maria_registry, "after")

    with pytest.raises(TransactionDoomed) as caught:
        post(work, maria_registry)
    assert isinstance(caught.value.__cause__, OperationalError)
    assert names(mariadb) == ["one", "two"]


def test_mariadb_a_rollback_makes_it_sound(mariadb: Engine, maria_registry: Registry) -> None:
    """When the application rolled back after the deadlock, what follows is committed."""

    def work() -> None:
        deadlock(mariadb, maria_registry)
        maria_registry.rollback()
        add(maria_registry, "kept")

    post(work, maria_registry)
    assert names(mariadb) == ["one", "two", "kept"]


def test_mariadb_no_savepoint_heals_a_deadlock(mariadb: Engine, maria_registry: Registry) -> None:
    """The deadlock took the savepoint with it, so going back to that heals nothing."""

    def work() -> None:
        add(maria_registry, "before")
        savepoint = maria_registry.begin_nested()
        deadlock(mariadb, maria_registry)
        with suppress(DBAPIError):
            savepoint.rollback()
        add(maria_registry, "after")

    with pytest.raises(TransactionDoomed):
        post(work, maria_registry)
    assert names(mariadb) == ["one", "two"]


def test_mariadb_a_plain_error_dooms_nothing(mariadb: Engine, maria_registry: Registry) -> None:
    """A constraint error undoes its own statement only, and the rest is committed."""
    post(lambda: fail(maria_registry), maria_registry)
    assert names(mariadb) == ["one", "two", "seven"]


def test_mariadb_a_lock_timeout_dooms_nothing(mariadb: Engine, maria_registry: Registry) -> None:
    """A lock wait that timed out undoes its own statement only, and the rest is committed."""

    def work() -> None:
        add(maria_registry, "kept")
        maria_registry.execute(sql("SET innodb_lock_wait_timeout = 1"))
        with mariadb.begin() as other:
            rename(other, 1, "one")
            with suppress(OperationalError):
                rename(maria_registry, 1, "mine")

    post(work, maria_registry)
    assert names(mariadb) == ["one", "two", "kept"]


def test_mariadb_a_snapshot_conflict_is_no_success(
    mariadb: Engine, maria_registry: Registry
) -> None:
    """A swallowed 1020 (innodb_snapshot_isolation) undid the whole transaction."""

    def work() -> None:
        add(maria_registry, "before")
        maria_registry.execute(sql("SELECT * FROM items")).all()
        with mariadb.begin() as other:
            rename(other, 1, "other")
        with suppress(OperationalError):
            rename(maria_registry, 1, "mine")

    with pytest.raises(TransactionDoomed):
        post(work, maria_registry)
    assert names(mariadb) == ["other", "two"]


@pytest.mark.parametrize("number", [1047, 1180])
def test_mariadb_a_node_outside_the_cluster_is_left(
    number: int, mariadb: Engine, maria_registry: Registry
) -> None:
    """A connection whose node lost its cluster (Galera) is in doubt, and not used again."""
    seen: list[int | None] = []
    identity = sql("SELECT connection_id()")

    def work() -> None:
        seen.append(maria_registry.scalar(identity))
        with suppress(DBAPIError):
            maria_registry.execute(
                sql(f"SIGNAL SQLSTATE '08S01' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'no'")
            )

    with pytest.raises(TransactionDoomed):
        post(work, maria_registry)
    post(lambda: seen.append(maria_registry.scalar(identity)), maria_registry)
    assert seen[0] != seen[1]


# SQLite: some errors undo the whole transaction, most only their statement.


def test_sqlite_a_plain_error_dooms_nothing(registry: Registry, outside: Engine) -> None:
    """A constraint error undoes its own statement only, and the rest is committed."""
    post(lambda: fail(registry), registry)
    assert names(outside) == ["seven"]


SQLITE_UNDOES: dict[str, Callable[[Registry], object]] = {
    "on conflict rollback": lambda registry: registry.execute(
        sql("INSERT OR ROLLBACK INTO items (id) VALUES (1)")
    ),
    "raise(rollback)": lambda registry: registry.execute(
        sql("UPDATE items SET name = 'raise' WHERE id = 1")
    ),
    "database full": lambda registry: registry.execute(
        sql("""
        INSERT INTO items (name) WITH RECURSIVE n (i) AS
        (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT 'many' FROM n
        """)
    ),
}


@pytest.fixture(params=["explicit begin", "driver's default"])
def sqlite(request: pytest.FixtureRequest, sqlite_url: str, engine: Engine) -> Iterator[Engine]:
    """SQLite with our engine's transactions, and with those of the driver's default."""
    made = engine if request.param == "explicit begin" else create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.execute(insert(Item).values(id=1, name="one"))
        connection.execute(
            sql("""
            CREATE TRIGGER no BEFORE UPDATE ON items WHEN new.name = 'raise'
            BEGIN SELECT raise(ROLLBACK, 'no'); END
            """)
        )
    yield made
    made.dispose()


@pytest.fixture
def small(sqlite: Engine) -> Registry:
    """A registry on a SQLite file that may grow by a few pages only."""

    @event.listens_for(sqlite, "checkout")
    def bound(dbapi_connection: Any, *_: object) -> None:
        dbapi_connection.execute("PRAGMA max_page_count = 20")

    return scoped_session(sessionmaker(sqlite))


@pytest.mark.parametrize(
    "undo", [pytest.param(work, id=name) for name, work in SQLITE_UNDOES.items()]
)
@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "stops"])
def test_sqlite_an_error_that_undid_the_transaction_is_no_success(
    undo: Callable[[Registry], object], goes_on: bool, small: Registry, outside: Engine
) -> None:
    """After an error that rolled the transaction back a 200 is refused."""

    def work() -> None:
        add(small, "before")
        with suppress(DBAPIError):
            undo(small)
        if goes_on:
            small.execute(sql("SELECT 1"))

    with pytest.raises(TransactionDoomed) as caught:
        post(work, small)
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert names(outside) == ["one"]


@pytest.mark.parametrize(
    "undo", [pytest.param(work, id=name) for name, work in SQLITE_UNDOES.items()]
)
def test_sqlite_a_rollback_makes_it_sound(
    undo: Callable[[Registry], object], small: Registry, outside: Engine
) -> None:
    """When the application rolled back after the error, what follows is committed."""

    def work() -> None:
        add(small, "before")
        with suppress(DBAPIError):
            undo(small)
        small.rollback()
        add(small, "kept")

    post(work, small)
    assert names(outside) == ["one", "kept"]


def test_sqlite_no_savepoint_heals_it(small: Registry, outside: Engine) -> None:
    """The error took the savepoint with it, so going back to that heals nothing."""

    def work() -> None:
        add(small, "before")
        savepoint = small.begin_nested()
        with suppress(DBAPIError):
            SQLITE_UNDOES["on conflict rollback"](small)
        with suppress(DBAPIError):
            savepoint.rollback()

    with pytest.raises(TransactionDoomed):
        post(work, small)
    assert names(outside) == ["one"]


@pytest.mark.parametrize("end", ["rollback", "close"])
@pytest.mark.filterwarnings("ignore:transaction already deassociated:sqlalchemy.exc.SAWarning")
def test_sqlite_a_connection_that_was_replaced_is_not_asked(end: str, engine: Engine) -> None:
    """After invalidate() and a new connection, rollback() and close() of the session work."""
    with engine.connect() as connection:
        registry: Registry = scoped_session(sessionmaker(connection))

        def work() -> None:
            registry.execute(select(Item))
            connection.invalidate()
            connection.get_transaction().rollback()  # type: ignore[union-attr]
            connection.execute(select(Item))
            getattr(registry, end)()
            registry.rollback()

        app = SessionMiddleware(text(b"fine", before=work), registry)
        assert serve_once(app).content == b"fine"


# Every engine alike.


def test_a_status_that_rolls_back_is_answered_as_it_is(any_registry: Registry) -> None:
    """A doomed transaction does not matter to a response that rolls back anyway."""
    post(lambda: fail(any_registry), any_registry, "409 Conflict")


def test_the_cause_is_what_ended_the_transaction(registry: Registry) -> None:
    """An error after the one that undid the whole transaction is not the cause."""
    again = insert(Item).prefix_with("OR ROLLBACK").values(id=7, name="again")

    def work() -> None:
        registry.execute(insert(Item).values(id=7, name="gone"))
        with suppress(IntegrityError):
            registry.execute(again)
        with suppress(OperationalError):
            registry.execute(sql("SELECT * FROM nowhere"))

    with pytest.raises(TransactionDoomed) as caught:
        post(work, registry)
    assert isinstance(caught.value.__cause__, IntegrityError)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (sqlite3.OperationalError("no code"), CommitOutcomeUnknown),
        (sqlite3.IntegrityError("no code"), IntegrityError),
    ],
)
def test_an_error_of_commit_without_a_code_leaves_it_unknown(
    error: Exception,
    raised: type[Exception],
    engine: Engine,
    registry: Registry,
    outside: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a driver says no more of a COMMIT, only a broken rule is known to be a refusal."""

    def refuse(_driver: object) -> None:
        raise error

    monkeypatch.setattr(engine.dialect, "do_commit", refuse)
    with pytest.raises(raised):
        post(lambda: add(registry, "perhaps"), registry)
    assert names(outside) == []


def test_a_scope_is_doomed_like_a_request(postgresql: Engine, pg_registry: Registry) -> None:
    """session_scope refuses to commit a doomed transaction too."""
    with pytest.raises(TransactionDoomed), session_scope(pg_registry):
        fail(pg_registry)
    assert names(postgresql) == []


def test_two_databases_the_second_of_which_refuses_leave_it_unknown(
    engine: Engine, sqlite_url: str, outside: Engine
) -> None:
    """When one of two COMMITs returned and the other failed, the outcome is unknown."""
    other = make_engine(f"{sqlite_url}-2")
    make_tables(other)

    registry = scoped_session(sessionmaker(binds={Item: engine, debts: other}))
    committed: list[object] = []
    event.listen(engine, "commit", committed.append)

    def work() -> None:
        registry.execute(insert(Item).values(name="perhaps"))
        registry.execute(insert(debts).values(item_id=-1))

    with pytest.raises((CommitOutcomeUnknown, IntegrityError)) as caught:
        post(work, registry)
    # SQLAlchemy commits connections in no certain order.
    assert isinstance(caught.value, CommitOutcomeUnknown) is bool(committed)
    assert names(outside) == (["perhaps"] if committed else [])
    other.dispose()
