"""Which web pages may call: those of this site, and others only if they are named (CORS)."""

from collections.abc import Iterable
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from web.requests import SAFE_METHODS
from web.responses import HTTPError, Response

EXPOSED = "Commit-Outcome, ETag, Idempotent-Replayed, Link, Location, Retry-After, X-Request-Id"

PREFLIGHT = {
    "Access-Control-Allow-Methods": "DELETE, GET, HEAD, PATCH, POST, PUT",
    "Access-Control-Allow-Headers": (
        "Content-Type, Idempotency-Key, If-Match, If-None-Match, X-Request-Id"
    ),
    "Access-Control-Max-Age": "600",
}


class Origins:
    """A WSGI application that keeps pages of other sites from using *app*.

    :param allowed: origins such as ``https://shop.example`` whose pages may use it.
    """

    def __init__(self, app: WSGIApplication, allowed: Iterable[str] = ()) -> None:
        self.app = app
        self.allowed = frozenset(allowed)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        origin, method = environ.get("HTTP_ORIGIN", ""), environ["REQUEST_METHOD"]
        is_allowed = origin in self.allowed or method in SAFE_METHODS
        if not is_allowed and is_from_another_site(environ):
            refusal = HTTPError(403, "pages of other sites may not change anything here")
            return refusal.response()(environ, start_response)
        if not self.allowed:
            return self.app(environ, start_response)
        added = {"Vary": "Origin"}
        if origin in self.allowed:
            added["Access-Control-Allow-Origin"] = origin
            if method == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ:
                return Response(204, PREFLIGHT | added)(environ, start_response)
            added["Access-Control-Expose-Headers"] = EXPOSED

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            return start_response(status, [*headers, *added.items()], *exc_info)

        return self.app(environ, start)


def is_from_another_site(environ: WSGIEnvironment) -> bool:
    """Return whether a browser sends this request for a page of another site.

    Browsers say so (https://www.w3.org/TR/fetch-metadata/); old ones send at least the Origin.
    Other clients send neither, and cannot be tricked by a page.
    """
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site is not None:
        return site not in ("same-origin", "none")
    origin, host = environ.get("HTTP_ORIGIN"), environ.get("HTTP_HOST", "")
    return origin is not None and origin.rpartition("//")[2].lower() != host.lower()
