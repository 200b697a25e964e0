"""The service as it is run: a process of its own, its log, and clients with real sockets."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from support import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
SERVE = [sys.executable, str(ROOT / "serve.py")]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python of its own to its end, in the root of the repository."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


class Process:
    """A server in a process of its own, and what it logs."""

    def __init__(self, command: list[str], cwd: Path, environ: dict[str, str]) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=inherited | {"PYTHONPATH": str(ROOT)} | environ,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        assert self.process.stderr is not None
        self.stderr = self.process.stderr
        self.lines: deque[str] = deque()
        self.port = 0

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read the log up to the line in which *pattern* is found."""
        for line in self.stderr:
            self.lines.append(line)
            found = re.search(pattern, line)
            if found is not None:
                return found
        raise AssertionError(f"{pattern} was not logged:\n{self.log}")

    @property
    def log(self) -> str:
        """All that was logged; complete when the process has ended."""
        return "".join(self.lines)


@contextmanager
def running(
    *command: str,
    port_in: str,
    ready: int = 0,
    cwd: Path = ROOT,
    environ: dict[str, str] | None = None,
) -> Iterator[Process]:
    """Run a server until the block ends; it must say its port, and be *ready* so many times."""
    server = Process([*command], cwd, environ or {})
    try:
        server.port = int(server.read_until(port_in)[1])
        for _ in range(ready):
            server.read_until("worker is ready")
        drain = threading.Thread(target=lambda: server.lines.extend(server.stderr), daemon=True)
        drain.start()
        try:
            yield server
        finally:
            server.process.terminate()
            drain.join(PATIENCE)
    finally:
        server.process.terminate()
        server.process.wait(PATIENCE)
        server.stderr.close()


def serve(*arguments: str, cwd: Path = ROOT, **environ: str) -> AbstractContextManager[Process]:
    """Run ``python serve.py`` on a free port."""
    listening = r"serving on http://127\.0\.0\.1:(\d+)"
    command = [*SERVE, "--listen", "127.0.0.1:0", *arguments]
    return running(*command, port_in=listening, cwd=cwd, environ=environ)


class Client:
    """A client that keeps its connection, and fails where it is closed."""

    def __init__(self, server: Process) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        self.connection.connect()
        self.connection.auto_open = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.connection.close()

    def send(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None = None
    ) -> tuple[int, bytes]:
        headers = {} if body is None else {"Content-Type": "application/json"}
        self.connection.request(method, path, body, headers)
        response = self.connection.getresponse()
        content = response.read()
        if content:
            assert response.headers["Content-Type"] == "application/json"
        return response.status, content


def send(
    server: Process, method: str, path: str, body: bytes | Iterable[bytes] | None = None
) -> tuple[int, bytes]:
    """Make one request on a connection of its own."""
    with Client(server) as client:
        return client.send(method, path, body)


def create_many(server: Process, clients: int, each: int) -> list[int]:
    """Create items from many clients at once; their ids."""
    together = threading.Barrier(clients)

    def create(_: int) -> list[int]:
        with Client(server) as client:
            together.wait(PATIENCE)
            answers = [client.send("POST", "/") for _ in range(each)]
        assert {status for status, _ in answers} == {200}
        return [json.loads(content)["id"] for _, content in answers]

    with ThreadPoolExecutor(clients) as threads:
        return [id for ids in threads.map(create, range(clients)) for id in ids]


def listed(server: Process) -> list[int]:
    return [item["id"] for item in json.loads(send(server, "GET", "/")[1])["items"]]
