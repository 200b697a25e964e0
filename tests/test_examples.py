"""The examples as a reader runs them: by the commands that they give, and over real sockets.

One suite for all of them and for our own service: it cannot tell which framework answers.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from databases import free_port, wait_for_port
from sqlalchemy import create_engine, text
from support import PATIENCE, fetch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = [path for path in sorted(EXAMPLES.iterdir()) if path.suffix in (".py", ".ini")]

# mod_wsgi runs a file as a module of another name, in the folder /, and takes "application".
MOD_WSGI = """
import logging, os, types, waitress
path = os.path.abspath("examples/items.wsgi")
os.chdir("/")
module = types.ModuleType("_mod_wsgi_items")
module.__file__ = path
with open(path) as script:
    exec(compile(script.read(), path, "exec"), vars(module))
logging.basicConfig(level=logging.DEBUG)
waitress.serve(module.application, listen="127.0.0.1:" + os.environ["PORT"])
"""

SERVICES = {
    "webob": f"LOG_LEVEL=debug python {shlex.quote(str(ROOT / 'serve.py'))} --listen 8080",
    "flask": "python examples/flask_items.py",
    "flask-sqlalchemy": "python examples/flask_sqlalchemy_items.py",
    "gunicorn": "gunicorn examples.flask_items:application",
    "granian": "granian --interface wsgi examples.flask_items:application",
    "mod_wsgi": f"python -c {shlex.quote(MOD_WSGI)}",
    "swapped-models": "python examples/swapped.py models",
    "swapped-views": "python examples/swapped.py views",
    "pyramid": "PYTHONPATH=examples pserve examples/development.ini http_port=8080",
    "falcon": "python examples/falcon_items.py",
    "bottle": "python examples/bottle_items.py",
    "django": "python examples/django_items.py",
}
"""Our own service, and each way to run an example that serves."""

LOGGING = [name for name in SERVICES if name not in ("gunicorn", "granian")]
"""Those that show the log of the library; the other two show their own alone."""

ONCE = "python examples/orders_once.py"

WORKER = "python examples/worker.py lamp table,,chair shelf,books"

NO_WARNINGS = ",".join(
    [
        "error",
        "ignore:pkg_resources is deprecated:UserWarning",  # imported by Pyramid 2.1
        "ignore:'cgi' is deprecated:DeprecationWarning",  # imported by WebOb 1.8
    ]
)


def environment(port: int = 0, **more: str) -> dict[str, str]:
    """The environment of a command: this Python's programs, on *port* of loopback."""
    inherited = {name: os.environ[name] for name in os.environ if name != "DATABASE_URL"}
    return {
        **inherited,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONWARNINGS": NO_WARNINGS,
        "PORT": str(port),
        "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{port}",
        "GRANIAN_PORT": str(port),
        **more,
    }


