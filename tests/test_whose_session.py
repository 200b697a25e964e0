"""Whose session is in the registry: nested, leaked, removed and broken ones."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from warnings import catch_warnings, simplefilter

import pytest
from sessionscope import SessionMiddleware, TransactionDoomed, session_scope
from sessionscope.engines import make_engine
from sqlalchemy import Engine, event, insert, select
from sqlalchemy import text as sql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import Server, environ, in_thread, names, serve_once, text

from models import Item

Registry = scoped_session[Session]


def test_the_registry_is_empty_outside_the_apps_code(registry: Registry) -> None:
    """Between two chunks, and while the head is sent, the registry holds nothing."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        assert registry() is environ["sessionscope.session"]
        yield b"one"
        assert registry() is environ["sessionscope.session"]
        yield b"two"

    class Watching(Server):
        def start_response(self, status: str, headers: Any, exc_info: Any = None, /) -> Any:
            assert not registry.registry.has()
            return super().start_response(status, headers, exc_info)

    server = Watching(SessionMiddleware(app, registry))
    for _ in server.begin():
        assert not registry.registry.has()
    server.finish()


@pytest.mark.parametrize("status", ["200 OK", "404 No"])
def test_an_override_of_close_that_uses_the_registry_leaves_nothing_in_it(
    status: str, engine: Engine
) -> None:
    """A close() of the user's own finds the request's session there, and starts no other one."""
    seen: list[bool] = []

    class Curious(Session):
        def close(self) -> None:
            seen.append(registry() is self)
            super().close()

    registry: Registry = scoped_session(sessionmaker(engine, class_=Curious))
    app = text(b"", status=status, before=lambda: write(registry))
    serve_once(SessionMiddleware(app, registry))
    assert (seen, registry.registry.has()) == ([True], False)


def test_a_wrap_inside_a_wrap_joins(registry: Registry, outside: Engine) -> None:
    """The outermost middleware owns the session; the one within it does nothing."""
    seen = []

    def app(environ: Any, start_response: Any) -> Any:
        seen.append(registry())
        return text(b"", before=lambda: registry.add(Item(name="kept")))(environ, start_response)

    def outer(environ: Any, start_response: Any) -> Any:
        seen.append(registry())
        body = inner(environ, start_response)
        assert names(outside) == []
        return body

    inner = SessionMiddleware(app, registry, commit_when=lambda *_: False)
    serve_once(SessionMiddleware(outer, registry))
    assert seen[0] is seen[1]
    assert names(outside) == ["kept"]


def test_a_sub_request_with_an_environ_of_its_own_joins(
    registry: Registry, outside: Engine
) -> None:
    """A request made while another runs in the same thread works in that one's session."""

    def sub(environ: Any, start_response: Any) -> Any:
        assert environ["sessionscope.session"] is registry()
        registry.add(Item(name="sub"))
        start_response("404 Not Found", [])
        return [b""]

    application = SessionMiddleware(sub, registry)

    def main() -> None:
        registry.add(Item(name="main"))
        assert serve_once(application, environ("GET", "/sub")).status == "404 Not Found"

    serve_once(SessionMiddleware(text(b"", before=main), registry))
    assert names(outside) == ["main", "sub"]


def test_a_request_in_another_thread_is_one_of_its_own(registry: Registry) -> None:
    """A request that the application makes in another thread has a session of its own."""
    seen = []
    shared = scoped_session(registry.session_factory, scopefunc=lambda: "everyone")
    application = SessionMiddleware(text(b"", before=lambda: seen.append(shared())), shared)

    def main() -> None:
        seen.append(shared())
        in_thread(lambda: serve_once(application))
        seen.append(shared())

    serve_once(SessionMiddleware(text(b"", before=main), shared))
    assert seen[0] is seen[2]
    assert seen[0] is not seen[1]
    assert not shared.registry.has()


def test_another_session_in_the_registry_is_set_aside_and_put_back(
    registry: Registry, outside: Engine
) -> None:
    """A session that was there before is untouched by the request, and there again after it."""
    before = registry()
    before.add(Item(name="pending"))
    seen = []
    serve_once(SessionMiddleware(text(b"", before=lambda: seen.append(registry())), registry))
    assert registry() is before
    assert seen[0] is not before
    assert [item.name for item in before.new] == ["pending"]
    assert names(outside) == []
    registry.remove()


