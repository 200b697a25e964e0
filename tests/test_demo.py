"""``--demo``: the outcomes that the page's panel shows, and three requests that fail."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from http.client import HTTPResponse
from typing import Any

import item_service
import pytest
from item_service import Service, service_at
from support import PATIENCE, serving

from resources import WEB
from web import demo

Ask = Callable[[str, str], HTTPResponse]

FAILURES = {"conflict": 409, "error": 500, "commit": 500}


@pytest.fixture
def service(sqlite_url: str) -> Iterator[Service]:
    """The service with its demonstration, of which one stream may wait at a time."""
    with service_at(sqlite_url, demo=True, threads=4) as made:
        yield made


@pytest.fixture
def ask(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Make requests to a server of it, each on a connection of its own that stays open."""
    with serving(service.app) as port:

        def request(connections: ExitStack, method: str, path: str) -> HTTPResponse:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connections.enter_context(closing(client))
            client.request(method, path)
            return connections.enter_context(client.getresponse())

        monkeypatch.setattr(demo, "DURATION", PATIENCE)
        with ExitStack() as connections:
            yield partial(request, connections)
        monkeypatch.setattr(demo, "DURATION", 0)
        with ExitStack() as connections:  # wakes the streams, whose time is over
            request(connections, "POST", "/").read()


def events(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith(b"data: ")]


def next_event(stream: HTTPResponse) -> dict[str, Any]:
    """The next outcome that a stream has; it must not end before."""
    for line in iter(stream.readline, b""):
        for event in events(line):
            return event
    raise AssertionError("the stream has ended")


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("engine", ["sqlite", "postgresql", "mariadb"])
def test_a_failure_leaves_nothing_behind(
    name: str, engine: str, request: pytest.FixtureRequest
) -> None:
    """Each of the three fails on every engine, is rolled back, and the next request is fine."""
    with service_at(request.getfixturevalue(f"{engine}_url"), demo=True) as service:
        service.client.post(f"/demo/{name}", status=FAILURES[name])
        assert service.rows() == []
        service.client.post("/", status=200)
        assert len(service.rows()) == 1
        options: dict[str, Any] = {"wsgi.multithread": False}
        stream = service.send("GET", "/demo/outcomes", **options)
        told = [(event["path"], event["action"]) for event in events(stream.content)]
        assert told == [(f"/demo/{name}", "rollback"), ("/", "commit")]


def test_outcomes_are_sent_as_they_happen(ask: Ask) -> None:
    """A stream that is open gets each outcome, and those that there were before."""
    ask("POST", "/").read()
    stream = ask("GET", "/demo/outcomes")
    assert stream.headers["Content-Type"] == "text/event-stream"
    assert next_event(stream)["path"] == "/"
    ask("POST", "/demo/conflict").read()
    told = next_event(stream)
    assert told.pop("ms") >= 0
    assert told == {
        "method": "POST",
        "path": "/demo/conflict",
        "status": "409 Conflict",
        "action": "rollback",
        "attempts": 1,
    }


def test_a_stream_uses_no_connection(ask: Ask, service: Service) -> None:
    """While a stream waits no connection of the pool is in use, and it is not told of itself."""
    stream = ask("GET", "/demo/outcomes")
    stream.readline()
    engines = service.app.engines.values()  # type: ignore[attr-defined]
    assert not any(engine.pool.checkedout() for engine in engines)
    ask("GET", "/page.css").read()
    ask("POST", "/").read()
    assert next_event(stream)["path"] == "/"


def test_streams_leave_threads_to_others(ask: Ask) -> None:
    """One more than may wait ends at once, with what there is."""
    ask("POST", "/").read()
    waiting = ask("GET", "/demo/outcomes")
    assert next_event(waiting)["path"] == "/"
    assert len(events(ask("GET", "/demo/outcomes").read())) == 1
    ask("POST", "/demo/error").read()
    assert next_event(waiting)["path"] == "/demo/error"


def test_a_stream_ends(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream ends by itself, after which another may wait."""
    monkeypatch.setattr(demo, "DURATION", 0.01)
    for _ in range(2):
        assert ask("GET", "/demo/outcomes").read() == b"retry: 1000\n\n"


@pytest.mark.parametrize(("last", "count"), [("", 2), ("first", 1), ("last", 0), ("x", 2)])
def test_a_browser_gets_what_it_has_not(service: Service, last: str, count: int) -> None:
    """A browser that comes back says what it had, and gets only the rest."""

    def ask(id: str) -> bytes:
        options: dict[str, Any] = {"HTTP_LAST_EVENT_ID": id, "wsgi.multithread": False}
        return service.send("GET", "/demo/outcomes", **options).content

    service.client.post("/")
    service.client.post("/")
    ids = [line[4:].decode() for line in ask("").splitlines() if line.startswith(b"id: ")]
    known = {"first": ids[0], "last": ids[1]}
    assert len(events(ask(known.get(last, last)))) == count


@pytest.mark.parametrize("name", ["demo.js", "demo.css"])
def test_its_files_are_served(name: str, service: Service) -> None:
    """The panel's files are there, and the page asks for them."""
    assert service.client.get(f"/{name}").body == (WEB / "page" / name).read_bytes()
    assert name in service.client.get("/", headers={"Accept": "text/html"})


def test_without_it_there_is_nothing(memory_url: str) -> None:
    """A service without the option has neither the panel, nor its stream, nor the failures."""
    with service_at(memory_url) as service:
        assert "demo" not in service.client.get("/", headers={"Accept": "text/html"})
        for path in ("/demo/outcomes", "/demo/commit", "/demo.js"):
            service.client.get(path, status=404)


memory_url = item_service.memory_url