@dataclass
class Service:
    """A running service, its log, and its SQLite file seen from outside."""

    port: int
    folder: Path
    log: Path
    begin: int = 0

    def ask(self, method: str = "GET", path: str = "/") -> tuple[int | None, Any]:
        """Status and JSON of an answer; None for a page that is no JSON."""
        answer = fetch(self.port, method, path)
        assert answer.complete
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(answer.content) if is_json else None

    def query(self, *statements: str) -> list[Any]:
        """Run statements in a transaction of their own; the rows of the last."""
        (file,) = self.folder.rglob("items.db")
        with closing(sqlite3.connect(file, timeout=PATIENCE)) as connection, connection:
            return [connection.execute(statement).fetchall() for statement in statements][-1]

    def rows(self) -> list[tuple[int, str]]:
        return self.query("SELECT id, name FROM items ORDER BY id")

    def forget(self) -> None:
        """Begin again, with no item and no line in the log."""
        self.query("DROP TRIGGER IF EXISTS refuse", "DELETE FROM items")
        if self.query("SELECT * FROM sqlite_master WHERE name = 'sqlite_sequence'"):
            self.query("DELETE FROM sqlite_sequence")  # AUTOINCREMENT begins again
        self.begin = len(self.log.read_text("utf-8"))

    def logged(self, line: str) -> bool:
        """Wait until *line* is in the log."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if line.lower() in self.log.read_text("utf-8")[self.begin :].lower():
                return True
            time.sleep(0.02)
        return False


@contextmanager
def running(command: str, folder: Path, **more: str) -> Iterator[Service]:
    """Run a command in a folder that has a copy of the examples; interrupted, it ends well."""
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    log = folder / "log"
    with free_port() as port:
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["env", *shlex.split(command.replace("8080", str(port)))],
                cwd=folder,
                env=environment(port, **more),
                stdout=output,
                stderr=subprocess.STDOUT,
                # A shell may have started us with interrupts ignored, which is inherited.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        try:
            wait_for_port(process, port, log)
            service = Service(port, folder, log)
            service.ask()  # gunicorn listens before it has an application
            yield service
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()
        assert process.returncode == 0, log.read_text("utf-8")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Service]]:
    """Start the service of a name when a test first wants it; all are stopped at the end."""
    with ExitStack() as stack:

        @cache
        def start(name: str) -> Service:
            return stack.enter_context(running(SERVICES[name], tmp_path_factory.mktemp(name)))

        yield start


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest, start: Callable[[str], Service]) -> Service:
    """Each service in turn, without an item."""
    started = start(request.param)
    started.forget()
    return started


def assert_transcript(service: Service) -> None:
    """Ask what the article asks."""
    first, second = {"id": 1, "name": "Item #1"}, {"id": 2, "name": "Item #2"}
    assert service.ask() == (200, {"items": []})
    assert service.ask("POST") == (200, first)
    assert service.ask("POST") == (200, second)
    assert service.ask() == (200, {"items": [first, second]})
    assert service.ask("GET", "/2") == (200, second)
    assert service.ask("GET", "/7") == (404, {"error": "not found"})


def test_every_command_is_run() -> None:
    """The commands that the examples give are those that this module runs."""
    given = re.compile(
        r"^#? {4,5}((?:PYTHONPATH=\S+ )?(?:python|pserve|gunicorn|granian) .+)$", re.M
    )
    found = {command for path in SCRIPTS for command in given.findall(path.read_text("utf-8"))}
    assert found == {*SERVICES.values(), ONCE, WORKER} - {SERVICES["webob"], SERVICES["mod_wsgi"]}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_example_handles_sessions(path: Path) -> None:
    """No line of an example commits, rolls back, closes or removes anything."""
    handling = r"\.(commit|rollback|close|remove)\b|teardown"
    assert re.findall(handling, path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    """An example has 60 lines at most; the one with two layers, Flask's, has 100."""
    limit = 100 if path.name == "flask_items.py" else 60
    assert len(path.read_text("utf-8").splitlines()) <= limit


def test_the_transcript_comes_true(service: Service) -> None:
    """Items are made, listed and shown, and one that is not there is a 404, on each service."""
    assert_transcript(service)
    assert service.rows() == [(1, "Item #1"), (2, "Item #2")]


@pytest.mark.parametrize("statement", ["INSERT", "UPDATE"])
def test_a_request_that_fails_leaves_nothing(service: Service, statement: str) -> None:
    """Where a row, or its name after it, is refused the answer is an error, and no row stays."""
    # FAIL is the one refusal after which SQLite keeps the row that was refused, for COMMIT.
    refuse = f"AFTER {statement} ON items BEGIN SELECT RAISE(FAIL, 'refused'); END"
    service.query(f"CREATE TRIGGER refuse {refuse}")
    status, _ = service.ask("POST")
    assert status in (409, 500)  # our own service knows a conflict
    assert service.rows() == []
    service.query("DROP TRIGGER refuse")
    assert service.ask("POST") == (200, {"id": 1, "name": "Item #1"})


