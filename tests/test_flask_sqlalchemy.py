"""Flask-SQLAlchemy in one line: ``app.wsgi_app = SessionMiddleware(app.wsgi_app, db.session)``."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import click
import flask
import pytest
from flask_login import LoginManager, UserMixin, current_user, login_user
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.track_modifications import models_committed
from sessionscope import CommitOutcomeUnknown, SessionMiddleware, on_commit, session_scope
from sessionscope.testing import isolated
from sqlalchemy import Engine, ForeignKey, QueuePool, String, insert, select
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, object_session, relationship
from support import PATIENCE, Server, environ, fetch, serving
from webtest import TestApp


class Base(DeclarativeBase):
    """The declarative base that Flask-SQLAlchemy makes its own of."""


db = SQLAlchemy(model_class=Base)
login = LoginManager()

if TYPE_CHECKING:
    from flask_sqlalchemy.model import Model as Queried

    class Model(Base, Queried):
        """What type checkers take ``db.Model`` for."""

else:
    Model = db.Model


class User(Model, UserMixin):  # type: ignore[misc]
    """Somebody who can log in."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))


class Item(Model):
    """A named item."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))


class Note(Model):
    """A note that knows its author, and the path that it came from."""

    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(String(40), default=lambda: flask.request.path)
    user_id: Mapped[int] = mapped_column(ForeignKey(User.id))
    user: Mapped[User] = relationship()


class Visit(Model):
    """A row of another database."""

    __bind_key__ = "stats"
    __tablename__ = "visits"
    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(String(40))


@login.user_loader  # type: ignore[untyped-decorator]
def load_user(id: str) -> User | None:
    return db.session.get(User, int(id))


def create_app(url: str, stats: str, config: dict[str, Any], **options: Any) -> flask.Flask:
    """What a project has in its factory."""
    app = flask.Flask(__name__)
    app.secret_key = "secret"
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_BINDS"] = {"stats": {"url": stats, "connect_args": {"timeout": 0}}}
    app.config.update(config)
    db.init_app(app)
    login.init_app(app)
    app.wsgi_app = SessionMiddleware(app.wsgi_app, db.session, **options)  # type: ignore[method-assign]
    return app


def engine_of(app: flask.Flask, key: str | None = None) -> Engine:
    with app.app_context():
        return db.engines[key]


def connections_out(app: flask.Flask) -> int:
    with app.app_context():
        pools = [engine.pool for engine in db.engines.values()]
    return sum(pool.checkedout() for pool in pools if isinstance(pool, QueuePool))


def stored(app: flask.Flask, column: Any = Item.name) -> list[Any]:
    """What is durable in a column, in order, seen from outside of all sessions."""
    engine = engine_of(app, column.class_.__table__.metadata.info["bind_key"])
    with engine.connect() as connection:
        return list(connection.scalars(select(column).order_by(column.class_.id)))


def keep(app: flask.Flask, *objects: object) -> None:
    """Store what a request shall find."""
    with app.app_context():
        db.session.add_all(objects)
        db.session.commit()


MakeApp = Callable[..., flask.Flask]


@pytest.fixture
def make_app(tmp_path: Path) -> Iterator[MakeApp]:
    """Makes applications with tables; at the end none may have left anything open."""
    made: list[flask.Flask] = []

    def make(url: str | None = None, config: dict[str, Any] | None = None, **options: Any) -> Any:
        files = [f"sqlite:///{tmp_path}/{name}{len(made)}.db" for name in ("shop", "stats")]
        app = create_app(url or files[0], files[1], config or {}, **options)
        made.append(app)
        with app.app_context():
            db.create_all()
        return app

    yield make
    left = [connections_out(app) for app in made]
    for app in made:
        with app.app_context():
            db.drop_all()
            for engine in db.engines.values():
                engine.dispose()
    assert left == [0] * len(made), "a connection was not returned to its pool"
    assert db.session.registry.registry == {}, "a session was left in the registry"


@pytest.fixture
def app(make_app: MakeApp) -> flask.Flask:
    return make_app()


def add_view(app: flask.Flask) -> TestApp:
    """Have POST /<name>/<status> add an item of that name and answer so; a client."""

    @app.post("/<name>/<int:status>")
    def create(name: str, status: int) -> tuple[str, int]:
        db.session.add(Item(name=name))
        return "done", status

    return TestApp(app)


def login_view(app: flask.Flask) -> None:
    """Keep Ada, and have POST /login log her in."""
    keep(app, User(name="Ada"))

    @app.post("/login")
    def log_in() -> str:
        login_user(db.get_or_404(User, 1))
        return "ok"


def rename_view(app: flask.Flask) -> None:
    """Have POST /<name> rename who is logged in."""

    @app.post("/<name>")
    def rename(name: str) -> str:
        current_user.name = name
        return "ok"


# What Flask-SQLAlchemy adds.


@pytest.mark.parametrize(
    "look",
    [
        lambda: Item.query.filter_by(name="new").one(),
        lambda: db.get_or_404(Item, 1),
        lambda: db.first_or_404(select(Item)),
        lambda: db.one_or_404(select(Item)),
        lambda: db.paginate(select(Item)).items[0],
    ],
    ids=["query", "get_or_404", "first_or_404", "one_or_404", "paginate"],
)
def test_its_queries_are_of_the_requests_session(
    look: Callable[[], Item], app: flask.Flask
) -> None:
    """What a view has added is found by each way to look, and a change of it is kept."""

    @app.post("/")
    def create() -> str:
        item = Item(name="new")
        db.session.add(item)
        db.session.flush()
        assert look() is item
        look().name = "changed"
        return "ok"

    TestApp(app).post("/")
    assert stored(app) == ["changed"]


@pytest.mark.parametrize(
    "look",
    [
        lambda: db.get_or_404(Item, 7),
        lambda: db.first_or_404(select(Item).where(Item.id == 7)),
        lambda: db.one_or_404(select(Item).where(Item.id == 7)),
        lambda: db.paginate(select(Item), page=7),
    ],
    ids=["get_or_404", "first_or_404", "one_or_404", "paginate"],
)
def test_what_is_not_there_is_a_404_that_keeps_nothing(
    look: Callable[[], Any], app: flask.Flask
) -> None:
    """A row or page that is not there is answered with 404, which takes the view's work back."""

    @app.post("/")
    def create() -> str:
        db.session.add(Item(name="gone"))
        look()
        return "ok"

    TestApp(app).post("/", status=404)
    assert stored(app) == []


