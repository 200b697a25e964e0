"""A ledger: what clients were told of the items that they created, against what is stored.

`Load` has many clients create items, each under a name of its own and only once, and books
what each was told.  Some clients send an Idempotency-Key, and repeat until they know.  `play`
injects faults meanwhile, in an order that a seed decides.  `audit` then compares the books
with the rows that a `Store` has.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from databases import MariaDB, Node, free_port, until
from processes import Process, serve
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool
from support import PATIENCE

CLIENTS = 12

KEYED = 6
"""Clients besides them that send a key, and repeat what they have no answer to."""

THREADS = 8
"""Requests that the service runs at once, and so its connections to the database."""

PAUSE = 0.1
"""Seconds after which a client that was refused creates another item."""

Verdict = Literal["acknowledged", "refused", "unknown"]
Rows = list[tuple[int, str]]


@dataclass(frozen=True)
class Entry:
    """What a client was told of one request.

    Refused is what was answered with an error, and what was not even sent because nobody
    listened.  Unknown is what the service itself calls so, and what was cut off.
    """

    name: str
    verdict: Verdict
    answer: str
    id: int | None = None


class Client:
    """Creates items over one connection, and over a new one where that was cut."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.connection.auto_open = 0  # or it would ask a second time by itself

    def create(self, name: str, key: str | None = None) -> Entry:
        """Ask once for an item of this name."""
        try:
            if self.connection.sock is None:
                self.connection.connect()
        except OSError:
            return Entry(name, "refused", "no connection")
        body = json.dumps({"name": name}).encode()
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Idempotency-Key"] = f'"{key}"'
        try:
            self.connection.request("POST", "/", body, headers)
            response = self.connection.getresponse()
            content = json.loads(response.read())
        except (http.client.HTTPException, OSError):
            self.connection.close()
            return Entry(name, "unknown", "cut off")
        if response.status == 200:
            assert content["name"] == name, f"asked for {name!r}, got {content!r}"
            replayed = " replayed" if "Idempotent-Replayed" in response.headers else ""
            return Entry(name, "acknowledged", f"200{replayed}", content["id"])
        told = [each for each in ("Commit-Outcome", "Retry-After") if each in response.headers]
        verdict: Verdict = "unknown" if "Commit-Outcome" in told else "refused"
        return Entry(name, verdict, " ".join([str(response.status), *told]))


_numbers = count(1)


class Load:
    """Clients that create items while the block runs, and their books.

    :param keyed: how many clients there are besides that repeat until they know.
    :ivar answers: whatever those were told.
    """

    def __init__(self, port: int, clients: int = CLIENTS, keyed: int = 0) -> None:
        self.port = port
        self.books: dict[int, list[Entry]] = {number: [] for number in islice(_numbers, clients)}
        self.keyed: dict[int, list[Entry]] = {number: [] for number in islice(_numbers, keyed)}
        self.answers: dict[int, Counter[str]] = {number: Counter() for number in self.keyed}
        self.acknowledged = dict.fromkeys([*self.books, *self.keyed], 0)
        self.stopping = threading.Event()
        self.threads = ThreadPoolExecutor(clients + keyed)

    def __enter__(self) -> Load:
        self.running = [self.threads.submit(self._run, number) for number in self.books]
        self.running += [self.threads.submit(self._run_keyed, number) for number in self.keyed]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stopping.set()
        self.threads.shutdown()
        for client in self.running:
            client.result()

    @property
    def entries(self) -> list[Entry]:
        return [entry for book in self.books.values() for entry in book]

    @property
    def keyed_entries(self) -> list[Entry]:
        return [entry for book in self.keyed.values() for entry in book]

    def wait_for(self, more: int) -> None:
        """Wait until so many more items were acknowledged."""
        wanted = sum(self.acknowledged.values()) + more
        until(lambda: self._has(wanted), f"{more} more acknowledgements")

    def _has(self, wanted: int) -> bool:
        ended = [client.exception() for client in self.running if client.done()]
        assert not ended, ended
        return sum(self.acknowledged.values()) >= wanted

    def _run(self, number: int) -> None:
        client, book = Client(self.port), self.books[number]
        with closing(client.connection):
            while not self.stopping.is_set():
                entry = client.create(f"{number}-{len(book)}")
                book.append(entry)
                if entry.verdict == "acknowledged":
                    self.acknowledged[number] += 1
                else:
                    self.stopping.wait(PAUSE)

    def _run_keyed(self, number: int) -> None:
        client, book = Client(self.port), self.keyed[number]
        with closing(client.connection):
            while not self.stopping.is_set():
                book.append(self._create_once(client, number, f"{number}-{len(book)}"))
                self.acknowledged[number] += 1

    def _create_once(self, client: Client, number: int, name: str) -> Entry:
        """Ask under a key of the same name until there is an answer."""
        answers, deadline = self.answers[number], time.monotonic() + 2 * PATIENCE
        while True:
            entry = client.create(name, key=name)
            answers[entry.answer] += 1
            if entry.verdict == "acknowledged" or time.monotonic() > deadline:
                return entry
            time.sleep(PAUSE)


