"""Extensions of Flask and of SQLAlchemy, as they are installed, do their work in our requests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import celery
import extension_shop
import flask
import flask_mail
import pytest
import sqlalchemy_continuum as continuum
import strawberry
from databases import until
from factory.alchemy import SQLAlchemyModelFactory
from flask_admin import Admin
from flask_admin.contrib.sqla import ModelView
from flask_caching import Cache
from flask_login import LoginManager, UserMixin
from flask_sqlalchemy import SQLAlchemy
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from processes import Process, running
from sessionscope import (
    Outcome,
    SessionMiddleware,
    commit_on_success,
    on_commit,
)
from sessionscope.engines import make_engine
from sessionscope.testing import isolated
from simple_websocket import Client
from sqlalchemy import Engine, event, insert, inspect, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    Mapped,
    Session,
    configure_mappers,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from sqlalchemy_continuum.plugins import FlaskPlugin
from strawberry.flask.views import GraphQLView
from support import (
    PATIENCE,
    drop_tables,
    environ,
    make_tables,
    names,
    refuse_commit,
    serve_once,
)
from webtest import TestApp

from models import Item

if TYPE_CHECKING:
    from strawberry.http import GraphQLHTTPResponse
    from strawberry.types import ExecutionResult

Registry = scoped_session[Session]

HERE = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(HERE.parent), str(HERE)])


def run(*arguments: str, folder: Path = HERE, **environ: str) -> str:
    """Run Python in a process of its own; what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": PYTHONPATH} | environ,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_alone(script: str, *arguments: str) -> str:
    """Run a script that would leave traces in this process; what it prints."""
    # Sentry imports WebOb 1.8, and that cgi, which Python 3.11 deprecates.
    strict = ["-W", "error", "-W", "ignore:'cgi' is deprecated:DeprecationWarning"]
    return run(*strict, str(HERE / script), *arguments)


def wrapped(registry: scoped_session[Any], **options: Any) -> flask.Flask:
    """A Flask application without views, around which the middleware is."""
    app = flask.Flask(__name__)
    app.secret_key = "secret"
    app.wsgi_app = SessionMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, registry, **options
    )
    return app


@pytest.fixture
def db() -> SQLAlchemy:
    return SQLAlchemy()


@pytest.fixture
def shop(db: SQLAlchemy, sqlite_url: str, engine: Engine) -> Iterator[flask.Flask]:
    """An application of Flask-SQLAlchemy without views; the tables are there."""
    app = wrapped(db.session)
    app.config["SQLALCHEMY_DATABASE_URI"] = sqlite_url
    db.init_app(app)
    yield app
    with app.app_context():
        db.engine.dispose()


# SQLAlchemy-Continuum.


@pytest.fixture
def versioned(db: SQLAlchemy, shop: flask.Flask) -> Iterator[tuple[flask.Flask, Any]]:
    """An application whose notes have versions, and the table of its transactions."""
    base: Any = db.Model
    manager = continuum.VersioningManager()
    of_these = {"session": db.session, "manager": manager}
    continuum.make_versioned(plugins=[FlaskPlugin()], **of_these)

    class User(base, UserMixin):  # type: ignore[misc]
        id: Mapped[int] = mapped_column(primary_key=True)

    class Note(base):  # type: ignore[misc]
        __versioned__: dict[str, Any] = {}  # noqa: RUF012
        id: Mapped[int] = mapped_column(primary_key=True)

    login = LoginManager(shop)
    login.request_loader(lambda request: db.session.get(User, int(request.headers["User"])))

    @shop.post("/<int:status>")
    def create(status: int) -> tuple[str, int]:
        db.session.add(Note())  # flushed at COMMIT
        return "", status

    configure_mappers()  # makes the tables of versions
    with shop.app_context():
        db.create_all()
        db.session.add(User(id=7))
        db.session.commit()
    yield shop, manager.transaction_cls
    with shop.app_context():
        db.drop_all()
    continuum.remove_versioning(**of_these)


def recorded(db: SQLAlchemy, app: flask.Flask, transaction: Any) -> list[tuple[int, str]]:
    with app.app_context():
        rows = db.session.execute(select(transaction.user_id, transaction.remote_addr))
        return [tuple(row) for row in rows]