def test_committed_models_are_announced_after_the_commit(make_app: MakeApp) -> None:
    """models_committed has the changes of a 200 that are durable by then, and the context."""
    app = make_app(config={"SQLALCHEMY_TRACK_MODIFICATIONS": True})
    client, engine = add_view(app), engine_of(app)
    heard: list[Any] = []

    def hear(sender: flask.Flask, changes: list[tuple[Item, str]]) -> None:
        with engine.connect() as outside:
            durable = outside.scalars(select(Item.name)).all()
        made = [(type(item), operation) for item, operation in changes]
        heard.append((made, durable, flask.current_app.name, flask.request.path))

    with models_committed.connected_to(hear, app):
        client.post("/kept/200")
        client.post("/gone/409", status=409)
    assert heard == [([(Item, "insert")], ["kept"], app.name, "/kept/200")]


def test_the_user_and_the_request_are_known_at_commit(app: flask.Flask) -> None:
    """An object that the view never flushes gets current_user, and request in a default."""
    login_view(app)

    @app.post("/notes")
    def create() -> str:
        db.session.add(Note(user=current_user._get_current_object()))
        return "ok"

    client = TestApp(app)
    client.post("/login")
    client.post("/notes")
    assert (stored(app, Note.user_id), stored(app, Note.path)) == ([1], ["/notes"])


def test_a_change_of_the_user_is_kept(app: flask.Flask) -> None:
    """What a view changes of current_user is committed like any other object."""
    login_view(app)
    rename_view(app)
    client = TestApp(app)
    client.post("/login")
    client.post("/Grace")
    assert stored(app, User.name) == ["Grace"]


def test_a_callback_queries_and_makes_urls(app: flask.Flask) -> None:
    """What runs on_commit finds the new row through Model.query, and url_for works."""
    sent: list[str] = []

    @app.get("/items/<name>")
    def show(name: str) -> str:
        return name

    @app.post("/")
    def create() -> str:
        db.session.add(Item(name="lamp"))
        on_commit(db.session, mail)
        return "ok"

    def mail() -> None:
        sent.append(flask.url_for("show", name=Item.query.one().name))

    TestApp(app).post("/")
    assert sent == ["/items/lamp"]


