"""Tenants in one PostgreSQL, as the page about them tells: nobody meets another's rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flask
import pytest
from conflicts import meanwhile
from sessionscope import SessionMiddleware, session_scope
from sqlalchemy import Engine, create_engine, event, func, insert, select, update
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from support import Reply, Server, environ, serve_once

import middleware

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

Registry = scoped_session[Session]
Work = Callable[[], object]

PAGE = (Path(__file__).parents[1] / "docs/tenants.md").read_text("utf-8")
SQL = "".join(re.findall("```sql\n(.*?)```", PAGE, re.S))
FOR_TENANT, SECURITY, SCHEMAS, _LOCKS = re.findall("```python\n(.*?)```", PAGE, re.S)


class Base(DeclarativeBase): ...


class Order(Base):
    """An order; whose it is the application does not know."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.0)


@pytest.fixture
def owner(postgresql_url: str) -> Iterator[Engine]:
    """Who owns the tables, and sees all rows; orders as the page tells, and a role to use them."""
    engine = create_engine(postgresql_url)
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        for statement in SQL.strip().split("\n"):
            connection.execute(sql(statement))
        connection.execute(sql("CREATE ROLE shop LOGIN"))
        connection.execute(sql("GRANT ALL ON ALL TABLES IN SCHEMA public TO shop"))
        connection.execute(sql("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO shop"))
    yield engine
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(sql("DROP OWNED BY shop"))
        connection.execute(sql("DROP ROLE shop"))
    engine.dispose()


@pytest.fixture
def engine(owner: Engine) -> Iterator[Engine]:
    """An engine of the application, with one connection, which all requests use in turn."""
    made = create_engine(owner.url.set(username="shop"), pool_size=1, max_overflow=0)
    yield made
    assert made.pool.checkedout() == 0  # type: ignore[attr-defined]
    made.dispose()


@pytest.fixture
def shop(engine: Engine) -> Shop:
    return Shop(engine, SECURITY)


class Shop:
    """An application that does what it is told, for the tenant that the host is named after.

    :param listener: the code of the page that is to make the difference between tenants.
    """

    def __init__(self, engine: Engine, listener: str) -> None:
        self.session: Registry = scoped_session(sessionmaker(engine))
        self.names: dict[str, Any] = {
            "Session": self.session,
            "SessionMiddleware": SessionMiddleware,
            "event": event,
            "app": self.app,
        }
        exec(FOR_TENANT, self.names)
        exec(listener, self.names)

    def app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        answer = environ["shop.work"]()
        start_response(environ["shop.status"], [])
        return [str(answer).encode()] if answer is None or isinstance(answer, list) else answer

    def send(self, tenant: str, work: Work, status: str = "200 OK", attempts: int = 1) -> Reply:
        app = self.names["application"]
        app.attempts = attempts
        return serve_once(app, self.request(tenant, work, status))

    def request(self, tenant: str, work: Work, status: str = "200 OK") -> WSGIEnvironment:
        host = f"{tenant}.shop.example"
        more: dict[str, Any] = {"shop.work": work, "shop.status": status}
        return environ("POST", HTTP_HOST=host, **more)

    def order(self, item: str) -> None:
        self.session.add(Order(item=item))

    def items(self) -> list[str]:
        """What the tenant can see."""
        return list(self.session.scalars(select(Order.item).order_by(Order.id)))


def rows(owner: Engine) -> list[tuple[str, str]]:
    """Whose rows there are, and what they say."""
    with owner.connect() as connection:
        found = connection.execute(sql("SELECT tenant, item FROM orders ORDER BY id"))
        return [(tenant, item) for tenant, item in found]


def test_each_tenant_has_its_own_rows(shop: Shop, owner: Engine) -> None:
    """Who orders sees that order and no other's, on the connection that all of them use."""
    shop.send("ann", lambda: shop.order("lamp"))
    shop.send("bob", lambda: shop.order("chair"))
    assert shop.send("ann", shop.items).content == b"['lamp']"
    assert shop.send("bob", shop.items).content == b"['chair']"
    assert rows(owner) == [("ann", "lamp"), ("bob", "chair")]


def test_streams_that_take_turns_see_their_own(shop: Shop, owner: Engine) -> None:
    """Two streams that commit before each chunk lend each other the connection and no row."""

    def stream() -> Iterator[bytes]:
        for number in range(3):
            shop.order(f"item {number}")
            seen = shop.items()
            shop.session.commit()
            yield f"{seen}\n".encode()

    servers = [Server(shop.names["application"]) for _ in range(2)]
    bodies = [
        server.begin(shop.request(tenant, stream))
        for server, tenant in zip(servers, ("ann", "bob"), strict=True)
    ]
    chunks = [next(body) for _ in range(3) for body in bodies]
    for server in servers:
        server.finish()
    expected = [["item 0"], ["item 0", "item 1"], ["item 0", "item 1", "item 2"]]
    assert chunks == [f"{seen}\n".encode() for seen in expected for _ in bodies]
    assert sorted(rows(owner)) == [(who, f"item {n}") for who in ("ann", "bob") for n in range(3)]


