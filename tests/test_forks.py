"""A process that forks after it used an engine: two processes must not share a connection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import scoped_session, sessionmaker
from support import environ, names, serve_once

from models import Base, Item

SCRIPT = """
import ctypes, json, logging, os, sys
from support import environ, serve_once
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import scoped_session, sessionmaker
from models import Base, Item
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine

url, make, how, attempts, swallows = sys.argv[1], *map(json.loads, sys.argv[2:])
fork = {"Python": os.fork, "C": ctypes.PyDLL(None).fork}[how]
engine = {"create_engine": create_engine, "make_engine": make_engine}[make](url)
Base.metadata.create_all(engine)  # leaves a connection in the pool
Session = scoped_session(sessionmaker(engine))


def app(environ, start_response):
    try:
        Session.add(Item(name="kept"))
        Session.flush()
    except SQLAlchemyError:
        if not swallows:
            raise
    start_response("200 OK", [])
    return [b"fine"]


wrapped = SessionMiddleware(app, Session, attempts=attempts)


def request():
    try:
        return serve_once(wrapped, environ("POST")).status
    except SQLAlchemyError as error:
        return type(error).__name__


def requests():
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.disable(logging.NOTSET)
    return [request() for _ in range(3)]


reading, writing = os.pipe()
child = fork()
if child == 0:
    os.write(writing, json.dumps(requests()).encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(reading, 10_000).decode())
print(json.dumps(requests()))
with engine.connect() as connection:
    print(connection.exec_driver_sql("SELECT count(*) FROM items").scalar())
engine.dispose()
"""


def run(script: str, *arguments: str) -> tuple[str, str]:
    """Run Python; what it prints, and what it logs."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={"PYTHONPATH": "tests:."},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def fork(
    url: str,
    make: str = "create_engine",
    how: str = "C",
    attempts: int = 1,
    swallows: bool = False,
) -> tuple[Any, Any, Any, str]:
    """Send three requests in a child and then in its parent; what came, the rows, the log."""
    out, log = run(SCRIPT, url, *map(json.dumps, (make, how, attempts, swallows)))
    child, parent, rows = map(json.loads, out.splitlines())
    return child, parent, rows, log


OK = "200 OK"


def with_driver(url: str) -> str:
    """Name the driver, which a plain ``create_engine`` does not choose as we do."""
    return url.replace("postgresql:", "postgresql+psycopg:").replace("mariadb:", "mariadb+pymysql:")


@pytest.mark.parametrize("how", ["Python", "C"])
def test_our_engines_survive_a_fork(how: str, any_url: str, empty: None) -> None:
    """The engines of make_engine open connections of their own in a child, silently."""
    child, parent, rows, log = fork(any_url, make="make_engine", how=how)
    assert (child, parent, rows, log) == ([OK, OK, OK], [OK, OK, OK], 6, "")


def test_other_engines_survive_a_fork_of_python(any_url: str, empty: None) -> None:
    """So do all engines where Python itself forks, as gunicorn does."""
    child, parent, rows, log = fork(with_driver(any_url), how="Python")
    assert (child, parent, rows, log) == ([OK, OK, OK], [OK, OK, OK], 6, "")


def test_an_inherited_connection_is_refused_once(any_url: str, empty: None) -> None:
    """Where C forks, as in uWSGI, a child's first request fails with a warning, and no other."""
    child, parent, rows, log = fork(with_driver(any_url))
    assert (child, parent, rows) == (["DBAPIError", OK, OK], [OK, OK, OK], 5)
    assert log.count("used before this process was forked") == 1


def test_attempts_get_over_an_inherited_connection(any_url: str, empty: None) -> None:
    """With attempts=2 no request of a child fails."""
    child, parent, rows, _ = fork(with_driver(any_url), attempts=2)
    assert (child, parent, rows) == ([OK, OK, OK], [OK, OK, OK], 6)


def test_a_swallowed_refusal_is_no_success(any_url: str, empty: None) -> None:
    """An application that goes on with an inherited connection is refused all the same."""
    child, _, rows, _ = fork(with_driver(any_url), swallows=True)
    assert (child, rows) == (["TransactionDoomed", OK, OK], 5)


@pytest.mark.parametrize("how", ["Python", "C"])
@pytest.mark.parametrize("make", ["make_engine", "create_engine"])
def test_a_database_in_memory_is_the_childs_own(make: str, how: str) -> None:
    """A child has a copy of a database in memory, which it may go on with."""
    child, parent, rows, log = fork("sqlite://", make=make, how=how)
    assert (child, parent, rows, log) == ([OK, OK, OK], [OK, OK, OK], 3, "")