def test_an_async_view_has_its_engine(app: flask.Flask) -> None:
    """An async view, which runs in another thread, works in the request's session and commits."""

    @app.post("/")
    async def create() -> str:
        db.session.add(Item(name="kept"))
        return str(len(Item.query.all()))

    assert TestApp(app).post("/").text == "1"
    assert stored(app) == ["kept"]


# Bind keys.


def visit_view(app: flask.Flask) -> TestApp:
    """Have POST /<status> write to both databases; a client."""

    @app.post("/<int:status>")
    def create(status: int) -> tuple[str, int]:
        db.session.add_all([Item(name="lamp"), Visit(path="/lamp")])
        return "done", status

    return TestApp(app)


@pytest.mark.parametrize(("status", "rows"), [(200, 1), (409, 0)])
def test_both_databases_do_as_the_status_says(status: int, rows: int, app: flask.Flask) -> None:
    """Databases of two bind keys both commit on 200, and both roll back on 409."""
    visit_view(app).post(f"/{status}", status=status)
    assert stored(app) == ["lamp"] * rows
    assert stored(app, Visit.path) == ["/lamp"] * rows


def test_a_commit_that_fails_in_one_of_two_databases_is_no_success(app: flask.Flask) -> None:
    """Where the second COMMIT is refused the answer is an error; it tells what may be durable."""
    keep(app, Visit(path="/old"))
    client = visit_view(app)
    file = engine_of(app, "stats").url.database
    with closing(sqlite3.connect(str(file), isolation_level=None)) as reading:
        reading.execute("BEGIN")
        reading.execute("SELECT * FROM visits").fetchall()  # a lock that only COMMIT runs into
        with pytest.raises((OperationalError, CommitOutcomeUnknown)) as caught:
            client.post("/200")
    first_is_durable = caught.type is CommitOutcomeUnknown
    assert stored(app) == ["lamp"] * first_is_durable
    assert stored(app, Visit.path) == ["/old"]


@pytest.mark.parametrize("owed", [None, -1])
def test_two_phases_keep_both_or_none(
    owed: int | None, postgresql_url: str, mariadb_url: str
) -> None:
    """With twophase=True a database that refuses at COMMIT keeps the other from committing."""
    shop = SQLAlchemy(session_options={"twophase": True})
    base: Any = shop.Model

    class Order(base):  # type: ignore[misc]
        id = mapped_column(shop.Integer, primary_key=True)

    class Debt(base):  # type: ignore[misc]
        __bind_key__ = "stats"
        id = mapped_column(shop.Integer, primary_key=True)
        debt_id = mapped_column(ForeignKey("debt.id", deferrable=True, initially="DEFERRED"))

    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = mariadb_url
    app.config["SQLALCHEMY_BINDS"] = {"stats": postgresql_url}
    shop.init_app(app)
    app.wsgi_app = SessionMiddleware(app.wsgi_app, shop.session)  # type: ignore[method-assign]

    @app.post("/")
    def create() -> str:
        shop.session.add_all([Order(), Debt(debt_id=owed)])
        return "ok"

    with app.app_context():
        shop.create_all()
    if owed is None:
        TestApp(app).post("/")
    else:
        with pytest.raises(DatabaseError):
            TestApp(app).post("/")
    with app.app_context():
        found = len(Order.query.all()), len(Debt.query.all())
        shop.session.remove()
        shop.drop_all()
        for engine in shop.engines.values():
            engine.dispose()
    assert found == ((1, 1) if owed is None else (0, 0))


# Application factories.


def test_applications_of_one_factory_each_have_their_database(make_app: MakeApp) -> None:
    """Requests of two applications that share db overlap, and each writes to its own engine."""
    apps = [make_app(), make_app()]
    together = Barrier(2)

    def add(app: flask.Flask) -> TestApp:
        @app.post("/<name>")
        def create(name: str) -> str:
            db.session.add(Item(name=name))
            together.wait(PATIENCE)
            db.session.flush()
            together.wait(PATIENCE)
            return "ok"

        return TestApp(app)

    clients = [add(app) for app in apps]
    with ThreadPoolExecutor(2) as threads:
        for name in ("one", "two"):
            list(threads.map(lambda client, name=name: client.post(f"/{name}"), clients))
    assert [stored(app) for app in apps] == [["one", "two"]] * 2


