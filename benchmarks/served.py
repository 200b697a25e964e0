"""Requests per second over real connections, beside other ways, on equally durable databases.

``wrk`` keeps 16 connections busy.  The servers of a table's row run all at once, and one after
the other is loaded, round after round: what disturbs the machine disturbs all alike.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import waitress
from databases import PostgreSQL, find, free_port, place_for, postgresql_programs, running
from measuring import fill
from services import SERVICES

TITLE = "Served: requests per second, and p99 in ms; 16 connections"
MINUTES = 7

CONNECTIONS, SECONDS, ROUNDS = 16, 2, 4
THREADS = (4, 8)
CONTESTANTS = [*(name for name in SERVICES if name != "floor"), "item service, granian"]
REQUESTS = {"GET /1": "", "POST /": 'wrk.method = "POST"'}
UNITS = {"us": 0.001, "ms": 1, "s": 1000}
HEAD = ("all in waitress, but for the last", *CONTESTANTS)

MakeURL = Callable[[str], str]


def rows() -> Iterator[tuple[str, ...]]:
    wrk = find("wrk")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from rows_on("SQLite", lambda database: f"sqlite:///{folder / database}.db", wrk)
    with durable_postgresql() as make_url:
        yield from rows_on("PostgreSQL", make_url, wrk)


def rows_on(engine: str, make_url: MakeURL, wrk: str) -> Iterator[tuple[str, ...]]:
    for threads in THREADS:
        with ExitStack() as stack:
            ports = {}
            for number, name in enumerate(CONTESTANTS):
                url = make_url(f"items_{threads}_{number}")
                fill(url, 100)
                ports[name] = stack.enter_context(serving(name, url, threads))
            for request in REQUESTS:
                loads = [[load(wrk, ports[name], request) for name in ports] for _ in range(ROUNDS)]
                each = map(shown, zip(*loads[1:], strict=True))  # the first was the warm-up
                yield f"{engine}, {threads} threads, {request}", *each


@contextmanager
def durable_postgresql() -> Iterator[MakeURL]:
    """A server that writes to the disk before it says so, and a database for each name."""
    with place_for("postgres") as place:
        usual = {"fsync": "on", "checkpoint_timeout": "5min", "autovacuum": "on"}
        node = PostgreSQL(postgresql_programs(place.folder), place, usual)

        def make_url(database: str) -> str:
            node.execute(f"CREATE DATABASE {database}")
            return node.url.removesuffix("postgres") + database

        try:
            node.initialize()
            node.start()
            yield make_url
        finally:
            node.close()


@contextmanager
def serving(name: str, url: str, threads: int) -> Iterator[int]:
    """Run a server in a process of its own; its port."""
    with free_port() as port, tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, name, url, str(port), str(threads)]
        if name not in SERVICES:
            options = ["--interface=wsgi", "--no-ws", "--factory", f"--blocking-threads={threads}"]
            granian = [sys.executable, "-m", "granian", *options, f"--port={port}"]
            command = ["env", f"DATABASE_URL={url}", *granian, "serve:create_app"]
        with running(command, user=None, folder=Path(folder), port=port):
            yield port


def load(wrk: str, port: int, request: str) -> tuple[float, float, int]:
    """Requests per second, the 99th percentile in ms, and how many failed."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(REQUESTS[request])
        script.flush()
        options = [f"-c{CONNECTIONS}", "-t1", f"-d{SECONDS}s", "--latency", "-s", script.name]
        target = f"http://127.0.0.1:{port}{request.split()[1]}"
        text = subprocess.run([wrk, *options, target], check=True, stdout=-1, text=True).stdout
    rate = re.search(r"Requests/sec: +([\d.]+)", text)
    p99 = re.search(r"99% +([\d.]+)(us|ms|s)", text)
    assert rate is not None, text
    assert p99 is not None, text
    failed = re.findall(r"(?:responses:|connect|read|write|timeout) (\d+)", text)
    return float(rate[1]), float(p99[1]) * UNITS[p99[2]], sum(map(int, failed))


def shown(loads: tuple[tuple[float, float, int], ...]) -> str:
    """The medians of the rounds, and all failures."""
    rates, p99s, failed = zip(*loads, strict=True)
    failures = f", {sum(failed)} failed" if any(failed) else ""
    return f"{statistics.median(rates):,.0f}, {statistics.median(p99s):.0f} ms{failures}"


if __name__ == "__main__":
    name, url, port, threads = sys.argv[1:]
    app = SERVICES[name](url)
    waitress.serve(app, host="127.0.0.1", port=int(port), threads=int(threads))
