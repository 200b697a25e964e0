"""Files that belong to the program, served as they were when it started."""

from __future__ import annotations

import gzip
from urllib.parse import quote

from web.compression import accepts_gzip
from web.requests import JSONRequest
from web.responses import JSON, JSON_HEADERS, Response, etag_of

_SAFE = "!$&'()*+,;=:@"  # what a segment of a path may have besides (RFC 3986, 3.3)

PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # https://www.w3.org/TR/CSP3/: nothing but the page's own files and requests.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class StaticFile:
    """A file, compressed once.

    :param media_type: what the file is; its text is UTF-8.
    """

    def __init__(self, content: bytes, media_type: str) -> None:
        self.media_type = media_type
        self.plain = self.encoded(content)
        self.gzip = self.encoded(gzip.compress(content, mtime=0), {"Content-Encoding": "gzip"})

    def encoded(
        self, content: bytes, headers: dict[str, str] | None = None
    ) -> tuple[dict[str, str], list[bytes]]:
        """Return the headers and the body of one encoding of the file."""
        is_json = self.media_type == JSON
        kind = JSON_HEADERS if is_json else {"Content-Type": f"{self.media_type}; charset=utf-8"}
        about = {"Content-Length": str(len(content)), "ETag": etag_of(content)}
        rest = {} if is_json else PAGE_HEADERS
        return {**kind, **rest, **about, "Vary": "Accept-Encoding", **(headers or {})}, [content]

    def show(self, request: JSONRequest) -> Response:
        if self.media_type == "text/html" and not request.environ.get("PATH_INFO"):
            empty = {"Content-Type": self.plain[0]["Content-Type"], "Content-Length": "0"}
            return Response(308, {"Location": below(request), **empty})
        return Response(200, *(self.gzip if accepts_gzip(request) else self.plain))


def below(request: JSONRequest, name: object = "") -> str:
    """Return a reference to *name* below the root, from a request for the root.

    Relative to the URL that the client knows, whatever a proxy has made of it (RFC 9110, 10.2.2);
    that may be ``/prefix``, without a slash at its end.
    """
    if request.environ.get("PATH_INFO"):
        return f"./{name}"
    last = request.environ.get("SCRIPT_NAME", "").rpartition("/")[2]
    query = request.environ.get("QUERY_STRING", "") if not name else ""
    path = quote(last, _SAFE, encoding="latin-1")
    suffix = query and "?" + quote(query, f"{_SAFE}/?%", encoding="latin-1")
    return f"./{path}/{name}{suffix}"
