"""Requests with one key that meet in a process, or in the database at any isolation level."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from conflicts import meanwhile
from databases import until
from keyed_service import (
    Held,
    Rivals,
    Service,
    bind_of,
    code,
    in_step,
    is_replay,
    keys,
    post,
    prepared,
    rows,
    sent,
)
from sessionscope.engines import make_engine
from sessionscope.idempotency import purge
from sqlalchemy import Engine, create_engine, event, make_url, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from support import PATIENCE, Reply, Server, names, serve_once

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


# Isolation levels.

LEVELS = {
    "postgresql": ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
    "mariadb": ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "old snapshot"],
    "sqlite": ["immediate", "deferred"],
}
LEVEL_IDS = [f"{name}-{level}" for name, levels in LEVELS.items() for level in levels]


def engine_with(url: str, level: str) -> Engine:
    """An engine at *level*; "old snapshot" is MariaDB's default of before 11.6."""
    if level == "immediate":
        return make_engine(url)
    if level == "deferred":
        options: Any = {"isolation_level": None, "timeout": PATIENCE}
        return create_engine(
            make_url(url).set(drivername="sqlite+deferred"), connect_args=options, pool_size=9
        )
    if level != "old snapshot":
        return make_engine(url).execution_options(isolation_level=level)
    engine = make_engine(url)

    @event.listens_for(engine, "connect")
    def configure(dbapi_connection: Any, _record: object) -> None:
        with dbapi_connection.cursor() as cursor:
            cursor.execute("SET SESSION innodb_snapshot_isolation = OFF")

    return engine


@pytest.fixture(params=LEVEL_IDS)
def leveled(request: pytest.FixtureRequest) -> Iterator[Callable[[], Engine]]:
    """Makes engines of one kind and isolation level, with the tables."""
    name, _, level = request.param.partition("-")
    url: str = request.getfixturevalue(f"{name}_url")
    made: list[Engine] = []

    def make() -> Engine:
        made.append(engine_with(url, level))
        return made[-1]

    with prepared(make_engine(url)):
        yield make
        for engine in made:
            engine.dispose()


@pytest.fixture
def services(any_url: str) -> Iterator[Callable[[], Service]]:
    """Makes services that know nothing of each other, each with an engine, as of processes."""
    made: list[Engine] = []

    def make(**options: Any) -> Service:
        made.append(make_engine(any_url))
        return Service(made[-1], **options)

    with prepared(make_engine(any_url)):
        yield make
        for engine in made:
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            engine.dispose()


# In one process.


@pytest.fixture
def service(services: Callable[[], Service]) -> Service:
    return services()


def test_a_rival_in_the_process_is_refused_at_once(service: Service) -> None:
    """It is a 409 with Retry-After, without a statement and whatever it asks for."""
    with Held(service, key='"k"') as held:
        words = sent(bind_of(service))
        refused = service.post("k", b"other")
        assert (code(refused), dict(refused.headers)["Retry-After"]) == (409, "1")
        assert b"still running" in refused.content
        assert words == []
        first = held.end()
    assert is_replay(service.post("k"), first)
    assert service.calls == 1


@pytest.mark.parametrize("any_url", ["sqlite"], indirect=True)
def test_another_key_or_scope_is_no_rival(service: Service, any_url: str) -> None:
    """Requests with other keys, or of other callers, are carried out meanwhile."""
    engine = bind_of(service)
    entered: list[str] = []

    def around(session: Session) -> None:
        entered.append("first")
        session.rollback()  # SQLite has one writer
        others = [post("other"), post("k", REMOTE_USER="ann"), post(None)]
        service.work = bool
        assert [code(serve_once(service.app, other)) for other in others] == [201] * 3

    service.work = around
    assert code(service.post("k")) == 201
    assert len(rows(engine)) == 3
    assert len(names(engine)) == 3


def ends_well(service: Service) -> object:
    return service.post()


def raises(service: Service) -> object:
    service.work = lambda session: 1 / 0
    with pytest.raises(ZeroDivisionError) as caught:
        service.post()
    return caught


def fails(service: Service) -> object:
    service.status = "500 Internal Server Error"
    return service.post()


def stream(*chunks: bytes) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield from chunks

    return app


def is_hung_up_on(service: Service) -> object:
    service.inner = stream(b"one", b"two")
    server = Server(service.app)
    next(server.begin(post()))
    server.finish()
    return server