def test_continuum_records_the_user_of_the_request(
    db: SQLAlchemy, versioned: tuple[flask.Flask, Any]
) -> None:
    """A version that is flushed at COMMIT knows the user and the address of its request."""
    app, transaction = versioned
    client = TestApp(app, extra_environ={"REMOTE_ADDR": "192.0.2.7"})
    client.post("/200", headers={"User": "7"})
    assert recorded(db, app, transaction) == [(7, "192.0.2.7")]


def test_continuum_forgets_a_refused_request(
    db: SQLAlchemy, versioned: tuple[flask.Flask, Any]
) -> None:
    """A refused request leaves no version, and the next one has its own."""
    app, transaction = versioned
    client = TestApp(app)
    client.post("/409", headers={"User": "7"}, status=409)
    assert recorded(db, app, transaction) == []
    client.post("/200", headers={"User": "7"})
    assert len(recorded(db, app, transaction)) == 1


# sentry-sdk.


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Sentry would have got of a request that was kept, and of one whose COMMIT failed."""
    url = f"sqlite:///{tmp_path_factory.mktemp('sentry')}/items.db"
    engine = make_engine(url)
    make_tables(engine)
    engine.dispose()
    result: dict[str, Any] = json.loads(run_alone("extension_sentry.py", url))
    assert result["statuses"] == [200, 500]
    return result


def test_sentry_hears_once_of_a_commit_that_failed(sent: dict[str, Any]) -> None:
    """Our log, Sentry's WSGI layer and the server's log tell of it, and one event results."""
    [event] = [payload for payload in sent["payloads"] if "exception" in payload]
    assert event["transaction"] == "refuse"
    assert event["exception"]["values"][-1]["type"] == "IntegrityError"


def test_sentry_sees_the_statements_of_commit(sent: dict[str, Any]) -> None:
    """What is flushed at COMMIT is a span of the request's transaction."""
    [spans] = [payload["spans"] for payload in sent["payloads"] if payload["transaction"] == "keep"]
    assert [span["description"] for span in spans] == ["INSERT INTO items (name) VALUES (?)"]


# OpenTelemetry.


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    """A provider whose spans are exported to the memory of the test."""
    made = TracerProvider(shutdown_on_exit=False)
    made.add_span_processor(SimpleSpanProcessor(exporter))
    yield made
    made.shutdown()


@pytest.fixture
def traced_engine(provider: TracerProvider, postgresql_url: str) -> Iterator[Engine]:
    """An engine for PostgreSQL of which each statement, and each COMMIT, is a span."""
    psycopg, sqlalchemy = PsycopgInstrumentor(), SQLAlchemyInstrumentor()
    psycopg.instrument(tracer_provider=provider)
    engine = make_engine(postgresql_url)
    make_tables(engine)
    # It asks for SQLAlchemy below 2.1 so far.
    sqlalchemy.instrument(engine=engine, tracer_provider=provider, skip_dep_check=True)
    tracer = provider.get_tracer("commits")
    event.listen(engine, "commit", lambda connection: tracer.start_span("COMMIT").end())
    yield engine
    sqlalchemy.uninstrument()
    psycopg.uninstrument()
    drop_tables(engine)
    engine.dispose()


@pytest.fixture
def traced(traced_engine: Engine) -> Registry:
    return scoped_session(sessionmaker(traced_engine))


def within(outer: str, exporter: InMemorySpanExporter) -> list[str]:
    """The verbs of the spans right below the one of that name, in the order of their ends."""
    spans = exporter.get_finished_spans()
    [parent] = [span.context.span_id for span in spans if span.name == outer]
    below = [span for span in spans if span.parent and span.parent.span_id == parent]
    return [span.name.split()[0] for span in below]


STATEMENTS = ["connect", "INSERT", "INSERT", "COMMIT"]
"""SQLAlchemy's connect, an INSERT as psycopg and as SQLAlchemy see it, and COMMIT."""


