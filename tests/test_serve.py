"""The service as it is run: ``python serve.py`` and gunicorn, real sockets, real processes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sessionscope
from databases import Node, free_port, until
from item_service import service_at
from processes import (
    SERVE,
    Client,
    Process,
    create_many,
    listed,
    run_python,
    running,
    send,
    serve,
)
from prometheus_client.parser import text_string_to_metric_families
from sessionscope.engines import make_engine
from sqlalchemy import insert, make_url
from support import PATIENCE, fetch, names, serve_once

from models import Base, Item
from serve import create_app, main
from web.database import create_tables
from web.options import StartError, make_parser, parse_given


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
        assert client.send("GET", "/") == (200, b'{"items": []}\n')
        assert client.send("POST", "/") == (200, b'{"id": 1, "name": "Item #1"}\n')
        assert client.send("GET", "/1") == (200, b'{"id": 1, "name": "Item #1"}\n')
        assert client.send("HEAD", "/1") == (200, b"")
        assert client.send("GET", "/2") == (404, b'{"error": "not found"}\n')
        assert client.send("POST", "/", b'{"name": "chair"}\n') == (
            200,
            b'{"id": 2, "name": "chair"}\n',
        )
        assert client.send("POST", "/", b'{"name": 1}')[0] == 422
        assert client.send("GET", "/2") == (200, b'{"id": 2, "name": "chair"}\n')


LINE = r"""
    INFO\ items\.access:\ 127\.0\.0\.1\ "(?P<request>.*)"\ (?P<status>\d+)\ (?P<bytes>\d+)
    \ [\d.]+\ ms\ (?P<session>\w+)\ attempts=(?P<attempts>\d)\ id=(?P<id>\S+)
