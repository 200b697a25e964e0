"""The item resources, and the small router beneath them.

Handlers read like the pages they serve: they take a request, use the session of the
registry, and return what shall become JSON.  None of them begins, commits, rolls back
or closes anything, and none knows what database there is.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session, scoped_session
from webob import Request, Response

from models import MAX_ID, Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    Handler = Callable[..., msgspec.Struct]

log = logging.getLogger("items")

MAX_BODY = 64 * 1024
"""Bytes that a request's body may have, unless told otherwise."""

Struct = TypeVar("Struct", bound=msgspec.Struct)

# PostgreSQL cannot store NUL in a text.
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=16, pattern=r"\A[^\x00]*\Z")]


class NewItem(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends to create an item."""

    name: Name | msgspec.UnsetType = msgspec.UNSET


class ItemView(msgspec.Struct):
    """An item as clients see it."""

    id: int
    name: str | None


class ItemList(msgspec.Struct):
    """All items."""

    items: list[ItemView]


class Error(msgspec.Struct):
    """Why a request was refused."""

    error: str


class Refusal(Exception):
    """The request cannot be answered as asked; *message* tells the client why."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.headers = headers or {}


class Items:
    """The item resources.

    :param session: the registry in which the session of the request is found.
    """

    def __init__(self, session: scoped_session[Session]) -> None:
        self.session = session

    def create(self, request: JSONRequest) -> ItemView:
        new = request.read(NewItem)
        item = Item(name=None if new.name is msgspec.UNSET else new.name)
        self.session.add(item)
        self.session.flush()
        if item.name is None:
            item.name = f"Item #{item.id}"
        return ItemView(item.id, item.name)

    def list(self, request: JSONRequest) -> ItemList:
        found = self.session.execute(select(Item.id, Item.name).order_by(Item.id))
        return ItemList([ItemView(id, name) for id, name in found])

    def show(self, request: JSONRequest, id: int) -> ItemView:
        item = self.session.get(Item, id) if id <= MAX_ID else None
        if item is None:
            raise Refusal(404, "not found")
        return ItemView(item.id, item.name)


def make_app(session: scoped_session[Session], *, max_body: int = MAX_BODY) -> Router:
    """Make the WSGI application that serves items.

    :param session: the registry in which handlers find the session of the request.
    :param max_body: bytes that a request's body may have; a longer one is a 413.
    """
    items = Items(session)
    router = Router(max_body)
    router.add("GET", "/", items.list)
    router.add("POST", "/", items.create)
    router.add("GET", "/{id:int}", items.show)
    return router


class JSONRequest(Request):
    """A request whose body, if it has one, is JSON."""

    def read(self, kind: type[Struct]) -> Struct:
        """Read the body as a *kind*; no body stands for one without members.

        :raises Refusal: 400, 413, 415 or 422, saying what is wrong.
        """
        limit: int = self.environ["items.max_body"]
        too_long = Refusal(413, f"a body may have at most {limit} bytes")
        if self.content_length is not None and self.content_length > limit:
            raise too_long
        try:
            body = self.body_file.read(limit + 1)
        except OSError:  # WebOb's DisconnectionError, and what servers raise themselves
            raise Refusal(400, "the body is incomplete") from None
        if len(body) > limit:
            raise too_long
        if body and self.content_type.lower() != "application/json":
            raise Refusal(415, "the body must be application/json")
        try:
            # First whether it is JSON at all, then whether it is what was asked for.
            return msgspec.convert(msgspec.json.decode(body or b"{}"), kind)
        except msgspec.ValidationError as error:
            raise Refusal(422, str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, f"the body is not JSON: {error}") from None


class Router:
    """A WSGI application that finds the handler for a path and a method.

    Patterns are literal but for ``{name:int}``, a decimal number.  HEAD is answered
    from GET, OPTIONS from what is there, an unknown method with 405 (RFC 9110, 9.3 and
    15.5.6).  Only ``PATH_INFO`` is looked at, so it can be mounted anywhere.
    """

    def __init__(self, max_body: int) -> None:
        self.max_body = max_body
        self.routes: dict[re.Pattern[str], dict[str, Handler]] = {}

    def add(self, method: str, pattern: str, handler: Handler) -> None:
        """Answer *method* on paths like *pattern* with *handler*."""
        literal = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}")
        path = re.compile(re.sub(r"{(\w+):int}", r"(?P<\1>0|[1-9][0-9]{0,9})", literal))
        self.routes.setdefault(path, {})[method] = handler

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ["items.max_body"] = self.max_body
        try:
            response = self.dispatch(JSONRequest(environ))
        except Refusal as refusal:
            response = as_json(Error(refusal.message), refusal.status, refusal.headers)
        return response(environ, start_response)

    def dispatch(self, request: JSONRequest) -> Response:
        handlers, arguments = self.match(request)
        method = "GET" if request.method == "HEAD" else request.method
        if method in handlers:
            return as_json(handlers[method](request, **arguments))
        names = {*handlers, "OPTIONS"} | ({"HEAD"} if "GET" in handlers else set())
        allow = {"Allow": ", ".join(sorted(names))}
        if method == "OPTIONS":
            return Response(status=204, headerlist=[*allow.items()])
        raise Refusal(405, "method not allowed", allow)

    def match(self, request: JSONRequest) -> tuple[dict[str, Handler], dict[str, int]]:
        try:  # PEP 3333, "Unicode Issues"; an empty PATH_INFO may be missing
            path = request.environ.get("PATH_INFO", "").encode("latin-1").decode() or "/"
        except UnicodeDecodeError:
            path = ""
        for pattern, handlers in self.routes.items():
            found = pattern.fullmatch(path)
            if found is not None:
                return handlers, {name: int(value) for name, value in found.groupdict().items()}
        raise Refusal(404, "not found")


def as_json(
    value: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Make the response that says *value*."""
    body = msgspec.json.format(msgspec.json.encode(value), indent=0)
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    return Response(body, status, [*fields.items(), *(headers or {}).items()])


def errors_as_json(app: WSGIApplication) -> WSGIApplication:
    """Answer what *app* raises before its response has begun with a 500 in JSON.

    Wrapped around the session middleware, it also answers for a COMMIT that failed.
    """

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            return app(environ, start_response)
        except Exception:
            method = environ["REQUEST_METHOD"]
            log.exception("%s %r failed", method, environ.get("PATH_INFO", ""))
            response = as_json(Error("internal server error"), 500)
            start_response(response.status, response.headerlist, sys.exc_info())
            return [] if method == "HEAD" else response.app_iter

    return answer
