"""``/metrics`` for Prometheus: requests, outcomes, attempts, seconds, and the pools' use."""

from __future__ import annotations

from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import Engine

from web.logs import Exchange
from web.requests import JSONRequest
from web.responses import Response

TEXT = "text/plain; version=0.0.4; charset=utf-8"

METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


class Metrics:
    """The numbers of this process.

    :param engines: those whose pools are shown, by name.
    """

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.registry = CollectorRegistry()
        self.requests = self.make(Counter, "items_requests", "Requests.", "method", "status")
        self.sessions = self.make(Counter, "items_sessions", "Ends of sessions.", "action")
        self.repeated = self.make(Counter, "items_repeated_attempts", "Attempts after the first.")
        self.seconds = self.make(Histogram, "items_request_seconds", "Seconds of a request.")
        used = self.make(Gauge, "items_pool_connections", "Connections in use.", "engine")
        size = self.make(Gauge, "items_pool_size", "Connections at most.", "engine")
        for name, engine in engines.items():
            used.labels(name).set_function(partial(pool_number, engine, "checkedout"))
            size.labels(name).set_function(partial(pool_number, engine, "size"))

    def make(self, kind: Any, name: str, text: str, *labels: str) -> Any:
        return kind(name, text, labels, registry=self.registry)

    def count(self, exchange: Exchange) -> None:
        """Take an exchange into account when it is over."""
        method = exchange.method if exchange.method in METHODS else "other"
        self.requests.labels(method, exchange.status[:3]).inc()
        self.sessions.labels(exchange.action).inc()
        self.repeated.inc(max(0, exchange.attempts - 1))
        self.seconds.observe(exchange.seconds)

    def show(self, request: JSONRequest) -> Response:
        body = generate_latest(self.registry)
        headers = {"Content-Type": TEXT, "Content-Length": str(len(body))}
        return Response(200, {**headers, "Cache-Control": "no-cache"}, [body])


def pool_number(engine: Engine, name: str) -> int:
    """Return a number of the pool that *engine* has now; a fork gives it a new one."""
    return int(getattr(engine.pool, name)())
