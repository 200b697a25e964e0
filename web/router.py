"""A small router: from a WSGI request to a handler and back.

A handler's signature says what it takes and what it returns::

    class Pets:
        def rename(self, request: JSONRequest, id: int, body: NewName) -> Pet: ...

    router = Router()
    router.add("PUT", "/{id}", Pets().rename)

``request`` comes first.  What the path names is a number.  ``query`` and ``body`` are structs: the
query string and the JSON body, checked by their types.  A struct that is returned is sent as JSON,
None as a 204, a `Response` as it is; a handler may raise `HTTPError`.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints
from wsgiref.types import StartResponse, WSGIEnvironment

import msgspec
from webob.acceptparse import create_accept_header

from web.requests import MERGE_PATCH, SAFE_METHODS, JSONRequest
from web.responses import JSON, HTTPError, Response, etag_of, json_response

Handler = Callable[..., Any]

MAX_BODY = 64 * 1024
"""The default limit of a request's body, in bytes."""

MAX_NUMBER = 2**31 - 1
"""The largest number in a path; no INTEGER column has a larger one."""

_CHARSET = re.compile(r";\s*charset=[^;,]*", re.IGNORECASE)


class Route:
    """A handler, and what its signature says.

    :param etag: add an entity tag to successful responses.
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
        require("return" in hints, "must have a return annotation, None for a 204")
        for name in names:
            require(hints.get(name) is int, f"must have the parameter '{name}: int' of its path")
        for name in {"query", "body"} & {*parameters}:
            kind = hints.get(name)
            is_struct = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
            require(is_struct, f"must annotate '{name}' with a msgspec.Struct")
        for name in {*parameters} - {"request", "query", "body", *names}:
            require(False, f"has '{name}', which is neither query, body nor in its path")

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
            response.etag = etag_of(b"".join(response.body))
        return response


class Resource:
    """A pattern of paths, with the routes of each method by media type."""

    def __init__(self, path: str) -> None:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[1-9][0-9]{0,9})", re.escape(path))
        self.pattern = re.compile(pattern)
        self.names = {*self.pattern.groupindex}
        self.methods: dict[str, dict[str, Route]] = {}

    def match(self, path: str) -> dict[str, int] | None:
        """Return the numbers in *path*; None if the pattern does not match."""
        found = self.pattern.fullmatch(path)
        if found is None:
            return None
        numbers = {name: int(text) for name, text in found.groupdict().items()}
        return None if any(number > MAX_NUMBER for number in numbers.values()) else numbers

    def respond_without_route(self, method: str) -> Response:
        """Respond to OPTIONS; refuse any other method, and list those that are allowed."""
        names = {*self.methods, "OPTIONS"} | ({"HEAD"} if "GET" in self.methods else set())
        headers = {"Allow": ", ".join(sorted(names))}
        if method != "OPTIONS":
            raise HTTPError(405, "method not allowed", headers)
        if "PATCH" in self.methods:
            headers["Accept-Patch"] = f"{MERGE_PATCH}, {JSON}"  # RFC 5789, 3.1
        return Response(204, headers)


class Router:
    """A WSGI application that finds the handler for a path, a method and an Accept.

    Paths are literal except for ``{name}``, a decimal number from 1.  HEAD and OPTIONS need no
    handlers of their own.  Only ``PATH_INFO`` matters, so a router can be mounted anywhere.

    :param max_body: the largest number of bytes in a request's body.
    """

    def __init__(self, max_body: int = MAX_BODY) -> None:
        self.max_body = max_body
        self.resources: dict[str, Resource] = {}

    def add(
        self, method: str, path: str, handler: Handler, media_type: str = JSON, etag: bool = False
    ) -> None:
        """Respond to *method* on *path* with *handler*.

        :param media_type: what the handler returns.  A client chooses between handlers that
            differ in it; the first one is the default.
        :param etag: add an entity tag to successful responses, for conditional requests.
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
        resource, numbers = self.match(request.environ.get("PATH_INFO", ""))
        method = request.method
        routes = resource.methods.get("GET" if method == "HEAD" else method)
        if routes is None:
            return resource.respond_without_route(method)
        try:
            route = negotiate(request, routes)
            response = not_modified(request, route.respond(request, numbers, self.max_body))
            response.compress(request.accepts_gzip())
        except HTTPError as error:
            response = error.response()
        if len(routes) > 1:
            response.headers.append(("Vary", "Accept"))
        return response

    def match(self, path: str) -> tuple[Resource, dict[str, int]]:
        # The root may be an empty path (PEP 3333), and some servers collapse leading slashes.  A
        # path without a slash comes from a malformed target, and is not found.
        path = re.sub("^(/+|$)", "/", path)
        for resource in self.resources.values():
            numbers = resource.match(path)
            if numbers is not None:
                return resource, numbers
        try:
            path.encode("latin-1").decode()  # PEP 3333, "Unicode Issues"
        except UnicodeError:
            raise HTTPError(400, "the path is not percent-encoded UTF-8") from None
        raise HTTPError(404, "not found")


def negotiate(request: JSONRequest, routes: dict[str, Route]) -> Route:
    """Return the route whose media type the client prefers (RFC 9110, 12.5.1).

    :raises HTTPError: 406 if it accepts none.
    """
    accept = request.environ.get("HTTP_ACCEPT")
    if not accept or accept == "*/*":
        return next(iter(routes.values()))
    # Some clients name a charset, which JSON does not have (RFC 8259, 11).
    accepted = create_accept_header(_CHARSET.sub("", accept)).acceptable_offers([*routes])
    if not accepted:
        raise HTTPError(406, f"this is available as {' or '.join(routes)} only")
    return routes[accepted[0][0]]


def not_modified(request: JSONRequest, response: Response) -> Response:
    """Return a 304 instead of a *response* that the client has already (RFC 9110, 15.4.5)."""
    if response.etag is None or request.method not in SAFE_METHODS:
        return response
    if not request.has_representation(response.etag):
        return response
    kept = {name: value for name, value in response.headers if name in ("Cache-Control", "Vary")}
    return Response(304, kept, etag=response.etag)