def test_an_application_that_is_not_wrapped_shares_the_extension(
    app: flask.Flask, make_app: MakeApp
) -> None:
    """An application of the same db without the middleware commits by itself, as ever."""
    plain = make_app()
    plain.wsgi_app = plain.wsgi_app.app  # type: ignore[attr-defined,method-assign]

    @plain.post("/<name>")
    def create(name: str) -> str:
        db.session.add(Item(name=name))
        if name == "kept":
            db.session.commit()
        return "ok"

    client = TestApp(plain)
    client.post("/kept")
    client.post("/gone")
    assert stored(plain) == ["kept"]


def test_another_application_in_a_request_needs_a_scope(
    app: flask.Flask, make_app: MakeApp
) -> None:
    """A session_scope in another application's context writes to that one's database."""
    other = make_app()

    @app.post("/")
    def create() -> str:
        db.session.add(Item(name="here"))
        with other.app_context(), session_scope(db.session):
            db.session.add(Item(name="there"))
        return "ok"

    TestApp(app).post("/")
    assert (stored(app), stored(other)) == (["here"], ["there"])


# Outside of requests.


def test_a_command_commits_by_itself(app: flask.Flask) -> None:
    """A command of the CLI keeps what it commits and nothing else."""

    @app.cli.command("seed")
    @click.argument("name")
    def seed(name: str) -> None:
        db.session.add(Item(name=name))
        db.session.commit()
        db.session.add(Item(name="not committed"))

    result = app.test_cli_runner().invoke(args=["seed", "lamp"])
    assert (result.exception, stored(app)) == (None, ["lamp"])


def test_a_script_has_a_session_for_each_context(app: flask.Flask) -> None:
    """Outside of requests a context has its own session, which its end throws away."""
    with app.app_context():
        first = db.session()
        db.session.add(Item(name="kept"))
        db.session.commit()
        db.session.add(Item(name="gone"))
        with app.app_context():
            assert db.session() is not first
        assert db.session() is first
    assert stored(app) == ["kept"]


def test_there_is_no_session_without_a_context(app: flask.Flask) -> None:
    """Outside of requests and contexts db.session says that it needs one."""
    TestApp(app).get("/", status=404)
    with pytest.raises(RuntimeError, match="application context"):
        db.session()


def test_session_scope_needs_only_a_context(app: flask.Flask) -> None:
    """In a script session_scope(db.session) commits, or rolls back because of an exception."""
    with app.app_context():
        with session_scope(db.session):
            db.session.add(Item(name="kept"))
        with pytest.raises(LookupError), session_scope(db.session) as session:
            session.add(Item(name="gone"))
            raise LookupError
    assert stored(app) == ["kept"]


# Tests of users.


def test_a_pushed_context_keeps_nothing_of_a_request(app: flask.Flask) -> None:
    """In a context around several requests g outlives each; what it holds belongs to nobody."""
    keep(app, User(name="Ada"))

    @app.post("/")
    def create() -> str:
        if "user" not in flask.g:
            flask.g.user = db.get_or_404(User, 1)
        db.session.add(Note(user=flask.g.user))
        return "ok"

    with app.app_context():
        for _ in range(2):
            assert app.test_client().post("/").status == "200 OK"
            assert object_session(flask.g.user) is None
    assert stored(app, Note.user_id) == [1, 1]


def test_contexts_between_requests_disturb_nobody(app: flask.Flask) -> None:
    """A test that pushes a context for each look sees and keeps what each request did."""
    login_view(app)
    rename_view(app)
    client = app.test_client()
    client.post("/login")
    for name in ("Grace", "Joan"):
        client.post(f"/{name}")
        with app.app_context():
            assert User.query.one().name == name
    assert stored(app, User.name) == ["Joan"]


def test_isolated_undoes_both_databases(app: flask.Flask) -> None:
    """Entered in a context and used without, isolated(db.session) undoes all bind keys."""
    client = visit_view(app)
    with ExitStack() as stack:
        with app.app_context():
            connection = stack.enter_context(isolated(db.session))
        client.post("/200")
        client.post("/409", status=409)
        assert connection.scalars(select(Item.name)).all() == ["lamp"]
        with app.app_context():
            assert [visit.path for visit in Visit.query] == ["/lamp"]
    assert (stored(app), stored(app, Visit.path)) == ([], [])


