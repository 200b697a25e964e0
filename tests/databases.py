"""Private database servers for the tests: on a socket or loopback, in their own folder.

Nothing of the machine's own servers is used or touched.  Each server is a child of the
test run, on a port that was free, and is stopped by its own process.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 120.0
"""Seconds to wait for a server to answer; far more than any machine needs."""


class Missing(Exception):
    """A program is not on this machine; the message says what was left out for it."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def find(program: str, *, where: str = "") -> str:
    """Path of *program*, searched in PATH, in sbin and in the folders matching *where*."""
    folders = [*map(str, sorted(Path("/").glob(where), reverse=True))] if where else []
    path = os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    found = shutil.which(program, path=path)
    if found is None:
        raise Missing(f"{program} is not installed")
    return os.path.realpath(found)


@contextmanager
def folder_of(user: str) -> Iterator[tuple[Path, str | None]]:
    """A folder that the server may write, and the user to run it as: root must not."""
    folder = Path(tempfile.mkdtemp(prefix="sessionscope-"))
    account = None
    if os.getuid() == 0:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise Missing(f"run by root, and there is no user {user}") from None
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        account = user
    try:
        yield folder, account
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def prepare(command: list[str], user: str | None, folder: Path) -> None:
    done = subprocess.run(command, user=user, cwd=folder, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout!r} {done.stderr!r}")


@contextmanager
def running(command: list[str], *, user: str | None, folder: Path, port: int) -> Iterator[None]:
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, user=user, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_for_port(process, port, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def postgresql() -> Iterator[str]:
    """Run a PostgreSQL server; the URL of an empty database on it."""
    programs = "usr/lib/postgresql/*/bin"
    initdb, postgres = find("initdb", where=programs), find("postgres", where=programs)
    port = free_port()
    with folder_of("postgres") as (folder, user):
        data = folder / "data"
        prepare(
            [initdb, "-D", str(data), "-A", "trust", "-U", "tests", "-E", "UTF8", "--no-sync"],
            user,
            folder,
        )
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": "200",
            "max_prepared_transactions": "10",
        }
        command = [postgres, "-D", str(data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with running(command, user=user, folder=folder, port=port):
            url = f"postgresql+psycopg://tests@127.0.0.1:{port}/postgres"
            wait_for_answer(url)
            yield url


@contextmanager
def mariadb() -> Iterator[str]:
    """Run a MariaDB server; the URL of an empty database on it."""
    install, mariadbd = find("mariadb-install-db"), find("mariadbd")
    port = free_port()
    with folder_of("mysql") as (folder, user):
        data = folder / "data"
        normal = "--auth-root-authentication-method=normal"
        command = [install, "--no-defaults", f"--datadir={data}", normal, "--skip-test-db"]
        prepare(command, user, folder)
        command = [
            mariadbd,
            "--no-defaults",
            f"--datadir={data}",
            f"--port={port}",
            "--bind-address=127.0.0.1",
            f"--socket={folder}/socket",
            f"--pid-file={folder}/pid",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-buffer-pool-size=32M",
            "--character-set-server=utf8mb4",
        ]
        with running(command, user=user, folder=folder, port=port):
            wait_for_answer(f"mysql+pymysql://root@127.0.0.1:{port}/mysql")
            url = f"mariadb+pymysql://root@127.0.0.1:{port}"
            execute(f"{url}/mysql", "CREATE DATABASE tests")
            yield f"{url}/tests"


def wait_for_answer(url: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            execute(url, "SELECT 1")
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def execute(url: str, statement: str) -> None:
    """Run one statement outside any transaction."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
