"""A process that forks after it used an engine: two processes must not share a connection."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, logging, os, sys
from support import environ, serve_once
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import scoped_session, sessionmaker
from models import Base, Item
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine

url, make, attempts, swallows = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
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
child = os.fork()
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


def fork(
    url: str, make: str = "create_engine", attempts: int = 1, swallows: bool = False
) -> tuple[Any, Any, Any, str]:
    """Send three requests in a child and then in its parent; what came, the rows, the log."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, url, make, str(attempts), str(swallows)],
        env={"PYTHONPATH": "tests:."},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    child, parent, rows = map(json.loads, done.stdout.splitlines())
    return child, parent, rows, done.stderr


OK = "200 OK"


def with_driver(url: str) -> str:
    """Name the driver, which a plain ``create_engine`` does not choose as we do."""
    return url.replace("postgresql:", "postgresql+psycopg:").replace("mariadb:", "mariadb+pymysql:")


def test_an_inherited_connection_is_refused_once(any_url: str, empty: None) -> None:
    """The first request of a child fails with a warning, and later ones have their rows."""
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


def test_our_engines_survive_a_fork(any_url: str, empty: None) -> None:
    """The engines of make_engine need no second attempt, and nobody is warned."""
    child, parent, rows, log = fork(any_url, make="make_engine")
    assert (child, parent, rows, log) == ([OK, OK, OK], [OK, OK, OK], 6, "")


@pytest.mark.parametrize("make", ["make_engine", "create_engine"])
def test_a_database_in_memory_is_the_childs_own(make: str) -> None:
    """A child has a copy of a database in memory, which it may go on with."""
    child, parent, rows, log = fork("sqlite://", make=make)
    assert (child, parent, rows, log) == ([OK, OK, OK], [OK, OK, OK], 3, "")


@pytest.fixture
def empty(any_engine: object) -> None:
    """The tables are there, and dropped at the end."""
