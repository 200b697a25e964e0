"""Requests through PgBouncer, which lends them a connection to PostgreSQL per transaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
from conflicts import Request, Work
from conftest import running
from databases import PgBouncer, pgbouncer
from links import Cut, Link, linked
from sessionscope import CommitOutcomeUnknown, TransactionDoomed
from sessionscope.engines import make_reader
from sqlalchemy import Engine, create_engine, insert
from sqlalchemy import text as sql
from sqlalchemy.exc import IntegrityError, InternalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, Pool, QueuePool
from support import names

import middleware
from models import Item


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "RETRY_PAUSE", 0.0)


@pytest.fixture(scope="module")
def behind(postgresql_url: str) -> Iterator[Link]:
    """The link between PgBouncer and the server."""
    with linked(postgresql_url) as link:
        yield link


@pytest.fixture(scope="module")
def bouncer(behind: Link) -> Iterator[PgBouncer]:
    yield from running("PgBouncer", pgbouncer(behind.url))


@pytest.fixture(scope="module")
def before(bouncer: PgBouncer) -> Iterator[Link]:
    """The link between the application and PgBouncer."""
    with linked(bouncer.url) as link:
        yield link


@pytest.fixture
def links(before: Link, behind: Link) -> Iterator[dict[str, Link]]:
    """Both links, whole again at the end."""
    yield {"before": before, "behind": behind}
    before.cut = behind.cut = None


@pytest.fixture
def outside(postgresql: Engine) -> Engine:
    """The tables, and an engine that goes past PgBouncer to see what is durable."""
    return postgresql


@pytest.fixture(params=[NullPool, QueuePool], ids=["no-pool", "pool"])
def engine(
    request: pytest.FixtureRequest, links: dict[str, Link], outside: Engine
) -> Iterator[Engine]:
    """An engine for PgBouncer, which prepares no statement on a connection that is lent."""
    pool: type[Pool] = request.param
    url, options = links["before"].url, {"prepare_threshold": None}
    made = create_engine(url, poolclass=pool, connect_args=options)
    yield made
    made.dispose()


def add(session: Session, attempt: int) -> None:
    session.execute(insert(Item).values(name=f"attempt {attempt}"))


def action(request: Request) -> str:
    (outcome,) = request.outcomes
    return outcome.action


def test_the_status_decides(engine: Engine, outside: Engine) -> None:
    """A 409 leaves nothing, and the 200 after it commits on the same connection of the server."""
    Request(engine, add, status="409 Conflict").send()
    Request(engine, add).send()
    assert names(outside) == ["attempt 1"]


def test_a_swallowed_error_is_no_success(engine: Engine, outside: Engine) -> None:
    """A doomed transaction is known as one, and the next client is lent a sound connection."""

    def work(session: Session, attempt: int) -> None:
        add(session, attempt)
        with suppress(IntegrityError):
            session.execute(sql("INSERT INTO debts VALUES (1, 1), (1, 1)"))

    with pytest.raises(TransactionDoomed):
        Request(engine, work).send()
    Request(engine, add).send()
    assert names(outside) == ["attempt 1"]


def test_a_conflict_is_repeated(engine: Engine, outside: Engine) -> None:
    """An error that says "try again" is seen as one."""

    def work(session: Session, attempt: int) -> None:
        add(session, attempt)
        if attempt == 1:
            session.execute(sql("DO $$ BEGIN RAISE USING ERRCODE = '40001'; END $$"))

    Request(engine, work).send()
    assert names(outside) == ["attempt 2"]


def test_a_server_that_was_lost_is_replaced(engine: Engine, outside: Engine) -> None:
    """A connection that the server ended before COMMIT was sent costs an attempt."""

    def work(session: Session, attempt: int) -> None:
        add(session, attempt)
        if attempt == 1:
            session.execute(sql("SELECT pg_terminate_backend(pg_backend_pid())"))

    Request(engine, work).send()
    assert names(outside) == ["attempt 2"]


CUTS: list[Cut] = ["before it arrives", "before its answer"]

at_each_link = pytest.mark.parametrize("where", ["before", "behind"])


@at_each_link
@pytest.mark.parametrize("cut", CUTS)
def test_a_commit_whose_answer_was_lost_is_unknown(
    cut: Cut, where: str, engine: Engine, links: dict[str, Link]
) -> None:
    """Whichever of the two connections is cut in COMMIT, the outcome is unknown."""
    request = Request(engine, mending(links))
    engine.connect().close()
    links[where].cut = cut
    with pytest.raises(CommitOutcomeUnknown):
        request.send()
    assert (action(request), request.calls) == ("unknown", 1)


def mending(links: dict[str, Link]) -> Work:
    """Add an item; at the second attempt nothing is cut any more."""

    def work(session: Session, attempt: int) -> None:
        if attempt == 2:
            links["before"].cut = links["behind"].cut = None
        add(session, attempt)

    return work


@at_each_link
@pytest.mark.parametrize(("cut", "calls"), [("before it arrives", 2), ("before its answer", 1)])
def test_postgresql_is_asked_through_it(
    cut: Cut, calls: int, where: str, engine: Engine, links: dict[str, Link], outside: Engine
) -> None:
    """With confirm a COMMIT that was done is a success, and one that was not is made again."""
    request = Request(engine, mending(links), confirm=True)
    links[where].cut = cut
    request.send()
    assert (action(request), request.calls) == ("commit", calls)
    assert names(outside) == [f"attempt {calls}"]


def test_a_reader_needs_a_name_of_its_own(
    engine: Engine, links: dict[str, Link], outside: Engine
) -> None:
    """A reader that has its own database in PgBouncer cannot write, and keeps nobody from it."""
    reader = make_reader(links["before"].url.set(database="reader"))
    assert reader is not None
    with pytest.raises(InternalError, match="read-only"):
        Request(reader, add).send()
    Request(engine, add).send()
    reader.dispose()
    assert names(outside) == ["attempt 1"]
