"""A storm: impatient clients, workers that are killed, and each payment is made once.

Many clients make payments, each under a key, at an application that several processes serve.
They hang up after milliseconds or in the middle of their request, a tenth of the views fails,
a third streams, and all the while some process gets SIGKILL.  Each client repeats a request
until it was answered twice.  Then there is one payment for each key, and both answers are the
same.  Without keys the same storm makes payments twice, though clients there ask for no
second answer.

    python tests/storm.py --seed 7 --clients 50 --keys 10 postgresql galera
"""

from __future__ import annotations

import argparse
import http.client
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import databases
import once
from clusters import galera_cluster
from once import Answer
from support import PATIENCE

TIMEOUTS = [0.005, 0.02, 0.05, 5.0]
"""Seconds that a client waits for an answer; drawn for each request."""

VIEWS = ["fail"] + 3 * ["stream"] + 6 * ["list"]
"""What the view is told to do; drawn for each request."""

HANG_UPS = 0.1
"""How many requests of all are cut off in their middle."""

PACE = 0.02
"""Seconds that the view takes at most."""

KILL_EVERY = 0.7
"""Seconds between two SIGKILL."""

RESET = struct.pack("ii", 1, 0)
"""Of SO_LINGER, socket(7): close() is to reset the connection."""


@dataclass
class Client:
    """One who pays; all clients use the same keys.

    :param wanted: how many successes each key must have.
    :ivar told: what came of each request.
    """

    port: int
    number: int
    chance: random.Random
    wanted: int
    deadline: float
    told: Counter[str] = field(default_factory=Counter)
    unlike: list[str] = field(default_factory=list)

    def pay(self, keys: int) -> None:
        for number in range(keys):
            name = f"{self.number}-{number}"
            answers = list(self.successes(name, f"key-{number}"))
            if len(set(answers)) > 1:
                self.unlike.append(f"{name}: {answers}")

    def successes(self, name: str, key: str) -> Iterator[Answer]:
        found = 0
        while found < self.wanted:
            assert time.monotonic() < self.deadline, f"{name} was not paid: {self.told}"
            try:
                answer = self.ask(name, key)
            except (OSError, http.client.HTTPException):
                self.told["cut off"] += 1
            else:
                self.told[str(answer.status)] += 1
                if answer.status == 201:
                    found += 1
                    yield answer
                    continue
            time.sleep(self.chance.uniform(0, PACE))

    def ask(self, name: str, key: str) -> Answer:
        """Ask once, and wait only so long."""
        timeout = self.chance.choice(TIMEOUTS)
        head = once.headers(name, key, f"client-{self.number}", self.chance.choice(VIEWS))
        sent = name.encode()
        if self.chance.random() < HANG_UPS:
            sent = sent[: self.chance.randrange(len(sent))]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", "/", sent, {**head, "X-Pace": str(PACE)})
            if len(sent) < len(name):
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                raise ConnectionAbortedError("on purpose")
            with connection.getresponse() as response:
                return Answer.read(response)
        finally:
            connection.close()


@dataclass
class Toll:
    """What a storm came to."""

    keys: int
    kills: int
    told: Counter[str]
    unlike: list[str]
    names: Counter[str]
    key_rows: int
    without_response: int
    seconds: float

    @property
    def rows(self) -> int:
        return self.names.total()

    @property
    def duplicates(self) -> int:
        return self.rows - len(self.names)

    @property
    def once(self) -> bool:
        """Whether each key has one payment, and one response that all its answers are."""
        wrong = self.duplicates or self.unlike or self.without_response
        return self.rows == self.key_rows == self.keys and not wrong

    def __str__(self) -> str:
        told = ", ".join(f"{what} {self.told[what]}" for what in sorted(self.told))
        return (
            f"{self.keys} keys, {self.kills} kills, answers: {told}; "
            f"{self.rows} rows, {self.duplicates} duplicates, "
            f"{len(self.unlike)} answers that differ, {self.key_rows} rows of keys, "
            f"{self.without_response} without a response; {self.seconds:.0f} s"
        )


@contextmanager
def workers(urls: list[str], folder: Path, keyed: bool) -> Iterator[tuple[int, int]]:
    """Serve from three processes that are replaced when they die; port and pid."""
    gunicorn = ["-m", "gunicorn", "--preload", "--workers", "3", "--threads", "4", "once_app"]
    with databases.free_port() as port:
        command = [*gunicorn, "--bind", f"127.0.0.1:{port}"]
        with once.served(*command, urls=urls, port=port, folder=folder, keyed=keyed) as pid:
            yield port, pid


@contextmanager
def killing(master: int, chance: random.Random) -> Iterator[list[int]]:
    """Let some worker of *master* be killed again and again; the pids of those that were."""
    over, killed = threading.Event(), list[int]()

    def run() -> None:
        while not over.wait(KILL_EVERY):
            victims = databases.descendants(master)
            if victims:
                killed.append(chance.choice(sorted(victims)))
                databases.send(signal.SIGKILL, killed[-1:])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join(PATIENCE)


def storm(
    urls: list[str], *, seed: int, clients: int, keys: int, keyed: bool = True, limit: float = 300
) -> Toll:
    """Let it rage over a database, in which there is nothing afterwards.

    :param urls: its servers; each can be written to.
    :param limit: seconds that it may take.
    """
    began, chance = time.monotonic(), random.Random(seed)
    with once.tables(urls[0]) as engine, tempfile.TemporaryDirectory() as folder:
        with workers(urls, Path(folder), keyed) as (port, master), killing(master, chance) as kills:
            wanted, deadline = (2 if keyed else 1), began + limit
            crowd = [
                Client(port, number, random.Random(f"{seed}-{number}"), wanted, deadline)
                for number in range(clients)
            ]
            with ThreadPoolExecutor(clients) as threads:
                list(threads.map(lambda client: client.pay(keys), crowd))
        names, responses = Counter(once.names(engine)), once.responses(engine)
    return Toll(
        keys=clients * keys,
        kills=len(kills),
        told=sum((client.told for client in crowd), Counter[str]()),
        unlike=[each for client in crowd for each in client.unlike],
        names=names,
        key_rows=len(responses),
        without_response=responses.count(None),
        seconds=time.monotonic() - began,
    )


@contextmanager
def servers(engine: str) -> Iterator[list[str]]:
    """The URLs of a database of its own."""
    if engine == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield [f"sqlite:///{folder}/items.db"]
    elif engine == "galera":
        with galera_cluster() as cluster:
            yield [node.url for node in cluster.nodes]
    else:
        with getattr(databases, engine)() as node:
            yield [node.url]


def main() -> None:
    parser = argparse.ArgumentParser(description="Each payment is made once, in any storm.")
    parser.add_argument("engines", nargs="*", metavar="engine")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--keys", type=int, default=10, help="of each client")
    options = parser.parse_args()
    size = {"seed": options.seed, "clients": options.clients, "keys": options.keys}
    for engine in options.engines or ["sqlite", "postgresql", "mariadb", "galera"]:
        with servers(engine) as urls:
            for keyed in (False, True):
                toll = storm(urls, **size, keyed=keyed)
                print(f"{engine}, {'with' if keyed else 'without'} keys: {toll}", flush=True)
                if toll.once != keyed:
                    sys.exit("with keys, and only with them, each payment is made once")


if __name__ == "__main__":
    main()