def test_a_request_inside_a_scope_is_one_of_its_own(registry: Registry, outside: Engine) -> None:
    """A session that a session_scope runs is set aside too."""
    with session_scope(registry) as scoped:
        inside: list[Session] = []
        serve_once(SessionMiddleware(text(b"", before=lambda: inside.append(registry())), registry))
        assert registry() is scoped
    assert inside != [scoped]


def test_a_request_does_not_close_the_session_of_a_scope(
    registry: Registry, outside: Engine
) -> None:
    """A request that leaves the session of a scope in its own's place lets it live."""
    with session_scope(registry) as scoped:
        scoped.add(Item(name="scoped"))
        app = text(b"", before=lambda: registry.registry.set(scoped))
        serve_once(SessionMiddleware(app, registry))
    assert names(outside) == ["scoped"]


def test_different_registries_are_independent(
    registry: Registry, engine: Engine, outside: Engine, sqlite_url: str
) -> None:
    """Two middlewares with two registries make two COMMITs."""
    second_engine = make_engine(f"{sqlite_url}-2")
    Item.metadata.create_all(second_engine)
    second = scoped_session(sessionmaker(second_engine))

    def work() -> None:
        registry.add(Item(name="one"))
        second.add(Item(name="two"))

    serve_once(SessionMiddleware(SessionMiddleware(text(b"", before=work), second), registry))
    assert (names(outside), names(second_engine)) == (["one"], ["two"])
    second_engine.dispose()


# Work that the application threw away.


def write(registry: Registry) -> None:
    registry.execute(insert(Item).values(name="gone"))


def add(registry: Registry) -> None:
    registry.add(Item(name="gone"))


@pytest.mark.parametrize("work", [write, add])
@pytest.mark.parametrize("throw", [lambda r: r().close(), lambda r: r().invalidate()])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_work_that_was_thrown_away_is_no_success(
    method: str,
    throw: Callable[[Registry], object],
    work: Callable[[Registry], object],
    registry: Registry,
    outside: Engine,
) -> None:
    """Closing a session that holds work is doomed, and the message names the line."""

    def both() -> None:
        work(registry)
        throw(registry)

    with pytest.raises(TransactionDoomed, match=r"test_whose_session\.py:\d+ closed the session"):
        serve_once(SessionMiddleware(text(b"", before=both), registry), environ(method))
    assert names(outside) == []


def add_and_flush(registry: Registry) -> None:
    add(registry)
    registry.flush()


@pytest.mark.parametrize("work", [add, add_and_flush, write])
def test_written_objects_thrown_away_by_a_safe_method_are_no_success(
    work: Callable[[Registry], object], registry: Registry
) -> None:
    """A GET that threw away objects, flushed or not, or what Core had written is doomed too."""

    def both() -> None:
        work(registry)
        registry().close()

    with pytest.raises(TransactionDoomed):
        serve_once(SessionMiddleware(text(b"", before=both), registry))


@pytest.mark.parametrize("attempts", [1, 2])
@pytest.mark.parametrize("query", ["SELECT 1", "/* a */ -- b\n SELECT 1", "SELECT(1)"])
def test_a_read_thrown_away_by_a_safe_method_is_warned_of_once(
    attempts: int, query: str, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """A GET that only read before the session was closed succeeds, with one warning."""

    def both() -> None:
        registry.execute(sql(query))
        registry().close()

    application = SessionMiddleware(text(b"fine", before=both), registry, attempts=attempts)
    for _ in range(3):
        assert serve_once(application).status == "200 OK"
    assert caplog.text.count("closed the session while a transaction was open that had only") == 1


def test_what_was_thrown_away_does_not_matter_to_a_failure(registry: Registry) -> None:
    """A response that rolls back anyway is not affected by a session thrown away."""

    def both() -> None:
        write(registry)
        registry.remove()

    app = text(b"", status="400 Bad Request", before=both)
    assert serve_once(SessionMiddleware(app, registry), environ("POST")).status == "400 Bad Request"


@pytest.mark.parametrize(
    "end", [lambda registry: registry.commit(), lambda registry: registry.rollback()]
)
def test_a_session_removed_after_its_own_commit_or_rollback_is_fine(
    end: Callable[[Registry], object], registry: Registry
) -> None:
    """The hand-written recipe, commit or rollback and then remove, throws nothing away."""

    def work() -> None:
        write(registry)
        end(registry)
        registry.remove()

    reply = serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    assert reply.status == "200 OK"


def test_a_rollback_does_not_make_up_for_work_thrown_away_before(registry: Registry) -> None:
    """Work lost by close() stays lost when later work is rolled back."""

    def work() -> None:
        write(registry)
        registry.close()
        write(registry)
        registry.rollback()

    with pytest.raises(TransactionDoomed):
        serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))