@pytest.mark.parametrize("stream", [False, True], ids=["list", "stream"])
def test_commit_lies_in_the_span_of_the_request(
    stream: bool,
    traced: Registry,
    traced_engine: Engine,
    provider: TracerProvider,
    exporter: InMemorySpanExporter,
) -> None:
    """COMMIT, and what is flushed at it, are spans in that of the request, which ends last."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        traced.add(Item(name="kept"))
        return iter([b"o", b"k"]) if stream else [b"ok"]

    inner = SessionMiddleware(app, traced)
    serve_once(OpenTelemetryMiddleware(inner, tracer_provider=provider), environ("POST"))
    assert within("POST /", exporter) == STATEMENTS
    assert exporter.get_finished_spans()[-1].name == "POST /"
    assert names(traced_engine) == ["kept"]


def test_commit_is_in_the_trace_of_a_flask_request(
    traced: Registry, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """Flask's span, which ends with Flask's context, is the parent of those of COMMIT."""
    app = flask.Flask(__name__)
    FlaskInstrumentor.instrument_app(  # type: ignore[no-untyped-call]
        app, tracer_provider=provider
    )
    app.wsgi_app = SessionMiddleware(app.wsgi_app, traced)  # type: ignore[method-assign]

    @app.post("/")
    def create() -> str:
        traced.add(Item(name="kept"))
        return "ok"

    TestApp(app).post("/")
    FlaskInstrumentor.uninstrument_app(app)  # type: ignore[no-untyped-call]
    assert within("POST /", exporter) == STATEMENTS


# Flask-Admin.


class ItemView(ModelView):  # type: ignore[misc]
    """The pages of items; a new one gets a companion after Flask-Admin's own COMMIT."""

    form_columns = ("name",)

    def after_model_change(self, form: Any, model: Item, is_created: bool) -> None:
        if is_created:
            self.session.session.add(Item(name=f"{model.name}, too"))


@pytest.fixture
def admin(db: SQLAlchemy, shop: flask.Flask) -> TestApp:
    Admin(shop).add_view(ItemView(Item, db))
    return TestApp(shop)


def submit(page: Any, name: str) -> Any:
    form = page.forms[0]
    form["name"] = name
    return form.submit()


def test_flask_admin_makes_changes_and_deletes(admin: TestApp, outside: Engine) -> None:
    """Its pages work, with commits of its own and with work that it leaves to the request's."""
    submit(admin.get("/admin/item/new/"), "lamp")
    assert names(outside) == ["lamp", "lamp, too"]
    submit(admin.get("/admin/item/edit/?id=1"), "chair")
    assert names(outside) == ["chair", "lamp, too"]
    admin.post("/admin/item/delete/", {"id": "1"})
    assert names(outside) == ["lamp, too"]


def test_a_form_that_flask_admin_refuses_leaves_nothing(admin: TestApp, outside: Engine) -> None:
    """What the database refuses is answered with the form and 200, and nothing is kept."""
    with outside.begin() as connection:
        connection.execute(text("CREATE UNIQUE INDEX once ON items (name)"))
        connection.execute(insert(Item).values(name="lamp"))
    page = submit(admin.get("/admin/item/new/"), "lamp")
    assert page.status == "200 OK"
    assert "UNIQUE constraint failed" in page
    assert names(outside) == ["lamp"]


# Flask-Caching.


def test_flask_caching_replays_an_answer_without_a_session(
    registry: Registry, outside: Engine
) -> None:
    """The second request gets the first one's answer, and its session is never used."""
    outcomes: list[Outcome] = []
    app = wrapped(registry, observer=outcomes.append)
    cache = Cache(app, config={"CACHE_TYPE": "SimpleCache"})

    @app.get("/")
    @cache.cached()
    def visit() -> str:
        registry.add(Item(name="visit"))
        registry.flush()
        return str(registry.query(Item).count())

    client = TestApp(app)
    assert [client.get("/").text for _ in range(2)] == ["1", "1"]
    assert [outcome.action for outcome in outcomes] == ["commit", "none"]
    assert names(outside) == ["visit"]


# Flask-Mail.


@pytest.mark.parametrize(
    ("path", "durable"),
    [("/200", [["lamp"]]), ("/409", []), ("/200?in=vain", [])],
    ids=["kept", "refused", "COMMIT failed"],
)
def test_flask_mail_sends_after_commit(
    path: str, durable: list[list[str]], registry: Registry, outside: Engine
) -> None:
    """A mail of on_commit is sent in Flask's context when its row is durable, and only then."""
    app = wrapped(registry)
    app.config.update(TESTING=True, MAIL_DEFAULT_SENDER="shop@example.org")
    mail = flask_mail.Mail(app)
    seen: list[list[str | None]] = []

    def send() -> None:
        seen.append(names(outside))
        link = flask.url_for("order", status=200, _external=True)
        mail.send(flask_mail.Message("Thanks", ["you@example.org"], link))

    @app.post("/<int:status>")
    def order(status: int) -> tuple[str, int]:
        registry.add(Item(name="lamp"))
        if "in" in flask.request.args:
            refuse_commit(registry)
        on_commit(registry, send)
        return "", status

    with mail.record_messages() as outbox, suppress(IntegrityError):
        TestApp(app).post(path, expect_errors=True)
    assert seen == durable
    assert [message.body for message in outbox] == ["http://localhost/200" for _ in durable]


