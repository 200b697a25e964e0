"""How long a key is kept, and what it costs."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import time_ns
from typing import Any

import keyed_service
import pytest
from keyed_service import Service, code, is_replay, key_table, keys, rows, sent
from processes import run_python
from sessionscope.engines import make_engine
from sessionscope.idempotency import purge
from sessionscope.testing import isolated
from sqlalchemy import (
    Connection,
    Engine,
    create_engine,
    event,
    insert,
    make_url,
    select,
)
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import (
    drop_tables,
    make_tables,
    names,
    text,
)

service, any_service = keyed_service.service, keyed_service.any_service

Registry = scoped_session[Session]


# Keeping.


def old_keys(engine: Engine, number: int, age: timedelta = timedelta(days=2)) -> None:
    created = time_ns() - age // timedelta(microseconds=1) * 1000
    made = [{"id": f"{n}", "request": "", "created": created + n} for n in range(number)]
    with engine.begin() as connection:
        connection.execute(insert(keys), made)


@pytest.mark.parametrize("batch", [1, 3, 500])
def test_purge_deletes_what_is_old(batch: int, any_service: Service, any_engine: Engine) -> None:
    """It deletes exactly the keys that are older, whatever the batch, and tells how many."""
    first = any_service.post()
    old_keys(any_engine, 7)
    assert purge(any_service.registry, keys, timedelta(days=1), batch) == 7
    assert is_replay(any_service.post(), first)
    assert purge(any_service.registry, keys, timedelta(days=1)) == 0


def test_purge_has_small_transactions(service: Service, engine: Engine) -> None:
    """Each batch is deleted in a transaction of its own, of no more rows than it may have."""
    old_keys(engine, 7)
    deleted: list[int] = []

    def note(connection: Connection) -> None:
        left = connection.scalar(sql("SELECT count(*) FROM once"))
        deleted.append(7 - (left or 0) - sum(deleted))

    event.listen(engine, "commit", note)
    purge(service.registry, keys, timedelta(0), batch=3)
    event.remove(engine, "commit", note)
    assert [rows for rows in deleted if rows] == [3, 3, 1]


def test_a_purged_key_is_new(service: Service, engine: Engine) -> None:
    """A repeat after the purge is carried out again, also for another request."""
    service.post(body=b"one")
    purge(service.registry, keys, timedelta(0))
    assert code(service.post(body=b"two")) == 201
    assert service.calls == 2


@pytest.mark.parametrize(
    ("older_than", "batch", "error"),
    [(86400, 1, TypeError), (timedelta(-1), 1, ValueError), (timedelta(1), 0, ValueError)],
)
def test_purge_refuses_what_makes_no_sense(
    older_than: Any, batch: int, error: type[Exception], service: Service
) -> None:
    """Seconds are no timedelta, an age is not negative, and a batch has a row."""
    with pytest.raises(error, match="older_than"):
        purge(service.registry, keys, older_than, batch)


def test_a_very_long_life_purges_nothing(any_service: Service, any_engine: Engine) -> None:
    """An age beyond what the column can say is no error."""
    any_service.post()
    assert purge(any_service.registry, keys, timedelta.max) == 0


def test_purges_may_run_beside_each_other(any_service: Service, any_engine: Engine) -> None:
    """Two at once delete each key once between them."""
    old_keys(any_engine, 300)
    with ThreadPoolExecutor(2) as threads:
        counts = [
            threads.submit(purge, any_service.registry, keys, timedelta(days=1), 7)
            for _ in range(2)
        ]
        assert sum(count.result() for count in counts) == 300
    assert rows(any_engine) == []


@pytest.mark.parametrize("any_url", ["postgresql", "mariadb"], indirect=True)
def test_a_purge_that_is_always_too_late_goes_on(
    any_service: Service, any_engine: Engine, any_url: str
) -> None:
    """One whose every batch another purge deletes first neither fails nor stops before the end."""
    old_keys(any_engine, 70)
    late = make_engine(any_url)

    @event.listens_for(late, "after_cursor_execute")
    def overtake(_1: object, _2: object, statement: str, *_: object) -> None:
        if statement.startswith("SELECT") and keys.name in statement:
            with any_engine.begin() as connection:
                oldest = select(keys.c.id).order_by(keys.c.created).limit(7)
                found = connection.scalars(oldest).all()
                connection.execute(keys.delete().where(keys.c.id.in_(found)))

    assert purge(scoped_session(sessionmaker(late)), keys, timedelta(0), batch=7) == 0
    assert rows(any_engine) == []
    late.dispose()


def test_purge_without_autobegin(any_service: Service, any_engine: Engine) -> None:
    """A session that does not begin by itself is told to."""
    old_keys(any_engine, 7)
    any_service.registry.configure(autobegin=False)
    assert purge(any_service.registry, keys, timedelta(0), batch=3) == 7
    assert rows(any_engine) == []


def test_purge_ends_where_nothing_can_be_deleted(service: Service, engine: Engine) -> None:
    """Rows that the database keeps are not asked for again and again."""
    old_keys(engine, 3)
    with engine.begin() as connection:
        connection.execute(
            sql("CREATE TRIGGER keep BEFORE DELETE ON once BEGIN SELECT RAISE(IGNORE); END")
        )
    begun: list[Connection] = []

    def begin(connection: Connection) -> None:
        begun.append(connection)
        assert len(begun) < 9, "purge does not end"

    event.listen(engine, "begin", begin)
    assert purge(service.registry, keys, timedelta(0), batch=1) == 0
    event.remove(engine, "begin", begin)
    assert len(rows(engine)) == 3


@pytest.mark.parametrize("any_url", ["postgresql"], indirect=True)
def test_a_key_that_is_purged_while_it_is_looked_for(
    any_service: Service, any_engine: Engine, any_url: str
) -> None:
    """A repeat that finds its row gone is told to come again, and then it is new."""
    other = make_engine(any_url)
    any_service.post()

    def meanwhile(_1: object, _2: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT") and any_service.calls == 1:
            with other.begin() as connection:
                connection.execute(keys.delete())

    event.listen(any_engine, "after_cursor_execute", meanwhile)
    refused = any_service.post()
    event.remove(any_engine, "after_cursor_execute", meanwhile)
    assert (code(refused), dict(refused.headers)["Retry-After"]) == (409, "1")
    assert (code(any_service.post()), any_service.calls) == (201, 2)
    other.dispose()


FAIL_AT_FIRST = [
    "CREATE SEQUENCE tries",
    """CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('tries') <= {} THEN RAISE EXCEPTION USING ERRCODE = '40001'; END IF;
        RETURN NULL; END $$""",
    "CREATE TRIGGER conflict BEFORE DELETE ON once EXECUTE FUNCTION conflict()",
]
"""What makes so many of PostgreSQL's next DELETEs fail, as a rival would."""