MIDST = """
import ctypes, os, sys
from support import environ, serve_once
from sqlalchemy import create_engine, make_url
from sqlalchemy.orm import scoped_session, sessionmaker
from models import Base, Item
from sessionscope import SessionMiddleware

url = make_url(sys.argv[1])
dialect = url.get_dialect()
dbapi = dialect.import_dbapi()
arguments, options = dialect().create_connect_args(url)
engine = create_engine(  # the URL tells of no database
    f"{url.drivername}://", creator=lambda: dbapi.connect(*arguments, **options)
)
Base.metadata.create_all(engine)
Session = scoped_session(sessionmaker(engine))


def refused(environ, start_response):
    Session.connection()
    start_response("400 Bad Request", [])
    return [b"no"]


def accepted(environ, start_response):
    Session.add(Item(name="parent"))
    Session.flush()
    os.close(writing)
    os.waitpid(child, 0)
    start_response("200 OK", [])
    return [b"fine"]


reading, writing = os.pipe()
child = {"Python": os.fork, "C": ctypes.PyDLL(None).fork}[sys.argv[2]]()
if child == 0:
    os.close(writing)
    os.read(reading, 1)  # until the parent is in the midst of its request
    serve_once(SessionMiddleware(refused, Session, attempts=3))
    os._exit(0)
print(serve_once(SessionMiddleware(accepted, Session)).status)
with engine.connect() as connection:
    print(connection.exec_driver_sql("SELECT count(*) FROM items").scalar())
"""


@pytest.mark.parametrize("how", ["Python", "C"])
@pytest.mark.parametrize("server", ["postgresql", "mariadb"])
def test_a_child_disturbs_no_request_of_its_parent(
    server: str, how: str, request: pytest.FixtureRequest
) -> None:
    """A refused request in the child takes back nothing of what its parent is doing."""
    url = request.getfixturevalue(f"{server}_url")
    engine = make_engine(url)
    Base.metadata.drop_all(engine)
    assert run(MIDST, with_driver(url), how)[0].splitlines() == ["200 OK", "1"]
    Base.metadata.drop_all(engine)
    engine.dispose()


KEYED = """
import os, sys, threading
from keyed_service import Service, key_table
from models import Base
from sqlalchemy import create_engine

engine = create_engine(sys.argv[1])
Base.metadata.create_all(engine)
holds, may_end = threading.Event(), threading.Event()


def hold(session):
    session.rollback()  # SQLite has one writer
    holds.set()
    may_end.wait()


service = Service(engine, hold)
with key_table(engine):
    thread = threading.Thread(target=service.post)
    thread.start()
    holds.wait()
    child = os.fork()
    if child == 0:
        service.work = bool
        print(service.post().status, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    may_end.set()
    thread.join()
engine.dispose()
"""


def test_a_key_of_the_parent_is_not_in_flight_in_a_child(sqlite_url: str) -> None:
    """What a parent was carrying out when it forked is no rival in the child for ever."""
    assert run(KEYED, sqlite_url)[0].splitlines() == ["201 Created"]


OUT = """
import os, sys, threading
from sessionscope import engines

engines.POOL_TIMEOUT = 0.0
engine = engines.make_engine(sys.argv[1], pool_size=1)
is_out, may_end = threading.Event(), threading.Event()


def hold():
    with engine.connect():
        is_out.set()
        may_end.wait()


thread = threading.Thread(target=hold)
thread.start()
is_out.wait()
child = os.fork()
if child == 0:
    with engine.connect() as connection:
        print(connection.exec_driver_sql("SELECT 1").scalar(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
may_end.set()
thread.join()
"""


def test_what_a_parent_had_out_is_not_missing_in_a_child(any_url: str) -> None:
    """A pool of one connection, which a thread of the parent had out, has one in the child."""
    assert run(OUT, any_url)[0].splitlines() == ["1"]


@pytest.mark.parametrize("make", [make_engine, create_engine])
def test_a_process_that_has_another_number(
    make: Any, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves all connections alone; seen from within, where C forks nobody can look."""
    engine = make(sqlite_url)
    Base.metadata.create_all(engine)
    registry = scoped_session(sessionmaker(engine))

    def app(environ: Any, start_response: Any) -> list[bytes]:
        registry.add(Item(name="kept"))
        start_response("200 OK", [])
        return [b"fine"]

    number = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: number + 1)
    if make is create_engine:
        with pytest.raises(DBAPIError):
            serve_once(SessionMiddleware(app, registry), environ("POST"))
    assert serve_once(SessionMiddleware(app, registry), environ("POST")).status == OK
    assert names(engine) == ["kept"]
    engine.dispose()


@pytest.fixture
def empty(any_engine: object) -> None:
    """The tables are there, and dropped at the end."""
