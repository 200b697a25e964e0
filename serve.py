"""Serve items: the entry point, which puts the other modules together.

``python serve.py`` serves a SQLite file with waitress; ``gunicorn 'serve:create_app()'`` serves
the same application.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from sessionscope import SessionMiddleware
from sessionscope.engines import make_reader
from sessionscope.idempotency import Idempotency, purge
from sqlalchemy import Engine
from sqlalchemy.orm import scoped_session, sessionmaker

from models import keys
from resources import make_app
from web.database import make_probe, open_database, parse_url
from web.demo import add_demo
from web.errors import errors_as_json
from web.logs import AccessLog, Exchange, configure_logging, log_exchange, observe
from web.options import StartError, make_parser, parse_given
from web.origins import Origins
from web.router import Router
from web.waitress_server import Server

ATTEMPTS = 5
"""How often a request may be tried when the database says "try again"."""


class Service:
    """The WSGI application, layer by layer, and its engines.

    :param options: the options of the command line.
    :raises StartError: if the database cannot be used, for example.
    """

    def __init__(self, options: Namespace) -> None:
        url = parse_url(options.database_url, "--database-url")
        reader_url = parse_url(options.reader_url, "--reader-url") if options.reader_url else None
        engine = open_database(
            url, threads=options.threads, create=options.create_tables, wait=options.wait
        )
        reader = make_reader(reader_url or url, pool_size=options.threads)
        self.engines = {"writer": engine} | ({} if reader is None else {"reader": reader})
        self.session = session = scoped_session(sessionmaker(engine))
        router = make_app(session, probe=make_probe(url, reader_url), max_body=options.max_body)
        reports: list[Callable[[Exchange], None]] = [log_exchange]
        if options.metrics:
            reports.append(add_metrics(router, self.engines))
        if options.demo:
            reports.append(add_demo(router, session, options.threads).add)
        # Callers are anonymous, so a key means the same whoever sends it.
        once = Idempotency(router, keys, scope=lambda environ: "")
        sessions = SessionMiddleware(
            once, session, attempts=ATTEMPTS, reader=reader, confirm=True, observer=observe
        )
        origins = Origins(errors_as_json(sessions), options.cors_origins.split())
        self.app = AccessLog(origins, *reports)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return self.app(environ, start_response)

    def dispose(self) -> None:
        """Close the connections that are not in use."""
        for engine in self.engines.values():
            engine.dispose()


def add_metrics(router: Router, engines: dict[str, Engine]) -> Callable[[Exchange], None]:
    """Add ``/metrics``; return the function that counts an exchange."""
    try:
        from web.metrics import TEXT, Metrics
    except ImportError as error:
        raise StartError(f"--metrics: {error}; pip install -e '.[app]'") from None
    metrics = Metrics(engines)
    router.add("GET", "/metrics", metrics.show, media_type=TEXT.partition(";")[0])
    return metrics.count


def create_app(database_url: str | None = None, **given: Any) -> Service:
    """Make the service.

    :param database_url: a SQLAlchemy URL.
    :param given: other options, named as on the command line.  Options that are left out come
        from the environment.
    :raises StartError: if the database cannot be used, for example.
    :raises TypeError: if there is no such option.
    """
    options = parse_given({"database_url": database_url, **given})
    configure_logging(options.log_level, options.log_format)
    return Service(options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and serve until SIGTERM, SIGINT or SIGHUP."""
    try:
        parser = make_parser()
        options = parser.parse_args(arguments)
        configure_logging(options.log_level, options.log_format)
        service = Service(options)
        if options.purge_keys is not None:
            number = purge(service.session, keys, timedelta(days=options.purge_keys))
            parser.exit(0, f"{number} idempotency keys deleted\n")
        server = Server(service, options)
    except StartError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        sys.exit(2)
    server.run(options.stop_timeout)
    service.dispose()


if __name__ == "__main__":
    main()
