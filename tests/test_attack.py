"""The service under attack: malformed requests by the thousand leave nothing behind."""

from __future__ import annotations

import ast
import json
import os
import re
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

import attack
import pytest
from attack import CUT, Attack, Connection, Creation, Reply
from databases import until
from processes import ROOT, SERVE, Process, create_many, send, serve
from sessionscope.engines import make_engine
from sqlalchemy import insert, select

from models import Item
from web.database import create_tables

pytestmark = pytest.mark.long

SEED = os.environ.get("ATTACK_SEED") or token_hex(4)
"""Set it to send the requests of an earlier run once more."""

REQUESTS = 10_000
WARM_UP = REQUESTS
"""It takes thousands until what threads and caches keep has its size."""

CLIENTS = 6
SLOW_CLIENTS = 36

ITEMS = 1_500
"""More than are sent at once: a list of them is streamed."""

LEAKED = 8 * 2**20
"""Bytes by which the process may have grown."""


@dataclass
class Aftermath:
    """What the attack has left."""

    answered: list[tuple[Attack, Reply]]
    before: list[tuple[int, str | None]]
    after: list[tuple[int, str | None]]
    warm: int
    resident: int
    open_transactions: int
    concurrent: list[int]
    health: int
    log: str

    def replies(self) -> Iterator[tuple[Attack, Reply]]:
        """What was answered at all."""
        return ((made, reply) for made, reply in self.answered if reply.status != CUT)


def rows(path: Path) -> list[tuple[int, str | None]]:
    engine = make_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        found = [(id, name) for id, name in connection.execute(select(Item.id, Item.name))]
    engine.dispose()
    return sorted(found)


def fill(path: Path) -> None:
    engine = make_engine(f"sqlite:///{path}")
    create_tables(engine)
    with engine.begin() as connection:
        connection.execute(insert(Item), [{"name": f"old {number}"} for number in range(ITEMS)])
    engine.dispose()


