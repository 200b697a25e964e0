"""``/livez`` and ``/readyz``: whether the process and its database serve, told at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.orm import scoped_session, sessionmaker
from support import PATIENCE, Reply, environ, serve_once

from resources import make_app
from web.health import Health
from web.router import Router


def application(probe: Callable[[], object], patience: float = PATIENCE) -> Router:
    return application_of(Health(probe, patience))


def application_of(health: Health) -> Router:
    router = Router()
    router.add("GET", "/livez", health.live)
    router.add("GET", "/readyz", health.ready)
    return router


def ask(app: Router, method: str = "GET", path: str = "/readyz") -> Reply:
    return serve_once(app, environ(method, path))


class Probe:
    """A probe that hangs until it is let go."""

    def __init__(self) -> None:
        self.began = threading.Semaphore(0)
        self.released = threading.Event()
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        self.began.release()
        assert self.released.wait(PATIENCE)


@pytest.fixture
def probe() -> Iterator[Probe]:
    made = Probe()
    yield made
    made.released.set()
    for thread in threading.enumerate():
        if thread.name == "health":
            thread.join(PATIENCE)


def test_a_database_that_serves_is_well() -> None:
    """While the probe returns the answer is 200."""
    reply = ask(application(lambda: None))
    assert (reply.status, reply.content) == ("200 OK", b'{"status": "ok"}\n')


@pytest.mark.parametrize("path", ["/readyz", "/healthz"])
def test_the_service_has_it(path: str) -> None:
    """The service answers /readyz, and /healthz as before, by the probe that it is given."""

    def fail() -> None:
        raise ConnectionError

    session = scoped_session(sessionmaker())
    assert ask(make_app(session, probe=lambda: None), path=path).status == "200 OK"
    assert ask(make_app(session, probe=fail), path=path).status == "503 Service Unavailable"


def test_the_process_lives_without_its_database() -> None:
    """/livez is a 200 whatever the probe says, and does not run it."""

    def fail() -> None:
        raise AssertionError("the probe was run")

    reply = ask(application(fail), path="/livez")
    assert (reply.status, reply.content) == ("200 OK", b'{"status": "ok"}\n')


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_database_that_fails_is_told(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where the probe raises it is a 503 with the kind of the error; the log has its message."""

    def fail() -> None:
        raise ConnectionError("no such host: secret")

    reply = ask(application(fail), method)
    assert reply.status == "503 Service Unavailable"
    assert dict(reply.headers)["Retry-After"] == "1"
    content = b'{"error": "the database is not available: ConnectionError"}\n'
    assert reply.content == (content if method == "GET" else b"")
    assert "no such host: secret" in caplog.text


def test_a_database_that_hangs_keeps_nobody_waiting(probe: Probe) -> None:
    """A probe that does not return in time is a 503 that says how long it had."""
    reply = ask(application(probe, patience=0.05))
    assert reply.status == "503 Service Unavailable"
    assert reply.content == b'{"error": "the database did not respond within 0.05 s"}\n'
    assert not probe.released.is_set()


def test_a_database_that_hangs_is_asked_once(probe: Probe) -> None:
    """While a probe hangs no other begins, however many ask."""
    app = application(probe, patience=0.01)
    for _ in range(5):
        assert ask(app).status == "503 Service Unavailable"
    assert probe.began.acquire(timeout=PATIENCE)
    assert probe.calls == 1


def test_who_asks_meanwhile_is_answered(probe: Probe) -> None:
    """All who ask while a probe runs are answered when it returns."""
    app = application(probe)
    with ThreadPoolExecutor(5) as threads:
        replies = [threads.submit(ask, app) for _ in range(5)]
        assert probe.began.acquire(timeout=PATIENCE)
        probe.released.set()
        assert {reply.result(PATIENCE).status for reply in replies} == {"200 OK"}


def test_a_database_that_comes_back_is_well(probe: Probe) -> None:
    """When a probe that hung has returned, the next who asks begins a new one."""
    health = Health(probe, patience=0.05)
    app = application_of(health)
    assert ask(app).status == "503 Service Unavailable"
    (thread,) = (each for each in threading.enumerate() if each.name == "health")
    probe.released.set()
    thread.join(PATIENCE)
    calls, health.patience = probe.calls, PATIENCE
    assert ask(app).content == b'{"status": "ok"}\n'
    assert probe.calls == calls + 1