# Retries.


def test_each_attempt_has_a_context_of_its_own(make_app: MakeApp) -> None:
    """A request that meets a rival is made again with a fresh g, and is kept once."""
    options = {"SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": {"timeout": 0}}}
    app = make_app(config=options, attempts=3)
    rival = sqlite3.connect(str(engine_of(app).url.database), isolation_level=None)
    seen: list[object] = []

    @app.post("/")
    def create() -> str:
        seen.append(flask.g.get("attempt"))
        flask.g.attempt = len(seen)
        rival.execute("BEGIN IMMEDIATE" if len(seen) < 3 else "SELECT 1")
        try:
            db.session.add(Item(name="kept"))
            db.session.flush()
        finally:
            if rival.in_transaction:
                rival.execute("ROLLBACK")
        return "ok"

    with closing(rival):
        TestApp(app).post("/")
    assert seen == [None, None, None]
    assert stored(app) == ["kept"]


# Views that end their work themselves.


def test_a_commit_in_a_view_stays(app: flask.Flask) -> None:
    """What a view commits itself is kept, whatever it answers; what follows is not."""

    @app.post("/")
    def create() -> tuple[str, int]:
        db.session.add(Item(name="kept"))
        db.session.commit()
        db.session.add(Item(name="gone"))
        return "no", 409

    TestApp(app).post("/", status=409)
    assert stored(app) == ["kept"]


def test_a_rollback_in_a_view_discards(app: flask.Flask) -> None:
    """What a view rolls back is gone; what follows is committed."""

    @app.post("/")
    def create() -> str:
        db.session.add(Item(name="gone"))
        db.session.rollback()
        db.session.add(Item(name="kept"))
        return "ok"

    TestApp(app).post("/")
    assert stored(app) == ["kept"]


def test_an_expected_error_is_rolled_back_as_ever(app: flask.Flask) -> None:
    """A view that catches an IntegrityError and rolls back answers 200, and goes on working."""
    keep(app, Item(id=1, name="old"))

    @app.post("/")
    def create() -> str:
        db.session.add(Item(id=1, name="twice"))
        try:
            db.session.commit()
        except IntegrityError:
            db.session.rollback()
            db.session.add(Item(name="kept"))
        return "ok"

    TestApp(app).post("/")
    assert stored(app) == ["old", "kept"]


@pytest.mark.parametrize(("status", "names"), [(200, ["lamp"]), (409, [])])
def test_a_nested_context_ends_nothing(status: int, names: list[str], app: flask.Flask) -> None:
    """A helper's own application context, an eager task's, sees pending work and leaves it."""

    def count() -> int:
        with app.app_context():
            return len(Item.query.all())

    @app.post("/")
    def create() -> tuple[str, int]:
        db.session.add(Item(name="lamp"))
        return str(count()), status

    assert TestApp(app).post("/", status=status).text == "1"
    assert stored(app) == names


def open_a_context(app: flask.Flask) -> None:
    """What a helper does that needs the application: an eager task, a mail that is rendered."""
    with app.app_context():
        flask.render_template_string("")


def test_a_nested_context_in_a_savepoint_loses_no_work(app: flask.Flask) -> None:
    """A context that is opened while a savepoint fails takes back no more than the savepoint."""
    keep(app, Item(id=1, name="old"))

    @app.post("/")
    def create() -> str:
        db.session.add(Item(name="before"))
        db.session.flush()
        with contextlib.suppress(IntegrityError), db.session.begin_nested():
            db.session.add(Item(id=1, name="twice"))
            try:
                db.session.flush()
            except IntegrityError:
                open_a_context(app)
                raise
        db.session.add(Item(name="after"))
        return "ok"

    TestApp(app).post("/")
    assert stored(app) == ["old", "before", "after"]


def test_a_nested_context_hides_no_error(app: flask.Flask) -> None:
    """Work that a swallowed error has undone is no success, whatever contexts were opened."""
    keep(app, Item(id=1, name="old"))

    @app.post("/")
    def create() -> str:
        db.session.add(Item(name="before"))
        db.session.flush()
        db.session.add(Item(id=1, name="twice"))
        with contextlib.suppress(IntegrityError):
            db.session.flush()
        open_a_context(app)
        db.session.execute(insert(Item).values(name="after"))
        return "ok"

    TestApp(app).post("/", status=500)
    assert stored(app) == ["old"]


