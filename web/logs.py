"""The log: one line per request, with the outcome of its session; as text or as JSON."""

import json
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from time import perf_counter
from typing import Any
from urllib.parse import quote
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from sessionscope import Outcome

log = logging.getLogger("items.access")

LINE = (
    '%(client)s "%(request)s" %(status)s %(bytes)d %(ms)s ms '
    "%(session)s attempts=%(attempts)d id=%(id)s"
)

_ID = re.compile(r"[\w.:/+=-]{1,64}", re.ASCII)
_ID_KEY = "items.request_id"


def request_id(environ: WSGIEnvironment) -> str:
    """Return the id of a request: its ``X-Request-Id``, or a new one."""
    if _ID_KEY not in environ:
        given = environ.get("HTTP_X_REQUEST_ID", "")
        environ[_ID_KEY] = given if _ID.fullmatch(given) else secrets.token_hex(4)
    return str(environ[_ID_KEY])


class Exchange:
    """A request and its response, as the log and the metrics see them."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        self.began = perf_counter()
        self.seconds = 0.0
        self.client = environ.get("REMOTE_ADDR") or "-"
        self.method: str = environ["REQUEST_METHOD"]
        self.path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        self.query = environ.get("QUERY_STRING", "")
        self.protocol = environ.get("SERVER_PROTOCOL", "")
        self.id = request_id(environ)
        self.status = "-"
        self.bytes = 0
        self.action = "none"  # until the session has an outcome
        self.attempts = 0

    def fields(self) -> dict[str, object]:
        """Return the fields of the log line; no client can break or overfill it."""
        target = quote(self.path or "/", "/!$&'()*+,;=:@~", "latin-1", "replace")
        if self.query:
            target += "?" + quote(self.query, "/!$&'()*+,;=:@~?%", "latin-1", "replace")
        return {
            "client": self.client,
            "request": f"{self.method[:99]} {target[:999]} {self.protocol}",
            "status": self.status[:3],
            "bytes": self.bytes,
            "ms": round(self.seconds * 1000, 1),
            "session": self.action,
            "attempts": self.attempts,
            "id": self.id,
        }


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def observe(outcome: Outcome) -> None:
    """Note the outcome of a session; the *observer* of the session middleware."""
    exchange = _current.get()
    if exchange is not None:
        exchange.action, exchange.attempts = outcome.action, outcome.attempts


def log_exchange(exchange: Exchange) -> None:
    if log.isEnabledFor(logging.INFO):
        log.info(LINE, exchange.fields())


class AccessLog:
    """A WSGI application that reports each exchange of *app* when it is over.

    :param reports: called with each `Exchange`.
    """

    def __init__(self, app: WSGIApplication, *reports: Callable[[Exchange], object]) -> None:
        self.app = app
        self.reports = reports

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        exchange = Exchange(environ)
        _current.set(exchange)

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            exchange.status = status
            return start_response(status, [*headers, ("X-Request-Id", exchange.id)], *exc_info)

        body = self.app(environ, start)
        if not isinstance(body, list):
            return ReportedBody(body, exchange, self.report)
        exchange.bytes = sum(map(len, body))
        self.report(exchange)
        return body

    def report(self, exchange: Exchange) -> None:
        exchange.seconds = perf_counter() - exchange.began
        for report in self.reports:
            report(exchange)


class ReportedBody:
    """A body whose bytes are counted, and whose exchange is reported when it is closed."""

    def __init__(
        self, body: Iterable[bytes], exchange: Exchange, report: Callable[[Exchange], None]
    ) -> None:
        self.body = body
        self.iterator = iter(body)
        self.exchange = exchange
        self.report = report

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        _current.set(self.exchange)  # one thread may send several bodies in turn
        chunk = next(self.iterator)
        self.exchange.bytes += len(chunk)
        return chunk

    def close(self) -> None:
        _current.set(self.exchange)
        try:
            if hasattr(self.body, "close"):
                self.body.close()
        finally:
            self.report(self.exchange)


class JSONFormatter(logging.Formatter):
    """Each record as a line of JSON, with the fields of a request as members."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(record.args, dict):
            fields |= record.args
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure_logging(level: str, form: str) -> None:
    """Log to standard error, unless logging is configured already."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JSONFormatter() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
