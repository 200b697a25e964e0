"""The service as it is run: ``python serve.py`` and gunicorn, real sockets, real processes."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT, SERVE, Client, Process, create_many, listed, running, send, serve
from sessionscope.engines import make_engine
from support import PATIENCE, names

from models import Base


@pytest.fixture
def memory_url() -> str:
    return "sqlite://"


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def fresh_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a database without tables, for each engine in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    yield url
    engine = make_engine(url)
    Base.metadata.drop_all(engine)
    engine.dispose()


# python serve.py


def test_the_transcripts_come_true(fresh_url: str) -> None:
    """A client gets each answer exact to the byte, all of them on one connection."""
    with serve("--database-url", fresh_url) as server, Client(server) as client:
        assert client.send("GET", "/") == (200, b'{"items": []}')
        assert client.send("POST", "/") == (200, b'{"id": 1, "name": "Item #1"}')
        assert client.send("GET", "/1") == (200, b'{"id": 1, "name": "Item #1"}')
        assert client.send("HEAD", "/1") == (200, b"")
        assert client.send("GET", "/2") == (404, b'{"error": "not found"}')
        assert client.send("POST", "/", b'{"name": "chair"}') == (
            200,
            b'{"id": 2, "name": "chair"}',
        )
        assert client.send("POST", "/", b'{"name": 1}')[0] == 422
        assert client.send("GET", "/2") == (200, b'{"id": 2, "name": "chair"}')


def test_the_log_shows_commits_and_rollbacks(sqlite_url: str) -> None:
    """The log has each commit and rollback, with method, path and status."""
    with serve("--database-url", sqlite_url) as server, Client(server) as client:
        for method, path in (("POST", "/"), ("GET", "/1"), ("GET", "/2"), ("OPTIONS", "/")):
            client.send(method, path)
    assert re.findall(r"DEBUG sessionscope: (.*)", server.log) == [
        "commit POST / 200 OK",
        "commit GET /1 200 OK",
        "rollback GET /2 404 Not Found",
        "none OPTIONS / 204 No Content",
    ]


def test_the_log_can_be_quiet(sqlite_url: str) -> None:
    """--log-level info leaves commits and rollbacks out of the log."""
    with serve("--database-url", sqlite_url, "--log-level", "info") as server:
        send(server, "POST", "/")
    assert "sessionscope" not in server.log


def test_kill_and_restart_keep_the_items(sqlite_url: str) -> None:
    """What was acknowledged is there after SIGKILL and a new start."""
    with serve("--database-url", sqlite_url) as server:
        ids = create_many(server, clients=4, each=5)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(PATIENCE)
    with serve("--database-url", sqlite_url) as server:
        assert listed(server) == sorted(ids) == list(range(1, 21))


def test_the_environment_names_the_database(sqlite_url: str) -> None:
    """DATABASE_URL says which database, where the command line does not."""
    with serve(DATABASE_URL=sqlite_url) as server:
        send(server, "POST", "/")
    engine = make_engine(sqlite_url)
    assert names(engine) == ["Item #1"]
    engine.dispose()


def test_the_command_line_goes_before_the_environment(sqlite_url: str) -> None:
    """--database-url goes before DATABASE_URL."""
    with serve("--database-url", sqlite_url, DATABASE_URL="nonsense://") as server:
        assert send(server, "POST", "/")[0] == 200


def test_the_default_is_a_file_where_it_runs(tmp_path: Path) -> None:
    """Without either, items.db in the working directory is the database."""
    with serve(cwd=tmp_path) as server:
        send(server, "POST", "/")
    engine = make_engine(f"sqlite:///{tmp_path}/items.db")
    assert names(engine) == ["Item #1"]
    engine.dispose()


@pytest.mark.parametrize("how", ["sized", "chunked"])
def test_the_limit_of_a_body_can_be_set(how: str) -> None:
    """A body over --max-body is a 413, whether its length is told or not."""
    body = b'{"name": "chair"}'
    with serve("--database-url", "sqlite://", "--max-body", "16") as server:
        answer = send(server, "POST", "/", body if how == "sized" else iter([body]))
        assert answer == (413, b'{"error": "a body may have at most 16 bytes"}')
        assert listed(server) == []


@pytest.mark.parametrize("fresh_url", ["sqlite", "memory", "postgresql", "mariadb"], indirect=True)
def test_many_create_at_once(fresh_url: str) -> None:
    """Of items created by many clients at once all ids are distinct, and none is lost."""
    with serve("--database-url", fresh_url, "--threads", "8") as server:
        ids = create_many(server, clients=12, each=10)
        assert len(set(ids)) == 120
        assert listed(server) == sorted(ids)


def test_help_tells_options_and_defaults() -> None:
    """--help names each option with its default."""
    done = subprocess.run([*SERVE, "--help"], capture_output=True, text=True, check=True)
    shown = " ".join(done.stdout.split())
    for word in (
        "--database-url URL",
        "$DATABASE_URL, or sqlite:///items.db",
        "--listen HOST:PORT",
        "default: 127.0.0.1:8080",
        "--threads N",
        "--reader-url URL",
        "--max-body N bytes that a request's body may have (default: 65536)",
        "--connections N",
        "--idle-timeout N",
        "--stop-timeout N",
        "--log-level L",
    ):
        assert word in shown


def refused(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python serve.py`` with what it cannot use."""
    return subprocess.run(
        [*SERVE, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


NOT_A_DATABASE = "serve.py: the database cannot be used: "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--database-url", "items.db"], NOT_A_DATABASE + "Could not parse"),
        (["--database-url", "nonsense://"], NOT_A_DATABASE + "Can't load plugin"),
        (["--database-url", "mssql+pyodbc://x"], NOT_A_DATABASE + "No module named 'pyodbc'"),
        (["--database-url", "postgresql://h:x/d"], NOT_A_DATABASE + "invalid literal"),
        (["--database-url", "postgresql://u:secret@127.0.0.1:1/d"], "Connection refused"),
        (["--database-url", "mysql://u:secret@127.0.0.1:1/d"], "Connection refused"),
        (["--database-url", "mysql://127.0.0.1:1/d?bad=1"], NOT_A_DATABASE + "Connection"),
        (["--database-url", "sqlite:////no/such/folder/x"], "unable to open database file"),
        (["--database-url", f"sqlite:///{__file__}"], "file is not a database"),
        (["--listen", "8080"], "argument --listen: '8080' is not HOST:PORT"),
        (["--listen", "127.0.0.1:http"], "'127.0.0.1:http' is not HOST:PORT"),
        (["--listen", "127.0.0.1:65536"], "'127.0.0.1:65536' is not HOST:PORT"),
        (["--listen", "no.such.host.invalid:0"], "cannot listen on no.such.host.invalid:0"),
        (["--threads", "0"], "argument --threads: '0' is not a number above zero"),
        (["--threads", "many"], "argument --threads: 'many' is not a number above zero"),
        (["--max-body", "-1"], "argument --max-body: '-1' is not a number above zero"),
        (["--log-level", "loud"], "argument --log-level: invalid choice: 'loud'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_told(arguments: list[str], message: str, sqlite_url: str) -> None:
    """What cannot be used ends with exit status 2, and with a message, not a traceback."""
    done = refused("--database-url", sqlite_url, "--listen", "127.0.0.1:0", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_a_port_that_is_taken_is_told(sqlite_url: str) -> None:
    """Where another program listens already, that is the message, with exit status 2."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = refused("--database-url", sqlite_url, "--listen", address)
    assert done.returncode == 2
    assert f"serve.py: cannot listen on {address}: " in done.stderr


# Other servers, and many processes.

STARTER = """
import sys
from serve import create_app
print("ready", flush=True)
sys.stdin.readline()
create_app(sys.argv[1])
"""


def test_many_start_at_once(fresh_url: str) -> None:
    """Processes that start at once on a database without tables all succeed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, fresh_url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [(process.communicate(timeout=PATIENCE)[1], process.returncode) for process in processes]
    assert ends == [("", 0)] * 6


@pytest.fixture
def gunicorn(sqlite_url: str, tmp_path: Path) -> Iterator[Process]:
    """Gunicorn with two workers that made the service at once, on a fresh file."""
    config = tmp_path / "gunicorn_config.py"
    config.write_text("def post_worker_init(worker):\n    worker.log.info('worker is ready')\n")
    options = f"--workers 2 --threads 4 --bind 127.0.0.1:0 --no-control-socket --config {config}"
    command = (sys.executable, "-m", "gunicorn", *options.split(), "serve:create_app()")
    with running(
        *command,
        port_in=r"Listening at: http://127\.0\.0\.1:(\d+)",
        ready=2,
        environ={"DATABASE_URL": sqlite_url},
    ) as server:
        yield server


def test_gunicorn_runs_many_workers(gunicorn: Process) -> None:
    """Two workers that started at once on a fresh file create items with distinct ids."""
    ids = create_many(gunicorn, clients=8, each=10)
    assert len(set(ids)) == 80
    assert listed(gunicorn) == sorted(ids)


def test_gunicorn_takes_a_body_of_unknown_length(gunicorn: Process) -> None:
    """A chunked body makes its item, where the server does not know its length beforehand."""
    answer = send(gunicorn, "POST", "/", iter([b'{"name": ', b'"chair"}']))
    assert answer == (200, b'{"id": 1, "name": "chair"}')


def test_gunicorn_refuses_an_endless_body(gunicorn: Process) -> None:
    """A chunked body over the limit is a 413, and leaves nothing."""
    assert send(gunicorn, "POST", "/", iter([b" " * 2**16, b"{}"]))[0] == 413
    assert listed(gunicorn) == []
