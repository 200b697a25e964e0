"""A request with an Idempotency-Key is carried out once, in the transaction of its work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keyed_service
import pytest
from alembic.autogenerate import compare_metadata, produce_migrations
from alembic.migration import MigrationContext
from alembic.operations import Operations
from keyed_service import Service, code, is_replay, keys, post, rows, sent
from sessionscope.engines import make_engine
from sessionscope.idempotency import Idempotency, idempotency_table
from sqlalchemy import (
    Delete,
    Engine,
    MetaData,
    Update,
    create_engine,
    inspect,
    make_url,
)
from sqlalchemy import text as sql
from sqlalchemy.dialects import registry as dialects
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError
from support import (
    environ,
    names,
    refuse_commit,
    serve_once,
    text,
)

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

service, any_service = keyed_service.service, keyed_service.any_service

Registry = scoped_session[Session]


# Wiring.


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_it_needs_the_session_of_a_middleware(method: str) -> None:
    """Outside of a SessionMiddleware each request is refused with an error that says why."""
    app = Idempotency(text(b"fine"), keys, scope=lambda environ: "")
    with pytest.raises(RuntimeError, match="needs the session of a SessionMiddleware around it"):
        serve_once(app, environ(method))


def test_it_needs_a_session_that_is_open(service: Service) -> None:
    """The environ of a request that is over brings no session."""
    request = post(None)
    serve_once(service.app, request)
    with pytest.raises(RuntimeError, match="needs the session"):
        serve_once(service.once, request)


@pytest.mark.parametrize(
    "wrong",
    [
        {"app": None},
        {"table": "idempotency_keys"},
        {"scope": "me"},
        {"methods": "POST"},
        {"methods": 1},
        {"methods": [b"POST"]},
        {"required": 1},
        {"limit": "9"},
        {"limit": True},
        {"help": None},
        {"context": None},
    ],
    ids=str,
)
def test_an_argument_of_a_wrong_type_is_refused(wrong: dict[str, Any]) -> None:
    """It is a TypeError that names the argument, when the layer is made."""
    right: dict[str, Any] = {"app": text(b""), "table": keys, "scope": lambda environ: ""}
    (name,) = wrong
    with pytest.raises(TypeError, match=f"^{name} must be"):
        Idempotency(**right | wrong)


@pytest.mark.parametrize("limit", [0, -1, 2**24])
def test_a_limit_is_what_a_row_can_hold(limit: int) -> None:
    """Below 1, and beyond the 16 MB of MariaDB's MEDIUMBLOB, it is a ValueError."""
    with pytest.raises(ValueError, match=f"limit must be between 1 and 16777215, not {limit}"):
        Idempotency(text(b""), keys, scope=lambda environ: "", limit=limit)


def test_there_is_no_default_scope() -> None:
    """A layer that is not told who calls cannot be made."""
    with pytest.raises(TypeError, match="scope"):
        Idempotency(text(b""), keys)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "request_", [post(None), environ("GET", HTTP_IDEMPOTENCY_KEY="k")], ids=["POST", "GET"]
)
def test_what_has_no_key_passes_untouched(request_: WSGIEnvironment, engine: Engine) -> None:
    """Without a key, or with a method whose keys don't count, nothing is sent or wrapped."""
    body, bodies = [b"fine"], []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return body

    def around(once: WSGIApplication) -> WSGIApplication:
        def see(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            bodies.append(once(environ, start_response))
            return bodies[0]

        return see

    words, service = sent(engine), Service(engine, app=app, around=around)
    assert serve_once(service.app, request_).content == b"fine"
    assert bodies[0] is body
    assert words == []


def test_methods_can_be_chosen(service: Service, engine: Engine) -> None:
    """PUT counts where it was named, and POST does not where it was not."""
    put = Service(engine, methods={"PUT"})
    for _ in range(2):
        serve_once(put.app, post() | {"REQUEST_METHOD": "PUT"})
        put.post()
    assert put.calls == 3


def test_the_table_is_one_of_the_metadata(any_engine: Engine) -> None:
    """It has the name that it was given, an index on created, and create_all() makes it."""
    metadata = MetaData()
    table = idempotency_table(metadata, "seen_keys")
    assert metadata.tables == {"seen_keys": table}
    metadata.create_all(any_engine)
    (index,) = inspect(any_engine).get_indexes("seen_keys")
    metadata.drop_all(any_engine)
    assert index["column_names"] == ["created"]


def test_the_table_takes_options() -> None:
    """What else a Table takes is passed on, its schema for instance."""
    table = idempotency_table(MetaData(), schema="audit", comment="seen")
    assert (table.fullname, table.comment) == ("audit.idempotency_keys", "seen")


def test_alembic_has_nothing_to_add(any_engine: Engine) -> None:
    """After the migration that Alembic generates it finds no difference."""
    only_keys = {"include_name": lambda name, kind, _: kind != "table" or name == keys.name}
    with any_engine.begin() as connection:
        context = MigrationContext.configure(connection, opts=only_keys)
        migration = produce_migrations(context, keys.metadata).upgrade_ops
        assert migration is not None
        for table in migration.ops:
            for operation in getattr(table, "ops", [table]):
                Operations(context).invoke(operation)
    with any_engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=only_keys)
        found = compare_metadata(context, keys.metadata)
    keys.drop(any_engine)
    assert (len(migration.ops), found) == (2, [])