def raises_in_its_stream(service: Service) -> object:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"one"
        raise ZeroDivisionError

    service.inner = app
    with pytest.raises(ZeroDivisionError) as caught:
        serve_once(service.app, post())
    return caught


def has_no_body(service: Service) -> object:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        start_response("200 OK", [])

    service.inner = app
    with pytest.raises(TypeError) as caught:
        service.post()
    return caught


def is_interrupted(service: Service) -> object:
    def interrupt(session: Session) -> None:
        raise KeyboardInterrupt

    service.work = interrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        service.post()
    return caught


@pytest.mark.parametrize("any_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "end",
    [ends_well, raises, fails, is_hung_up_on, raises_in_its_stream, has_no_body, is_interrupted],
)
def test_after_its_end_a_key_is_not_in_flight(
    end: Callable[[Service], object], service: Service, any_url: str
) -> None:
    """However a request ended, and whatever is kept of it, the next one is not refused for it."""
    kept = end(service)
    service.work, service.inner, service.status = bool, service.create, "201 Created"
    assert code(service.post()) == 201
    del kept


@pytest.mark.parametrize("any_url", ["sqlite"], indirect=True)
def test_a_sent_response_need_not_be_closed(service: Service, any_url: str) -> None:
    """A client that has all of it may repeat, before its server closes the body."""
    service.inner = stream(b"one")
    server = Server(service.app)
    assert [*server.begin(post())] == [b"one"]
    repeat = service.post()
    server.finish()
    assert (repeat.content, service.calls) == (b"one", 1)


