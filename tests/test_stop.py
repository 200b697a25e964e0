"""An orderly stop: what was begun is finished, nothing new is, and the end is clean."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from databases import until, until_one_waits
from processes import Client, Process, create_many, send, serve
from sessionscope.engines import make_engine
from sqlalchemy import Connection, Engine, text
from support import PATIENCE, names

each_signal = pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])


@pytest.fixture
def rival(postgresql: Engine) -> Iterator[Connection]:
    """A connection that keeps others from writing items, until it rolls back."""
    with postgresql.connect() as connection:
        connection.execute(text("LOCK TABLE items IN SHARE MODE"))
        yield connection


def refuses(server: Process) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port)).close()
    except ConnectionRefusedError:
        return True
    return False


def wait_until_refused(server: Process) -> None:
    until(lambda: refuses(server), "the server to stop listening")


@each_signal
def test_what_runs_is_finished(how: signal.Signals, postgresql_url: str, rival: Connection) -> None:
    """Told to stop, the server accepts nobody, answers the request that runs, and exits with 0."""
    with serve("--database-url", postgresql_url) as server, ThreadPoolExecutor() as threads:
        answer = threads.submit(send, server, "POST", "/")
        until_one_waits(rival.engine.url)
        server.process.send_signal(how)
        wait_until_refused(server)
        assert not answer.done()
        rival.rollback()
        assert answer.result(PATIENCE) == (200, b'{"id": 1, "name": "Item #1"}\n')
        assert server.process.wait(PATIENCE) == 0
    assert names(rival.engine) == ["Item #1"]


def test_what_is_half_received_is_finished(sqlite_url: str) -> None:
    """A request whose head has arrived is waited for, and answered."""
    with serve("--database-url", sqlite_url) as server:
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client:
            client.sendall(
                b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 16\r\nExpect: 100-continue\r\n\r\n"
            )
            assert b"100 Continue" in client.recv(100)
            server.process.terminate()
            wait_until_refused(server)
            client.sendall(b'{"name": "lamp"}')
            assert b'{"id": 1, "name": "lamp"}' in client.makefile("rb").read()
        assert server.process.wait(PATIENCE) == 0


def test_clients_that_wait_do_not_hold_it_up(sqlite_url: str) -> None:
    """A connection that is only kept alive is closed at once."""
    command = ("--database-url", sqlite_url, "--stop-timeout", "3600")
    with serve(*command) as server, Client(server) as client:
        client.send("GET", "/")
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0
        assert client.connection.sock.recv(1) == b""


def test_the_wait_is_bounded(postgresql_url: str, rival: Connection) -> None:
    """After --stop-timeout the rest is left: no answer, no row, and still exit status 0."""
    command = ("--database-url", postgresql_url, "--stop-timeout", "1")
    with serve(*command) as server, Client(server) as client:
        client.connection.request("POST", "/")
        until_one_waits(rival.engine.url)
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0
        assert client.connection.sock.recv(1) == b""
    rival.rollback()
    assert names(rival.engine) == []


def test_the_second_signal_is_final(postgresql_url: str, rival: Connection) -> None:
    """A second signal ends the service at once, although a request still runs."""
    command = ("--database-url", postgresql_url, "--stop-timeout", "3600")
    with serve(*command) as server, Client(server) as client:
        client.connection.request("POST", "/")
        until_one_waits(rival.engine.url)
        server.process.send_signal(signal.SIGINT)
        wait_until_refused(server)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == -signal.SIGINT


def test_under_load_nothing_is_dropped(sqlite_url: str) -> None:
    """Of many clients that keep creating while the server stops, none has a cut answer."""
    outcomes: list[str] = []

    def create_until_refused(server: Process) -> None:
        while True:
            try:
                with Client(server) as client:
                    client.connection.request("POST", "/")
                    response = client.connection.getresponse()
                    response.read()
                    outcomes.append(str(response.status))
            except ConnectionRefusedError:
                return
            except ConnectionError:
                outcomes.append("never begun")

    with ThreadPoolExecutor(8) as threads, serve("--database-url", sqlite_url) as server:
        create_many(server, 2, 2)
        for _ in range(8):
            threads.submit(create_until_refused, server)
        until(lambda: len(outcomes) >= 40, "40 answers", pause=0.01)
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0
    engine = make_engine(sqlite_url)
    assert len(names(engine)) == 4 + outcomes.count("200")
    engine.dispose()
    assert set(outcomes) <= {"200", "never begun"}