@pytest.mark.parametrize(("conflicts", "fails"), [(1, False), (4, False), (5, True)])
@pytest.mark.parametrize("any_url", ["postgresql"], indirect=True)
def test_purge_begins_a_batch_again(
    conflicts: int, fails: bool, any_service: Service, any_engine: Engine, any_url: str
) -> None:
    """A batch that conflicts with another transaction is tried five times."""
    old_keys(any_engine, 9)
    for statement in FAIL_AT_FIRST:
        with any_engine.begin() as connection:
            connection.execute(sql(statement.format(conflicts)))
    try:
        if fails:
            with pytest.raises(DBAPIError):
                purge(any_service.registry, keys, timedelta(0))
        else:
            assert purge(any_service.registry, keys, timedelta(0)) == 9
    finally:
        with any_engine.begin() as connection:
            connection.execute(sql("DROP FUNCTION conflict() CASCADE"))
            connection.execute(sql("DROP SEQUENCE tries"))


def test_purge_raises_what_is_no_conflict(service: Service, engine: Engine) -> None:
    """An error that another attempt would not cure is raised at once."""
    keys.drop(engine)
    with pytest.raises(OperationalError, match="no such table"):
        purge(service.registry, keys, timedelta(0))
    keys.create(engine)


def test_a_copy_of_the_table_tells_no_key(any_service: Service, any_engine: Engine) -> None:
    """The row holds neither the key nor the scope, but digests of one length."""
    any_service.post("secret-key", REMOTE_USER="secret-user")
    (row,) = rows(any_engine)
    assert (len(row.id), len(row.request)) == (64, 64)
    assert int(row.id, 16) != int(row.request, 16)
    assert b"secret" not in repr(row).encode() + bytes(row.response)


def test_in_isolated_tests_keys_count(any_service: Service, any_engine: Engine) -> None:
    """In an isolated() block a keyed request replays, and nothing is left of it afterwards."""
    with isolated(any_service.registry):
        first = any_service.post()
        assert is_replay(any_service.post(), first)
        assert any_service.calls == 1
    assert (names(any_engine), rows(any_engine)) == ([], [])


# Costs.


def test_what_a_key_costs(any_engine: Engine) -> None:
    """The first sends an INSERT and an UPDATE more, a replay an INSERT and a SELECT."""
    with key_table(any_engine):
        service = Service(any_engine, app=text(b"fine", status="201 Created"))
        words = sent(any_engine)
        service.post()
        first = words.copy()
        service.post()
        replay = words[len(first) :]
    assert (first, replay) == (["INSERT", "UPDATE"], ["INSERT", "SELECT"])


@pytest.mark.parametrize("any_url", ["postgresql"], indirect=True)
def test_a_replay_writes_nothing(any_service: Service, any_engine: Engine) -> None:
    """PostgreSQL gives it no transaction id, because nothing is written."""
    ids: list[object] = []
    any_service.post()

    def note(connection: Connection) -> None:
        ids.append(connection.scalar(sql("SELECT pg_current_xact_id_if_assigned()::text")))

    event.listen(any_engine, "commit", note)
    any_service.post()
    event.remove(any_engine, "commit", note)
    assert ids == [None]


def modules_after(*imports: str) -> set[str]:
    script = f"import sys; {'; '.join(imports)}; print(*sys.modules)"
    return set(run_python("-c", script).stdout.split())


def test_it_imports_sqlalchemy_and_the_standard_library() -> None:
    """Nothing else is imported, and SQLAlchemy's own needs."""
    bare = modules_after("import sqlalchemy.orm")
    loaded = modules_after("import sessionscope.idempotency") - bare
    foreign = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert foreign == {"sessionscope", "sqlalchemy"}


def test_nothing_of_it_is_imported_unasked() -> None:
    """Who uses no keys loads no code of theirs."""
    loaded = modules_after("from sessionscope import SessionMiddleware")
    assert loaded.isdisjoint({f"sessionscope.{name}" for name in ("idempotency", "keyed", "keys")})


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000", "pymysql"])
def test_drivers(driver: str, request: pytest.FixtureRequest) -> None:
    """A first, a repeat and a conflict are the same with each driver."""
    server = "mariadb" if driver == "pymysql" else "postgresql"
    url = make_url(request.getfixturevalue(f"{server}_url"))
    engine = create_engine(url.set(drivername=f"{server}+{driver}"))
    make_tables(engine)
    try:
        with key_table(engine):
            service = Service(engine)
            first = service.post()
            assert is_replay(service.post(), first)
            assert code(service.post(body=b"other")) == 422
            assert names(engine) == [first.content.decode()]
    finally:
        drop_tables(engine)
        engine.dispose()
