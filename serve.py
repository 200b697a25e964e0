"""Serve items: the composition root and the command line.

The only module that knows the others.  ``python serve.py`` serves an embedded SQLite
file with waitress; ``gunicorn 'serve:create_app()'`` serves the same application.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import scoped_session, sessionmaker
from waitress.server import create_server

from middleware import SessionMiddleware
from models import create_tables, make_engine, make_reader
from resources import MAX_BODY, errors_as_json, make_app

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

DEFAULT_URL = "sqlite:///items.db"

log = logging.getLogger("items")


def create_app(
    database_url: str | None = None, *, threads: int = 8, max_body: int = MAX_BODY
) -> WSGIApplication:
    """Make the whole service: engines, missing tables, resources, sessions, errors.

    :param database_url: a SQLAlchemy URL; by default that of the environment variable
        ``DATABASE_URL``, or a file ``items.db`` in the working directory.
    :param threads: how many requests the server runs at once; so many connections at most.
    :param max_body: bytes that a request's body may have.
    :raises sqlalchemy.exc.SQLAlchemyError: where the URL is wrong or the database is not there.
    """
    url = make_url(database_url or os.environ.get("DATABASE_URL") or DEFAULT_URL)
    engine = make_engine(url, pool_size=threads)
    create_tables(engine)
    session = scoped_session(sessionmaker(engine))
    items = make_app(session, max_body=max_body)
    reader = make_reader(url, pool_size=threads)
    return errors_as_json(SessionMiddleware(items, session, reader=reader))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and serve until interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        app = create_app(options.database_url, threads=options.threads, max_body=options.max_body)
    except (SQLAlchemyError, ImportError, ValueError, TypeError) as error:
        # The last two are what a port that is no number and an unknown option come to.
        parser.exit(2, f"{parser.prog}: the database cannot be used: {error}\n")
    try:
        server = create_server(app, listen=options.listen, threads=options.threads)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: cannot listen on {options.listen}: {error}\n")
    server.print_listen("serving on http://{}:{}")
    server.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve.py", description="Serve items over HTTP.")
    default = "default: %(default)s"
    parser.add_argument(
        "--database-url",
        metavar="URL",
        help=f"a SQLAlchemy URL (default: $DATABASE_URL, or {DEFAULT_URL})",
    )
    parser.add_argument(
        "--listen", metavar="HOST:PORT", type=_address, default="127.0.0.1:8080", help=default
    )
    parser.add_argument("--threads", metavar="N", type=_positive, default=8, help=default)
    parser.add_argument(
        "--max-body", metavar="BYTES", type=_positive, default=MAX_BODY, help=default
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
