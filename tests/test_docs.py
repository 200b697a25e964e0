"""What the pages of the documentation say is so, and a site is made of them."""

from __future__ import annotations

import ast
import asyncio.tasks
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import ExitStack, closing
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from html.parser import HTMLParser
from importlib.util import find_spec
from inspect import getsource
from itertools import count, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urldefrag

import flask.globals
import framework_apps  # noqa: F401  Django's settings can be made only once in a process
import prometheus_client
import pytest
import sessionscope
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path
from flask import Flask
from prometheus_client.metrics import MetricWrapperBase
from sessionscope import (
    SessionMiddleware,
    engines,
    idempotency,
    pastedeploy,
    pytest_plugin,
    testing,
)
from sqlalchemy import Engine, create_engine, event, func, insert, orm, pool, select
from sqlalchemy import text as sql
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.util import concurrency
from support import Server, environ, serve_once, serving
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from webtest import TestApp

from web.options import make_parser

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))

POSTGRESQL = re.compile(r"postgresql\+psycopg://\w+@\w+\.example/\w+")
MARIADB = re.compile(r"mariadb\+pymysql://\w+@\w+\.example/\w+")
"""Databases on the pages, which tests replace by their own."""

Names = dict[str, Any]


class Reader:
    """Somebody who runs the code of pages, and compares what they see with what is shown.

    The blocks of a page share one namespace, that of the module ``shop``: the first block of
    the index, on which the others build.
    """

    def __init__(self, capsys: Any, caplog: Any) -> None:
        self.capsys, self.caplog = capsys, caplog
        self.shop = ModuleType("shop")
        self.names: Names = vars(self.shop)
        self.urls: dict[re.Pattern[str], str] = {}
        self.engines: set[Engine] = set()
        self.seen: list[str] = []
        next(self.steps("index"))

    def steps(self, page: str) -> Iterator[Example]:
        """Run a page, and stop after each block."""
        source = (DOCS / f"{page}.md").read_text("utf-8")
        for pattern, url in self.urls.items():
            source = pattern.sub(url, source)
        copy = Path(f"{page}.md")
        copy.write_text(source, "utf-8")
        parsers = [CodeBlockParser("python", self.execute), CodeBlockParser("text", self.compare)]
        document = Sybil(parsers).parse(copy.resolve())
        document.namespace = self.names
        for example in document.examples():
            example.evaluate()
            yield example

    def run(self, page: str) -> Names:
        for _ in self.steps(page):
            pass
        return self.names

    def execute(self, example: Example) -> None:
        self.look()
        PythonEvaluator()(example)
        self.engines |= {found for found in self.names.values() if isinstance(found, Engine)}
        self.seen = self.look()

    def look(self) -> list[str]:
        """What was printed, and what was logged, since the last look."""
        printed = self.capsys.readouterr().out
        logged = [
            f"{record.levelname} {record.name}: {record.getMessage()}\n"
            for record in self.caplog.records
            if record.name == "sessionscope"
        ]
        self.caplog.clear()
        return [printed, "".join(logged)]

    def compare(self, example: Example) -> str | None:
        """A block of text is what the code before it printed or logged; ``...`` is anything.

        Of the log only the levels count that are shown.
        """
        check, options = OutputChecker().check_output, ELLIPSIS | NORMALIZE_WHITESPACE
        shown = example.parsed
        printed, logged = self.seen
        levels = {line.partition(" ")[0] for line in shown.splitlines()}
        lines = [line for line in logged.splitlines() if line.partition(" ")[0] in levels]
        found = [printed, "\n".join(lines) + "\n"]
        if shown.startswith("HTTP/") or any(check(shown, text, options) for text in found):
            return None
        return "\n".join(["shown:", shown, "printed, and logged:", *found])

    def orders(self) -> list[str]:
        """The items that are durable, seen from outside."""
        with create_engine(self.names["engine"].url).connect() as connection:
            order = self.names["Order"]
            return list(connection.scalars(select(order.item).order_by(order.id)))


@pytest.fixture
def reader(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Reader]:
    """A reader in an empty folder; at the end nothing may be left in their registry."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("DEBUG", "sessionscope")
    reader = Reader(capsys, caplog)
    monkeypatch.setitem(sys.modules, "shop", reader.shop)
    yield reader
    left = reader.names["Session"].registry.has()
    reader.names["Session"].remove()
    for engine in reader.engines:
        engine.dispose()
    assert not left


def plain(status: str, work: Callable[[Any], object]) -> WSGIApplication:
    """A plain application that gives *work* its environ."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        work(environ)
        start_response(status, [("Content-Type", "text/plain")])
        return [b""]

    return app


