"""The small router beneath the resources: from a WSGI request to a handler and back.

A handler says in its signature what it takes, and what it gives::

    class Pets:
        def rename(self, request: JSONRequest, id: int, body: NewName) -> Pet: ...

    router = Router()
    router.add("PUT", "/{id}", Pets().rename)

``request`` comes first.  What the path names comes from the path; ``query`` and ``body``
are structs, read from the query string and from a body of JSON, and checked by their types.
The struct that is returned becomes JSON, None a 204; a `Response` goes out as it is, and a
`Refusal` that is raised says why there is none.  `openapi` describes a router from the
same signatures.

RFC 9110 (https://www.rfc-editor.org/rfc/rfc9110) is HTTP Semantics.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints
from urllib.parse import parse_qsl

import msgspec
from webob import Request
from webob.acceptparse import create_accept_header

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    Handler = Callable[..., Any]

JSON = "application/json"

JSON_HEADERS = {
    "Content-Type": JSON,
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}

MAX_BODY = 64 * 1024
"""Bytes that a request's body may have, unless told otherwise."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, 9.2.1

PRECONDITION = "a precondition of the request does not hold"

STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}

Struct = TypeVar("Struct", bound=msgspec.Struct)

_NUMBER = r"0|[1-9][0-9]{0,17}"
_ETAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')  # RFC 9110, 8.8.3
_CHARSET = re.compile(r";\s*charset=[^;,]*", re.IGNORECASE)


class Error(msgspec.Struct):
    """Why a request was refused."""

    error: str


class Response:
    """A response: a status, headers, and a body that may be a list or a stream."""

    def __init__(self, status: int, headers: dict[str, str], body: Iterable[bytes] = ()) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def begin(self, start_response: StartResponse, method: str, *exc_info: Any) -> Iterable[bytes]:
        """Give the head to *start_response*; the body, which HEAD has not."""
        start_response(STATUS_LINES[self.status], [*self.headers.items()], *exc_info)
        return [] if method == "HEAD" else self.body


