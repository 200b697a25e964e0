"""How often a request has to wait for its database, counted on the line to PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from links import Link, linked
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine, make_reader
from sqlalchemy import Engine, insert
from sqlalchemy.orm import scoped_session, sessionmaker
from support import environ, serve_once

from models import Item
from resources import make_app

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

WARM = 12
"""Requests after which psycopg has prepared the statements that it sends again and again."""


@pytest.fixture
def link(postgresql: Engine, postgresql_url: str) -> Iterator[Link]:
    """The line to a server that has one item."""
    with postgresql.begin() as connection:
        connection.execute(insert(Item).values(id=1000, name="lamp"))
    with linked(postgresql_url) as made:
        yield made


@pytest.fixture
def make(link: Link) -> Iterator[Callable[..., WSGIApplication]]:
    """Make the item service on the link; with a reader if asked, and the options given."""
    with ExitStack() as stack:

        def make(reading: bool = False, **options: Any) -> WSGIApplication:
            engine, reader = make_engine(link.url), make_reader(link.url)
            assert reader is not None
            stack.callback(engine.dispose)
            stack.callback(reader.dispose)
            session = scoped_session(sessionmaker(engine))
            options["reader"] = reader if reading else None
            return SessionMiddleware(make_app(session), session, **options)

        yield make


def trips(link: Link, app: WSGIApplication, method: str, path: str, status: str) -> int:
    """Round trips of one request, when others like it have gone before."""
    for _ in range(WARM):
        before = link.trips
        assert serve_once(app, environ(method, path)).status == status
    return link.trips - before


def test_a_request_that_leaves_its_session_alone_sends_nothing(link: Link, make: Any) -> None:
    """A request that does not use its session makes no round trip, whatever the options."""
    app = make(reading=True, confirm=True, attempts=3)
    assert trips(link, app, "GET", "/nowhere", "404 Not Found") == 0


def test_a_read_through_the_reader_is_one_round_trip(link: Link, make: Any) -> None:
    """A read on an engine in autocommit is its statement and no more, with confirm as well."""
    app = make(reading=True, confirm=True, attempts=3)
    assert trips(link, app, "GET", "/1000", "200 OK") == 1
    assert trips(link, app, "GET", "/999", "404 Not Found") == 1


def test_a_read_without_a_reader_is_three_round_trips(link: Link, make: Any) -> None:
    """A read in a transaction is BEGIN, its statement, and COMMIT or ROLLBACK."""
    app = make()
    assert trips(link, app, "GET", "/1000", "200 OK") == 3
    assert trips(link, app, "GET", "/999", "404 Not Found") == 3


def test_a_create_is_four_round_trips(link: Link, make: Any) -> None:
    """Creating an item that is named after its id is BEGIN, two statements and COMMIT."""
    assert trips(link, make(), "POST", "/", "200 OK") == 4


def test_confirm_costs_one_round_trip_a_commit(link: Link, make: Any) -> None:
    """What a lost COMMIT could be asked about is taken in a single statement before it."""
    assert trips(link, make(confirm=True), "POST", "/", "200 OK") == 5
