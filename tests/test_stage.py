"""The session of a request follows its code: into tasks, threads, greenlets and scopes."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import flask
import greenlet
import pytest
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import Model
from sessionscope import SessionMiddleware, TransactionDoomed, session_scope
from sessionscope.testing import isolated
from sqlalchemy import Engine, insert, select
from sqlalchemy.orm import Mapped, Session, mapped_column, scoped_session, sessionmaker
from support import PATIENCE, Server, environ, in_thread, names, serve_once, text
from webtest import TestApp

from models import Item

Registry = scoped_session[Session]


def add(registry: Registry, name: str) -> Session:
    registry.execute(insert(Item).values(name=name))
    return registry()


# Asynchronous views.


@pytest.fixture
def app(registry: Registry) -> flask.Flask:
    made = flask.Flask(__name__)
    made.wsgi_app = SessionMiddleware(made.wsgi_app, registry)  # type: ignore[method-assign]
    return made


def test_an_async_view_of_flask_commits(
    app: flask.Flask, registry: Registry, outside: Engine
) -> None:
    """An async view, which asgiref runs in another thread, has the request's session."""

    @app.post("/")
    async def create() -> str:
        await asyncio.sleep(0)
        add(registry, "kept")
        return "ok"

    TestApp(app).post("/")
    assert names(outside) == ["kept"]


def test_an_async_view_that_refuses_rolls_back(
    app: flask.Flask, registry: Registry, outside: Engine
) -> None:
    """A 409 of an async view takes its work back."""

    @app.post("/")
    async def create() -> tuple[str, int]:
        add(registry, "gone")
        return "no", 409

    TestApp(app).post("/", status=409)
    assert names(outside) == []


def test_async_hooks_and_error_handlers_have_the_session(
    app: flask.Flask, registry: Registry, outside: Engine
) -> None:
    """Async hooks and an async error handler of Flask work in the same session."""
    seen: list[Session] = []

    @app.before_request
    async def before() -> None:
        seen.append(add(registry, "before"))

    @app.errorhandler(LookupError)
    async def handle(error: LookupError) -> tuple[str, int]:
        seen.append(add(registry, "handler"))
        return "handled", 200

    @app.post("/")
    async def create() -> str:
        seen.append(registry())
        raise LookupError

    TestApp(app).post("/")
    assert len(set(map(id, seen))) == 1
    assert names(outside) == ["before", "handler"]


def test_eight_async_reads_leave_no_connection_out(
    app: flask.Flask, registry: Registry, engine: Engine
) -> None:
    """Async views return their connections, however many there are."""

    @app.get("/")
    async def read() -> str:
        return str(len(registry.query(Item).all()))

    client = TestApp(app)
    assert [client.get("/").text for _ in range(8)] == ["0"] * 8
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


DJANGO = """
import asyncio
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path
from sessionscope import SessionMiddleware
from sqlalchemy import create_engine, insert, orm, text
from support import environ, serve_once

engine = create_engine("sqlite:///{file}")
with engine.begin() as connection:
    connection.execute(text("CREATE TABLE made (name TEXT)"))
Session = orm.scoped_session(orm.sessionmaker(engine))

async def create(request):
    await asyncio.sleep(0)
    Session.execute(text("INSERT INTO made VALUES ('view')"))
    return HttpResponse("ok")

async def chunks():
    yield b"one"
    Session.execute(text("INSERT INTO made VALUES ('stream')"))
    yield b"two"

async def stream(request):
    return StreamingHttpResponse(chunks())

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], USE_TZ=True, SECRET_KEY="x")
urlpatterns = [path("create", create), path("stream", stream)]
application = SessionMiddleware(get_wsgi_application(), Session)
print(serve_once(application, environ("GET", "/create")).content)
import warnings
warnings.simplefilter("ignore")  # Django warns that it turns the asynchronous body into a list
print(serve_once(application, environ("GET", "/stream")).content)
with engine.connect() as connection:
    print(sorted(connection.scalars(text("SELECT name FROM made"))), engine.pool.checkedout() - 1)
engine.dispose()
"""


