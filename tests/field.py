"""The field: servers, engines and applications as users combine them, under overlapping load.

A cell is one server, one engine and one application.  Several clients at once send it
requests of every kind, each with a name of its own.  Then the answers are held against the
rows: a complete 2xx has its row, an error has none, no connection is left in a transaction,
and what should succeed did.

``make field`` runs each server on each engine with one application, each application on each
engine with two servers, and each application after each kind of fork on PostgreSQL.  ``--all``
runs the full product; ``--cell gunicorn-sync/sqlite/flask`` runs one, or several.  A line per
cell, and a table of all; the exit status is 1 where a cell is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import databases
from sessionscope.engines import make_engine
from sqlalchemy import Engine, insert
from support import PATIENCE, Answer, drop_tables, fetch, make_tables, names

from models import Item

CLIENTS = 6
"""How many requests are under way at once."""

ROUNDS = 4
"""How often each client sends each kind of request."""

ENOUGH = 0.9
"""How much of what should succeed must."""

GUNICORN = ["gunicorn", "--bind={at}", "--log-level=warning", "field_apps:application"]
GTHREAD = [*GUNICORN, "--workers=2", "--threads=4"]
GEVENT = [*GUNICORN, "--workers=2", "--worker-class=gevent"]
UVICORN = ["uvicorn", "--port={port}", "--log-level=warning", "--factory"]
UWSGI = ["--master", "--die-on-term", "--need-app", "--http-socket={at}", "--module=field_apps"]

SERVERS = {
    "waitress": ["waitress", "--listen={at}", "--threads=6", "field_apps:application"],
    "gunicorn-sync": [*GUNICORN, "--workers=4"],
    "gunicorn-gthread": GTHREAD,
    "gunicorn-gthread-preload": [*GTHREAD, "--preload"],
    "gunicorn-gevent": GEVENT,
    "gunicorn-gevent-preload": [*GEVENT, "--preload"],
    "uwsgi": [*UWSGI, "--processes=4"],
    "uwsgi-gevent": [*UWSGI, "--processes=2", "--gevent=100", "--gevent-monkey-patch"],
    "granian": [
        *("granian", "--interface=wsgi", "--workers=2", "--blocking-threads=4"),
        *("--port={port}", "--log-level=warning", "field_apps:application"),
    ],
    "uvicorn-a2wsgi": [*UVICORN, "field_apps:a2wsgi"],
    "uvicorn-asgiref": [*UVICORN, "field_apps:asgiref"],
    "uvicorn-starlette": [*UVICORN, "field_apps:starlette"],
}
"""What starts each: a module to run, and its arguments; uWSGI's is run by a line of Python."""

FORKING = ["gunicorn-gthread-preload", "gunicorn-gevent-preload", "uwsgi"]
"""Servers that import the application and fork then."""

ENGINES = ["sqlite", "postgresql", "mariadb"]

APPS = [
    *("plain", "flask", "flask-sqlalchemy", "flask-async", "django-async"),
    *("pyramid", "falcon", "bottle", "service"),
]

SUCCEEDING = ["orm", "core", "text", "stream"]
"""Kinds of requests that should have a complete 2xx."""

FAILING = ["refuse", "crash", "swallow"]
"""Kinds that need not: swallow may have one, where the engine undid nothing."""

KILLED = ["killed", "killed-in-query"]
"""The same for servers that run greenlets."""


class Cell(NamedTuple):
    """One combination."""

    server: str
    engine: str
    app: str

    def __str__(self) -> str:
        return "/".join(self)

    @property
    def kinds(self) -> list[str]:
        """What its clients send."""
        kinds = SUCCEEDING + FAILING
        if "gevent" in self.server and self.app == "plain":
            kinds = kinds + KILLED[: 1 if self.engine == "sqlite" else 2]
        return kinds

    @property
    def due(self) -> list[str]:
        """What should succeed; asgiref refuses to run coroutines where threads are greenlets."""
        refused = "gevent" in self.server and "async" in self.app
        return [] if refused else SUCCEEDING


def every_cell() -> list[Cell]:
    """All but Bottle's where gevent patches after the import.

    Its request and response are then a thread's, so clients get each other's answers.
    """
    cells = [Cell(*parts) for parts in product(SERVERS, ENGINES, APPS)]
    late = "uwsgi-gevent", "gunicorn-gevent-preload"
    return [cell for cell in cells if not (cell.server in late and cell.app == "bottle")]