def test_clients_at_once_each_get_their_item(service: Service) -> None:
    """Items that many clients make at once are all there, and no two are the same."""
    together = Barrier(4)

    def create(_: int) -> list[tuple[int | None, Any]]:
        together.wait(PATIENCE)
        return [service.ask("POST") for _ in range(3)]

    with ThreadPoolExecutor(4) as threads:
        answers = [answer for answers in threads.map(create, range(4)) for answer in answers]
    assert {status for status, _ in answers} == {200}
    assert sorted((item["id"], item["name"]) for _, item in answers) == service.rows()
    assert len(service.rows()) == 12


@pytest.mark.parametrize("service", LOGGING, indirect=True)
def test_the_log_tells_what_became_of_each_request(service: Service) -> None:
    """A commit and a rollback are told, with the request and its status."""
    service.ask("POST")
    service.ask("GET", "/7")
    assert service.logged("commit POST / 200 OK")
    assert service.logged("rollback GET /7 404 Not Found")


@pytest.mark.parametrize("arguments", [[], ["both"], ["models", "views"]])
def test_what_to_swap_must_be_said(arguments: list[str], tmp_path: Path) -> None:
    """Without the name of a half, `swapped.py` says how it is run."""
    command = [sys.executable, str(EXAMPLES / "swapped.py"), *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("usage: python ")
    assert done.stderr.endswith("swapped.py models | views\n")


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
@pytest.mark.parametrize("name", ["flask", "flask-sqlalchemy", "swapped-models"])
def test_another_database_is_a_url(
    name: str, database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With DATABASE_URL the transcript comes true there, with the ORM and without."""
    url = request.getfixturevalue(f"{database}_url")
    engine = create_engine(url)
    try:
        with running(SERVICES[name], tmp_path, DATABASE_URL=url) as service:
            assert_transcript(service)
        with engine.begin() as connection:
            assert connection.scalars(text("SELECT name FROM items")).all() == [
                "Item #1",
                "Item #2",
            ]
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE IF EXISTS items"))
        engine.dispose()
    assert [*tmp_path.rglob("items.db")] == []


def order(port: int, key: str, caller: str = "ada", cents: int = 4900) -> tuple[Any, ...]:
    """Order a lamp under a key; the status, whether it is a replay, and the JSON."""
    headers = {
        "Authorization": caller,
        "Content-Type": "application/x-www-form-urlencoded",
        "Idempotency-Key": key,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with closing(connection):
        connection.request("POST", "/", f"item=lamp&cents={cents}", headers)
        response = connection.getresponse()
        replayed = response.headers.get("Idempotent-Replayed")
        return response.status, replayed, json.loads(response.read())


def test_an_order_is_paid_once(tmp_path: Path) -> None:
    """A repeat gets the first answer; another caller, or another price, does not."""
    lamp = {"item": "lamp", "paid": 4900}
    with running(ONCE, tmp_path) as service:
        assert order(service.port, '"8e03978e"') == (201, None, {"id": 1, **lamp})
        assert order(service.port, '"8e03978e"') == (201, "true", {"id": 1, **lamp})
        assert order(service.port, '"8e03978e"', "bob") == (201, None, {"id": 2, **lamp})
        assert order(service.port, '"8e03978e"', cents=1)[0] == 422
        assert service.logged("POST '/': replayed")
    with closing(sqlite3.connect(tmp_path / "orders.db")) as connection:
        assert connection.execute("SELECT id, cents FROM orders").fetchall() == [
            (1, 4900),
            (2, 4900),
        ]


def test_the_worker_stores_whole_orders_and_announces_them(tmp_path: Path) -> None:
    """An order with a flaw leaves and announces nothing, and spoils no other."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    done = subprocess.run(
        shlex.split(WORKER),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "item 1 is lamp",
        "table,,chair is refused: an item has no name",
        "item 2 is shelf",
        "item 3 is books",
    ]
    stored = Service(0, tmp_path, tmp_path / "log").rows()
    assert stored == [(1, "lamp"), (2, "shelf"), (3, "books")]