class UnknownDialect(SQLiteDialect_pysqlite):
    """A database that nobody has heard of."""

    name = "unknown"
    supports_statement_cache = True


def test_a_database_that_is_not_supported_is_refused(sqlite_url: str, service: Service) -> None:
    """The first key is refused with an error that names it, before the application runs."""
    dialects.register("unknown", __name__, UnknownDialect.__name__)
    engine = create_engine(make_url(sqlite_url).set(drivername="unknown"))
    unknown = Service(engine)
    with pytest.raises(RuntimeError, match=r"supports PostgreSQL, .*, not unknown"):
        unknown.post()
    assert unknown.calls == 0
    engine.dispose()


def test_an_engine_in_autocommit_is_refused(any_service: Service, any_engine: Engine) -> None:
    """The first key is refused before the application runs: the key would outlive the work."""
    url = any_engine.url
    url = url.set(drivername=url.drivername.replace("+immediate", ""))
    auto = create_engine(url, isolation_level="AUTOCOMMIT")
    service = Service(auto)
    with pytest.raises(RuntimeError, match="AUTOCOMMIT"):
        service.post()
    assert (service.calls, rows(any_engine)) == (0, [])
    auto.dispose()


@pytest.mark.parametrize("undo", [False, True])
def test_a_session_that_does_not_begin_by_itself(undo: bool, any_service: Service) -> None:
    """With autobegin=False a key works, also if the view rolls its transaction back."""
    any_service.registry.configure(autobegin=False)
    if undo:
        any_service.work = lambda session: session.rollback()
    first = any_service.post()
    assert is_replay(any_service.post(), first)
    assert any_service.calls == 1


def test_a_session_that_routes_keeps_its_keys_where_it_writes(
    service: Service, engine: Engine, tmp_path: Path
) -> None:
    """They are on the engine of UPDATE and DELETE, and the one for reading needs no table.

    https://docs.sqlalchemy.org/en/20/orm/persistence_techniques.html#custom-vertical-partitioning
    """
    reader = make_engine(f"sqlite:///{tmp_path}/reader.db")

    class RoutingSession(Session):
        def get_bind(self, *args: Any, clause: Any = None, **kwargs: Any) -> Engine:
            return engine if self._flushing or isinstance(clause, (Update, Delete)) else reader

    words = sent(reader)
    routed = Service(engine, registry=scoped_session(sessionmaker(class_=RoutingSession)))
    first = routed.post()
    assert is_replay(routed.post(), first)
    assert (code(first), len(rows(engine)), words) == (201, 1, [])
    reader.dispose()


# Once.


def test_a_repeat_gets_the_same_response(any_service: Service, any_engine: Engine) -> None:
    """Status, headers and body are those of the first; the work is there once."""
    first = any_service.post()
    repeats = [any_service.post(), Service(any_engine).post()]
    assert code(first) == 201
    assert all(is_replay(repeat, first) for repeat in repeats)
    assert names(any_engine) == [first.content.decode()]
    assert any_service.calls == len(rows(any_engine)) == 1


def test_a_first_response_does_not_say_that_it_was_replayed(service: Service) -> None:
    """Only a replay has the header that says so."""
    names = [name for name, _ in service.post().headers]
    assert names == ["Content-Type", "Location"]


