"""The small router beneath the resources: from a WSGI request to a handler and back.

A handler says in its signature what it takes, and what it returns::

    class Pets:
        def rename(self, request: JSONRequest, id: int, body: NewName) -> Pet: ...

    router = Router()
    router.add("PUT", "/{id}", Pets().rename)

``request`` comes first.  What the path names is a number; ``query`` and ``body`` are structs,
read from the query string and from a body of JSON, and checked by their types.  A struct that is
returned becomes JSON, None a 204; a `Response` is sent as it is, and an `HTTPError` may be raised.

RFC 9110 (https://www.rfc-editor.org/rfc/rfc9110) is HTTP Semantics.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, get_type_hints

import msgspec
from webob.acceptparse import create_accept_header

from web.compression import compress
from web.requests import MERGE_PATCH, JSONRequest, precondition_failed
from web.responses import JSON, HTTPError, Response, etag_of, json_response

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    Handler = Callable[..., Any]

MAX_BODY = 64 * 1024
"""Bytes that a request's body may have, unless told otherwise."""

MAX_NUMBER = 2**31 - 1
"""The largest number in a path; what is beyond an INTEGER column is not found."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, 9.2.1

_CHARSET = re.compile(r";\s*charset=[^;,]*", re.IGNORECASE)


class Route:
    """A handler, and what its signature says.

    :param etag: give successes an entity tag; for GET the preconditions are evaluated, too.
    :raises TypeError: if the signature does not fit the path.
    """

    def __init__(self, handler: Handler, names: set[str], etag: bool) -> None:
        self.handler = handler
        self.etag = etag
        hints = get_type_hints(handler)
        self.query = hints.get("query")
        self.body = hints.get("body")
        self._check([*inspect.signature(handler).parameters], names, hints)

    def _check(self, parameters: list[str], names: set[str], hints: dict[str, Any]) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise TypeError(f"the handler {self.handler.__qualname__} {message}")

        require(parameters[:1] == ["request"], "must have 'request' as its first parameter")
        require("return" in hints, "must say what it returns, None for a 204")
        for name in names:
            require(hints.get(name) is int, f"must have the parameter '{name}: int' of its path")
        for name in {"query", "body"} & {*parameters}:
            kind = hints.get(name)
            is_struct = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
            require(is_struct, f"must annotate '{name}' with a msgspec.Struct")
        known = {"request", "query", "body", *names}
        for name in parameters:
            require(name in known, f"has '{name}', which is neither query, body nor in its path")

    def respond(self, request: JSONRequest, numbers: dict[str, int], max_body: int) -> Response:
        """Call the handler with what its signature asks for."""
        arguments: dict[str, Any] = {**numbers}
        if self.query is not None:
            arguments["query"] = request.read_query(self.query)
        if self.body is not None:
            arguments["body"] = request.read_json(self.body, max_body)
        returned = self.handler(request, **arguments)
        if returned is None:
            return Response(204, {})
        response = returned if isinstance(returned, Response) else json_response(returned)
        if self.etag:
            response.headers["ETag"] = etag_of(b"".join(response.body))
        return response


class Resource:
    """What is at the paths of one pattern: for each method its routes, by media type."""

    def __init__(self, path: str) -> None:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[1-9][0-9]{0,9})", re.escape(path))
        self.pattern = re.compile(pattern)
        self.names = {*self.pattern.groupindex}
        self.methods: dict[str, dict[str, Route]] = {}

    def match(self, path: str) -> dict[str, int] | None:
        """Return the numbers in *path*; None if it is none of these paths."""
        found = self.pattern.fullmatch(path)
        if found is None:
            return None
        numbers = {name: int(text) for name, text in found.groupdict().items()}
        return numbers if all(number <= MAX_NUMBER for number in numbers.values()) else None

    def respond_without_route(self, method: str) -> Response:
        """Respond to OPTIONS; refuse any other method, and name those that there are."""
        names = {*self.methods, "OPTIONS"} | ({"HEAD"} if "GET" in self.methods else set())
        headers = {"Allow": ", ".join(sorted(names))}
        if method != "OPTIONS":
            raise HTTPError(405, "method not allowed", headers)
        if "PATCH" in self.methods:
            headers["Accept-Patch"] = f"{MERGE_PATCH}, {JSON}"  # RFC 5789, 3.1
        return Response(204, headers)


class Router:
    """A WSGI application that finds the handler for a path, a method and an Accept.

    Paths are literal but for ``{name}``, a decimal number from 1.  HEAD is answered from GET,
    OPTIONS from what is there, an unknown method with 405.  Only ``PATH_INFO`` is looked at, so
    a router can be mounted anywhere.

    :param max_body: bytes that a request's body may have; a longer one is a 413.
    """

    def __init__(self, max_body: int = MAX_BODY) -> None:
        self.max_body = max_body
        self.resources: dict[str, Resource] = {}

    def add(
        self,
        method: str,
        path: str,
        handler: Handler,
        *,
        media_type: str = JSON,
        etag: bool = False,
    ) -> None:
        """Respond to *method* on *path* with *handler*.

        :param media_type: what the handler returns.  Where several handlers of one method
            differ in it the client chooses; the first one serves those who have no preference.
        :param etag: give successes an entity tag, by which clients need not fetch them twice.
        """
        resource = self.resources.setdefault(path, Resource(path))
        route = Route(handler, resource.names, etag)
        resource.methods.setdefault(method, {})[media_type] = route

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            response = self.dispatch(JSONRequest(environ))
        except HTTPError as error:
            response = error.response()
        return response(environ, start_response)

    def dispatch(self, request: JSONRequest) -> Response:
        resource, numbers = self.match(request.environ)
        method = request.method
        routes = resource.methods.get("GET" if method == "HEAD" else method)
        if routes is None:
            return resource.respond_without_route(method)
        try:
            route = negotiate(request, routes)
            response = route.respond(request, numbers, self.max_body)
            response = not_modified(request, compress(request, response))
        except HTTPError as error:
            response = error.response()
        if len(routes) > 1:
            response.headers.add_header("Vary", "Accept")
        return response

    def match(self, environ: WSGIEnvironment) -> tuple[Resource, dict[str, int]]:
        # PEP 3333: an empty path may be missing.  Some servers collapse the slashes before it.
        path = re.sub("^(/+|$)", "/", environ.get("PATH_INFO", ""))
        literal = self.resources.get(path)
        if literal is not None and not literal.names:
            return literal, {}
        for resource in self.resources.values():
            numbers = resource.match(path) if resource.names else None
            if numbers is not None:
                return resource, numbers
        if not path.isascii():
            try:
                path.encode("latin-1").decode()  # PEP 3333, "Unicode Issues"
            except UnicodeError:
                raise HTTPError(400, "the path is not percent-encoded UTF-8") from None
        raise HTTPError(404, "not found")


def negotiate(request: JSONRequest, routes: dict[str, Route]) -> Route:
    """Return the route whose media type the client likes best (RFC 9110, 12.5.1).

    :raises HTTPError: 406 if it accepts none.
    """
    accept = request.environ.get("HTTP_ACCEPT")
    if not accept or accept == "*/*":
        return next(iter(routes.values()))
    # Clients name a charset, which JSON has not (RFC 8259, 11).
    accepted = create_accept_header(_CHARSET.sub("", accept)).acceptable_offers([*routes])
    if not accepted:
        raise HTTPError(406, f"this is available as {' or '.join(routes)} only")
    return routes[accepted[0][0]]


def not_modified(request: JSONRequest, response: Response) -> Response:
    """Leave out what the client has already (RFC 9110, 13.1.2), or does not want any more."""
    etag = response.headers["ETag"]
    if etag is None or request.method not in SAFE_METHODS:
        return response
    status = request.evaluate(etag)
    if status == 412:
        raise precondition_failed()
    if status == 304:
        kept = ("ETag", "Cache-Control", "Vary")  # RFC 9110, 15.4.5
        found = {name: response.headers[name] for name in kept}
        return Response(304, {name: value for name, value in found.items() if value is not None})
    return response