class Service:
    """``serve.py`` as a process; nothing but `kill` starts it again, on the same port."""

    def __init__(self, *arguments: str) -> None:
        # A client who finds nobody at a port that is not held may be given it as its own.
        self.held = ExitStack()
        self.port = self.held.enter_context(free_port())
        own = {"--listen": f"127.0.0.1:{self.port}", "--threads": THREADS, "--log-level": "info"}
        self.arguments = [*arguments, *(str(word) for option in own.items() for word in option)]

    def __enter__(self) -> Service:
        self._start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stack.close()
        self.held.close()

    def _start(self) -> None:
        self.stack = ExitStack()
        self.process: Process = self.stack.enter_context(serve(*self.arguments))

    def kill(self) -> None:
        """SIGKILL the process, and start another."""
        self.process.process.kill()
        self.stack.close()
        self._start()

    def pause(self, seconds: float) -> None:
        """Let the process stand still for a while."""
        self.process.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """Ask the process to end in an orderly way; its exit status."""
        self.process.process.terminate()
        return self.process.process.wait(PATIENCE)


Faults = Mapping[str, Callable[[random.Random], object]]
"""Functions that do harm, and undo it before they return."""


def play(load: Load, faults: Faults, seed: int, seconds: float) -> Counter[str]:
    """Inject faults until the time is over; how often each.

    They come in rounds, each round all kinds in another order, and each kind comes at least
    once.  After each fault the clients must get on: items are acknowledged again.
    """
    chance, injected = random.Random(seed), Counter[str]()
    rounds = (chance.sample(sorted(faults), len(faults)) for _ in count())
    deadline = time.monotonic() + seconds
    for kind in (kind for each in rounds for kind in each):
        load.wait_for(chance.randint(1, 20 * CLIENTS))
        if time.monotonic() > deadline and len(injected) == len(faults):
            return injected
        faults[kind](chance)
        injected[kind] += 1
    raise AssertionError("the rounds have no end")


@dataclass
class Balance:
    """The books against the rows; what is in a list should not be."""

    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    unknown_but_stored: int = 0
    lost: list[Entry] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    refused_but_stored: list[Entry] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return not (self.lost or self.doubled or self.refused_but_stored or self.invented)

    def __str__(self) -> str:
        return (
            f"{self.acknowledged} acknowledged, {len(self.lost)} of them lost, "
            f"{len(self.doubled)} doubled; {self.refused} refused, "
            f"{len(self.refused_but_stored)} of them stored; "
            f"{self.unknown} unknown, {self.unknown_but_stored} of them stored"
        )


def audit(entries: Iterable[Entry], rows: Collection[tuple[int, str]]) -> Balance:
    """Compare what clients were told with the rows that there are."""
    balance, stored = Balance(), set(rows)
    told = {entry.name: entry for entry in entries}
    often = Counter(name for _, name in rows)
    balance.doubled = sorted(name for name, times in often.items() if times > 1)
    balance.invented = sorted(often.keys() - told.keys())
    for entry in told.values():
        if entry.verdict == "acknowledged":
            balance.acknowledged += 1
            if (entry.id, entry.name) not in stored:
                balance.lost.append(entry)
        elif entry.verdict == "refused":
            balance.refused += 1
            if entry.name in often:
                balance.refused_but_stored.append(entry)
        else:
            balance.unknown += 1
            balance.unknown_but_stored += entry.name in often
    return balance


KEYS = "SELECT count(*), count(response) FROM idempotency_keys"