def usual_cells() -> list[Cell]:
    """The part of the product that `make field` runs."""

    def chosen(cell: Cell) -> bool:
        by_server = cell.app == "plain"
        by_app = cell.server in ("gunicorn-gthread", "gunicorn-gevent")
        forked = cell.server in FORKING and cell.engine == "postgresql"
        return by_server or by_app or forked

    return [cell for cell in every_cell() if chosen(cell)]


SLICE = [
    Cell("waitress", "sqlite", "django-async"),
    Cell("gunicorn-sync", "postgresql", "flask"),
    Cell("gunicorn-gthread", "mariadb", "flask-sqlalchemy"),
    Cell("gunicorn-gthread-preload", "postgresql", "flask-async"),
    Cell("gunicorn-gevent", "postgresql", "plain"),
    Cell("gunicorn-gevent-preload", "mariadb", "pyramid"),
    Cell("uwsgi", "mariadb", "falcon"),
    Cell("uwsgi", "mariadb", "service"),
    Cell("uwsgi-gevent", "postgresql", "plain"),
    Cell("granian", "postgresql", "service"),
    Cell("uvicorn-a2wsgi", "sqlite", "bottle"),
    Cell("uvicorn-asgiref", "postgresql", "plain"),
    Cell("uvicorn-starlette", "mariadb", "plain"),
]
"""What is always tested: each server, engine and application at least once."""


@dataclass(frozen=True)
class Sent:
    """One request, what it inserts, and what its client got."""

    kind: str
    rows: frozenset[str]
    answer: Answer

    @property
    def succeeded(self) -> bool:
        """Whether its client holds a 2xx that looks complete."""
        status = self.answer.status or 0
        return self.answer.complete and 200 <= status < 300

    @property
    def complete(self) -> bool:
        """Whether that is sure: what only ends when the connection does may have been cut."""
        return self.succeeded and bool(
            {"content-length", "transfer-encoding"} & {*self.answer.headers}
        )


@dataclass(frozen=True)
class Report:
    """What was found in one cell.

    :ivar lost: complete 2xx without their row.
    :ivar refused: those with a 4xx, a 5xx, or a response that was visibly cut.
    :ivar kept: refused requests whose row is there.
    :ivar open: connections that are left in a transaction.
    :ivar due: requests that should have succeeded.
    :ivar done: how many of these did.
    """

    cell: Cell
    requests: int
    complete: int
    lost: int
    refused: int
    kept: int
    open: int
    due: int
    done: int

    @property
    def wrong(self) -> bool:
        return bool(self.lost or self.kept or self.open or self.done < ENOUGH * self.due)

    def __str__(self) -> str:
        return (
            f"{self.cell}: {self.requests} requests, {self.complete} complete 2xx, "
            f"{self.lost} of them without a row; {self.refused} refused, {self.kept} of them "
            f"with a row; {self.open} connections in a transaction; {self.done} of {self.due} "
            f"that should succeed did{'; WRONG' if self.wrong else ''}"
        )


# A server.


def command(cell: Cell, url: str, port: int) -> list[str]:
    at = f"127.0.0.1:{port}"
    run = ["-c", "import pyuwsgi; pyuwsgi.run()"] if "uwsgi" in cell.server else ["-m"]
    arguments = [each.format(at=at, port=port) for each in SERVERS[cell.server]]
    here = Path(__file__).parent
    environ = {
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
        "FIELD_APP": cell.app,
        "FIELD_URL": url,
    }
    settings = [f"{name}={value}" for name, value in environ.items()]
    return ["env", *settings, sys.executable, "-W", "ignore", *run, *arguments]


# Clients.


def ask(port: int, cell: Cell, kind: str, name: str) -> Sent:
    if cell.app == "service":
        item = {"name": name} if kind in SUCCEEDING else {"name": name, "unknown": 1}
        headers = {"Content-Type": "application/json"}
        answer = fetch(port, "POST", "/", json.dumps(item).encode(), headers)
        return Sent(kind, frozenset([name]), answer)
    rows = [name, f"{name}'"] if kind == "stream" else [name]
    return Sent(kind, frozenset(rows), fetch(port, "POST", f"/{kind}?name={name}", b""))