@pytest.mark.parametrize("status", ["200 OK", "202 Accepted", "303 See Other"])
def test_what_is_committed_is_kept(status: str, service: Service, engine: Engine) -> None:
    """2xx and 3xx are kept with their work."""
    service.status = status
    first = service.post()
    assert is_replay(service.post(), first)
    assert len(names(engine)) == 1


@pytest.mark.parametrize("status", ["404 Not Found", "500 Internal Server Error"])
def test_what_failed_is_carried_out_again(
    status: str, any_service: Service, any_engine: Engine
) -> None:
    """A 4xx or 5xx leaves no row, so the same key may succeed later."""
    any_service.status = status
    assert any_service.post().status == status
    assert rows(any_engine) == []
    any_service.status = "201 Created"
    assert code(any_service.post(body=b"corrected")) == 201
    assert (any_service.calls, len(names(any_engine))) == (2, 1)


def test_what_raised_is_carried_out_again(any_service: Service, any_engine: Engine) -> None:
    """An exception of the application leaves no row."""
    any_service.work = lambda session: 1 / 0
    with pytest.raises(ZeroDivisionError):
        any_service.post()
    assert rows(any_engine) == []
    any_service.work = bool
    assert code(any_service.post()) == 201


@pytest.mark.parametrize("any_url", ["sqlite", "postgresql"], indirect=True)
def test_a_refused_commit_is_carried_out_again(any_service: Service, any_engine: Engine) -> None:
    """Where the database refuses COMMIT, row and work are both gone."""
    any_service.work = refuse_commit
    with pytest.raises(IntegrityError):
        any_service.post()
    assert rows(any_engine) == []
    any_service.work = bool
    assert code(any_service.post()) == 201


def test_each_attempt_claims_the_key_anew(any_service: Service, any_engine: Engine) -> None:
    """Where a request is tried again, its row is that of the attempt that stays."""

    def work(session: Session) -> None:
        if any_service.calls == 1:
            raise StaleDataError("somebody has changed it")

    any_service.work = work
    first = any_service.post()
    assert names(any_engine) == [first.content.decode()]
    assert (any_service.calls, len(rows(any_engine))) == (2, 1)
    assert is_replay(any_service.post(), first)


def test_keys_of_two_scopes_are_two(any_service: Service, any_engine: Engine) -> None:
    """Nobody gets the response to another's key, though all keys are equal."""
    ann, bob = (any_service.post("1", REMOTE_USER=user) for user in ("ann", "bob"))
    assert ann.content != bob.content
    assert is_replay(any_service.post("1", REMOTE_USER="ann"), ann)
    assert is_replay(any_service.post("1", REMOTE_USER="bob"), bob)


def test_scope_and_key_are_kept_apart(service: Service) -> None:
    """What ends the scope does not count as the beginning of a key."""
    service.post("bc", REMOTE_USER="a")
    service.post("c", REMOTE_USER="ab")
    service.post("1:c", REMOTE_USER="ab")
    assert service.calls == 3


@pytest.mark.parametrize("spelling", ["composed", "decomposed"])
def test_keys_that_a_collation_takes_for_equal_differ(
    spelling: str, any_service: Service, any_engine: Engine
) -> None:
    """Case, trailing spaces and the normal form of a scope tell keys apart, on each engine."""
    if any_engine.dialect.name == "mariadb":
        with any_engine.connect() as connection:
            assert connection.scalar(sql("SELECT 'A' = 'a '")) == 1
    scope = {"composed": "\u00e9", "decomposed": "e\u0301"}
    for key in ('"A"', '"a"', '"A "', '" A"'):
        any_service.post(key, REMOTE_USER="\u00e9")
        any_service.post(key, REMOTE_USER=scope[spelling])
    assert any_service.calls == (4 if spelling == "composed" else 8)


def test_a_scope_that_raises(service: Service, engine: Engine) -> None:
    """Its error is raised on, before anything is sent."""
    words, broken = sent(engine), Service(engine, scope=lambda environ: environ["REMOTE_USER"])
    with pytest.raises(KeyError):
        broken.post()
    assert words == []


def test_a_scope_that_is_no_str(service: Service, engine: Engine) -> None:
    """It is a TypeError, before anything is sent."""
    words, broken = sent(engine), Service(engine, scope=lambda environ: None)
    with pytest.raises(TypeError, match="the result of scope must be a str, not None"):
        broken.post()
    assert words == []
