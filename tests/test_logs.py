"""The id of a request, and what the log says of it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextvars import Context
from typing import TYPE_CHECKING, Any

import item_service
import pytest
from item_service import Service
from processes import run_python
from sessionscope import SessionMiddleware
from sqlalchemy.orm import scoped_session, sessionmaker
from support import Server, environ, serve_once, text

from web.logs import AccessLog, Exchange, JSONFormatter, log_exchange, observe

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

service = item_service.service


@pytest.mark.parametrize("given", ["0b3f-4a.5:x/y+z=_", "x" * 64])
def test_a_client_may_name_its_request(
    given: str, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """The client's id comes back in the response, and is in the log."""
    caplog.set_level(logging.INFO, "items.access")
    reply = service.send("GET", "/1", HTTP_X_REQUEST_ID=given)
    assert dict(reply.headers)["X-Request-Id"] == given
    assert caplog.messages[-1].endswith(f" id={given}")


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", 'a"b', "\xe9", "a,b"])
def test_a_name_that_would_spoil_the_log_is_replaced(given: str, service: Service) -> None:
    """Who gives none, or one that a line cannot have, gets one that is made up for each request."""
    ids = {
        dict(service.send("GET", "/1", HTTP_X_REQUEST_ID=given).headers)["X-Request-Id"]
        for _ in range(2)
    }
    assert len(ids) == 2
    assert given not in ids


def test_the_lines_can_be_turned_off(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Above INFO the log has no line for a request that went well."""
    caplog.set_level(logging.WARNING, "items.access")
    service.send("GET", "/")
    assert caplog.messages == []


def test_a_session_without_an_exchange_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    """The observer may be used where the access log is not."""
    registry = scoped_session(sessionmaker())
    app = SessionMiddleware(text(b"fine"), registry, observer=observe)
    assert Context().run(serve_once, app).content == b"fine"
    assert caplog.messages == []


def exchange(**more: Any) -> Exchange:
    return Exchange(environ(**more))


@pytest.mark.parametrize(
    ("path", "query", "request_line"),
    [
        ("/\nINFO forged", "", "GET /%0AINFO%20forged HTTP/1.0"),
        ('/"', "x=\x1b[2J", "GET /%22?x=%1B%5B2J HTTP/1.0"),
        ("/\xc3\xa9", "a=%C3", "GET /%C3%A9?a=%C3 HTTP/1.0"),
        ("", "", "GET / HTTP/1.0"),
    ],
)
def test_a_line_cannot_be_forged(path: str, query: str, request_line: str) -> None:
    """What could end or hide a line is percent-encoded in the log."""
    found = exchange(path=path, QUERY_STRING=query).fields()["request"]
    assert found == request_line


def test_a_line_cannot_be_filled() -> None:
    """A path of any length takes a thousand characters at most."""
    assert len(str(exchange(path="/" + "x" * 100_000).fields()["request"])) < 1100


@pytest.fixture
def reported() -> list[Exchange]:
    return []


def test_a_stream_is_reported_when_it_is_closed(reported: list[Exchange]) -> None:
    """What was sent until then is counted, and the body is closed once."""
    closed = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            yield from (b"one", b"two", b"three")

        def close(self) -> None:
            closed.append(True)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Body:
        start_response("200 OK", [])
        return Body()

    server = Server(AccessLog(app, reported.append))
    chunks = server.begin(environ())
    next(chunks), next(chunks)
    assert reported == []
    server.finish()
    assert [(each.status, each.bytes) for each in reported] == [("200 OK", 6)]
    assert closed == [True]


def test_a_stream_that_fails_is_reported(service: Service) -> None:
    """A body whose close raises is reported all the same."""
    found: list[Exchange] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"one"])

        def close(self) -> None:
            raise RuntimeError("unexpected")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Body:
        start_response("200 OK", [])
        return Body()

    with pytest.raises(RuntimeError, match="unexpected"):
        serve_once(AccessLog(app, found.append))
    assert [each.bytes for each in found] == [3]


def test_nothing_is_written_for_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Where INFO is not logged no line is made."""
    caplog.set_level(logging.WARNING, "items.access")
    log_exchange(exchange())
    assert caplog.messages == []


def test_a_traceback_is_a_member() -> None:
    """In JSON a record with an exception has its traceback, and is one line all the same."""
    try:
        raise RuntimeError("unexpected")
    except RuntimeError:
        record = logging.LogRecord("items", 40, "", 1, "a %s", ("b",), sys.exc_info())
    line = JSONFormatter().format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["level"], fields["logger"], fields["message"]) == ("ERROR", "items", "a b")
    assert fields["traceback"].endswith("RuntimeError: unexpected")


CONFIGURED = """
import logging, sys
logging.basicConfig(format="%(message)s", level="WARNING")
import serve
from wsgiref.util import setup_testing_defaults
environ = {}
setup_testing_defaults(environ)
serve.create_app("sqlite://")(environ, lambda *head: None)
"""


def test_a_log_that_is_configured_is_left_alone() -> None:
    """What a program has set up before it makes the service stays as it is."""
    done = run_python("-W", "ignore", "-c", CONFIGURED)
    assert (done.returncode, done.stderr) == (0, "")