"""


def test_the_log_has_a_line_for_each_request(sqlite_url: str) -> None:
    """Who asked for what, what was sent, and what became of the session; not at DEBUG only."""
    with serve("--database-url", sqlite_url) as server, Client(server) as client:
        for method, path in [
            ("POST", "/"),
            ("GET", "/1?x=%22"),
            ("HEAD", "/1"),
            ("GET", "/2"),
            ("OPTIONS", "/"),
        ]:
            client.send(method, path)
    lines = [found.groups()[:5] for found in re.finditer(LINE, server.log, re.VERBOSE)]
    assert lines == [
        ("POST / HTTP/1.1", "200", "29", "commit", "1"),
        ("GET /1?x=%22 HTTP/1.1", "200", "29", "commit", "1"),
        ("HEAD /1 HTTP/1.1", "200", "0", "commit", "1"),
        ("GET /2 HTTP/1.1", "404", "23", "rollback", "1"),
        ("OPTIONS / HTTP/1.1", "204", "0", "none", "1"),
    ]
    assert "DEBUG" not in server.log


def test_the_log_counts_what_is_streamed(sqlite_url: str) -> None:
    """The line of a stream comes at its end, with all its bytes."""
    engine = make_engine(sqlite_url)
    create_tables(engine)
    with engine.begin() as connection:
        connection.execute(insert(Item), [{"name": "lamp"}] * 1600)
    engine.dispose()
    with serve("--database-url", sqlite_url) as server:
        _, content = send(server, "GET", "/")
    assert f" 200 {len(content)} " in server.log


def test_the_log_can_show_commits_and_rollbacks(sqlite_url: str) -> None:
    """At DEBUG the log has each commit and rollback, with method, path and status."""
    command = ("--database-url", sqlite_url, "--log-level", "debug")
    with serve(*command) as server, Client(server) as client:
        for method, path in (("POST", "/"), ("GET", "/1"), ("GET", "/2"), ("OPTIONS", "/")):
            client.send(method, path)
    assert re.findall(r"DEBUG sessionscope: (.*)", server.log) == [
        "commit POST / 200 OK",
        "commit GET /1 200 OK",
        "rollback GET /2 404 Not Found",
        "none OPTIONS / 204 No Content",
    ]


def test_the_log_can_be_json(sqlite_url: str) -> None:
    """With --log-format json each line is an object; that of a request has its fields."""
    command = ("--database-url", sqlite_url, "--log-format", "json")
    with serve(*command) as server, Client(server) as client:
        client.send("POST", "/")
        server.process.terminate()
        server.process.wait(PATIENCE)
    records = [json.loads(line) for line in server.log.splitlines()]
    (line,) = (record for record in records if record["logger"] == "items.access")
    assert line["level"] == "INFO"
    assert line["client"] == "127.0.0.1"
    assert (line["request"], line["status"], line["session"]) == (
        "POST / HTTP/1.1",
        "200",
        "commit",
    )
    assert (line["bytes"], line["attempts"]) == (29, 1)
    assert line["ms"] > 0
    assert line["id"]
    assert f'"{line["request"]}" 200 29' in line["message"]


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
        assert answer == (413, b'{"error": "a body may have at most 16 bytes"}\n')
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
    for words in (
        "--database-url URL a SQLAlchemy URL (default: sqlite:///items.db)",
        "--reader-url URL",
        "--create-tables, --no-create-tables",
        "--wait N seconds to wait for the database (default: 0)",
        "--listen HOST:PORT",
        "(default: 127.0.0.1:8080)",
        "--threads N",
        "--max-body N maximum size of a request body, in bytes (default: 65536)",
        "--connections N",
        "--idle-timeout N",
        "--stop-timeout N",
        "--trusted-proxy IP",
        "--cors-origins URLS",
        "--log-level {debug,info,warning,error}",
        "--log-format {text,json}",
        "--metrics, --no-metrics",
        "LOG_LEVEL stands for --log-level",
    ):
        assert words in shown


def test_the_version_is_told() -> None:
    """--version tells the version of the library, which is the service's, too."""
    done = subprocess.run([*SERVE, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"sessionscope {sessionscope.__version__}\n"


def test_each_option_may_be_a_variable(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command line does not say comes from the environment, by the option's name."""
    for flag, value in {
        "DATABASE_URL": sqlite_url,
        "READER_URL": "sqlite://",
        "CREATE_TABLES": "no",
        "WAIT": "3",
        "LISTEN": "9000",
        "THREADS": "3",
        "LOG_FORMAT": "json",
        "METRICS": "yes",
        "CORS_ORIGINS": "https://a.example https://b.example",
    }.items():
        monkeypatch.setenv(flag, value)
    options = make_parser().parse_args(["--threads", "4"])
    assert (options.database_url, options.reader_url) == (sqlite_url, "sqlite://")
    assert (options.create_tables, options.wait, options.metrics) == (False, 3, True)
    assert (options.listen, options.threads) == ("127.0.0.1:9000", 4)
    assert options.log_format == "json"
    assert options.cors_origins.split() == ["https://a.example", "https://b.example"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("THREADS", "many", "argument --threads: 'many' is not a number above zero"),
        ("LOG_LEVEL", "loud", "LOG_LEVEL must be one of debug, info, warning, error, not 'loud'"),
        ("LOG_FORMAT", "xml", "LOG_FORMAT must be one of text, json, not 'xml'"),
        ("METRICS", "maybe", "METRICS must be one of yes, true, on, 1, no, false, off, 0, not"),
    ],
)
def test_a_wrong_variable_is_told(
    variable: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A value from the environment is checked as one from the command line is."""
    monkeypatch.setenv(variable, value)
    assert message in told(capsys)


@pytest.mark.parametrize("given", ["{port}", ":{port}", "127.0.0.1:{port}", "localhost:{port}"])
def test_where_to_listen_can_be_said_in_many_ways(given: str) -> None:
    """A port alone, or after a colon, is one of loopback."""
    with (
        free_port() as port,
        serve("--database-url", "sqlite://", "--listen", given.format(port=port)) as server,
    ):
        assert server.port == port
        assert send(server, "GET", "/livez")[0] == 200


def test_it_listens_on_a_socket_file(tmp_path: Path) -> None:
    """``unix:/path`` is a socket in the file system, for a proxy of the same group."""
    path = tmp_path / "items-1.sock"
    command = [*SERVE, "--database-url", "sqlite://", "--listen", f"unix:{path}"]
    with running(*command, port_in=r"serving on unix:\S+/items-(\d)\.sock"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path))
            client.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
            assert b'{"status": "ok"}' in client.makefile("rb").read()
        assert path.stat().st_mode & 0o777 == 0o660


def test_it_waits_for_its_database(postgresql_node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """With --wait the service starts when the database does, and says what it waits for."""
    caplog.set_level("INFO", "items")
    postgresql_node.stop()
    with ThreadPoolExecutor() as threads:
        starting = threads.submit(create_app, postgresql_node.url, wait=60)
        until(lambda: "waiting for the database: " in caplog.text, "the service to wait")
        postgresql_node.start()
        app = starting.result(PATIENCE)
    assert serve_once(app).content == b'{"items": []}\n'
    Base.metadata.drop_all(app.engines["writer"])
    app.dispose()


def test_tables_may_be_made_by_somebody_else(fresh_url: str) -> None:
    """With --no-create-tables a table that is missing is told, and one that is there is used."""
    command = ("--database-url", fresh_url, "--no-create-tables")
    done = refused(*command)
    assert done.returncode == 2
    assert "there is no table items; run `alembic upgrade head`" in done.stderr
    engine = make_engine(fresh_url)
    create_tables(engine)
    engine.dispose()
    with serve(*command) as server:
        assert send(server, "GET", "/") == (200, b'{"items": []}\n')


def test_keys_can_be_deleted(fresh_url: str) -> None:
    """--purge-keys deletes the idempotency keys that are older than so many days, and exits."""
    with service_at(fresh_url) as service:
        service.send("POST", "/", HTTP_IDEMPOTENCY_KEY="one")
        kept = refused("--database-url", fresh_url, "--purge-keys", "1")
        assert (kept.returncode, kept.stdout + kept.stderr) == (0, "0 idempotency keys deleted\n")
        gone = refused("--database-url", fresh_url, "--purge-keys", "0")
        assert (gone.returncode, gone.stdout + gone.stderr) == (0, "1 idempotency keys deleted\n")
        assert service.rows() == [(1, "Item #1")]


def test_it_counts_for_prometheus(sqlite_url: str) -> None:
    """With --metrics requests, outcomes, attempts, seconds and the pools' use are numbers."""
    with serve("--database-url", sqlite_url, "--metrics") as server:
        for method, path in [("POST", "/"), ("GET", "/1"), ("GET", "/2"), ("BREW", "/1")]:
            send(server, method, path)
        answer = fetch(server.port, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    numbers = {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.content.decode())
        for sample in family.samples
    }
    assert numbers["items_requests_totalPOST200"] == 1
    assert numbers["items_requests_totalGET404"] == 1
    assert numbers["items_requests_totalother405"] == 1
    assert numbers["items_sessions_totalcommit"] == 2
    assert numbers["items_sessions_totalrollback"] == 1
    assert numbers["items_sessions_totalnone"] == 1
    assert numbers["items_repeated_attempts_total"] == 0
    assert numbers["items_request_seconds_count"] == 4
    assert numbers["items_pool_connectionswriter"] == 0
    assert numbers["items_pool_sizereader"] == 8


WITHOUT_IT = """
import sys
sys.modules["prometheus_client"] = None
sys.argv[1:] = ["--metrics", "--database-url", "sqlite://"]
import serve
serve.main()
"""


def test_metrics_need_their_library() -> None:
    """Where prometheus-client is not installed --metrics says how to get it."""
    done = run_python("-W", "ignore", "-c", WITHOUT_IT)
    assert done.returncode == 2
    assert "serve.py: --metrics: " in done.stderr
    assert "pip install -e '.[app]'" in done.stderr


def test_there_are_no_metrics_by_default(sqlite_url: str) -> None:
    """Without --metrics nobody outside learns how much is going on."""
    with serve("--database-url", sqlite_url) as server:
        assert send(server, "GET", "/metrics")[0] == 404


def refused(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python serve.py`` with what it cannot use."""
    return subprocess.run(
        [*SERVE, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `main` says of *arguments*, of which it can use no more than serve.py could."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--database-url", "items.db"], "--database-url: Could not parse"),
        (["--database-url", "items.db"], "a URL looks like sqlite:///items.db or postgresql://"),
        (["--database-url", "nonsense://"], "must begin with sqlite:, postgresql: or mariadb:"),
        (["--database-url", "mssql+pyodbc://x"], "run: pip install pyodbc"),
        (["--database-url", "postgresql://h:x/d"], "--database-url: invalid literal"),
        (["--reader-url", "replica"], "--reader-url: Could not parse"),
        (["--listen", "nowhere"], "'nowhere' is not HOST:PORT, PORT or unix:/PATH"),
        (["--listen", "127.0.0.1:http"], "'127.0.0.1:http' is not HOST:PORT"),
        (["--listen", "127.0.0.1:65536"], "'127.0.0.1:65536' is not HOST:PORT"),
        (["--listen", "unix:items.sock"], "'unix:items.sock' is not HOST:PORT"),
        (["--purge-keys", "9999999999"], "'9999999999' is not a number below 100,000"),
        (["--wait", "long"], "argument --wait: 'long' is not a number"),
        (["--threads", "0"], "argument --threads: '0' is not a number above zero"),
        (["--threads", "many"], "argument --threads: 'many' is not a number above zero"),
        (["--max-body", "-1"], "argument --max-body: '-1' is not a number above zero"),
        (["--log-level", "loud"], "argument --log-level: invalid choice: 'loud'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_told(
    arguments: list[str], message: str, sqlite_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be read ends with exit status 2 and a message, before anything is opened."""
    assert message in told(capsys, "--database-url", sqlite_url, *arguments)


@pytest.mark.parametrize(
    "origins", ["", "http://localhost:8081", "https://b.example http://[::1]:8081 app://items"]
)
def test_origins_are_accepted(origins: str) -> None:
    """--cors-origins takes any origin in the form that browsers send, and several."""
    assert make_parser().parse_args(["--cors-origins", origins]).cors_origins == origins


@pytest.mark.parametrize("given", ["0:0:0:0:0:0:0:1", "::1"])
def test_the_proxy_is_known_however_its_address_is_written(given: str) -> None:
    """An address is kept in the form in which the server has that of a client."""
    assert make_parser().parse_args(["--trusted-proxy", given]).trusted_proxy == "::1"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"nonsense": 3}, TypeError, "there is no option 'nonsense'"),
        ({"thread": 3}, TypeError, "there is no option 'thread'"),
        ({"log_level": "debugg"}, StartError, "choose from '?debug'?, '?info'?"),
        ({"threads": 0}, StartError, "argument --threads: '0' is not a number above zero"),
        ({"metrics": "maybe"}, StartError, "argument --metrics"),
        ({"trusted_proxy": "nonsense"}, StartError, "'nonsense' is not an IP address, localhost"),
        *(
            ({"cors_origins": f"https://b.example {origin}"}, StartError, f"'{origin}' is not an")
            for origin in ["https://a.example/", "a.example", "HTTP://a"]
        ),
        ({"cors_origins": "*"}, StartError, "is not an origin as browsers send it, such as https:"),
    ],
)
def test_a_wrong_option_in_python_is_told(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    """`create_app` checks its options as the command line does, and raises."""
    with pytest.raises(error, match=message):
        create_app("sqlite://", **given)


def test_the_database_may_be_a_url_object() -> None:
    """In Python the URL of an engine will do, whose text has no password."""
    url = "postgresql://u:secret@127.0.0.1/d"
    assert parse_given({"database_url": make_url(url), "wait": None}).database_url == url


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--listen", "nowhere"], ["'nowhere' is not HOST:PORT"]),
        (
            ["--database-url", "postgresql://u:secret@127.0.0.1:1/d"],
            [
                "cannot use the database postgresql://u:***@127.0.0.1:1/d (--database-url): ",
                "is it running? With --wait 30 the service waits for it",
            ],
        ),
        (["--wait", "1", "--database-url", "postgresql://127.0.0.1:1/d"], ["is it running?\n"]),
        (
            ["--database-url", "postgresql://127.0.0.1:1/d?password=secret&sslpassword=secret"],
            ["postgresql://127.0.0.1:1/d?password=...&sslpassword=... (--database-url): "],
        ),
        (["--database-url", "mysql://u:secret@127.0.0.1:1/d"], ["Connection refused"]),
        (["--database-url", "mysql://127.0.0.1:1/d?bad=1"], ["unexpected keyword argument 'bad'"]),
        (
            ["--database-url", "sqlite:////no/such/folder/x"],
            ["sqlite:////no/such/folder/x (--data", "its folder must exist and be"],
        ),
        (["--database-url", f"sqlite:///{__file__}"], ["file is not a database"]),
        (["--listen", "no.such.host.invalid:0"], ["cannot listen on no.such.host.invalid:0"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_what_cannot_be_used_is_told(
    arguments: list[str], messages: list[str], sqlite_url: str
) -> None:
    """What cannot be used ends with exit status 2, and with a message, not a traceback."""
    done = refused("--database-url", sqlite_url, "--listen", "127.0.0.1:0", *arguments)
    assert done.returncode == 2
    assert [message for message in messages if message not in done.stderr] == []
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_a_port_that_is_taken_is_told(sqlite_url: str) -> None:
    """Where another program listens already, that is the message, with exit status 2."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = refused("--database-url", sqlite_url, "--listen", address)
    assert done.returncode == 2
    assert f"serve.py: cannot listen on {address}: " in done.stderr
    assert "choose another with --listen" in done.stderr


# Other servers, and many processes.

STARTER = """
import os, sys
from serve import create_app

waiting, starting = os.pipe()


def start():
    os.close(starting)
    os.read(waiting, 1)  # until all are there
    create_app(sys.argv[1])
    os._exit(0)


children = [os.fork() or start() for _ in range(6)]
os.close(starting)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_many_start_at_once(fresh_url: str) -> None:
    """Processes that start at once on a database without tables all succeed."""
    done = run_python("-c", STARTER, fresh_url)
    assert (done.stdout, done.stderr) == ("[0, 0, 0, 0, 0, 0]\n", "")


@pytest.fixture(scope="module")
def gunicorn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Gunicorn with two workers that made the service at once, on a fresh file."""
    folder = tmp_path_factory.mktemp("gunicorn")
    config = folder / "gunicorn_config.py"
    config.write_text("def post_worker_init(worker):\n    worker.log.info('worker is ready')\n")
    options = f"--workers 2 --threads 4 --bind 127.0.0.1:0 --no-control-socket --config {config}"
    command = (sys.executable, "-m", "gunicorn", *options.split(), "serve:create_app()")
    with running(
        *command,
        port_in=r"Listening at: http://127\.0\.0\.1:(\d+)",
        ready=2,
        environ={"DATABASE_URL": f"sqlite:///{folder}/items.db"},
    ) as server:
        yield server


def test_gunicorn_runs_many_workers(gunicorn: Process) -> None:
    """Two workers that started at once on a fresh file create items with distinct ids."""
    before = listed(gunicorn)
    ids = create_many(gunicorn, clients=8, each=10)
    assert len(set(ids)) == 80
    assert listed(gunicorn) == [*before, *sorted(ids)]


def test_gunicorn_logs_as_well(gunicorn: Process) -> None:
    """Where nothing configures logging there is a line for each request, too."""
    send(gunicorn, "GET", "/livez")
    until(lambda: '"GET /livez HTTP/1.1" 200' in gunicorn.log, "the line")


def test_gunicorn_knows_the_same_paths(gunicorn: Process) -> None:
    """Slashes too many are answered as they are on waitress, which leaves some out."""
    with serve("--database-url", "sqlite://") as waitress:
        for server in (gunicorn, waitress):
            send(server, "POST", "/")
            assert [send(server, "GET", path)[0] for path in ("//1", "/1/")] == [200, 404]


def test_gunicorn_takes_a_body_of_unknown_length(gunicorn: Process) -> None:
    """A chunked body makes its item, where the server does not know its length beforehand."""
    status, content = send(gunicorn, "POST", "/", iter([b'{"name": ', b'"chair"}']))
    item = json.loads(content)
    assert (status, item["name"]) == (200, "chair")
    assert item["id"] in listed(gunicorn)


def test_gunicorn_refuses_an_endless_body(gunicorn: Process) -> None:
    """A chunked body over the limit is a 413, and leaves nothing."""
    before = listed(gunicorn)
    assert send(gunicorn, "POST", "/", iter([b" " * 2**16, b"{}"]))[0] == 413
    assert listed(gunicorn) == before