# filedepot.


@pytest.mark.parametrize(
    ("requests", "files"),
    [
        ("add 200", ["content"]),
        ("add 409", []),
        ("flush 409", []),
        ("add 200 replace 200", ["new content"]),
        ("add 200 replace 409", ["content"]),
        ("add 200 replace-in-vain 200", ["content"]),
    ],
)
def test_files_of_depot_share_the_fate_of_their_row(
    requests: str, files: list[str], outside: Engine, sqlite_url: str, tmp_path: Path
) -> None:
    """A file is there if its row was committed, and gone if it was rolled back or replaced."""
    run_alone("extension_depot.py", sqlite_url, str(tmp_path / "files"), *requests.split())
    found = list(tmp_path.glob("files/*/file"))
    assert [file.read_text() for file in found] == files
    with outside.connect() as connection:
        rows = connection.scalars(text("SELECT file FROM documents"))
        assert [json.loads(row)["file_id"] for row in rows] == [file.parent.name for file in found]


# Flask-Migrate and flask-sock: a shop in processes of its own.


DATABASE = "FLASK_SQLALCHEMY_DATABASE_URI"
"""The variable of the environment that tells the shop where its items are."""


def test_flask_migrate_makes_the_tables_of_a_wrapped_application(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """init, migrate and upgrade do what they do without us, and then requests are served."""
    monkeypatch.setenv(DATABASE, sqlite_url)
    for command in ["init"], ["migrate", "--message", "items"], ["upgrade"]:
        run("-m", "flask", "--app", "extension_shop", "db", *command, folder=tmp_path)
    app = extension_shop.create_app()
    TestApp(app).post("/lamp")
    with app.app_context():
        extension_shop.db.engine.dispose()
    engine = make_engine(sqlite_url)
    assert inspect(engine).get_table_names() == ["alembic_version", "items"]
    assert names(engine) == ["lamp"]
    engine.dispose()


SERVERS = {
    "werkzeug": ["flask", "--app", "extension_shop:create_logging_app()", "run", "--port", "0"],
    "gunicorn": [
        *("gunicorn", "--bind", "127.0.0.1:0", "--threads", "4"),
        "extension_shop:create_logging_app()",
    ],
}

LEFT = {"werkzeug": ["last"], "gunicorn": []}
"""What becomes of what a handler leaves: flask-sock ends with a 200, or with a StopIteration."""


@pytest.fixture(scope="module", params=SERVERS)
def sockets(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Process, Engine]]:
    """The name of a real server of WebSockets, the server, and its database seen from outside."""
    url = f"sqlite:///{tmp_path_factory.mktemp('sockets')}/items.db"
    engine = make_engine(url)
    make_tables(engine)
    command = [sys.executable, "-m", *SERVERS[request.param]]
    environ = {"PYTHONPATH": PYTHONPATH, DATABASE: url}
    with running(*command, port_in=r"http://127\.0\.0\.1:(\d+)", environ=environ) as server:
        yield request.param, server, engine
    engine.dispose()


def talk(server: Process, path: str, *messages: str) -> list[str]:
    """Say *messages* on a connection of their own; what was answered to each."""
    client = Client(f"ws://127.0.0.1:{server.port}{path}")
    answers = []
    for message in messages:
        client.send(message)
        answers.append(client.receive(PATIENCE))
    client.close()
    return answers


def test_a_websocket_commits_what_it_wants(sockets: tuple[str, Process, Engine]) -> None:
    """What the handler commits is durable; the rest is kept or lost with the request's end."""
    name, server, engine = sockets
    before = names(engine)
    assert talk(server, "/commits", "one", "two") == ["have one", "have two"]
    assert names(engine) == [*before, "one", "two"]
    talk(server, "/commits", "last")
    ends = re.compile("^DEBUG:sessionscope:.* GET /commits", re.MULTILINE)
    until(lambda: len(ends.findall(server.log)) == 2, "the end of both requests")
    assert names(engine) == [*before, "one", "two", *LEFT[name]]