def resident(server: Process) -> int:
    """Bytes of memory that the process has; see proc_pid_statm(5)."""
    statm = Path(f"/proc/{server.process.pid}/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sockets(server: Process) -> int:
    """How many sockets the process has open."""
    found = 0
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            found += os.readlink(link).startswith("socket:")
    return found


def open_transactions(path: Path) -> int:
    """1 where somebody reads or writes, for then the write-ahead log cannot be reset, or else 0.

    https://www.sqlite.org/pragma.html#pragma_wal_checkpoint
    """
    with closing(sqlite3.connect(path, timeout=0)) as connection:
        busy: int = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        return busy


@pytest.fixture(autouse=True)
def tell_the_seed() -> None:
    """Say in the report of a test that fails how to repeat it."""
    print(f"ATTACK_SEED={SEED}")


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    """Attack the service that runs as users run it, and look at what is left."""
    path = tmp_path_factory.mktemp("attack") / "items.db"
    fill(path)
    with serve("--database-url", f"sqlite:///{path}", "--log-level", "info") as server:
        idle = sockets(server)
        attack.launch(server.port, f"{SEED} warm-up", WARM_UP, CLIENTS)
        attack.trickle(server.port, SLOW_CLIENTS)
        until(lambda: sockets(server) == idle, "the clients to be gone")
        before, warm = rows(path), resident(server)
        answered = attack.launch(server.port, SEED, REQUESTS, CLIENTS)
        answered += attack.trickle(server.port, SLOW_CLIENTS)
        until(lambda: sockets(server) == idle, "the clients to be gone")
        left = resident(server), open_transactions(path)
        after = rows(path)
        concurrent = create_many(server, clients=8, each=1)
        health = send(server, "GET", "/healthz")[0]
    return Aftermath(answered, before, after, warm, *left, concurrent, health, server.log)


def test_every_request_gets_the_answer_that_it_deserves(aftermath: Aftermath) -> None:
    """Each of ten thousand malformed requests is refused with a status that says why."""
    wrong = Counter(
        (made.kind, reply.status, made.data[:300], reply.content[:300])
        for made, reply in aftermath.answered
        if reply.status not in made.statuses
    )
    tally = Counter((made.kind, reply.status) for made, reply in aftermath.answered)
    print(*sorted(tally.items()), sep="\n")
    print(f"resident: {aftermath.warm} before, {aftermath.resident} after")
    assert not wrong
    assert sum(tally.values()) >= REQUESTS


def test_no_failure_is_the_services(aftermath: Aftermath) -> None:
    """No answer is a 5xx, but for the server's own 501 to an unknown transfer coding."""
    failed = {
        (made.kind, reply.status) for made, reply in aftermath.replies() if reply.status >= 500
    }
    assert failed == {("unknown transfer coding", 501)}


def test_every_refusal_says_why_in_json(aftermath: Aftermath) -> None:
    """A refusal is JSON with ``error``, and ``errors`` by field at most, also the server's own."""
    for made, reply in aftermath.replies():
        if reply.status < 400 or made.data.startswith(b"HEAD "):
            continue
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-request-id"]
        refusal = json.loads(reply.content)
        assert refusal.keys() <= {"error", "errors"}
        assert isinstance(refusal["error"], str)
        assert "Traceback" not in refusal["error"]
        assert all(error["code"] for error in refusal.get("errors", []))


def test_the_books_match(aftermath: Aftermath) -> None:
    """There is a row for each 2xx creation, with its name to the letter, and no other is new."""
    created: list[tuple[int, str | None]] = [
        (json.loads(reply.content)["id"], made.name)
        for made, reply in aftermath.answered
        if isinstance(made, Creation)
    ]
    assert created
    assert aftermath.after == sorted(aftermath.before + created)


def test_what_was_there_is_unchanged(aftermath: Aftermath) -> None:
    """No item that was there before is gone or has another name."""
    assert aftermath.after[:ITEMS] == [(id, f"old {id - 1}") for id in range(1, ITEMS + 1)]


def test_nothing_is_left_open(aftermath: Aftermath) -> None:
    """No session is left in a transaction, and the service is as ready as before."""
    assert aftermath.open_transactions == 0
    assert len(set(aftermath.concurrent)) == 8
    assert aftermath.health == 200


def test_memory_does_not_grow(aftermath: Aftermath) -> None:
    """The process has at most 8 MiB more than after a warm-up of the same kind."""
    assert aftermath.resident - aftermath.warm <= LEAKED


def test_the_log_tells_of_no_failure(aftermath: Aftermath) -> None:
    """Refusals are no errors: the log has no traceback, and nothing about a failure."""
    assert "Traceback" not in aftermath.log
    assert max(map(len, aftermath.log.splitlines())) < 1500
    assert re.findall(r"^\S+ \S+ (?:ERROR|CRITICAL) .*", aftermath.log, re.MULTILINE) == []


# Limits.


def test_the_limits_have_defaults() -> None:
    """Each limit is an option, and has a number where nothing is said."""
    done = subprocess.run([*SERVE, "--help"], capture_output=True, text=True, check=True)
    shown = " ".join(done.stdout.split())
    assert re.findall(r"--(\S+) N [^()]* \(default: (\d+)\)", shown) == [
        ("wait", "0"),
        ("threads", "8"),
        ("connections", "100"),
        ("max-body", "65536"),
        ("idle-timeout", "60"),
        ("stop-timeout", "30"),
    ]


def test_the_connections_can_be_limited(sqlite_url: str) -> None:
    """Over --connections the next client waits, and is served when another has gone."""
    with serve("--database-url", sqlite_url, "--connections", "6") as server:
        with ExitStack() as connected:
            for _ in range(6):
                connected.enter_context(Connection(server.port))
            until(lambda: "reached the connection limit" in server.log, "the limit")
            waiting = Connection(server.port)
            waiting.send(attack.request("GET", "/livez"))
        with waiting:
            assert waiting.read().status == 200


# SQL.

TAKE_SQL = {"execute", "executemany", "exec_driver_sql", "scalar", "scalars", "text", "script"}
"""Methods and functions that are given SQL."""

FORMATTED = {
    ("confirm.py", "_HISTORY"),
    ("engines.py", "_MARIADB_SETTINGS name"),
    ("engines.py", "names"),
    ("engines.py", "pragma"),
    ("engines.py", "setting"),
}
"""SQL that is not a literal, by the names in it: constants of those modules, all of them."""


def formatted(module: Path) -> Iterator[tuple[str, str]]:
    """Yield the SQL of *module* that is put together from strings, by the names in it."""
    for call in ast.walk(ast.parse(module.read_text("utf-8"))):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        function, sql = ast.unparse(call.func).rpartition(".")[2], call.args[0]
        parts = [*ast.walk(sql)]
        if function in TAKE_SQL and any(
            isinstance(part, ast.JoinedStr | ast.BinOp) for part in parts
        ):
            names = {part.id for part in parts if isinstance(part, ast.Name)}
            yield module.name, " ".join(sorted(names))


def test_sql_never_comes_from_a_string() -> None:
    """No module puts SQL together from strings, but for settings that are its own constants."""
    modules = [
        module
        for pattern in ("*.py", "sessionscope/*.py", "web/*.py")
        for module in ROOT.glob(pattern)
        if module.name != "setup.py"
    ]
    assert {found for module in modules for found in formatted(module)} == FORMATTED
