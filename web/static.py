"""Files that belong to the program, served as they were when it started."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from web.router import JSONRequest, Response, etag_of

_SAFE = "!$&'()*+,;=:@"  # what a segment of a path may have besides (RFC 3986, 3.3)

HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # https://www.w3.org/TR/CSP3/: nothing but the page's own files and requests.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class StaticFile:
    """A file, read once.

    :param path: where it is.
    :param media_type: what it is; its text is UTF-8.
    :raises OSError: where it cannot be read.
    """

    def __init__(self, path: Path, media_type: str) -> None:
        self.content = path.read_bytes()
        self.headers = {
            "Content-Type": f"{media_type}; charset=utf-8",
            "Content-Length": str(len(self.content)),
            "ETag": etag_of(self.content),
            **HEADERS,
        }

    def show(self, request: JSONRequest) -> Response:
        """Get a file of the page for people."""
        if not request.environ.get("PATH_INFO"):
            empty = {"Content-Type": self.headers["Content-Type"], "Content-Length": "0"}
            return Response(308, {"Location": _with_slash(request), **empty})
        return Response(200, {**self.headers}, [self.content])


def _with_slash(request: JSONRequest) -> str:
    """Where the root is when it was asked for as ``/prefix``: links in it begin at ``/prefix/``.

    Relative to the URL that the client knows (RFC 9110, 10.2.2), whatever a proxy has made of it.
    """
    last = request.environ.get("SCRIPT_NAME", "").rpartition("/")[2]
    query = request.environ.get("QUERY_STRING", "")
    path = quote(last, _SAFE, encoding="latin-1")
    return f"./{path}/" + (query and "?" + quote(query, f"{_SAFE}/?%", encoding="latin-1"))
