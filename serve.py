"""Serve items: the composition root and the command line.

The module that puts the others together.  ``python serve.py`` serves an embedded SQLite
file with waitress; ``gunicorn 'serve:create_app()'`` serves the same application.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine, make_reader
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import scoped_session, sessionmaker
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import BaseWSGIServer, create_server
from waitress.utilities import BadRequest

from models import create_tables, make_probe
from resources import make_app
from web.errors import errors_as_json
from web.router import MAX_BODY

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

DEFAULT_URL = "sqlite:///items.db"

ATTEMPTS = 5
"""How often one request may be tried when the database says "try again"."""

log = logging.getLogger("items")


class RequestParser(HTTPRequestParser):
    """waitress's parser, which answers as well where it would hang up, or wait in vain."""

    def received(self, data: bytes) -> int:
        try:
            consumed: int = super().received(data)
        except ValueError:  # a target that is no URL, or a length of thousands of digits
            self.error = BadRequest("The head cannot be read")
            self.completed, consumed = True, len(data)
        if self.completed:
            self.expect_continue = False  # it would wait for a body that never comes
        return consumed


class Channel(HTTPChannel):
    """A client's connection."""

    parser_class = RequestParser


class Service:
    """The WSGI application: resources, sessions, errors; and the engines beneath it."""

    def __init__(
        self,
        engine: Engine,
        reader: Engine | None,
        probe: Callable[[], object],
        max_body: int,
    ) -> None:
        self.engines = [engine] if reader is None else [engine, reader]
        session = scoped_session(sessionmaker(engine))
        items = make_app(session, probe=probe, max_body=max_body)
        self.app = errors_as_json(
            SessionMiddleware(items, session, attempts=ATTEMPTS, reader=reader, confirm=True)
        )

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return self.app(environ, start_response)

    def dispose(self) -> None:
        """Close the connections that are not in use."""
        for engine in self.engines:
            engine.dispose()


def create_app(
    database_url: str | None = None,
    *,
    reader_url: str | None = None,
    threads: int = 8,
    max_body: int = MAX_BODY,
) -> Service:
    """Make the whole service, and the tables that are missing.

    :param database_url: a SQLAlchemy URL; by default that of the environment variable
        ``DATABASE_URL``, or a file ``items.db`` in the working directory.
    :param reader_url: where safe requests read, a replica for instance; by default that of
        ``READER_URL``, or else what *database_url* says.
    :param threads: how many requests the server runs at once; so many connections at most
        to write, and as many to read.
    :param max_body: bytes that a request's body may have.
    :raises sqlalchemy.exc.SQLAlchemyError: where the URL is wrong or the database is not there.
    """
    url = make_url(database_url or os.environ.get("DATABASE_URL") or DEFAULT_URL)
    engine = make_engine(url, pool_size=threads)
    create_tables(engine)
    reader = make_reader(reader_url or os.environ.get("READER_URL") or url, pool_size=threads)
    return Service(engine, reader, make_probe(url), max_body)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and serve until told to stop by SIGTERM or SIGINT."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        app = create_app(
            options.database_url,
            reader_url=options.reader_url,
            threads=options.threads,
            max_body=options.max_body,
        )
    except (SQLAlchemyError, ImportError, ValueError, TypeError) as error:
        # The last two are what a port that is no number and an unknown option come to.
        parser.exit(2, f"{parser.prog}: the database cannot be used: {error}\n")
    sockets: dict[int, Any] = {}
    try:
        server = create_server(
            app,
            sockets,
            listen=options.listen,
            threads=options.threads,
            connection_limit=options.connections,
            channel_timeout=options.idle_timeout,
            # waitress refuses what is far too long before it has stored it.
            max_request_body_size=options.max_body + 2**20,
            # So much of a stream waits in memory for a client slower than we are.
            outbuf_high_watermark=2**19,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: cannot listen on {options.listen}: {error}\n")
    server.print_listen("serving on http://{}:{}")
    run_until_stopped(sockets, options.stop_timeout)
    server.task_dispatcher.shutdown()
    app.dispose()


def run_until_stopped(sockets: dict[int, Any], patience: float) -> None:
    """Run the server of *sockets* until SIGTERM or SIGINT, and finish what it has begun.

    waitress by itself drops the requests that it is working on.

    :param patience: seconds after which even unfinished requests are left.
    """
    listeners = [each for each in sockets.values() if isinstance(each, BaseWSGIServer)]
    for listener in listeners:
        listener.channel_class = Channel
    stopping = False

    def stop(number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        signal.signal(number, signal.SIG_DFL)  # the second time is final
        listeners[0].pull_trigger()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while not stopping:
        wasyncore.loop(map=sockets, count=1)
    log.info("stopping: no new requests, %g s for those that run", patience)
    deadline = monotonic() + patience
    for listener in listeners:
        wasyncore.dispatcher.close(listener)  # its own close() would stop the workers' signals
    while _close_idle(sockets) and monotonic() < deadline:
        wasyncore.loop(timeout=0.1, map=sockets, count=1)


def _close_idle(sockets: dict[int, Any]) -> bool:
    """Close the connections that wait for a request; tell whether others are left."""
    busy = False
    for channel in [each for each in sockets.values() if isinstance(each, HTTPChannel)]:
        if channel.requests or channel.request or channel.total_outbufs_len:
            busy = True
        else:
            channel.handle_close()
    return busy


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve.py", description="Serve items over HTTP.")
    default = "default: %(default)s"
    parser.add_argument(
        "--database-url",
        metavar="URL",
        help=f"a SQLAlchemy URL (default: $DATABASE_URL, or {DEFAULT_URL})",
    )
    parser.add_argument(
        "--reader-url",
        metavar="URL",
        help="where to read, a replica for instance (default: $READER_URL, or the same)",
    )
    parser.add_argument(
        "--listen", metavar="HOST:PORT", type=_address, default="127.0.0.1:8080", help=default
    )
    numbers = {
        "threads": (8, "requests that run at once; so many connections to the database"),
        "connections": (100, "clients that may be connected"),
        "max-body": (MAX_BODY, "bytes that a request's body may have"),
        "idle-timeout": (60, "seconds after which a silent client is disconnected"),
        "stop-timeout": (30, "seconds to finish what is running when told to stop"),
    }
    for name, (value, what) in numbers.items():
        parser.add_argument(
            f"--{name}", metavar="N", type=_positive, default=value, help=f"{what} ({default})"
        )
    parser.add_argument(
        "--log-level",
        metavar="L",
        default="debug",
        choices=["debug", "info", "warning", "error"],
        help="debug, which shows each commit and rollback, info, warning or error "
        "(default: %(default)s)",
    )
    return parser


def _address(text: str) -> str:
    port = text.rpartition(":")[2] if ":" in text else ""
    if not (port.isdecimal() and int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return int(text)


if __name__ == "__main__":
    main()
