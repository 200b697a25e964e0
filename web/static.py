"""Files that belong to the program, as they were when it started."""

import gzip
from urllib.parse import quote

from web.requests import JSONRequest
from web.responses import JSON, JSON_HEADERS, Response, etag_of

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

_SAFE = "!$&'()*+,;=:@"  # allowed in a segment of a path (RFC 3986, 3.3)


class StaticFile:
    """A file of UTF-8 text, compressed once."""

    def __init__(self, content: bytes, media_type: str) -> None:
        text = {"Content-Type": f"{media_type}; charset=utf-8", **PAGE_HEADERS}
        headers = {**(JSON_HEADERS if media_type == JSON else text), "Vary": "Accept-Encoding"}
        packed = gzip.compress(content, mtime=0)
        self.is_page = media_type == "text/html"
        self.plain = headers, [content], etag_of(content)
        self.gzip = {**headers, "Content-Encoding": "gzip"}, [packed], etag_of(packed)

    def show(self, request: JSONRequest) -> Response:
        if self.is_page and not request.environ.get("PATH_INFO"):
            return Response(308, {"Location": below(request), "Content-Type": "text/html"}, [])
        return Response(200, *(self.gzip if request.accepts_gzip() else self.plain))


def below(request: JSONRequest, name: object = "") -> str:
    """Return a reference to *name* below the root, from a request for the root.

    It is relative to the URL that the client used, whatever a proxy has made of that (RFC 9110,
    10.2.2), even to ``/prefix`` without a slash at its end.
    """
    if request.environ.get("PATH_INFO"):
        return f"./{name}"
    last = request.environ.get("SCRIPT_NAME", "").rpartition("/")[2]
    query = request.environ.get("QUERY_STRING", "") if not name else ""
    path = quote(last, _SAFE, encoding="latin-1")
    suffix = query and "?" + quote(query, f"{_SAFE}/?%", encoding="latin-1")
    return f"./{path}/{name}{suffix}"