class Refusal(Exception):
    """The request cannot be answered as asked; *message* tells the client why."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.message = message
        self.headers = headers

    def response(self) -> Response:
        """Make the response that says so."""
        return with_json(error_bytes(self.message), self.status, self.headers)


@lru_cache(maxsize=64)
def error_bytes(message: str) -> bytes:
    """Write an `Error`; most refusals say what another has said before."""
    return json_bytes(Error(message))


def json_bytes(value: Any) -> bytes:
    """Write *value* as JSON on one line, with a space after each comma and colon."""
    return msgspec.json.format(msgspec.json.encode(value), indent=0)


def as_json(
    value: msgspec.Struct,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    *,
    tagged: bool = False,
) -> Response:
    """Make the response that says *value*, with an entity tag if it is to be *tagged*."""
    body = json_bytes(value)
    response = with_json(body, status, headers)
    if tagged:
        response.headers["ETag"] = etag_of(body)
    return response


def with_json(body: bytes, status: int, headers: Mapping[str, str] | None) -> Response:
    """Make a response of JSON that is written already."""
    fields = {**JSON_HEADERS, "Content-Length": str(len(body))}
    if headers:
        fields.update(headers)
    return Response(status, fields, [body])


def etag_of(body: bytes) -> str:
    """Make a strong entity tag (RFC 9110, 8.8.3): equal for equal bytes, and only for them."""
    return f'"{blake2b(body, digest_size=16).hexdigest()}"'


class JSONRequest(Request):
    """A request whose body, if it has one, is JSON."""

    def read(self, kind: type[Struct], limit: int = MAX_BODY) -> Struct:
        """Read the body as a *kind*; no body stands for one without members.

        :param limit: bytes that the body may have.
        :raises Refusal: 400, 413, 415 or 422, saying what is wrong.
        """
        body = self.read_bytes(limit)
        if body and self.content_type.lower() != JSON:
            raise Refusal(415, "the body must be application/json")
        if body and self.environ.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
            raise Refusal(415, "the body must not be encoded")
        try:
            # First whether it is JSON at all, then whether it is what was asked for.
            return msgspec.convert(msgspec.json.decode(body or b"{}"), kind)
        except msgspec.ValidationError as error:
            raise Refusal(422, str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, f"the body is not JSON: {error}") from None

    def read_bytes(self, limit: int) -> bytes:
        """Read a body of at most *limit* bytes, whether its length is known or not."""
        too_long = Refusal(413, f"a body may have at most {limit} bytes")
        if self.http_version == "HTTP/1.0" and "HTTP_TRANSFER_ENCODING" in self.environ:
            # Servers don't look for the body then (RFC 9112, 6.1).
            raise Refusal(400, "HTTP/1.0 has no Transfer-Encoding")
        if self.content_length is not None and self.content_length > limit:
            raise too_long
        try:
            body: bytes = self.body_file.read(limit + 1)
        except OSError:  # WebOb's DisconnectionError, and what servers raise themselves
            raise Refusal(400, "the body is incomplete") from None
        if len(body) > limit:
            raise too_long
        return body

    def read_query(self, kind: type[Struct]) -> Struct:
        """Read the query string as a *kind*, whose members are numbers.

        :raises Refusal: 400 where it cannot be decoded; 422 for a parameter that is
            unknown, repeated or wrong.
        """
        query = self.environ.get("QUERY_STRING", "")
        if not query:
            return kind()
        try:
            pairs = parse_qsl(query.encode("ascii").decode(), True, errors="strict")
        except UnicodeError:
            raise Refusal(400, "the query is not percent-encoded UTF-8") from None
        values: dict[str, int | str] = {}
        for name, text in pairs:
            if name in values:
                raise Refusal(422, f"the query has `{name}` more than once")
            values[name] = int(text) if re.fullmatch(_NUMBER, text) else text
        try:
            return msgspec.convert(values, kind)
        except msgspec.ValidationError as error:
            raise Refusal(422, f"the query is wrong: {error}") from None

    def require(self, current: msgspec.Struct) -> None:
        """Go on only where the preconditions hold for what is *current*.

        :raises Refusal: 412.
        """
        if self.evaluate(etag_of(json_bytes(current))) != 200:
            raise Refusal(412, PRECONDITION)

    def evaluate(self, etag: str) -> int:
        """Evaluate the preconditions for a representation that exists (RFC 9110, 13.2.2).

        :returns: 200 to go on, 304, which for a change is as bad as 412, or 412.
        """
        wanted = self.environ.get("HTTP_IF_MATCH")
        if wanted is not None and not _names(wanted, etag, weak=False):
            return 412
        unwanted = self.environ.get("HTTP_IF_NONE_MATCH")
        if unwanted is not None and _names(unwanted, etag, weak=True):
            return 304
        return 200


def _names(field: str, etag: str, *, weak: bool) -> bool:
    """Tell whether a list of entity tags has *etag* (RFC 9110, 8.8.3.2), or is ``*``."""
    # WebOb's own parser overlooks a tag that follows a comma without a space.
    tags = _ETAG.findall(field)
    return field.strip() == "*" or any(tag == etag and (weak or not mark) for mark, tag in tags)


class Route:
    """A handler, and what its signature says.

    :ivar path: the types of what the path names.
    :ivar query: the struct that the query is read as, or None.
    :ivar body: the struct that the body is read as, or None.
    :ivar returns: what the handler returns.
    :ivar tagged: whether that has an entity tag.
    """

    def __init__(
        self,
        method: str,
        handler: Handler,
        conditional: bool,
        headers: Mapping[str, str],
        name: str,
    ) -> None:
        self.handler = handler
        self.name = name or handler.__qualname__.replace(".", "_").lower()
        self.summary = (handler.__doc__ or "").strip().partition("\n")[0]
        self.conditional = conditional
        # With PUT it would say that what the client sent is what it would get (RFC 9110, 9.3.4).
        self.tagged = conditional and method != "PUT"
        self.headers = headers
        hints = get_type_hints(handler, include_extras=True)
        self.returns = hints.pop("return")
        self.query = hints.pop("query", None)
        self.body = hints.pop("body", None)
        self.path = {name: kind for name, kind in hints.items() if name != "request"}

    def answer(self, request: JSONRequest, numbers: dict[str, int], max_body: int) -> Response:
        """Call the handler with what its signature asks for."""
        arguments: dict[str, Any] = {**numbers}
        if self.query is not None:
            arguments["query"] = request.read_query(self.query)
        if self.body is not None:
            arguments["body"] = request.read(self.body, max_body)
        return self.respond(self.handler(request, **arguments))

    def respond(self, answer: msgspec.Struct | Response | None) -> Response:
        if isinstance(answer, Response):
            return answer
        if answer is None:
            return Response(204, {})
        return as_json(answer, tagged=self.tagged)


class Resource:
    """What is at the paths of one pattern.

    :ivar methods: for each method its routes by media type, the preferred one first.
    :ivar path: the types of what the path names.
    """

    def __init__(self, pattern: str) -> None:
        numbers = re.sub(r"\\{(\w+)\\}", rf"(?P<\1>{_NUMBER})", re.escape(pattern))
        self.pattern = re.compile(numbers)
        self.methods: dict[str, dict[str, Route]] = {}
        self.path: dict[str, Any] = {}
        self.decoders: list[tuple[str, msgspec.json.Decoder[Any]]] = []

    def add(self, method: str, media_type: str, route: Route) -> None:
        self.methods.setdefault(method, {})[media_type] = route
        self.path = route.path
        # A decoder knows its type; msgspec.convert() would look at it each time.
        names = self.pattern.groupindex
        self.decoders = [(name, msgspec.json.Decoder(route.path[name])) for name in names]

    def match(self, path: str) -> dict[str, int] | None:
        """Read the numbers in *path*; None where it is none of ours."""
        found = self.pattern.fullmatch(path)
        if found is None:
            return None
        try:
            return {name: decoder.decode(found[name]) for name, decoder in self.decoders}
        except msgspec.ValidationError:
            return None

    def without_route(self, method: str) -> Response:
        """Answer OPTIONS; refuse any other method, naming those that there are."""
        names = {*self.methods, "OPTIONS"} | ({"HEAD"} if "GET" in self.methods else set())
        allow = {"Allow": ", ".join(sorted(names))}
        if method != "OPTIONS":
            raise Refusal(405, "method not allowed", allow)
        if "PATCH" in self.methods:
            allow["Accept-Patch"] = JSON  # RFC 5789, 3.1
        return Response(204, allow)


class Router:
    """A WSGI application that finds the handler for a path, a method and an Accept.

    Patterns are literal but for ``{name}``, a decimal number.  HEAD is answered from GET,
    OPTIONS from what is there, an unknown method with 405 (RFC 9110, 9.3 and 15.5.6).
    Only ``PATH_INFO`` is looked at, so it can be mounted anywhere.

    :param max_body: bytes that a request's body may have; a longer one is a 413.
    """

    def __init__(self, max_body: int = MAX_BODY) -> None:
        self.max_body = max_body
        self.literal: dict[str, Resource] = {}
        self.numbered: dict[str, Resource] = {}

    @property
    def resources(self) -> dict[str, Resource]:
        """All resources, by their patterns."""
        return self.literal | self.numbered

    def add(
        self,
        method: str,
        pattern: str,
        handler: Handler,
        *,
        media_type: str = JSON,
        conditional: bool = False,
        headers: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:
        """Answer *method* on paths like *pattern* with *handler*.

        :param media_type: what the handler gives.  Where several handlers of one method
            differ in it the client chooses; the first one serves who has no wish.
        :param conditional: that preconditions are evaluated: by the router for what was
            asked for, by the handler (`JSONRequest.require`) for what it is to change.
        :param headers: names of headers that a success may have, and what they say.
        :param name: what the operation is called; by default as its handler.
        """
        resources = self.numbered if "{" in pattern else self.literal
        resource = resources.setdefault(pattern, Resource(pattern))
        resource.add(method, media_type, Route(method, handler, conditional, headers or {}, name))

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            response = self.dispatch(environ)
        except Refusal as refusal:
            response = refusal.response()
        return response.begin(start_response, environ["REQUEST_METHOD"])

    def dispatch(self, environ: WSGIEnvironment) -> Response:
        resource, numbers = self.match(environ)
        method = environ["REQUEST_METHOD"]
        routes = resource.methods.get("GET" if method == "HEAD" else method)
        if routes is None:
            return resource.without_route(method)
        refuse_other_sites(environ)
        request = JSONRequest(environ)
        try:
            route = choose(request, routes)
            response = conditional(request, route.answer(request, numbers, self.max_body))
        except Refusal as refusal:
            response = refusal.response()
        if len(routes) > 1:
            response.headers["Vary"] = "Accept"
        return response

    def match(self, environ: WSGIEnvironment) -> tuple[Resource, dict[str, int]]:
        path = environ.get("PATH_INFO") or "/"  # PEP 3333: an empty one may be missing
        if path in self.literal:
            return self.literal[path], {}
        for resource in self.numbered.values():
            numbers = resource.match(path)
            if numbers is not None:
                return resource, numbers
        if not path.isascii():
            try:
                path.encode("latin-1").decode()  # PEP 3333, "Unicode Issues"
            except UnicodeError:
                raise Refusal(400, "the path is not percent-encoded UTF-8") from None
        raise Refusal(404, "not found")


def refuse_other_sites(environ: WSGIEnvironment) -> None:
    """Refuse a change that a page of another site has its visitor's browser make.

    Browsers say where a request comes from (https://www.w3.org/TR/fetch-metadata/); other
    clients don't, and have nobody to deceive.
    """
    site = environ.get("HTTP_SEC_FETCH_SITE", "none")
    if site not in ("same-origin", "none") and environ["REQUEST_METHOD"] not in SAFE_METHODS:
        raise Refusal(403, "a page of another site may not change anything here")


def choose(request: JSONRequest, routes: dict[str, Route]) -> Route:
    """Choose the route whose media type the client likes best (RFC 9110, 12.5.1).

    :raises Refusal: 406 where it likes none.
    """
    accept = request.environ.get("HTTP_ACCEPT")
    if accept and accept != "*/*":
        # Clients name a charset, which JSON has not (RFC 8259, 11).
        liked = create_accept_header(_CHARSET.sub("", accept)).acceptable_offers([*routes])
        if not liked:
            raise Refusal(406, f"this is available as {' or '.join(routes)} only")
        return routes[liked[0][0]]
    return next(iter(routes.values()))


def conditional(request: JSONRequest, response: Response) -> Response:
    """Leave out what the client has already (RFC 9110, 13.1.2), or does not want any more."""
    etag = response.headers.get("ETag")
    if etag is None or request.environ["REQUEST_METHOD"] not in SAFE_METHODS:
        return response
    status = request.evaluate(etag)
    if status == 412:
        raise Refusal(412, PRECONDITION)
    if status == 304:
        kept = {"ETag", "Cache-Control"}  # RFC 9110, 15.4.5
        headers = {name: value for name, value in response.headers.items() if name in kept}
        return Response(304, headers)
    return response