def test_a_rollback_after_a_nested_context_is_enough(app: flask.Flask) -> None:
    """A view that rolls back after an error is a success, though a context was opened before."""
    keep(app, Item(id=1, name="old"))

    @app.post("/")
    def create() -> str:
        db.session.add(Item(id=1, name="twice"))
        try:
            db.session.flush()
        except IntegrityError:
            open_a_context(app)
            db.session.rollback()
        return "ok"

    TestApp(app).post("/")
    assert stored(app) == ["old"]


def test_a_nested_context_may_make_the_first_query(app: flask.Flask) -> None:
    """A view whose helper did so may recover from an error with remove() as well."""
    keep(app, Item(id=1, name="old"))

    @app.post("/")
    def create() -> str:
        with app.app_context():
            db.session.scalar(select(Item.name))
        db.session.add(Item(id=1, name="twice"))
        try:
            db.session.flush()
        except IntegrityError:
            db.session.remove()
        db.session.add(Item(name="kept"))
        return "ok"

    TestApp(app).post("/")
    assert stored(app) == ["old", "kept"]


def test_a_nested_context_after_the_commit(make_app: MakeApp) -> None:
    """A receiver of models_committed may open a context."""
    app = make_app(config={"SQLALCHEMY_TRACK_MODIFICATIONS": True})
    client = add_view(app)

    def index(sender: flask.Flask, changes: object) -> None:
        open_a_context(sender)

    with models_committed.connected_to(index, app):
        client.post("/kept/200")
    assert stored(app) == ["kept"]


