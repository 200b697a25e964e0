"""waitress as the service runs it: refusals that arrive, and connections that are kept."""

from __future__ import annotations

import http.client
import inspect
import json
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import waitress
from attack import Connection, request
from databases import until
from processes import Process, serve
from sessionscope.engines import make_engine
from sqlalchemy import insert
from support import PATIENCE, fetch
from waitress import channel, parser, server, task

from models import Item
from web.database import create_tables
from web.waitress_server import DISCARDED

LONG = 4 * 2**20
"""Bytes of a body that waitress itself refuses, and more than sockets hold."""


@pytest.fixture(scope="module")
def running() -> Iterator[Process]:
    with serve("--database-url", "sqlite://") as process:
        yield process


@pytest.fixture
def client(running: Process) -> Iterator[Connection]:
    with Connection(running.port) as connection:
        yield connection


@pytest.mark.parametrize("how", ["sized", "chunked"])
def test_a_client_that_sends_all_before_it_reads_is_told(how: str, running: Process) -> None:
    """A body that is far too long is a 413 also for Python's own client, and no reset."""
    body = b"x" * LONG
    with closing(http.client.HTTPConnection("127.0.0.1", running.port, PATIENCE)) as connection:
        connection.request("POST", "/", body if how == "sized" else iter([body]))
        response = connection.getresponse()
        assert response.status == 413
        assert json.load(response) == {"error": "the body is too long"}


def test_a_client_that_reads_at_once_need_not_send_all(client: Connection) -> None:
    """The 413 is there before the body is."""
    client.send(request("POST", "/", f"Content-Length: {LONG}", body=b""))
    assert client.read().status == 413


def test_what_is_thrown_away_is_bounded(client: Connection) -> None:
    """Who sends without an end is cut off."""
    client.send(request("POST", "/", f"Content-Length: {10 * DISCARDED}", body=b""))
    with pytest.raises(ConnectionError):
        for _ in range(2 * DISCARDED // LONG):
            client.socket.sendall(b"x" * LONG)


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"G\x00T / HTTP/1.1\r\n\r\n", 400, "Start line is invalid"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, "Invalid header"),
        (b"GET http://[ HTTP/1.1\r\n\r\n", 400, "The head cannot be read"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 300_000, 431, "the head of the request is too long"),
        (
            b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
            501,
            "this transfer coding is not known",
        ),
    ],
)
def test_what_the_server_refuses_is_as_any_other_error(
    data: bytes, status: int, words: str, client: Connection, running: Process
) -> None:
    """What is no request is refused in JSON, with an id that the log has, and the end."""
    client.send(data)
    reply = client.read()
    assert reply.status == status
    assert json.loads(reply.content) == {"error": words}
    assert reply.headers["connection"] == "close"
    assert client.file.read() == b""
    line = f"id={reply.headers['x-request-id']}"
    until(lambda: line in running.log, "its line in the log")


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("OPTIONS", "/", [], 204),
        ("GET", "/openapi.json", ["If-None-Match: *"], 304),
        ("HEAD", "/openapi.json", ["If-None-Match: *"], 304),
    ],
)
def test_a_connection_is_kept_after_a_response_without_a_body(
    method: str, path: str, fields: list[str], status: int, client: Connection
) -> None:
    """After a 204 and a 304 the next request is answered on the same connection."""
    for _ in range(2):
        client.send(request(method, path, *fields))
        reply = client.read()
        assert reply.status == status
        assert "connection" not in reply.headers
        assert "content-length" not in reply.headers
    client.send(request("GET", "/livez"))
    assert client.read().status == 200


def test_a_client_may_close_after_a_response_without_a_body(client: Connection) -> None:
    """Who says so, or speaks HTTP/1.0, gets the end of the connection."""
    client.send(request("OPTIONS", "/", "Connection: close"))
    assert client.read().status == 204
    assert client.file.read() == b""


def test_a_trusted_proxy_is_believed() -> None:
    """With --trusted-proxy the log names the client of the proxy; without it nobody else."""
    for options, client in [(("--trusted-proxy", "127.0.0.1"), "203.0.113.7"), ((), "127.0.0.1")]:
        with serve("--database-url", "sqlite://", *options) as process:
            with Connection(process.port) as connection:
                connection.send(request("GET", "/livez", "X-Forwarded-For: 203.0.113.7"))
                assert connection.read().status == 200
            line = f'{client} "GET /livez HTTP/1.1" 200'
            until(lambda: line in process.log, "the line")  # noqa: B023  (it is called at once)


@contextmanager
def stalled(port: int) -> Iterator[socket.socket]:
    """A client that reads the head of a long list, and nothing else."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(request("GET", "/"))
        assert client.recv(12) == b"HTTP/1.1 200"
        yield client


@pytest.fixture
def long_list(tmp_path: Path) -> str:
    """The URL of a database whose list is longer than all buffers on the way to a client."""
    url = f"sqlite:///{tmp_path}/items.db"
    engine = make_engine(url)
    create_tables(engine)
    with engine.begin() as connection:
        rows = ({"name": f"name number {number}"} for number in range(300_000))
        connection.execute(insert(Item), [*rows])
    engine.dispose()
    return url


def test_a_client_that_reads_nothing_is_disconnected(long_list: str) -> None:
    """After --idle-timeout its request is over, and its thread serves others."""
    options = ("--threads", "1", "--idle-timeout", "1")
    with serve("--database-url", long_list, *options) as process, stalled(process.port):
        assert fetch(process.port, path="/livez").status == 200
        until(lambda: '"GET / HTTP/1.1" 200' in process.log, "its line in the log")


def test_a_client_waits_while_there_are_enough_others() -> None:
    """With --connections 1 one client is served, and the next is when that one has left."""
    with serve("--database-url", "sqlite://", "--connections", "1") as process:
        with Connection(process.port) as first:
            first.send(request("GET", "/livez"))
            assert first.read().status == 200
            until(lambda: "reached the connection limit" in process.log, "the limit")
            second = Connection(process.port)
        with second:
            second.send(request("GET", "/livez"))
            assert second.read().status == 200


def test_waitress_is_what_it_was() -> None:
    """The private parts that web/waitress_server.py relies on are those of waitress 3."""
    assert hasattr(waitress, "create_server")
    private = {
        channel.HTTPChannel: {
            *("handle_close", "received", "requests", "request", "will_close"),
            *("total_outbufs_len", "last_activity = time.time()"),
        },
        parser.HTTPRequestParser: {"received", "expect_continue", "completed", "error", "headers"},
        task.Task: {"set_close_on_finish", "has_body", "version"},
        task.WSGITask: {"get_environment", "execute"},
        server.BaseWSGIServer: {"pull_trigger", "print_listen", "channel_class", "adj"},
    }
    for owner, names in private.items():
        source = inspect.getsource(owner)
        assert {name for name in names if name not in source} == set(), owner
    service = inspect.getsource(channel.HTTPChannel.service)
    assert "error_task_class(self, request)" in service
    assert "close_when_flushed = True" in service
    head = inspect.getsource(task.Task.build_response_header)
    assert "if not self.close_on_finish:\n                    self.set_close_on_finish()" in head
    write = inspect.getsource(channel.HTTPChannel.handle_write)
    assert write.rstrip().endswith("if self.will_close:\n            self.handle_close()")
