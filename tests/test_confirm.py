"""What became of a COMMIT whose answer was lost, where PostgreSQL can be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from links import Link, linked
from sessionscope import (
    CommitOutcomeUnknown,
    Outcome,
    SessionMiddleware,
    TransactionDoomed,
    confirm,
    on_commit,
)
from sessionscope.engines import make_engine
from sqlalchemy import Engine, create_engine, event
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import environ, make_tables, names, serve_once, text

from models import Item

Registry = scoped_session[Session]


@pytest.fixture
def outside(postgresql: Engine) -> Engine:
    """A connection of its own to the server, with the tables."""
    return postgresql


@pytest.fixture
def link(postgresql_url: str, outside: Engine) -> Iterator[Link]:
    with linked(postgresql_url) as made:
        yield made


@pytest.fixture
def engine(link: Link) -> Iterator[Engine]:
    """An engine with a single connection, which runs over the link."""
    made = create_engine(link.url, pool_size=1, max_overflow=0, pool_timeout=20)
    yield made
    assert made.pool.checkedout() == 0  # type: ignore[attr-defined]
    made.dispose()


class Post:
    """A request that creates an item, and all that is seen of it."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.registry: Registry = scoped_session(sessionmaker(engine))
        self.outcomes: list[Outcome] = []
        self.calls = self.callbacks = 0
        app = text(b"fine", before=self.work)
        options = {"confirm": True, "observer": self.outcomes.append, **options}
        self.app = SessionMiddleware(app, self.registry, **options)

    def work(self) -> None:
        self.calls += 1
        self.registry.add(Item(name=f"call {self.calls}"))
        on_commit(self.registry, self.called_back)

    def called_back(self) -> None:
        self.callbacks += 1

    def send(self) -> bytes:
        return serve_once(self.app, environ("POST")).content

    @property
    def action(self) -> str:
        (outcome,) = self.outcomes
        return outcome.action


def mend_when_lost(engine: Engine, link: Link) -> None:
    """Have the link whole again when the engine has lost its connection."""

    @event.listens_for(engine, "invalidate")
    def mend(*_: Any) -> None:
        link.cut = None


def statements(engine: Engine) -> list[str]:
    """All that the engine sends from now on."""
    sent: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_1: Any, _2: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    return sent


def test_a_commit_whose_answer_was_lost_is_a_success(
    engine: Engine, link: Link, outside: Engine
) -> None:
    """Where the server says committed, the client gets its 200, and callbacks run once."""
    post = Post(engine, attempts=3)
    link.cut = "before its answer"
    assert post.send() == b"fine"
    assert names(outside) == ["call 1"]
    assert (post.action, post.calls, post.callbacks) == ("commit", 1, 1)


def test_a_commit_that_never_arrived_is_a_failure(
    engine: Engine, link: Link, outside: Engine
) -> None:
    """Where the server says aborted, the driver's error is raised and nothing is unknown."""
    post = Post(engine)
    link.cut = "before it arrives"
    with pytest.raises(OperationalError):
        post.send()
    assert names(outside) == []
    assert (post.action, post.callbacks) == ("rollback", 0)


def test_a_commit_that_never_arrived_is_made_again(
    engine: Engine, link: Link, outside: Engine
) -> None:
    """What is known to be aborted may be tried again, and has one effect."""
    post = Post(engine, attempts=2)
    link.cut = "before it arrives"
    mend_when_lost(engine, link)
    assert post.send() == b"fine"
    assert names(outside) == ["call 2"]
    assert (post.action, post.calls, post.callbacks) == ("commit", 2, 1)


@pytest.fixture
def slow_commit(outside: Engine) -> Iterator[Callable[[], object]]:
    """COMMIT of an item waits until the fixture is called."""
    lock = "pg_advisory{}(4711)"
    with outside.begin() as connection:
        connection.execute(
            sql(
                "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
                f"'BEGIN PERFORM {lock.format('_xact_lock_shared')}; RETURN NULL; END'"
            )
        )
        connection.execute(
            sql(
                "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON items DEFERRABLE INITIALLY "
                "DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()"
            )
        )
    with outside.connect() as holder:
        holder.execute(sql(f"SELECT {lock.format('_xact_lock')}"))
        yield holder.rollback
        holder.rollback()
    with outside.begin() as connection:
        connection.execute(sql("DROP FUNCTION wait CASCADE"))


def test_a_commit_in_progress_is_asked_for_again(
    engine: Engine, link: Link, outside: Engine, slow_commit: Callable[[], object]
) -> None:
    """While COMMIT still runs on the server, the question is put again until it has ended."""
    post = Post(engine)
    sent = statements(engine)
    link.cut = "while it runs"

    @event.listens_for(engine, "after_cursor_execute")
    def release(*_: Any) -> None:
        if sum("pg_xact_status" in statement for statement in sent) == 2:
            slow_commit()

    assert post.send() == b"fine"
    assert names(outside) == ["call 1"]