def test_work_after_remove_is_kept(
    registry: Registry, outside: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """An application that removes the session and works on is still in the same session."""

    def work() -> None:
        write(registry)
        registry.remove()
        write(registry)

    for _ in range(2):
        serve_once(app := SessionMiddleware(text(b"", before=work), registry), environ("POST"))
        serve_once(app, environ("POST"))
    assert names(outside) == ["gone"] * 8
    assert len(re.findall(r"test_whose_session\.py:\d+ removed a session", caplog.text)) == 2


def fail_and_remove(registry: Registry) -> None:
    """Swallow the error of a flush, and then remove the session, as teardowns do."""
    registry.add(Item(id=1, name="first"))
    registry.flush()
    registry.add(Item(id=1, name="twice"))
    with suppress(IntegrityError), catch_warnings():
        simplefilter("ignore")
        registry.flush()
    registry.remove()


def test_remove_after_an_error_rolls_back(registry: Registry, outside: Engine) -> None:
    """remove() after a failed flush lets the application go on, as by hand."""

    def work() -> None:
        fail_and_remove(registry)
        registry.add(Item(id=1, name="second"))

    serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    assert names(outside) == ["second"]


def test_remove_after_an_error_that_another_layer_began(engine: Engine, outside: Engine) -> None:
    """So it does where a layer outside used environ["sessionscope.session"] first."""
    registry = scoped_session(sessionmaker(engine), scopefunc=threading.get_ident)

    def view() -> None:
        fail_and_remove(registry)
        registry.add(Item(id=1, name="second"))

    def authenticate(environ: Any, start_response: Any) -> Any:
        environ["sessionscope.session"].execute(select(Item))
        return text(b"", before=view)(environ, start_response)

    serve_once(SessionMiddleware(authenticate, registry), environ("POST"))
    assert names(outside) == ["second"]


def test_remove_after_an_error_is_no_success_by_itself(registry: Registry, outside: Engine) -> None:
    """A failed flush that was swallowed stays one when a teardown removes the session."""

    def work() -> None:
        fail_and_remove(registry)

    with pytest.raises(TransactionDoomed) as caught:
        serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert names(outside) == []


def test_a_session_that_took_the_place_and_is_done_is_removed(
    registry: Registry, outside: Engine
) -> None:
    """What an application commits in a session of its own stands, and that session goes too."""

    def work() -> None:
        registry.remove()
        registry.add(Item(name="kept"))
        registry.commit()

    serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    assert names(outside) == ["kept"]
    assert not registry.registry.has()


@pytest.mark.parametrize("thrown", [True, False])
def test_a_scope_that_changes_inside_the_app_does_not_matter(
    thrown: bool, engine: Engine, outside: Engine
) -> None:
    """Whatever the scope of the registry is, the request's code finds its session."""
    scope = ["server"]
    registry = scoped_session(sessionmaker(engine), scopefunc=lambda: scope[0])

    def app(environ: Any, start_response: Any) -> Any:
        scope[0] = "app"
        write(registry)
        start_response("200 OK", [])
        if thrown:
            registry.remove()
            scope[0] = "server"
        return [b"fine"]

    serve_once(SessionMiddleware(app, registry), environ("POST"))
    assert names(outside) == ["gone"]


# Sessions that break, and factories of every kind.


class Broken(Exception):
    """The driver's own complaint."""


def test_a_session_that_cannot_be_closed_leaves_nothing_behind(
    registry: Registry, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """When ROLLBACK fails, the session is out of the registry and its connection is back."""

    def work() -> None:
        write(registry)
        event.listen(engine, "rollback", refuse, once=True)

    def refuse(connection: object) -> None:
        raise Broken

    app = text(b"", status="404 Not Found", before=work)
    assert serve_once(SessionMiddleware(app, registry)).status == "404 Not Found"
    assert "ROLLBACK failed" in caplog.text
    assert not registry.registry.has()
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert names(engine) == []


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_connections_that_sqlalchemy_failed_to_close_are_discarded(
    streamed: bool, engine: Engine, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When ROLLBACK fails on each of two connections, neither stays out of its pool."""
    second = make_engine(f"{sqlite_url}-2")
    Item.metadata.create_all(second)
    registry: Registry = scoped_session(sessionmaker())

    def refuse(connection: object) -> None:
        raise Broken

    def work() -> None:
        for each in (engine, second):
            registry.connection(bind_arguments={"bind": each})
            event.listen(each, "rollback", refuse)

    def app(environ: Any, start_response: Any) -> Any:
        body = text(b"", status="404 Not Found", before=work)(environ, start_response)
        return iter(body) if streamed else body

    serve_once(SessionMiddleware(app, registry))
    assert "ROLLBACK failed" in caplog.text
    assert "This Connection is closed" not in caplog.text
    assert [each.pool.checkedout() for each in (engine, second)] == [0, 0]  # type: ignore[attr-defined]
    for each in (engine, second):
        event.remove(each, "rollback", refuse)
    second.dispose()


def test_a_session_whose_close_raises_leaves_nothing_behind(
    engine: Engine, outside: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A session class whose close() raises is logged, and the response stands."""

    class Stubborn(Session):
        def close(self) -> None:
            raise Broken

    registry: Registry = scoped_session(sessionmaker(engine, class_=Stubborn))
    app = text(b"fine", before=lambda: registry.add(Item(name="kept")))
    assert serve_once(SessionMiddleware(app, registry)).content == b"fine"
    assert "a session could not be closed" in caplog.text
    assert not registry.registry.has()
    assert names(outside) == ["kept"]


@pytest.mark.parametrize(
    "options",
    [
        {"autobegin": False},
        {"close_resets_only": False},
        {"expire_on_commit": False},
        {"autoflush": False},
        {"info": {"mine": 1}},
    ],
    ids=str,
)
@pytest.mark.parametrize("streamed", [True, False])
def test_any_kind_of_session_is_committed(
    options: dict[str, Any], streamed: bool, engine: Engine, outside: Engine
) -> None:
    """Whatever options the factory gives a session, it is committed and removed."""
    registry = scoped_session(sessionmaker(engine, **options))

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            work()
            yield b"body"

        def close(self) -> None:
            if options.get("autobegin") is False:
                registry.begin()
            assert registry.scalar(select(Item.name)) == "kept"

    def work() -> None:
        if options.get("autobegin") is False:
            registry.begin()
        registry.add(Item(name="kept"))

    def app(environ: Any, start_response: Any) -> Any:
        if not streamed:
            return text(b"body", before=work)(environ, start_response)
        start_response("200 OK", [])
        return Body()

    assert serve_once(SessionMiddleware(app, registry)).content == b"body"
    assert names(outside) == ["kept"]
    assert not registry.registry.has()


def test_a_plain_function_may_be_the_factory(engine: Engine, outside: Engine) -> None:
    """Any callable that gives a Session will do as the registry's factory."""
    factory: Any = lambda: Session(engine)  # noqa: E731
    registry: Registry = scoped_session(factory)
    serve_once(SessionMiddleware(text(b"", before=lambda: registry.add(Item(name="x"))), registry))
    assert names(outside) == ["x"]


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("create_savepoint", ["kept"]), ("rollback_only", ["kept"]), ("control_fully", ["kept"])],
)
def test_a_session_bound_to_a_connection_joins_its_transaction(
    mode: Any, kept: list[str], engine: Engine
) -> None:
    """On a Connection with a transaction of its own the session joins that transaction."""
    with engine.connect() as connection:
        connection.begin()
        connection.execute(sql("SELECT 1"))
        registry = scoped_session(sessionmaker(connection, join_transaction_mode=mode))
        serve_once(
            SessionMiddleware(text(b"", before=lambda: registry.add(Item(name="kept"))), registry)
        )
        assert connection.scalars(select(Item.name)).all() == kept


def test_reads_that_one_line_throws_away_are_warned_of_once(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """A line of a safe method that closes the session again and again makes one warning."""

    def work() -> None:
        for _ in range(2):
            registry.execute(select(Item))
            registry().close()

    serve_once(SessionMiddleware(text(b"", before=work), registry))
    assert caplog.text.count("closed the session") == 1


def test_a_connection_of_the_user_is_never_discarded(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """When a session on a user's Connection can be neither rolled back nor closed, that stays."""

    class Clinging(Session):
        def close(self) -> None:
            raise Broken

        def rollback(self) -> None:
            raise Broken

    with engine.connect() as connection:
        registry: Registry = scoped_session(sessionmaker(connection, class_=Clinging))
        app = text(b"", status="404 No", before=lambda: write(registry))
        serve_once(SessionMiddleware(app, registry))
        assert not connection.closed
    assert "ROLLBACK failed" in caplog.text