def test_many_at_once_see_their_own(shop: Shop, owner: Engine) -> None:
    """Of many requests at once, some of them refused, each sees what its tenant has ordered."""

    def send(number: int) -> tuple[str, bytes]:
        tenant = f"tenant{number % 4}"
        status = "409 Conflict" if number % 3 == 0 else "200 OK"

        def work() -> list[str]:
            shop.order(tenant)
            return sorted(set(shop.items()))

        return f"['{tenant}']", shop.send(tenant, work, status).content

    with ThreadPoolExecutor(8) as threads:
        for expected, seen in threads.map(send, range(60)):
            assert seen.decode() == expected
    assert len(rows(owner)) == 40
    assert {tenant == item for tenant, item in rows(owner)} == {True}


def test_nobody_changes_anothers_row(shop: Shop, owner: Engine) -> None:
    """A row of another tenant is not there to be changed, and none can be given away."""
    shop.send("ann", lambda: shop.order("lamp"))

    def change() -> None:
        shop.session.execute(update(Order).values(item="stolen"))

    def give() -> None:
        shop.session.execute(sql("INSERT INTO orders (item, tenant) VALUES ('gift', 'ann')"))

    shop.send("bob", change)
    with pytest.raises(DBAPIError, match="row-level security"):
        shop.send("bob", give)
    assert rows(owner) == [("ann", "lamp")]


@pytest.mark.parametrize("status", ["200 OK", "409 Conflict"])
def test_nothing_stays_on_the_connection(status: str, shop: Shop, engine: Engine) -> None:
    """After a request, committed or not, its connection belongs to no tenant."""

    def work() -> list[str]:
        shop.order("lamp")
        return shop.items()

    shop.send("ann", work, status)
    with engine.connect() as connection:
        assert connection.scalar(sql("SELECT current_setting('app.tenant')")) == ""
        assert connection.scalars(select(Order.item)).all() == []
        with pytest.raises(IntegrityError, match="orders_tenant_check"):
            connection.execute(insert(Order).values(item="nobody's"))


def test_a_reader_in_autocommit_finds_nothing(engine: Engine, shop: Shop) -> None:
    """Without a transaction the setting is over at once: a reader then sees too little."""
    shop.send("ann", lambda: shop.order("lamp"))
    shop.session.configure(bind=engine.execution_options(isolation_level="AUTOCOMMIT"))
    assert shop.send("ann", shop.items).content == b"[]"


def after_commit(session: Session) -> None:
    session.commit()


def after_rollback(session: Session) -> None:
    session.rollback()


def after_a_savepoint(session: Session) -> None:
    session.begin_nested().rollback()


def after_an_error(session: Session) -> None:
    with suppress(DBAPIError), session.begin_nested():
        session.execute(sql("SELECT 1 / 0"))


@pytest.mark.parametrize(
    "happens", [after_commit, after_rollback, after_a_savepoint, after_an_error]
)
def test_the_rest_of_a_request_is_the_tenants(
    happens: Callable[[Session], None], shop: Shop, owner: Engine
) -> None:
    """What a request does after a COMMIT or ROLLBACK of its own is its tenant's, too."""
    shop.send("ann", lambda: shop.order("lamp"))
    shop.send("bob", lambda: shop.order("chair"))

    def work() -> list[str]:
        shop.items()
        happens(shop.session())
        shop.order("table")
        return shop.items()

    assert shop.send("bob", work).content == b"['chair', 'table']"
    assert rows(owner)[2:] == [("bob", "table")]


def test_a_second_attempt_is_the_tenants(shop: Shop, owner: Engine) -> None:
    """A request that is made again is still its tenant's, though another was served between."""
    attempts: list[int] = []

    def work() -> list[str]:
        attempts.append(1)
        if len(attempts) == 2:
            meanwhile(lambda: shop.send("bob", lambda: shop.order("chair"), attempts=2))
        shop.order("lamp")
        seen = shop.items()
        if len(attempts) == 1:
            shop.session.execute(sql("DO $$ BEGIN RAISE USING ERRCODE = '40001'; END $$"))
        return seen

    assert shop.send("ann", work, attempts=2).content == b"['lamp']"
    assert rows(owner) == [("bob", "chair"), ("ann", "lamp")]


def test_a_scope_has_a_tenant_of_its_own(shop: Shop, owner: Engine) -> None:
    """A scope does not work for the tenant of the request around it, but for the one it names."""

    def work() -> None:
        with pytest.raises(KeyError, match="tenant"), session_scope(shop.session):
            shop.items()
        shop.session.rollback()  # its connection is the only one
        with session_scope(shop.session) as session:
            session.info["tenant"] = "bob"
            shop.order("chair")
        shop.order("lamp")

    shop.send("ann", work)
    assert rows(owner) == [("bob", "chair"), ("ann", "lamp")]