def test_async_views_and_streams_of_django_commit(tmp_path: Path) -> None:
    """Django's async views, and async generators that it streams, have the request's session."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", DJANGO.replace("{file}", str(tmp_path / "items.db"))],
        env={"PYTHONPATH": f"{here}:{here.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("b'ok'\nb'onetwo'\n['stream', 'view'] 0\n", "")


def test_tasks_of_a_view_each_in_a_scope_of_their_own(
    app: flask.Flask, registry: Registry, engine: Engine, outside: Engine
) -> None:
    """Two tasks of one view, each in a session_scope, don't see each other's session."""
    opened: list[Session] = []
    one_writes = asyncio.Lock()

    async def task(name: str, view: Session) -> None:
        async with one_writes:  # SQLite's one writer, and so a pool of one
            with session_scope(registry) as mine:
                opened.append(mine)
                assert registry() is mine is not view
                await asyncio.sleep(0)
                assert registry() is mine
                add(registry, name)
        assert registry() is view

    @app.post("/")
    async def create() -> str:
        await asyncio.gather(task("one", registry()), task("two", registry()))
        return "ok"

    TestApp(app).post("/")
    assert len(set(map(id, opened))) == 2
    assert names(outside) == ["one", "two"]


def test_interleaved_scopes_of_two_tasks(registry: Registry) -> None:
    """A scope that another task opens or leaves meanwhile changes nothing for this one."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        with session_scope(registry) as mine:
            reached.set()
            await go_on.wait()
            assert registry() is mine

    async def second() -> None:
        await reached.wait()
        with session_scope(registry) as mine:
            go_on.set()
            await asyncio.sleep(0)
            assert registry() is mine

    async def both() -> None:
        await asyncio.gather(first(), second())

    def work() -> None:
        asyncio.run(both())

    serve_once(SessionMiddleware(text(b"", before=work), registry))


# Threads.


def test_a_thread_without_the_context_has_the_users_own_registry(registry: Registry) -> None:
    """A thread that the application starts has a session of its own, as by hand."""
    seen: list[Session] = []

    def elsewhere() -> None:
        seen.append(registry())
        registry.remove()

    def work() -> None:
        seen.append(registry())
        in_thread(elsewhere)
        seen.append(registry())

    serve_once(SessionMiddleware(text(b"", before=work), registry))
    assert seen[0] is seen[2] is not seen[1]


@pytest.mark.parametrize("way", ["to_thread", "copy_context"])
def test_a_thread_with_the_context_shares_the_session(
    way: str, registry: Registry, outside: Engine
) -> None:
    """Code that carries the request's context works in its session."""
    seen: list[Session] = []

    def elsewhere() -> None:
        seen.append(add(registry, "kept"))

    def work() -> None:
        seen.append(registry())
        if way == "to_thread":
            asyncio.run(asyncio.to_thread(elsewhere))
        else:
            in_thread(lambda: None)
            context = copy_context()
            in_thread(lambda: context.run(elsewhere))

    serve_once(SessionMiddleware(text(b"", before=work), registry))
    assert seen[0] is seen[1]
    assert names(outside) == ["kept"]


def test_a_scope_in_a_thread_with_the_context(registry: Registry, outside: Engine) -> None:
    """A session_scope in such a thread is that thread's alone."""
    entered, left = threading.Event(), threading.Event()
    seen: list[Session] = []

    def elsewhere() -> None:
        with session_scope(registry) as mine:
            seen.append(mine)
            entered.set()
            assert left.wait(PATIENCE)
            assert registry() is mine

    def work() -> None:
        mine = registry()
        context = copy_context()
        thread = threading.Thread(target=context.run, args=(elsewhere,), daemon=True)
        thread.start()
        assert entered.wait(PATIENCE)
        assert registry() is mine is not seen[0]
        left.set()
        thread.join(PATIENCE)

    serve_once(SessionMiddleware(text(b"", before=work), registry))