# Each page.


def rival(reader: Reader) -> Callable[[], None]:
    """What fails twice because another connection holds the lock of the SQLite file."""
    tries = count(1)

    def meet() -> None:
        session = reader.names["Session"]()
        session.connection().exec_driver_sql("PRAGMA busy_timeout = 0")
        with closing(sqlite3.connect("shop.db")) as other:
            if next(tries) < 3:
                other.execute("BEGIN IMMEDIATE")
            session.flush()

    return meet


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_true(page: str, reader: Reader) -> None:
    """The code of a page runs from top to bottom, and does what the page shows."""
    reader.names |= {"reader": None, "meet_a_rival": rival(reader)}
    reader.run(page)
    for metric in reader.names.values():
        if isinstance(metric, MetricWrapperBase):
            prometheus_client.REGISTRY.unregister(metric)


def test_ini_files_are_read(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of each filter on the pages are understood."""
    monkeypatch.setitem(sys.modules, "shop.models", reader.shop)
    found = []
    for page in PAGES:
        for block in re.findall("```ini\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.S):
            ini = ConfigParser()
            ini.read_string(block)
            settings = dict(ini["filter:session"])
            assert settings.pop("use") == "egg:sessionscope"
            found.append(pastedeploy.filter_app_factory(plain("200 OK", bool), None, **settings))
    assert [made.registry for made in found] == [reader.names["Session"]] * 2


def test_commands_have_their_options() -> None:
    """Each option of ``serve.py`` that a page gives is one."""
    known = make_parser().format_help()
    given = {
        f"{page}: {option}": option in known
        for page in PAGES
        for block in re.findall("```console\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.S)
        if "serve.py" in block
        for option in re.findall(r"--[a-z][a-z-]+", block)
    }
    assert given
    assert [option for option, is_known in given.items() if not is_known] == []


# Pages of which more can be said.


def test_an_order_is_kept_on_each_framework(reader: Reader) -> None:
    """Each application on the page about wrapping keeps an order that is posted to it."""

    def create(request: Any) -> HttpResponse:
        reader.names["Session"].add(reader.names["Order"](item=request.POST["item"]))
        return HttpResponse()

    served: list[Any] = [None]
    with override_settings(ROOT_URLCONF=(path("orders", create),)):
        for _ in islice(reader.steps("wrapping"), 6):
            # Flask's is the application itself, with the middleware inside.
            name = "app" if len(served) == 1 else "application"
            served.append(reader.names[name])
            assert served[-1] not in served[:-1]
            TestApp(served[-1]).post("/orders", {"item": "lamp"}, status=200)
            assert reader.orders() == ["lamp"] * (len(served) - 1)


@pytest.mark.parametrize(
    ("error", "status"),
    [(IntegrityError, 409), (OperationalError, 503), (PoolTimeout, 503)],
)
def test_errors_are_answered_around_the_middleware(
    error: type[Exception], status: int, reader: Reader
) -> None:
    """The function around the middleware answers what leaves it."""

    def fail(_: object) -> None:
        raise error("", None, Exception())

    names = reader.run("outcomes")
    inner = SessionMiddleware(plain("200 OK", fail), names["Session"])
    TestApp(names["with_error_responses"](inner)).get("/", status=status)


def test_other_rules(reader: Reader) -> None:
    """One rule keeps what a 401 did, the other drops what a 200 did that was a dry run."""
    names = reader.run("outcomes")

    def post(item: str, status: str, **options: Any) -> None:
        def work(environ: WSGIEnvironment) -> None:
            names["Session"].add(names["Order"](item=item))
            environ["shop.dry_run"] = item == "dry"

        app = SessionMiddleware(plain(status, work), names["Session"], **options)
        serve_once(app, environ("POST"))

    post("401", "401 Unauthorized", commit_when=names["also_wrong_passwords"])
    post("403", "403 Forbidden", commit_when=names["also_wrong_passwords"])
    post("dry", "200 OK", commit_when=names["unless_told_otherwise"])
    post("200", "200 OK", commit_when=names["unless_told_otherwise"])
    assert reader.orders() == ["401", "200"]


def test_a_record_stays_and_an_expected_error_does_no_harm(reader: Reader) -> None:
    """What was recorded in a scope of its own stays; an error in a savepoint dooms nothing."""
    names = reader.run("outcomes")
    said: list[str] = []

    def record(_: object) -> None:
        names["record"]("asked")
        names["Session"].add(names["Order"](item="gone"))

    def twice(_: object) -> None:
        said.extend(names["order_once"](7, item) for item in ("lamp", "again"))

    for status, work in (("409 Conflict", record), ("200 OK", twice)):
        serve_once(SessionMiddleware(plain(status, work), names["Session"]), environ("POST"))
    assert reader.orders() == ["asked", "lamp"]
    assert said == ["ordered", "you have ordered that already"]


def test_events_hold_no_connection(reader: Reader) -> None:
    """Server-sent events arrive one by one, and between two of them the pool is full."""
    names = reader.run("streaming")
    outside = create_engine(names["engine"].url)

    def wait() -> None:
        with outside.begin() as connection:
            connection.execute(insert(names["Order"]), [{"item": "lamp"}, {"item": "chair"}])

    names["wait"] = wait
    server = Server(SessionMiddleware(names["app"], names["Session"]))
    seen = []
    for chunk in islice(server.begin(environ(path="/events")), 6):
        seen.append(chunk.decode())
        assert names["engine"].pool.checkedout() == 0
    server.finish()
    assert seen == [
        ": hello\n\n",
        ": still here\n\n",
        "id: 1\ndata: lamp\n\n",
        "id: 2\ndata: chair\n\n",
        ": still here\n\n",
        "id: 3\ndata: lamp\n\n",
    ]
    app = SessionMiddleware(names["app"], names["Session"])
    export = serve_once(app, environ(path="/orders.csv"))
    assert export.content.startswith(b"1,lamp\n2,chair\n3,lamp\n")
    outside.dispose()


def test_a_client_asks_until_it_knows(reader: Reader) -> None:
    """The client on the page gets its answer though two got lost, and there is one order."""
    names = reader.run("exactly-once")
    before, lost = reader.orders(), count(1)

    def losing_answers(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        answer = names["application"](environ, start_response)
        if next(lost) < 3:
            raise RuntimeError("after COMMIT, on purpose")
        return answer

    with serving(losing_answers) as port:
        status, content = names["order_a_lamp"](f"127.0.0.1:{port}")
    assert (status, next(lost)) == (200, 4)
    assert json.loads(content) == {"id": len(before) + 1}
    assert reader.orders() == [*before, "lamp"]


def test_flask_sqlalchemy_orders_once(reader: Reader) -> None:
    """The keys of a Flask-SQLAlchemy application work in its context, as the page shows."""
    names = reader.run("exactly-once")
    store, db = names["store"], names["db"]
    calls = count(1)
    store.add_url_rule("/", view_func=lambda: str(next(calls)), methods=["POST"])
    with store.app_context():
        db.create_all()
    for _ in range(2):
        answer = TestApp(store).post("/", headers={"Idempotency-Key": "one"}, status=200)
        assert answer.text == "1"
    with store.app_context():
        db.engine.dispose()


def test_a_task_and_a_job_find_their_order(reader: Reader) -> None:
    """A task of Celery, and a job like RQ's, run after the commit and keep what they do."""
    names = reader.run("recipes")
    app = Flask("packages")
    app.add_url_rule("/", view_func=names["order_package"], methods=["POST"])
    TestApp(SessionMiddleware(app, names["Session"])).post("/", status=200)
    assert reader.orders()[-1] == "lamp (packed)"

    class Queue:
        def enqueue(self, job: Callable[[int], None], id: int) -> None:
            job(id)

    def ship(_: object) -> None:
        order = names["Session"].scalars(select(names["Order"])).all()[-1]
        names["ship_later"](Queue(), order)

    serve_once(SessionMiddleware(plain("200 OK", ship), names["Session"]), environ("POST"))
    assert reader.orders()[-1] == "lamp (packed) (shipped)"


def test_an_error_of_graphql_rolls_back(reader: Reader) -> None:
    """A mutation is kept, and one whose 200 has errors is not."""
    names = reader.run("recipes")
    before = reader.orders()
    app = Flask("graphql")
    view = names["ShopView"].as_view("graphql", schema=names["schema"])
    app.add_url_rule("/", view_func=view)
    rule = names["unless_failed"]
    client = TestApp(SessionMiddleware(app, names["Session"], commit_when=rule))
    for item in ("lamp", "moon"):
        client.post_json("/", {"query": f'mutation {{ order(item: "{item}") }}'}, status=200)
    assert reader.orders() == [*before, "lamp"]


def test_a_request_may_have_a_limit(reader: Reader, postgresql_url: str) -> None:
    """The limit of one view is that of its transaction, and the next request has none."""
    names = reader.run("recipes")
    engine = create_engine(postgresql_url)
    names["Order"].__table__.create(engine)
    names["Session"].configure(bind=engine)
    found: list[Any] = []

    def ask(_: object) -> None:
        found.append(names["Session"].scalar(sql("SHOW statement_timeout")))

    def report(_: object) -> None:
        names["report"]()
        ask(_)

    for work in (report, ask):
        serve_once(SessionMiddleware(plain("200 OK", work), names["Session"]))
    names["Order"].__table__.drop(engine)
    engine.dispose()
    assert found == ["2s", "0"]


def test_the_tests_of_the_tutorial_pass(reader: Reader) -> None:
    """The tests that the tutorial writes pass in any order, and leave no order behind."""
    written = "test_an_order_is_stored", "test_the_moon_is_not_for_sale"
    next(step for step in reader.steps("tutorial") if written[1] in step.parsed)
    tests = [reader.names[name] for name in written]
    before = reader.orders()
    for test in (*tests, *reversed(tests)):
        with ExitStack() as stack:
            test(lambda registry: stack.enter_context(testing.isolated(registry)))
    assert reader.orders() == before


def test_callbacks_work_after_the_commit(reader: Reader) -> None:
    """The worker's callback changed its order, and a message is stored before it is announced."""
    names = reader.run("after-commit")
    assert reader.orders() == ["lamp", "chair (mailed)"]
    names["Base"].metadata.create_all(names["engine"])
    stored: list[str] = []

    def wake() -> None:
        with names["engine"].connect() as connection:
            stored.extend(connection.scalars(select(names["Outbox"].message)))

    app = plain("200 OK", lambda _: names["announce"]("an order", wake))
    serve_once(SessionMiddleware(app, names["Session"]), environ("POST"))
    assert stored == ["an order"]


def test_the_tests_on_the_page_pass(reader: Reader, tmp_path: Path) -> None:
    """The page about testing has a conftest.py and a module of tests, which pytest passes."""
    blocks = re.findall("```python\n(.*?)```", (DOCS / "testing.md").read_text("utf-8"), re.S)
    index = re.findall("```python\n(.*?)```", (DOCS / "index.md").read_text("utf-8"), re.S)
    (tmp_path / "sessionscope").mkdir()
    for name in ("middleware", "testing", "pytest_plugin"):
        (tmp_path / "sessionscope" / f"{name}.py").symlink_to(ROOT / f"{name}.py")
    for name, source in (("shop", index[0]), ("conftest", blocks[0]), ("test_shop", blocks[1])):
        (tmp_path / f"{name}.py").write_text(source, "utf-8")
    warnings = ["-W", "error", "-W", "ignore:'cgi' is deprecated:DeprecationWarning"]  # of WebOb
    options = ["-q", "-p", "sessionscope.pytest_plugin", *warnings, "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # one plugin cannot be loaded by two names
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


SETTINGS: dict[str, dict[str, object]] = {
    "postgresql": {
        "SHOW statement_timeout": "10s",
        "SHOW lock_timeout": "3s",
        "SHOW idle_in_transaction_session_timeout": "1min",
        "SHOW transaction_isolation": "repeatable read",
    },
    "mariadb": {
        "SELECT @@max_statement_time": 10,
        "SELECT @@innodb_lock_wait_timeout": 3,
        "SELECT @@innodb_snapshot_isolation": 1,
    },
    "sqlite": {"PRAGMA journal_mode": "wal", "PRAGMA busy_timeout": 10_000},
}


def test_timeouts_are_set(reader: Reader, postgresql_url: str, mariadb_url: str) -> None:
    """Each engine on the page about timeouts has the settings that the page tells of."""
    reader.urls = {POSTGRESQL: postgresql_url, MARIADB: mariadb_url}
    checked = []
    for _ in reader.steps("timeouts"):
        engine = reader.names["engine"]
        if engine not in checked:
            checked.append(engine)
            with engine.connect() as connection:
                for question, answer in SETTINGS[engine.dialect.name].items():
                    assert connection.scalar(sql(question)) == answer, question
    assert [engine.dialect.name for engine in checked] == ["postgresql", "mariadb", "sqlite"]


def test_one_request_may_be_stricter(reader: Reader, postgresql_url: str) -> None:
    """The level of one view, and the timeout of each transaction, are those that the page sets."""
    names = reader.run("timeouts")
    engine = create_engine(postgresql_url)
    names["Order"].__table__.create(engine)
    names["Session"].configure(bind=engine)
    found: list[Any] = []

    def work(_: object) -> None:
        names["report"]()
        session = names["Session"]
        found.append(session.scalar(sql("SHOW transaction_isolation")))
        found.append(session.scalar(sql("SHOW statement_timeout")))

    serve_once(SessionMiddleware(plain("200 OK", work), names["Session"]))
    names["Order"].__table__.drop(engine)
    engine.dispose()
    assert found == ["serializable", "5s"]


def test_sqlite_writers_wait_and_readers_only_read(reader: Reader) -> None:
    """On SQLite a transaction begins with the write lock, and the reader cannot write."""
    names = reader.run("timeouts")
    with names["engine"].connect() as writer:
        writer.exec_driver_sql("SELECT 1")
        other = sqlite3.connect("shop.db", timeout=0)
        with closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        with names["reader"].connect() as connection:
            assert connection.scalar(select(func.count(names["Order"].id))) == 0
            with pytest.raises(OperationalError, match="readonly"):
                connection.execute(insert(names["Order"]).values(item="lamp"))


@pytest.fixture
def two_databases(reader: Reader, postgresql_url: str, mariadb_url: str) -> Iterator[Reader]:
    """A reader whose shop is on PostgreSQL, and whose statistics are on MariaDB."""
    reader.urls = {POSTGRESQL: postgresql_url, MARIADB: mariadb_url}
    yield reader
    for engine, table in tables(reader):
        table.drop(engine, checkfirst=True)


def tables(reader: Reader) -> list[tuple[Engine, Any]]:
    order, visit, shop, stats = (reader.names[name] for name in ("Order", "Visit", "shop", "stats"))
    return [(shop, order.__table__), (stats, visit.__table__)]


def counts(reader: Reader) -> list[int]:
    """How many rows are durable in each database."""
    found = []
    for engine, table in tables(reader):
        with engine.connect() as connection:
            found.append(connection.scalar(select(func.count()).select_from(table)) or 0)
    return found


def order_and_visit(names: Names, of_visits: Any) -> WSGIApplication:
    def work(_: object) -> None:
        names["Session"].add(names["Order"](item="lamp"))
        of_visits.add(names["Visit"]())

    return plain("200 OK", work)


def test_several_databases(two_databases: Reader) -> None:
    """In each of the three ways of the page both databases keep what a request did."""
    names, ways = two_databases.names, 0
    for example in two_databases.steps("databases"):
        if "scoped_session" not in example.parsed:
            for engine, table in tables(two_databases):
                table.create(engine)
            continue
        ways += 1
        session = names["Session"]
        if ways == 1:
            inner = names["StatsSession"]
            app: Any = SessionMiddleware(order_and_visit(names, inner), inner)
        else:
            app = order_and_visit(names, session)
        serve_once(SessionMiddleware(app, session), environ("POST"))
        assert counts(two_databases) == [ways, ways]
        assert session.session_factory.kw.get("twophase", False) == (ways == 3)
    assert ways == 3


def test_of_two_registries_the_inner_one_commits_first(two_databases: Reader) -> None:
    """Where the outer COMMIT fails, what the inner one committed stays."""
    for _ in islice(two_databases.steps("databases"), 2):
        pass
    for engine, table in tables(two_databases):
        table.create(engine)
    names = two_databases.names
    outer, inner = names["Session"], names["StatsSession"]
    event.listen(outer, "before_commit", lambda session: 1 / 0)
    app = SessionMiddleware(order_and_visit(names, inner), inner)
    with pytest.raises(ZeroDivisionError):
        serve_once(SessionMiddleware(app, outer), environ("POST"))
    assert counts(two_databases) == [0, 1]


def test_flask_sqlalchemy_needs_one_line(reader: Reader) -> None:
    """An application of Flask-SQLAlchemy commits through its own db.session."""
    names = reader.run("coming-from")
    app, customer = names["app"], names["Customer"]
    db = names["db"] = app.extensions["sqlalchemy"]  # the block about a replica makes another
    assert TestApp(app).post("/customers", {"name": "Ada"}).json == {"id": 1}
    with app.app_context(), db.engine.connect() as connection:
        assert connection.scalars(select(customer.name)).all() == ["Ada"]


@pytest.mark.parametrize(("method", "kept"), [("POST", ["lamp"]), ("GET", [])])
def test_a_rule_keeps_what_a_get_has_changed_out(
    method: str, kept: list[str], reader: Reader
) -> None:
    """The rule on the page about others commits a POST, and nothing of a GET."""
    names = reader.run("coming-from")
    app = plain("200 OK", lambda _: names["Session"].add(names["Order"](item="lamp")))
    rule = names["never_for_reading"]
    serve_once(SessionMiddleware(app, names["Session"], commit_when=rule), environ(method))
    assert reader.orders() == kept


def test_flask_sqlalchemy_reads_from_a_replica(reader: Reader, tmp_path: Path) -> None:
    """With the session on the page about others a GET reads from reader=, and a POST doesn't."""
    names = reader.run("coming-from")
    db = names["db"]
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/primary.db"
    db.init_app(app)
    replica = names["replica"] = create_engine(f"sqlite:///{tmp_path}/replica.db")
    app.wsgi_app = SessionMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, db.session, reader=replica
    )

    @app.route("/", methods=["GET", "POST"])
    def show() -> str:
        return Path(str(db.session.connection().engine.url.database)).stem

    client = TestApp(app)
    assert [client.get("/").text, client.post("/").text] == ["replica", "primary"]
    replica.dispose()
    with app.app_context():
        db.engine.dispose()


# Troubleshooting by message.

TROUBLES = (DOCS / "troubleshooting.md").read_text("utf-8")


def messages(section: str) -> list[str]:
    """The headings that are messages, of sections that begin so; ``...`` is anything."""
    sections = re.findall(f"^## {section}.*?(?=^## |\\Z)", TROUBLES, re.M | re.S)
    return [message for text in sections for message in re.findall("^### `(.*)`$", text, re.M)]


OWN = messages("Messages of sessionscope")
MODULES: list[ModuleType] = [asyncio.tasks, concurrency, flask.globals, orm.session, pool.impl]
"""Where SQLAlchemy, Flask and asyncio have the messages that the page quotes."""

SAYING = {
    "CommitOutcomeUnknown",
    "DisconnectionError",
    "InheritedConnection",
    "Problem",
    "RuntimeError",
    "TransactionDoomed",
    "TypeError",
    "ValueError",
    "exception",
    "extra_work",
    "failure_of",
    "swallowed",
    "warn_once",
    "warning",
}
"""The functions of whose arguments one is read in an error, in a response or in the log."""


def literals(node: ast.AST) -> Iterator[str]:
    """The texts of a piece of source, in which ``...`` is what is only known when it runs."""
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            pieces = [p.value if isinstance(p, ast.Constant) else "..." for p in part.values]
            yield "".join(str(piece) for piece in pieces)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield re.sub("%[a-z]", "...", part.value)


def library() -> Iterator[ast.Module]:
    paths = (ROOT / "middleware.py", *(ROOT / "sessionscope").glob("*.py"))
    return (ast.parse(path.read_text("utf-8")) for path in paths)


@pytest.mark.parametrize("message", OWN)
def test_a_message_is_the_librarys(message: str) -> None:
    """Each message of ours on the page about troubles is one that the library has, word by word."""
    if message == "registry must be a scoped_session":
        with pytest.raises(TypeError, match=message):
            SessionMiddleware(plain("200 OK", bool), orm.sessionmaker())  # type: ignore[arg-type]
    else:
        assert [text for module in library() for text in literals(module) if message in text]


@pytest.mark.parametrize(
    "message", messages("Messages of (?:SQLAlchemy|asyncio|Flask)"), ids=lambda text: text[:30]
)
def test_a_message_is_that_of_others(message: str) -> None:
    """Each message of SQLAlchemy, asyncio or Flask on that page is in their source."""
    found = [text for module in MODULES for text in literals(ast.parse(getsource(module)))]
    assert [text for text in found if message in text]


def test_each_message_of_the_library_is_explained() -> None:
    """What the library raises or logs by itself has a heading, or is named under one."""
    page = " ".join(TROUBLES.split())
    missing = [
        text
        for module in library()
        for call in ast.walk(module)
        if isinstance(call, ast.Call) and call.args
        if getattr(call.func, "id", getattr(call.func, "attr", "")) in SAYING
        for text in [next((text for one in call.args for text in literals(one)), "")]
        if text.strip(".: ") and not any(message in text for message in OWN) and text not in page
    ]
    assert missing == []


# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site; each reference that leads nowhere is an error."""
    tools = {name: find_spec(name) for name in ("sphinx", "myst_parser", "furo")}
    missing = [name for name, found in {**tools, "dot": shutil.which("dot")}.items() if not found]
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"left out, not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("site")
    options = ["-n", "-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "doctrees")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder / "html")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    return folder / "html"


class Links(HTMLParser):
    """What a page of the site refers to, and what can be referred to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.links: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.targets.add(value)
            elif name in ("href", "src", "data") and value and ":" not in value:
                self.links.add(unquote(value))


def test_no_link_of_the_site_is_broken(site: Path) -> None:
    """Each relative link leads to a file of the site, and to a place that is there in it."""
    pages = {page: Links(page) for page in site.glob("*.html")}
    assert {page.stem for page in pages} >= {*PAGES, "search", "genindex"}
    for page, found in pages.items():
        for link in found.links:
            address, fragment = urldefrag(link)
            target = page.parent / address.partition("?")[0] if address else page
            assert target.is_file(), f"{page.name}: {link}"
            if fragment and target in pages:
                assert fragment in pages[target].targets, f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_no_link_of_a_page_is_broken(page: str) -> None:
    """A page can be read where it lies, too: each file that it links to is there."""
    source = (DOCS / f"{page}.md").read_text("utf-8")
    for link in re.findall(r"\]\((?!https:)([^)#:]+)|\{download\}`([^`]+)`", source):
        assert (DOCS / "".join(link)).is_file(), link


@pytest.mark.parametrize(
    "module", [sessionscope, engines, idempotency, testing, pytest_plugin, pastedeploy]
)
def test_the_interface_is_complete(module: ModuleType, site: Path) -> None:
    """Each public name of the library is on the page of its interface, and in dir()."""
    targets = Links(site / "interface.html").targets
    names = getattr(module, "__all__", ["sessionscope_isolate"])
    assert {*names} <= {*dir(module)}
    missing = [name for name in names if f"{module.__name__}.{name}" not in targets]
    assert missing == []


SEARCHES = [
    "tutorial",
    "FAQ",
    "troubleshooting",
    "Sentry",
    "gevent",
    "alembic",
    "FastAPI",
    "row level security",
    "tenant",
    "nginx",
    "docker",
    "API reference",
    "PendingRollbackError",
    "QueuePool limit",
    "asyncio",
    "csrf",
    "Flask-SQLAlchemy",
    "Flask-Admin",
    "Celery",
    "idempotency",
    "replica",
    "timeout",
    "savepoint",
    "streaming",
    "deadlock",
    "database is locked",
    "application context",
    "metrics",
]


def words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", re.sub("<[^>]+>", "", text)).lower()


@pytest.fixture(scope="module")
def headings(site: Path) -> dict[str, set[str]]:
    """What the search of the site ranks first: titles, headings, index entries; their pages."""
    source = (site / "searchindex.js").read_text("utf-8")
    index = json.loads(source.removeprefix("Search.setIndex(").removesuffix(")"))
    found: dict[str, set[str]] = {}
    for entries in (index["alltitles"], index["indexentries"]):
        for text, places in entries.items():
            pages = {index["docnames"][place[0]] for place in places}
            found.setdefault(words(text), set()).update(pages)
    return found


@pytest.mark.parametrize("term", SEARCHES)
def test_a_search_finds_a_heading(term: str, headings: dict[str, set[str]]) -> None:
    """Who searches for the term finds a page that has it in a title, heading or index entry."""
    assert [text for text in headings if words(term) in text]


def test_the_drawing_is_in_the_site(site: Path) -> None:
    """Graphviz has drawn a request's life, and all of its text is text."""
    (drawing,) = (site / "_images").glob("graphviz-*.svg")
    assert "the server calls" in drawing.read_text("utf-8")