# Other places to keep a tenant in.

tenant: ContextVar[str] = ContextVar("tenant")


def listen(registry: Registry, current: Callable[[], str]) -> None:
    """Begin each transaction for the tenant that *current* tells."""

    @event.listens_for(registry, "after_begin")
    def begin(session: Session, transaction: object, connection: Any) -> None:
        connection.execute(select(func.set_config("app.tenant", current(), True)))


def test_a_context_variable_can_hold_the_tenant(engine: Engine, owner: Engine) -> None:
    """What a middleware around ours has set holds for a flush that is left to COMMIT."""
    registry: Registry = scoped_session(sessionmaker(engine))
    listen(registry, tenant.get)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        registry.add(Order(item="lamp"))
        start_response("200 OK", [])
        return [b"ordered"]

    inner = SessionMiddleware(app, registry)

    def outer(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        token = tenant.set(environ["HTTP_HOST"])
        try:
            return inner(environ, start_response)
        finally:
            tenant.reset(token)

    for name in ("ann", "bob"):
        serve_once(outer, environ("POST", HTTP_HOST=name))
    assert rows(owner) == [("ann", "lamp"), ("bob", "lamp")]


def test_flasks_g_can_hold_the_tenant(engine: Engine, owner: Engine) -> None:
    """What Flask keeps for its request is there for a flush that is left to COMMIT."""
    registry: Registry = scoped_session(sessionmaker(engine))
    listen(registry, lambda: flask.g.tenant)
    app = flask.Flask(__name__)

    @app.before_request
    def choose() -> None:
        flask.g.tenant = flask.request.host

    @app.post("/")
    def order() -> str:
        registry.add(Order(item="lamp"))
        return "ordered"

    application: WSGIApplication = SessionMiddleware(app.wsgi_app, registry)
    for name in ("ann", "bob"):
        serve_once(application, environ("POST", HTTP_HOST=name))
    assert rows(owner) == [("ann", "lamp"), ("bob", "lamp")]


# A schema for each.


@pytest.fixture
def schemas(postgresql_url: str) -> Iterator[Engine]:
    """An engine with one connection, and the tables in two schemas."""
    engine = create_engine(postgresql_url, pool_size=1, max_overflow=0)
    for name in ("ann", "bob"):
        with engine.begin() as connection:
            connection.execute(sql(f"CREATE SCHEMA {name}"))
            connection.execution_options(schema_translate_map={None: name})
            Base.metadata.create_all(connection)
    yield engine
    with engine.begin() as connection:
        connection.execute(sql("DROP SCHEMA ann, bob CASCADE"))
    engine.dispose()


def test_rows_land_in_the_tenants_schema(schemas: Engine) -> None:
    """Each tenant's rows are in its schema, also those of a second transaction and attempt."""
    shop = Shop(schemas, SCHEMAS)
    attempts: list[int] = []

    def work() -> list[str]:
        attempts.append(1)
        if len(attempts) == 1:
            shop.session.execute(sql("DO $$ BEGIN RAISE USING ERRCODE = '40001'; END $$"))
        shop.order("first")
        shop.session.commit()
        shop.order("second")
        return shop.items()

    shop.send("bob", lambda: shop.order("refused"), "409 Conflict")
    assert shop.send("ann", work, attempts=2).content == b"['first', 'second']"
    shop.send("bob", lambda: shop.order("chair"))
    with schemas.connect() as connection:
        found = [
            connection.scalars(sql(f"SELECT item FROM {name}.orders ORDER BY id")).all()
            for name in ("ann", "bob")
        ]
    assert found == [["first", "second"], ["chair"]]


# Advisory locks.


def locks(engine: Engine) -> int:
    with engine.connect() as connection:
        return (
            connection.scalar(sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")) or 0
        )


@pytest.mark.parametrize("end", ["200 OK", "409 Conflict", "hung up", "raised"])
def test_a_lock_ends_with_the_request(end: str, shop: Shop, owner: Engine) -> None:
    """A lock of the transaction is held to the end of the request, and not longer."""
    held: list[int] = []

    def lock() -> None:
        shop.session.execute(select(func.pg_advisory_xact_lock(4711)))
        held.append(locks(owner))
        if end == "raised":
            raise LookupError

    def stream() -> Iterator[bytes]:
        lock()
        yield b"one"
        yield b"two"

    if end == "hung up":
        server = Server(shop.names["application"])
        next(server.begin(shop.request("ann", stream)))
        held.append(locks(owner))
        server.finish()
    elif end == "raised":
        with pytest.raises(LookupError):
            shop.send("ann", lock)
    else:
        shop.send("ann", lock, end)
    assert set(held) == {1}
    assert locks(owner) == 0
