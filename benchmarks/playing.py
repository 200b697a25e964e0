"""Requests as a server makes them; ``POST /lines/60`` has a body of 60 lines.

A third word is an idempotency key: ``new`` stands for one that has not been used.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from waitress.server import create_server

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication, WSGIEnvironment

ENVIRON: WSGIEnvironment = {
    "SCRIPT_NAME": "",
    "QUERY_STRING": "",
    "SERVER_NAME": "localhost",
    "SERVER_PORT": "80",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "REMOTE_ADDR": "127.0.0.1",
    "HTTP_HOST": "localhost",
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.errors": sys.stderr,
    "wsgi.multithread": True,
    "wsgi.multiprocess": False,
    "wsgi.run_once": False,
}

LINE = b"a line of a body that is read as a text, or as some kind of table\n"


class Socket(BytesIO):
    """What cannot be rewound, and so must be recorded if it may be needed again."""

    def seekable(self) -> bool:
        return False


def call(app: WSGIApplication, method: str, path: str, key: str = "", body: Any = None) -> None:
    """Play a server that gets a request, and sends the response."""
    environ = {**ENVIRON, "REQUEST_METHOD": method, "PATH_INFO": path, "CONTENT_LENGTH": "0"}
    environ["wsgi.input"] = BytesIO() if body is None else body
    if path.startswith("/lines/"):
        environ["wsgi.input"] = Socket(LINE * int(path[7:]))
    if key:
        environ["HTTP_IDEMPOTENCY_KEY"] = uuid4().hex if key == "new" else key
    chunks = app(environ, lambda *_: bool)
    for _ in chunks:
        pass
    getattr(chunks, "close", bool)()


def directly(app: WSGIApplication) -> Callable[[str, int], None]:
    """Make requests without a server."""

    def do(job: str, times: int) -> None:
        for _ in range(times):
            call(app, *job.split())

    return do


CLIENT = """
import http.client, sys
port, times, method, path = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", int(port))
for _ in range(int(times)):
    connection.request(method, path)
    connection.getresponse().read()
"""


def served(app: WSGIApplication) -> Callable[[str, int], None]:
    """Make requests to waitress in this process, by a client that keeps its connection."""
    server = create_server(app, listen="127.0.0.1:0")
    threading.Thread(target=server.run, daemon=True).start()
    port = str(getattr(server, "effective_port"))  # noqa: B009  (not in its types)

    def do(job: str, times: int) -> None:
        command = [sys.executable, "-c", CLIENT, port, str(times), *job.split()]
        subprocess.run(command, check=True)

    return do
