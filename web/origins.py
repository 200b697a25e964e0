"""Which web pages may call: those of this site, and others only if they are named (CORS)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from web.responses import HTTPError, Response
from web.router import SAFE_METHODS

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

EXPOSED = "Commit-Outcome, ETag, Idempotent-Replayed, Link, Location, Retry-After, X-Request-Id"

PREFLIGHT = {
    "Access-Control-Allow-Methods": "DELETE, GET, HEAD, PATCH, POST, PUT",
    "Access-Control-Allow-Headers": (
        "Content-Type, Idempotency-Key, If-Match, If-None-Match, X-Request-Id"
    ),
    "Access-Control-Max-Age": "600",
}


class Origins:
    """A WSGI application that lets the pages of this site, and of some others, use *app*.

    :param allowed: origins such as ``https://shop.example`` whose pages may read and change.
    """

    def __init__(self, app: WSGIApplication, allowed: Iterable[str] = ()) -> None:
        self.app = app
        self.allowed = frozenset(allowed)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        origin = environ.get("HTTP_ORIGIN")
        if origin not in self.allowed:
            if environ["REQUEST_METHOD"] not in SAFE_METHODS and is_from_another_site(environ):
                message = "a page of another site may not change anything here"
                return HTTPError(403, message).response()(environ, start_response)
            if not self.allowed:
                return self.app(environ, start_response)
        added = [("Vary", "Origin")]
        if origin in self.allowed:
            added += [("Access-Control-Allow-Origin", origin)]
            asks = "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
            if asks and environ["REQUEST_METHOD"] == "OPTIONS":
                return Response(204, {**PREFLIGHT, **dict(added)})(environ, start_response)
            added += [("Access-Control-Expose-Headers", EXPOSED)]

        def start(
            status: str, headers: list[tuple[str, str]], *exc_info: Any
        ) -> Callable[[bytes], object]:
            return start_response(status, headers + added, *exc_info)

        return self.app(environ, start)


def is_from_another_site(environ: WSGIEnvironment) -> bool:
    """Tell whether a browser says that a page of another site has it make this request.

    Browsers say where a request comes from (https://www.w3.org/TR/fetch-metadata/), old ones at
    least from which origin; other clients don't, and have nobody to deceive.
    """
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = environ.get("HTTP_ORIGIN")
    host = environ.get("HTTP_HOST", "")
    return origin is not None and origin.rpartition("//")[2].lower() != host.lower()
