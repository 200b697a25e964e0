"""``/metrics`` for Prometheus: requests, session outcomes, retries, seconds, and pools."""

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

    :param engines: the engines whose pools are shown, by name.
    """

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.registry = CollectorRegistry()
        self.requests = self.make(Counter, "items_requests", "Requests.", "method", "status")
        self.sessions = self.make(Counter, "items_sessions", "Outcomes of sessions.", "action")
        self.retries = self.make(Counter, "items_repeated_attempts", "Attempts after the first.")
        self.seconds = self.make(Histogram, "items_request_seconds", "Seconds per request.")
        used = self.make(Gauge, "items_pool_connections", "Connections in use.", "engine")
        size = self.make(Gauge, "items_pool_size", "Maximum number of connections.", "engine")
        for name, engine in engines.items():
            used.labels(name).set_function(partial(pool_number, engine, "checkedout"))
            size.labels(name).set_function(partial(pool_number, engine, "size"))

    def make(self, kind: Any, name: str, text: str, *labels: str) -> Any:
        return kind(name, text, labels, registry=self.registry)

    def count(self, exchange: Exchange) -> None:
        method = exchange.method if exchange.method in METHODS else "other"
        self.requests.labels(method, exchange.status[:3]).inc()
        self.sessions.labels(exchange.action).inc()
        self.retries.inc(max(0, exchange.attempts - 1))
        self.seconds.observe(exchange.seconds)

    def show(self, request: JSONRequest) -> Response:
        headers = {"Content-Type": TEXT, "Cache-Control": "no-cache"}
        return Response(200, headers, [generate_latest(self.registry)])


def pool_number(engine: Engine, name: str) -> int:
    """Return a number of the current pool of *engine*; a fork replaces the pool."""
    return int(getattr(engine.pool, name)())