def test_what_outlives_the_request_has_the_users_own_registry(registry: Registry) -> None:
    """A thread beside a stream sees its session until the request is over, and then its own."""
    looked: list[Session] = []
    asked, answered, over = threading.Event(), threading.Event(), threading.Event()

    def beside() -> None:
        assert asked.wait(PATIENCE)
        looked.append(registry())
        answered.set()
        assert over.wait(PATIENCE)
        looked.append(registry())
        registry.remove()

    thread: list[threading.Thread] = []

    def stream(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        looked.append(registry())
        thread.append(threading.Thread(target=copy_context().run, args=(beside,), daemon=True))
        thread[0].start()
        yield b"one"
        yield b"two"

    server = Server(SessionMiddleware(stream, registry))
    body = server.begin()
    assert next(body) == b"one"
    asked.set()
    assert answered.wait(PATIENCE)
    assert list(body) == [b"two"]
    server.finish()
    over.set()
    thread[0].join(PATIENCE)
    assert looked[0] is looked[1] is not looked[2]


# Streams.


def test_a_scope_that_outlives_the_request(registry: Registry, outside: Engine) -> None:
    """A scope in the context of a request that is over has a session of its own, and commits."""
    kept: list[Any] = []
    app = text(b"", status="404 No", before=lambda: kept.append(copy_context()))
    serve_once(SessionMiddleware(app, registry))

    def later() -> None:
        with session_scope(registry) as session:
            assert registry() is session
            add(registry, "later")

    kept[0].run(later)
    assert names(outside) == ["later"]


def test_scopes_held_open_across_two_alternating_streams(registry: Registry) -> None:
    """Each of two streams, pulled in turn, finds its own scope and session again."""

    def stream(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        mine = registry()
        with session_scope(registry) as scoped:
            for _ in range(3):
                assert registry() is scoped is not mine
                yield b"inside"
        assert registry() is mine
        yield b"after"

    application = SessionMiddleware(stream, registry)
    servers = [Server(application), Server(application)]
    bodies = [server.begin() for server in servers]
    for _ in range(4):
        for body in bodies:
            next(body)
    for server, body in zip(servers, bodies, strict=True):
        assert list(body) == []
        server.finish()


def test_a_stream_collected_inside_another_request(registry: Registry, outside: Engine) -> None:
    """A dropped stream, closed by the garbage collector in another request, disturbs nobody."""

    def stream(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        with session_scope(registry):
            yield b"one"
            yield b"two"

    server = Server(SessionMiddleware(stream, registry))
    server.begin()
    cycle: list[Any] = [server]
    cycle.append(cycle)
    del server, cycle

    def work() -> None:
        with session_scope(registry) as scoped:
            gc.collect()
            assert registry() is scoped
        add(registry, "kept")

    serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    assert names(outside) == ["kept"]


# Greenlets and scopes.


def test_requests_in_greenlets_of_one_thread_keep_apart(registry: Registry, engine: Engine) -> None:
    """Two requests that overlap in greenlets, under a registry of threads, keep their sessions."""
    seen: dict[str, list[Session]] = {"one": [], "two": []}

    def app(environ: Any, start_response: Any) -> Any:
        mine = seen[environ["PATH_INFO"].strip("/")]
        mine.append(registry())
        greenlet.getcurrent().parent.switch()
        mine.append(registry())
        start_response("200 OK", [])
        return [b""]

    application = SessionMiddleware(app, registry)
    both = [greenlet.greenlet(serve_once) for _ in seen]
    for each, name in zip(both, seen, strict=True):
        each.switch(application, environ("GET", f"/{name}"))
    for each in both:
        each.switch()
    assert seen["one"][0] is seen["one"][1]
    assert seen["two"][0] is seen["two"][1]
    assert seen["one"][0] is not seen["two"][0]


def test_a_killed_greenlet_rolls_back(registry: Registry, engine: Engine, outside: Engine) -> None:
    """A request whose greenlet is killed rolls back and returns its connection."""

    def app(environ: Any, start_response: Any) -> Any:
        add(registry, "gone")
        greenlet.getcurrent().parent.switch()
        start_response("200 OK", [])
        return [b""]

    request = greenlet.greenlet(serve_once)
    request.switch(SessionMiddleware(app, registry), environ("POST"))
    request.throw()
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert names(outside) == []


def test_a_layer_outside_of_every_scope_has_the_session(engine: Engine, outside: Engine) -> None:
    """Where a registry's scopefunc fails, as Flask-SQLAlchemy's does, a request has its session."""

    def fail() -> object:
        raise LookupError("no scope here")

    registry: Registry = scoped_session(sessionmaker(engine), scopefunc=fail)
    app = SessionMiddleware(text(b"", before=lambda: registry.add(Item(name="kept"))), registry)
    assert serve_once(app).status == "200 OK"
    assert names(outside) == ["kept"]


def test_a_scopefunc_that_fails_outside_of_the_app(engine: Engine, outside: Engine) -> None:
    """A registry whose scope exists inside the application only is as good as any."""
    scope: ContextVar[int] = ContextVar("scope")
    registry: Registry = scoped_session(sessionmaker(engine), scopefunc=scope.get)

    def app(environ: Any, start_response: Any) -> Any:
        token = scope.set(1)
        add(registry, "kept")
        registry.remove()
        scope.reset(token)
        start_response("200 OK", [])
        return [b""]

    serve_once(SessionMiddleware(app, registry), environ("POST"))
    assert names(outside) == ["kept"]


# The registry itself.


def test_configure_does_not_warn_in_a_request(registry: Registry) -> None:
    """The session of the request doesn't make configure() warn that one is present."""
    serve_once(
        SessionMiddleware(
            text(b"", before=lambda: registry.configure(info={"set": True})), registry
        )
    )
    assert registry(autoflush=False).info == {"set": True}
    registry.remove()


def test_the_users_own_registry_stays_reachable(engine: Engine) -> None:
    """createfunc, scopefunc and registry are those that the scoped_session was made with."""
    maker = sessionmaker(engine)
    registry: Registry = scoped_session(maker, scopefunc=threading.get_ident)
    SessionMiddleware(text(b""), registry)
    assert registry.registry.createfunc is maker
    assert registry.registry.scopefunc is threading.get_ident
    mine = registry()
    assert registry.registry.registry == {threading.get_ident(): mine}
    registry.remove()


def test_a_session_that_the_app_puts_there_is_its_own_affair(
    registry: Registry, outside: Engine
) -> None:
    """registry(**kw) in a request gives a session until remove(), and then the request's again."""
    seen: list[Session] = []

    def work() -> None:
        seen.append(registry())
        seen.append(registry(autoflush=False))
        add(registry, "own")
        registry.commit()
        registry.remove()
        seen.append(add(registry, "of the request"))

    serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    assert seen[0] is seen[2] is not seen[1]
    assert names(outside) == ["own", "of the request"]


def test_a_session_of_the_apps_own_that_was_rolled_back_loses_nothing(
    registry: Registry, outside: Engine
) -> None:
    """What the application rolls back itself, in a session of its own, is no lost work."""

    def work() -> None:
        registry(autoflush=False)
        add(registry, "gone")
        registry.rollback()
        add(registry, "kept")
        registry.commit()

    serve_once(SessionMiddleware(text(b"", before=work), registry), environ("POST"))
    assert names(outside) == ["kept"]


def test_isolated_shows_the_requests_session_too(registry: Registry, engine: Engine) -> None:
    """isolated(), which replaces the same attribute, goes with a middleware made before it."""
    application = SessionMiddleware(text(b"", before=lambda: add(registry, "isolated")), registry)
    with isolated(registry) as connection:
        serve_once(application, environ("POST"))
        serve_once(
            SessionMiddleware(text(b"", before=lambda: add(registry, "too")), registry),
            environ("POST"),
        )
        assert connection.scalars(insert(Item).returning(Item.id).values(name="x")).one() == 3
    serve_once(application, environ("POST"))
    assert names(engine) == ["isolated"]


# Flask-SQLAlchemy.


@pytest.fixture
def shop(sqlite_url: str) -> Iterator[tuple[flask.Flask, SQLAlchemy, Any]]:
    """An application of Flask-SQLAlchemy in one line, and its model."""
    db = SQLAlchemy()
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = sqlite_url
    db.init_app(app)
    base: type[Model] = db.Model

    class Thing(base):  # type: ignore[valid-type,misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    with app.app_context():
        db.create_all()
    app.wsgi_app = SessionMiddleware(app.wsgi_app, db.session)  # type: ignore[method-assign]
    yield app, db, Thing
    with app.app_context():
        db.drop_all()
        db.engine.dispose()


def test_flask_sqlalchemy_in_one_line(shop: tuple[flask.Flask, SQLAlchemy, Any]) -> None:
    """get_or_404() and a change are committed on 200, and rolled back on 409."""
    app, db, thing = shop

    @app.post("/<name>/<int:status>")
    def change(name: str, status: int) -> tuple[str, int]:
        if name == "new":
            db.session.add(thing(id=1, name=name))
        else:
            db.get_or_404(thing, 1).name = name
        return (thing.query.count() and "ok") or "none", status

    client = TestApp(app)
    client.post("/new/200")
    client.post("/changed/200")
    client.post("/refused/409", status=409)
    with app.app_context():
        assert [one.name for one in thing.query] == ["changed"]
        assert db.engine.pool.checkedout() == 1  # type: ignore[attr-defined]


def test_a_nested_application_context_shows_the_requests_session(
    shop: tuple[flask.Flask, SQLAlchemy, Any],
) -> None:
    """What a nested app_context() rolls back is the request's; session_scope is the cure."""
    app, db, thing = shop

    @app.post("/")
    def create() -> str:
        mine = db.session()
        with app.app_context():
            assert db.session() is mine
        db.session.add(thing(name="outer"))
        db.session.commit()
        with session_scope(db.session) as other:
            assert db.session() is other is not mine
            other.add(thing(name="inner"))
        return "ok"

    TestApp(app).post("/")
    with app.app_context():
        assert [one.name for one in thing.query] == ["outer", "inner"]


def test_a_test_that_pushes_a_context_around_requests(
    shop: tuple[flask.Flask, SQLAlchemy, Any],
) -> None:
    """A context around several requests has the user's own session, which no request touches."""
    app, db, thing = shop

    @app.post("/<name>")
    def create(name: str) -> str:
        db.session.add(thing(name=name))
        return "ok"

    with app.app_context():
        own = db.session()
        app.test_client().post("/one")
        app.test_client().post("/two")
        assert db.session() is own
        assert [one.name for one in thing.query] == ["one", "two"]


def test_a_doomed_async_view_is_no_success(
    app: flask.Flask, registry: Registry, outside: Engine
) -> None:
    """An async view that closes the session in which it worked is no success."""

    @app.post("/")
    async def create() -> str:
        add(registry, "gone")
        registry().close()
        return "ok"

    with pytest.raises(TransactionDoomed):
        TestApp(app).post("/")
    assert names(outside) == []


def test_a_session_of_the_apps_own_that_only_read_loses_nothing(registry: Registry) -> None:
    """A session that the application put there, read in and closed is no lost work."""

    def work() -> None:
        registry(autoflush=False).execute(select(Item)).all()
        registry().close()

    app = SessionMiddleware(text(b"", before=work), registry)
    assert serve_once(app, environ("POST")).status == "200 OK"


def test_remove_of_a_session_that_only_began(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """remove() of a session without work, and what follows, is not worth a warning."""

    def work() -> None:
        registry.begin()
        registry.remove()
        registry.execute(select(Item))

    serve_once(SessionMiddleware(text(b"", before=work), registry))
    assert caplog.text == ""