class SQLiteStore:
    """What the file itself says."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Rows]:
        return [self._execute("SELECT id, name FROM items")]

    def keys(self) -> tuple[Any, ...]:
        """How many keys are stored, and how many responses to them."""
        return self._execute(KEYS)[0]

    def open_work(self) -> bool:
        # https://www.sqlite.org/pragma.html#pragma_wal_checkpoint: its first column says
        # whether a reader or a writer was in the way.
        return bool(self._execute("PRAGMA wal_checkpoint(TRUNCATE)")[0][0])

    def connections(self) -> int:
        return Path(f"{self.path}-wal").exists()  # the last connection removes it

    def _execute(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            return connection.execute(statement).fetchall()


class PostgreSQLStore:
    """What the server says that is the primary when it is asked."""

    def __init__(self, primary: Callable[[], Node]) -> None:
        self.primary = primary

    def empty(self) -> None:
        self.primary().execute("DROP TABLE IF EXISTS items, idempotency_keys")

    def rows(self) -> list[Rows]:
        """The items, as each server has them."""
        rows: Any = self.primary().execute("SELECT id, name FROM items")
        return [rows]

    def keys(self) -> tuple[Any, ...]:
        return self.primary().execute(KEYS)[0]

    def open_work(self) -> bool:
        """Whether a client has left anything open."""
        return bool(self.backends("state <> 'idle'"))

    def connections(self) -> int:
        return len(self.backends())

    def backends(self, which: str = "true") -> list[int]:
        """The process ids of those that serve clients."""
        clients = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        query = f"SELECT pid FROM pg_stat_activity WHERE {clients} AND {which} ORDER BY pid"
        return [pid for (pid,) in self.primary().execute(query)]

    def terminate(self, pids: Sequence[int]) -> None:
        for pid in pids:
            self.primary().execute(f"SELECT pg_terminate_backend({pid})")

    @contextmanager
    def locked(self) -> Iterator[Callable[[], int]]:
        """Let nobody write while the block runs; it gets a function that counts who waits."""
        with create_engine(self.primary().url, poolclass=NullPool).begin() as holder:
            holder.execute(text("LOCK TABLE items IN SHARE MODE"))
            yield lambda: len(self.backends("wait_event_type = 'Lock'"))


class MariaDBStore:
    """The same of one MariaDB server, or of all nodes of a cluster."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = nodes

    def empty(self) -> None:
        self.nodes[0].execute("DROP TABLE IF EXISTS items, idempotency_keys")

    def rows(self) -> list[Rows]:
        rows: Any = [node.execute("SELECT id, name FROM items ORDER BY id") for node in self.nodes]
        return list(rows)

    def keys(self) -> tuple[Any, ...]:
        return self.nodes[0].execute(KEYS)[0]

    def open_work(self) -> bool:
        transactions = "SELECT trx_id FROM information_schema.innodb_trx"
        at_work = self.clients("command <> 'Sleep'")
        return bool(at_work) or any(node.execute(transactions) for node in self.nodes)

    def connections(self) -> int:
        return len(self.clients())

    def clients(self, which: str = "true") -> list[tuple[Node, int]]:
        """Where clients are connected, and the ids of their connections."""
        others = "user = 'root' AND id <> connection_id()"
        query = f"SELECT id FROM information_schema.processlist WHERE {others} AND {which}"
        return [(node, id) for node in self.nodes for (id,) in node.execute(query)]

    def terminate(self, clients: Sequence[tuple[Node, int]]) -> None:
        for node, id in clients:
            with suppress(SQLAlchemyError):  # it has left by itself
                node.execute(f"KILL {id}")

    @contextmanager
    def locked(self) -> Iterator[Callable[[], int]]:
        with ExitStack() as stack:
            for node in self.nodes:
                holder = stack.enter_context(create_engine(node.url, poolclass=NullPool).connect())
                holder.execute(text("LOCK TABLES items READ"))
            yield lambda: len(self.clients("state LIKE 'Waiting for %lock'"))


ServerStore = PostgreSQLStore | MariaDBStore
Store = SQLiteStore | ServerStore


def store_of(node: Node) -> ServerStore:
    return MariaDBStore(node) if isinstance(node, MariaDB) else PostgreSQLStore(lambda: node)


def rows_everywhere(store: Store) -> Rows:
    """The items, when all servers of *store* have the same: one may be behind for a moment."""
    rows: list[Rows] = []

    def same() -> bool:
        rows[:] = store.rows()
        return all(each == rows[0] for each in rows)

    until(same, "all servers to have the same")
    return rows[0]


def kill_processes(node: Node, pids: Iterable[int]) -> None:
    """SIGKILL processes of PostgreSQL, which then ends all others and recovers; wait for that."""
    before = last_checkpoint(node)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: last_checkpoint(node) not in (None, before), f"{node} to recover")


def last_checkpoint(node: Node) -> str | None:
    """Where PostgreSQL's last checkpoint is in the log; None while nobody answers."""
    with suppress(SQLAlchemyError):
        [(position,)] = node.execute("SELECT (pg_control_checkpoint()).checkpoint_lsn::text")
        return str(position)
    return None


def use_all_connections(port: int, store: ServerStore) -> list[Entry]:
    """Have the service at *port* use all its connections at once; what clients were told.

    It would wait for ever if one had been lost to the pool.
    """
    with ExitStack() as stack:
        waiting = stack.enter_context(store.locked())
        with Load(port, clients=THREADS) as load:
            until(lambda: waiting() == THREADS, f"{THREADS} connections to be in use")
            load.stopping.set()
            stack.close()
    return load.entries