@pytest.mark.parametrize("any_url", ["sqlite"], indirect=True)
def test_a_response_that_was_lost_is_not_in_flight(
    service: Service, any_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that a server neither sent nor closed is forgotten when it is collected."""
    service.inner = stream(b"one", b"two")
    server: Server | None = Server(service.app)
    assert server is not None
    next(server.begin(post()))
    del server
    gc.collect()
    assert len(service.once.running) == 0
    service.inner = service.create
    assert code(service.post()) == 201


# In the database.


def test_a_rival_of_another_process_waits(services: Callable[[], Service]) -> None:
    """It waits for the first in the database, and gets the same response."""
    first, second = services(), services()
    with Held(first) as held, Rivals([second]) as rivals:
        reply = held.end()
        assert is_replay(rivals.end()[0], reply)
    assert (first.calls, second.calls) == (1, 0)
    assert names(bind_of(first)) == [reply.content.decode()]


def test_a_rival_with_another_request_waits(services: Callable[[], Service]) -> None:
    """It is compared with what was carried out, and refused."""
    with Held(services()) as held, Rivals([services()], body=b"other") as rivals:
        held.end()
        assert [code(reply) for reply in rivals.end()] == [422]


SOON = {
    "postgresql": ["SET lock_timeout = 100", "SET statement_timeout = 100"],
    "mariadb": ["SET innodb_lock_wait_timeout = 1", "SET max_statement_time = 0.1"],
}


class Impatient:
    """An engine that does not wait for long while a block runs.

    Not always: what a busy machine takes long for is ended by the same settings.
    """

    def __init__(self, url: str, setting: str) -> None:
        self.engine = make_engine(url)
        self.setting = setting

    def __enter__(self) -> None:
        with self.engine.connect() as connection:  # the one that the pool lends next
            connection.exec_driver_sql(self.setting)
            connection.commit()

    def __exit__(self, *_exc_info: object) -> None:
        self.engine.dispose()


@pytest.fixture(params=[(name, soon) for name, each in SOON.items() for soon in each], ids=str)
def impatient(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Impatient]]:
    """An engine that waits and one that may not wait for long."""
    name, setting = request.param
    url = request.getfixturevalue(f"{name}_url")
    with prepared(make_engine(url)) as patient:
        made = Impatient(url, setting)
        yield patient, made
        made.engine.dispose()


def test_a_rival_that_waited_too_long(impatient: tuple[Engine, Impatient]) -> None:
    """The database's own timeout ends it as a 409 with Retry-After, and nothing is executed."""
    engine, impatience = impatient
    first, second = Service(engine), Service(impatience.engine)
    with Held(first) as held:
        with impatience:
            refused = second.post()
        assert (code(refused), dict(refused.headers)["Retry-After"]) == (409, "1")
        reply = held.end()
    assert is_replay(second.post(), reply)
    assert second.calls == 0


def test_a_rollback_and_then_a_rival_that_takes_long(impatient: tuple[Engine, Impatient]) -> None:
    """If the view rolls back and a rival still runs at its end, that is the same 409."""
    engine, impatience = impatient
    first, second = Service(engine), Service(impatience.engine)
    with ExitStack() as stack:
        held: list[Held] = []

        def work(session: Session) -> None:
            session.rollback()
            held.append(stack.enter_context(Held(first)))
            stack.enter_context(impatience)

        second.work = work
        refused = second.post()
        assert (code(refused), dict(refused.headers)["Retry-After"]) == (409, "1")
        reply = held[0].end()
    assert is_replay(second.post(), reply)
    assert names(engine) == [reply.content.decode()]


@pytest.mark.parametrize("any_url", ["postgresql", "mariadb"], indirect=True)
def test_another_error_of_the_claim_is_raised(services: Callable[[], Service]) -> None:
    """Where the row cannot be inserted the error is raised on, and nothing is executed."""
    service = services()
    keys.drop(bind_of(service))
    with pytest.raises(DBAPIError):
        service.post()
    keys.create(bind_of(service))
    assert service.calls == 0


def test_four_at_once_of_which_the_first_fails(leveled: Callable[[], Engine]) -> None:
    """Of those that waited exactly one executes, and the others get its response."""
    first, *others = (Service(leveled(), sessions={"attempts": 5}) for _ in range(4))
    first.status = "500 Internal Server Error"
    with Held(first) as held, Rivals(others) as rivals:
        assert code(held.end()) == 500
        replies = rivals.end()
    assert {code(reply) for reply in replies} <= {201, 409}
    succeeded = {reply.content for reply in replies if code(reply) == 201}
    assert [name.encode() for name in names(leveled()) if name] == [*succeeded]
    assert sum(other.calls for other in others) == 1
    assert len(rows(leveled())) == 1


# At the others a reader keeps the rival from writing.
@pytest.mark.parametrize(
    "leveled",
    [name for name in LEVEL_IDS if name not in ("mariadb-SERIALIZABLE", "sqlite-immediate")],
    indirect=True,
)
def test_a_layer_outside_may_have_read(leveled: Callable[[], Engine]) -> None:
    """A repeat whose snapshot is older than the row gets the response, at each level."""
    first = Service(leveled())
    replies: list[Reply] = []

    def read_first(once: WSGIApplication) -> WSGIApplication:
        def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            second.registry.scalars(select(Item)).all()
            if not replies:
                meanwhile(lambda: replies.append(first.post()))
            return once(environ, start_response)

        return app

    second = Service(leveled(), around=read_first)
    assert is_replay(second.post(), replies[0])
    assert (second.calls, names(leveled())) == (0, [replies[0].content.decode()])


def test_many_keys_at_once(services: Callable[[], Service]) -> None:
    """Nobody is refused for a key of its own, beside other keys, replays and a purge."""
    service, other = services(), services()
    old = [f"old-{n}" for n in range(10)]
    firsts = [service.post(key) for key in old]
    begun, stop = threading.Event(), threading.Event()

    def purge_all() -> int:
        total = 0
        while not stop.wait(0.01):  # SQLite has no queue: who comes back at once starves others
            total += purge(other.registry, keys, timedelta(0), batch=2)
            begun.set()
        return total

    def new(number: int) -> int:
        return code((service, other)[number % 2].post(f"new-{number}"))

    with ThreadPoolExecutor(6) as threads:
        purging = threads.submit(purge_all)
        try:
            until(lambda: begun.is_set() or purging.done(), "the purge to begin")
            answers = [*threads.map(new, range(60)), *(code(service.post(key)) for key in old)]
        finally:
            stop.set()
        assert purging.result(PATIENCE) > 0
    assert len(firsts) == 10
    assert set(answers) == {201}


@pytest.mark.parametrize("any_url", ["postgresql", "mariadb"], indirect=True)
def test_two_processes_race(services: Callable[[], Service]) -> None:
    """Of two at the same instant one executes; both get its response or a 409, and no error."""
    both = services(), services()
    pairs = in_step(both, 40)
    assert {code(reply) for pair in pairs for reply in pair} <= {201, 409}
    contents = [{reply.content for reply in pair if code(reply) == 201} for pair in pairs]
    assert {len(each) for each in contents} == {1}
    assert {name.encode() for name in names(bind_of(both[0])) if name} == set().union(*contents)
    assert sum(service.calls for service in both) >= 40
    assert len(names(bind_of(both[0]))) == len(rows(bind_of(both[0]))) == 40