def test_a_nested_context_is_worth_no_warning(
    app: flask.Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """The session that a nested context leaves alone goes on without a word."""
    keep(app, Item(name="old"))

    @app.get("/")
    def show() -> str:
        name: str = Item.query.one().name
        open_a_context(app)
        return f"{name}{Item.query.one().name}"

    assert TestApp(app).get("/").text == "oldold"
    assert [record for record in caplog.records if record.name == "sessionscope"] == []


def test_a_scope_in_a_request_is_on_its_own(make_app: MakeApp, any_url: str) -> None:
    """What session_scope(db.session) commits stays although the request is refused."""
    app = make_app(any_url)

    @app.post("/")
    def create() -> tuple[str, int]:
        with session_scope(db.session):
            db.session.add(Item(name="record"))
        db.session.add(Item(name="gone"))
        return "no", 409

    TestApp(app).post("/", status=409)
    assert stored(app) == ["record"]


# Hooks of Flask.


@pytest.mark.parametrize("hook", ["teardown_request", "teardown_appcontext"])
def test_a_remove_in_a_teardown_may_stay(
    hook: str, app: flask.Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """db.session.remove() in a teardown takes nothing from a 200, and warns of nothing."""
    getattr(app, hook)(lambda error: db.session.remove())
    client = add_view(app)
    client.post("/kept/200")
    client.post("/gone/409", status=409)
    assert stored(app) == ["kept"]
    assert [record for record in caplog.records if record.name == "sessionscope"] == []


def hook_after(app: flask.Flask) -> None:
    @app.after_request
    def log(response: flask.Response) -> flask.Response:
        db.session.add(Item(name="hook"))
        return response


def hook_of_a_blueprint(app: flask.Flask) -> None:
    blueprint = flask.Blueprint("blueprint", __name__)

    @blueprint.before_app_request
    def log() -> None:
        db.session.add(Item(name="hook"))

    app.register_blueprint(blueprint)


def hook_of_teardown(app: flask.Flask) -> None:
    @app.teardown_request
    def log(error: BaseException | None) -> None:
        db.session.add(Item(name="hook"))


@pytest.mark.parametrize(("status", "rows"), [(200, 2), (409, 0)])
@pytest.mark.parametrize("hook", [hook_after, hook_of_a_blueprint, hook_of_teardown])
def test_what_hooks_write_is_the_requests(
    hook: Callable[[flask.Flask], None], status: int, rows: int, app: flask.Flask
) -> None:
    """What hooks of Flask write before or after the view is kept or refused with its work."""
    hook(app)
    add_view(app).post(f"/view/{status}", status=status)
    assert len(stored(app)) == rows


@pytest.mark.parametrize("status", [200, 409])
def test_a_teardown_reads_what_the_view_has_done(status: int, app: flask.Flask) -> None:
    """teardown_request still sees the work of the request, and leaves no connection out."""
    seen: list[list[str]] = []

    @app.teardown_request
    def look(error: BaseException | None) -> None:
        seen.append([item.name for item in Item.query])

    add_view(app).post(f"/new/{status}", status=status)
    assert seen == [["new"]]
    assert connections_out(app) == 0


@pytest.mark.parametrize(("status", "names"), [(200, ["view", "handler"]), (400, [])])
def test_the_status_of_an_error_handler_decides(
    status: int, names: list[str], app: flask.Flask
) -> None:
    """A handler's page with 200 commits what the failed view had done; one with 400 doesn't."""

    @app.errorhandler(LookupError)
    def handle(error: LookupError) -> tuple[str, int]:
        db.session.add(Item(name="handler"))
        return "sorry", status

    @app.post("/")
    def create() -> str:
        db.session.add(Item(name="view"))
        raise LookupError

    TestApp(app).post("/", status=status)
    assert stored(app) == names


def test_an_error_in_an_error_handler_keeps_nothing(app: flask.Flask) -> None:
    """A handler that fails itself is a 500, and the next request begins afresh."""

    @app.errorhandler(LookupError)
    def handle(error: LookupError) -> str:
        db.session.add(Item(name="handler"))
        db.session.flush()
        raise ZeroDivisionError

    @app.post("/fail")
    def fail() -> str:
        db.session.add(Item(name="view"))
        raise LookupError

    client = add_view(app)
    client.post("/fail", status=500)
    assert connections_out(app) == 0
    client.post("/kept/200")
    assert stored(app) == ["kept"]


# Streams.


def stream_view(app: flask.Flask) -> list[str]:
    """Have GET / stream the names of the items one by one; a list of those it has read."""
    read: list[str] = []
    items = select(Item).order_by(Item.id).execution_options(yield_per=1)

    @app.get("/")
    def stream() -> flask.Response:
        def body() -> Iterator[str]:
            for item in db.session.scalars(items):
                read.append(item.name)
                yield item.name
            db.session.add(Item(name="end"))

        return flask.Response(flask.stream_with_context(body()))

    return read


def test_a_stream_reads_its_rows_one_by_one(app: flask.Flask) -> None:
    """stream_with_context() reads rows while they leave, and commits what it writes at its end."""
    keep(app, Item(name="one"), Item(name="two"))
    read = stream_view(app)
    server = Server(app)
    body = server.begin(environ())
    assert (next(body), read) == (b"one", ["one"])
    assert list(body) == [b"two"]
    server.finish()
    assert connections_out(app) == 0
    assert stored(app) == ["one", "two", "end"]


def test_a_client_that_hangs_up_ends_a_stream(app: flask.Flask) -> None:
    """Where the client hangs up the connection returns at once, and nothing is kept."""
    keep(app, Item(name="one"), Item(name="two"))
    stream_view(app)
    server = Server(app)
    next(server.begin(environ()))
    server.finish()
    assert connections_out(app) == 0
    assert stored(app) == ["one", "two"]


# Many at once.


def test_threads_of_a_server_keep_apart(make_app: MakeApp, any_url: str) -> None:
    """Of eight requests at once each 200 has its row, and no 409 has one."""
    patience = {"connect_args": {"timeout": PATIENCE}} if any_url.startswith("sqlite") else {}
    app = make_app(any_url, config={"SQLALCHEMY_ENGINE_OPTIONS": patience})
    together = Barrier(8)

    @app.post("/<name>/<int:status>")
    def create(name: str, status: int) -> tuple[str, int]:
        before = len(Item.query.all())
        together.wait(PATIENCE)
        db.session.add(Item(name=name))
        return str(before), status

    def client(number: int) -> list[tuple[str, int | None]]:
        status = 200 if number % 2 else 409
        names = [f"{number}.{turn}" for turn in range(3)]
        return [(name, fetch(port, "POST", f"/{name}/{status}").status) for name in names]

    with serving(app, threads=8) as port, ThreadPoolExecutor(8) as threads:
        answers = [answer for answers in threads.map(client, range(8)) for answer in answers]
    assert {status for _, status in answers} == {200, 409}
    assert sorted(stored(app)) == sorted(name for name, status in answers if status == 200)