def test_a_commit_that_stays_in_progress_is_unknown(
    engine: Engine,
    link: Link,
    slow_commit: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where COMMIT runs on for longer than one may ask, its outcome is unknown."""
    monkeypatch.setattr(confirm, "PATIENCE", 0.2)
    post = Post(engine, attempts=3)
    link.cut = "while it runs"
    with pytest.raises(CommitOutcomeUnknown) as caught:
        post.send()
    assert isinstance(caught.value.__cause__, OperationalError)
    assert (post.action, post.calls, post.callbacks) == ("unknown", 1, 0)


def test_a_server_that_stays_away_leaves_it_unknown(
    engine: Engine, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody can be asked, the outcome is unknown."""
    monkeypatch.setattr(confirm, "PATIENCE", 0.2)
    post = Post(engine, attempts=3)
    link.cut = "before its answer"

    @event.listens_for(engine, "invalidate")
    def go_away(*_: Any) -> None:
        link.target = link.target.set(port=1)

    with pytest.raises(CommitOutcomeUnknown):
        post.send()
    assert (post.action, post.calls) == ("unknown", 1)


@pytest.mark.parametrize(("method", "asked"), [("GET", False), ("POST", True)])
def test_a_read_whose_answer_was_lost_is_unknown(
    method: str, asked: bool, engine: Engine, link: Link
) -> None:
    """That no id was taken proves nothing; a safe method that only read is not even asked."""
    registry: Registry = scoped_session(sessionmaker(engine))
    app = text(b"fine", before=lambda: registry.execute(sql("SELECT 1")))
    sent = statements(engine)
    link.cut = "before it arrives"
    with pytest.raises(CommitOutcomeUnknown):
        serve_once(SessionMiddleware(app, registry, confirm=True), environ(method))
    assert any("pg_current_xact_id_if_assigned" in statement for statement in sent) is asked


def test_without_confirm_nobody_knows(engine: Engine, link: Link) -> None:
    """By default a lost answer is unknown, and nothing is asked before or after."""
    post = Post(engine, confirm=False)
    sent = statements(engine)
    link.cut = "before its answer"
    with pytest.raises(CommitOutcomeUnknown):
        post.send()
    assert [statement.split()[0] for statement in sent] == ["INSERT"]


def test_it_costs_one_statement(engine: Engine) -> None:
    """With confirm one more statement is sent before COMMIT, and none after it."""
    sent = statements(engine)
    assert Post(engine).send() == b"fine"
    assert [statement.split()[0] for statement in sent] == ["INSERT", "SELECT"]


def test_it_costs_nothing_in_autocommit(engine: Engine) -> None:
    """A connection in autocommit has no COMMIT to lose, and is not asked."""
    sent = statements(engine)
    assert Post(engine.execution_options(isolation_level="AUTOCOMMIT")).send() == b"fine"
    assert [statement.split()[0] for statement in sent] == ["INSERT"]


def test_a_savepoint_is_not_asked_for(engine: Engine) -> None:
    """A session that joined an outer transaction has no COMMIT of its own, and is not asked."""
    with engine.connect() as connection, connection.begin():
        post = Post(engine)
        post.registry.configure(bind=connection, join_transaction_mode="create_savepoint")
        sent = statements(engine)
        assert post.send() == b"fine"
        assert [statement.split()[0] for statement in sent] == ["SAVEPOINT", "INSERT", "RELEASE"]


def own_commit(post: Post, *, swallowed: bool) -> Callable[[], None]:
    def work() -> None:
        Post.work(post)
        try:
            post.registry.commit()
        except DBAPIError:
            if not swallowed:
                raise

    return work


def test_an_own_commit_that_was_done_is_not_repeated(
    engine: Engine, link: Link, outside: Engine
) -> None:
    """Where an own COMMIT lost its answer but was done, the error leaves, and is the last."""
    post = Post(engine, attempts=3)
    post.app.app = text(b"", before=own_commit(post, swallowed=False))
    link.cut = "before its answer"
    with pytest.raises(OperationalError):
        post.send()
    assert names(outside) == ["call 1"]
    assert (post.action, post.calls, post.callbacks) == ("commit", 1, 1)


def test_an_own_commit_that_was_not_done_is_repeated(
    engine: Engine, link: Link, outside: Engine
) -> None:
    """Where an own COMMIT never arrived, the request is made again."""
    post = Post(engine, attempts=2)
    post.app.app = text(b"fine", before=own_commit(post, swallowed=False))
    link.cut = "before it arrives"
    mend_when_lost(engine, link)
    assert post.send() == b"fine"
    assert names(outside) == ["call 2"]


def test_an_own_commit_that_was_swallowed_and_done_is_a_success(
    engine: Engine, link: Link, outside: Engine
) -> None:
    """An app that swallowed the loss of its own COMMIT is right where that was done."""
    post = Post(engine)
    post.app.app = text(b"fine", before=own_commit(post, swallowed=True))
    link.cut = "before its answer"
    assert post.send() == b"fine"
    assert names(outside) == ["call 1"]
    assert (post.action, post.callbacks) == ("commit", 1)


def test_an_own_commit_that_was_swallowed_and_not_done_is_doomed(
    engine: Engine, link: Link, outside: Engine
) -> None:
    """An app that swallowed the loss of its own COMMIT gets no success where it never came."""
    post = Post(engine)
    post.app.app = text(b"fine", before=own_commit(post, swallowed=True))
    link.cut = "before it arrives"
    with pytest.raises(TransactionDoomed):
        post.send()
    assert names(outside) == []


def test_an_own_commit_that_was_lost_is_unknown_behind_an_error_page(
    engine: Engine, link: Link
) -> None:
    """An app that swallowed the loss of its own COMMIT, and says so, leaves it unknown."""
    post = Post(engine, confirm=False)
    work = own_commit(post, swallowed=True)
    post.app.app = text(b"", status="503 Service Unavailable", before=work)
    link.cut = "before its answer"
    post.send()
    assert post.action == "unknown"


def test_several_connections_cannot_be_asked_for(
    engine: Engine, link: Link, outside: Engine
) -> None:
    """Of several COMMITs one may have been done before another failed: that stays unknown."""
    post = Post(engine)
    sent = statements(engine)

    def work() -> None:
        Post.work(post)
        post.registry.execute(sql("SELECT 1"), bind_arguments={"bind": outside})

    post.app.app = text(b"", before=work)
    link.cut = "before its answer"
    with pytest.raises(CommitOutcomeUnknown):
        post.send()
    assert not [statement for statement in sent if "pg_" in statement]


def test_an_interrupt_in_commit_is_not_asked_for(engine: Engine, link: Link) -> None:
    """A process that is told to stop in the middle of COMMIT stops, and asks nothing."""
    post = Post(engine)
    sent = statements(engine)

    def stop(connection: object) -> None:
        raise KeyboardInterrupt

    event.listen(engine, "commit", stop, once=True)
    with pytest.raises(KeyboardInterrupt):
        post.send()
    assert post.action == "unknown"
    assert not [statement for statement in sent if "pg_xact_status" in statement]


def test_other_databases_are_not_asked(sqlite_url: str) -> None:
    """On a database that cannot be asked, confirm sends nothing."""
    engine = make_engine(sqlite_url)
    make_tables(engine)
    sent = statements(engine)
    assert Post(engine).send() == b"fine"
    assert [statement.split()[0] for statement in sent] == ["INSERT"]
    engine.dispose()


def test_confirm_is_a_bool(engine: Engine) -> None:
    """Anything but a bool is refused at construction."""
    with pytest.raises(TypeError, match="confirm must be a bool, not 1"):
        Post(engine, confirm=1)


def forgotten_commit(post: Post) -> Callable[[], None]:
    """An own COMMIT that is cut off, rolled back and followed by other work."""

    def work() -> None:
        own_commit(post, swallowed=True)()
        post.registry.rollback()
        post.registry.begin()
        if not post.app.confirm:  # which needs the one connection of the pool to ask
            post.registry.execute(sql("SELECT 1"))

    return work


@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
def test_a_lost_commit_is_not_forgotten(status: str, engine: Engine, link: Link) -> None:
    """Whatever the app does after it lost the answer to its COMMIT, the outcome is unknown."""
    post = Post(engine, confirm=False)
    post.app.app = text(b"", status=status, before=forgotten_commit(post))
    link.cut = "before its answer"
    mend_when_lost(engine, link)
    if status == "200 OK":
        with pytest.raises(CommitOutcomeUnknown):
            post.send()
    else:
        post.send()
    assert post.action == "unknown"


def test_a_lost_commit_that_was_done_is_a_success_later(
    engine: Engine, link: Link, outside: Engine
) -> None:
    """If the server says committed of it, what followed is committed, too."""
    post = Post(engine)
    post.app.app = text(b"fine", before=forgotten_commit(post))
    link.cut = "before its answer"
    mend_when_lost(engine, link)
    assert post.send() == b"fine"
    assert names(outside) == ["call 1"]


def test_a_driver_that_does_not_tell_of_autocommit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dialect that cannot tell whether it is in AUTOCOMMIT is taken for one that is not."""

    def unknown(dialect: object, connection: object) -> bool:
        raise NotImplementedError

    monkeypatch.setattr(type(engine.dialect), "detect_autocommit_setting", unknown)
    sent = statements(engine)
    assert Post(engine).send() == b"fine"
    assert [statement.split()[0] for statement in sent] == ["INSERT", "SELECT"]