def test_each_message_of_a_websocket_can_be_a_unit_of_work(
    sockets: tuple[str, Process, Engine],
) -> None:
    """A session_scope per message keeps or loses that message alone."""
    _, server, engine = sockets
    before = names(engine)
    assert talk(server, "/scopes", "one", "gone", "two") == ["kept", "refused", "kept"]
    assert names(engine) == [*before, "one", "two"]


# factory_boy.


def test_rows_of_factories_are_undone(db: SQLAlchemy, shop: flask.Flask, outside: Engine) -> None:
    """What a factory of db.session commits in isolated() is found by requests, and undone."""

    class ItemFactory(SQLAlchemyModelFactory):
        class Meta:
            model = Item
            sqlalchemy_session = db.session
            sqlalchemy_session_persistence = "commit"

        name = "new"

    @shop.post("/<int:id>")
    def sell(id: int) -> str:
        db.get_or_404(Item, id).name = "sold"
        return "ok"

    with shop.app_context(), isolated(db.session) as connection:
        first, second = ItemFactory.create_batch(2)
        TestApp(shop).post("/1")
        assert list(connection.scalars(select(Item.name))) == ["sold", "new"]
        assert [first.name, second.name] == ["sold", "new"]
    assert names(outside) == []


# Strawberry.


@strawberry.type
class Query:
    """GraphQL wants one."""

    ok: bool = True


class ShopView(GraphQLView):
    """A view that tells *commit_when* of errors in the body of a 200."""

    def process_result(self, request: Any, result: ExecutionResult) -> GraphQLHTTPResponse:
        request.environ["shop.failed"] = bool(result.errors)
        return super().process_result(request, result)


def unless_failed(environ: Any, status: str, headers: Any) -> bool:
    return commit_on_success(environ, status, headers) and not environ.get("shop.failed")


@pytest.mark.parametrize(
    ("mutation", "kept"), [("{ add }", ["new"]), ("{ add refuse }", []), ("{ add collide }", [])]
)
def test_errors_of_graphql_roll_back(
    mutation: str, kept: list[str], registry: Registry, outside: Engine
) -> None:
    """A 200 whose body has errors keeps nothing, where its view tells commit_when."""

    @strawberry.type
    class Mutation:
        @strawberry.mutation
        def add(self) -> int:
            registry.add(Item(id=1, name="new"))
            registry.flush()
            return 1

        @strawberry.mutation
        def refuse(self) -> int:
            raise ValueError("not for sale")

        @strawberry.mutation
        def collide(self) -> int:
            registry.execute(insert(Item).values(id=1, name="other"))
            return 1

    app = wrapped(registry, commit_when=unless_failed)
    schema = strawberry.Schema(Query, Mutation)
    app.add_url_rule("/", view_func=ShopView.as_view("graphql", schema=schema))
    answer = TestApp(app).post_json("/", {"query": f"mutation {mutation}"}, status=200)
    assert ("errors" in answer.json) == (not kept)
    assert names(outside) == kept


# Celery.


@pytest.mark.parametrize(("status", "kept"), [(200, ["mine", "the task's", "more"]), (409, [])])
def test_an_eager_task_works_in_the_session_of_its_request(
    status: int, kept: list[str], db: SQLAlchemy, shop: flask.Flask, outside: Engine
) -> None:
    """A task that pushes a context and removes its session leaves the outcome to the status."""

    class ContextTask(celery.Task):  # type: ignore[misc]
        def __call__(self, *args: object, **options: object) -> object:
            with shop.app_context():
                return self.run(*args, **options)

    tasks = celery.Celery("shop", task_cls=ContextTask, broker="memory://", set_as_current=False)
    tasks.conf.update(task_always_eager=True, task_eager_propagates=True)

    @tasks.task  # type: ignore[untyped-decorator]
    def add(name: str) -> None:
        db.session.add(Item(name=name))

    @shop.post("/<int:status>")
    def create(status: int) -> tuple[str, int]:
        db.session.add(Item(name="mine"))
        add.delay("the task's")
        db.session.add(Item(name="more"))
        return "", status

    TestApp(shop).post(f"/{status}", expect_errors=True)
    assert names(outside) == kept
