"""The router: which mistakes of a programmer it finds, and when."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support import environ, serve_once

from web.requests import JSONRequest
from web.responses import Response
from web.router import Router


class Body(msgspec.Struct):
    """A struct that a handler may take."""

    name: str = ""


def unannotated(request: JSONRequest):  # type: ignore[no-untyped-def]
    """Say nothing of what it returns."""


def nameless(id: int) -> None:
    """Take no request."""


def wrong_name(request: JSONRequest, number: int) -> None:
    """Take another name than the path has."""


def text(request: JSONRequest, id: str) -> None:
    """Take a text where the path has a number."""


def extra(request: JSONRequest, id: int, more: int) -> None:
    """Take what nobody gives."""


def no_struct(request: JSONRequest, id: int, body: dict[str, Any]) -> None:
    """Take a body that is no struct."""


def untyped_query(request: JSONRequest, id: int, query) -> None:  # type: ignore[no-untyped-def]
    """Take a query without a type."""


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (unannotated, "unannotated must have a return annotation, None for a 204"),
        (nameless, "nameless must have 'request' as its first parameter"),
        (wrong_name, "wrong_name must have the parameter 'id: int' of its path"),
        (text, "text must have the parameter 'id: int' of its path"),
        (extra, "extra has 'more', which is neither query, body nor in its path"),
        (no_struct, "no_struct must annotate 'body' with a msgspec.Struct"),
        (untyped_query, "untyped_query must annotate 'query' with a msgspec.Struct"),
    ],
)
def test_a_handler_is_checked_when_it_is_added(handler: Any, words: str) -> None:
    """A handler that cannot be called as the path says is refused, with what to do."""
    with pytest.raises(TypeError, match="the handler ") as caught:
        Router().add("GET", "/{id}", handler)
    assert words in str(caught.value)


def test_a_handler_that_fits_is_called() -> None:
    """A handler gets what its signature asks for, and what it returns is sent."""

    def show(request: JSONRequest, shelf: int, id: int, query: Body) -> Response:
        return Response(200, {}, [f"{shelf} {id} {query.name}".encode()])

    router = Router()
    router.add("GET", "/shelves/{shelf}/{id}", show)
    reply = serve_once(router, environ("GET", "/shelves/3/14", QUERY_STRING="name=x"))
    assert reply.content == b"3 14 x"


def test_a_header_may_come_twice() -> None:
    """A response may have several Links."""

    def show(request: JSONRequest) -> Response:
        response = Response(200, {"Link": "<a>"}, [])
        response.headers.append(("Link", "<b>"))
        return response

    router = Router()
    router.add("GET", "/", show)
    assert serve_once(router).headers[:2] == [("Link", "<a>"), ("Link", "<b>")]