def load(port: int, cell: Cell) -> list[Sent]:
    """Send all kinds of requests from several clients at once, in an order by chance."""
    numbers = count()
    together = threading.Barrier(CLIENTS)

    def client(_: int) -> list[Sent]:
        kinds = cell.kinds * ROUNDS
        random.shuffle(kinds)
        together.wait(PATIENCE)
        return [ask(port, cell, kind, f"item{next(numbers)}") for kind in kinds]

    with ThreadPoolExecutor(CLIENTS) as threads:
        return [sent for each in threads.map(client, range(CLIENTS)) for sent in each]


# A database.

OPEN = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'",
    "mariadb": "SELECT count(*) FROM information_schema.innodb_trx",
}
"""How many connections are in a transaction."""


def left_open(engine: Engine) -> int:
    if engine.dialect.name in ("mysql", "mariadb", "postgresql"):
        name = engine.dialect.name.replace("mysql", "mariadb")
        [(found,)] = databases.execute(engine.url.render_as_string(False), OPEN[name])
        return int(found)
    connection = sqlite3.connect(str(engine.url.database), timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return 1
    finally:
        connection.close()
    return 0


def open_at_the_end(engine: Engine) -> int:
    """Connections that stay in a transaction; one that is about to end does not count."""
    try:
        databases.until(
            lambda: not left_open(engine),
            "transactions to end",
            seconds=10,
            pause=databases.INNODB_PAUSE,
        )
    except TimeoutError:
        return left_open(engine)
    return 0


@contextmanager
def tables(url: str) -> Iterator[Engine]:
    """The tables with the one item that is always there; seen from outside."""
    engine = make_engine(url)
    make_tables(engine)
    with engine.begin() as connection:
        connection.execute(insert(Item).values(name="taken"))
    try:
        yield engine
    finally:
        drop_tables(engine)
        engine.dispose()


def play(cell: Cell, url: str, folder: Path) -> Report:
    """Run one cell on the database at *url*; its server's log is in *folder*.

    :raises OSError: where a server does not answer at all.
    """
    with tables(url) as engine, databases.free_port() as port:
        with databases.running(command(cell, url, port), user=None, folder=folder, port=port):
            sent = load(port, cell)
            left = open_at_the_end(engine)
        return judge(cell, sent, set(map(str, names(engine))), left)


def judge(cell: Cell, sent: Sequence[Sent], rows: set[str], left: int) -> Report:
    complete = [one for one in sent if one.complete]
    refused = [one for one in sent if not one.succeeded]
    due = [one for one in sent if one.kind in cell.due]
    return Report(
        cell,
        requests=len(sent),
        complete=len(complete),
        lost=sum(not one.rows <= rows for one in complete),
        refused=len(refused),
        kept=sum(bool(one.rows & rows) for one in refused),
        open=left,
        due=len(due),
        done=sum(one.succeeded for one in due),
    )


# The whole.


def table(reports: Sequence[Report]) -> str:
    """All cells, as a table in Markdown."""
    lines = ["| cell | requests | 2xx | lost | refused | kept | open | done | |", "|---" * 9 + "|"]
    for one in reports:
        figures = one.requests, one.complete, one.lost, one.refused, one.kept, one.open
        columns = one.cell, *figures, f"{one.done}/{one.due}", "WRONG" * one.wrong
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines)


def main() -> int:
    """Run the cells that are asked for; the exit status."""
    parser = argparse.ArgumentParser(description="Try servers, engines and applications.")
    parser.add_argument("--all", action="store_true", help="run the full product, for an hour")
    parser.add_argument("--cell", nargs="+", default=[], metavar="SERVER/ENGINE/APP")
    options = parser.parse_args()
    cells = [Cell(*each.split("/")) for each in options.cell]
    cells = cells or (every_cell() if options.all else usual_cells())
    reports = []
    with ExitStack() as stack:
        urls = {
            "postgresql": stack.enter_context(databases.postgresql()).url,
            "mariadb": stack.enter_context(databases.mariadb()).url,
        }
        for cell in cells:
            with TemporaryDirectory() as folder:
                url = urls.get(cell.engine, f"sqlite:///{folder}/items.db")
                try:
                    reports.append(play(cell, url, Path(folder)))
                except OSError as error:
                    print(f"{cell}: {error!r}")
                    reports.append(Report(cell, 0, 0, 0, 0, 0, 0, due=1, done=0))
                print(reports[-1], flush=True)
                if reports[-1].wrong:
                    print(Path(folder, "server.log").read_text(errors="replace")[-4000:])
    print(table(reports))
    return int(any(one.wrong for one in reports))


if __name__ == "__main__":
    sys.exit(main())
