"""Where the instructions of a request to the item service go, layer by layer.

``make bench`` runs it where ``valgrind`` is installed.  Each layer is what is left of a
stack that has it when one that has it not is taken away::

    server             waitress, a client on the same connection, and an empty application
    router and JSON    the service with handlers that look nothing up
    middleware         the same under SessionMiddleware, and the Session that it makes
    statements         the real handlers, on a connection that is always open
    transaction        all together: what the stacks above do not explain

It prints a table, and draws it in ``build/layers.svg``.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counting import count, request
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine, make_reader
from sqlalchemy import insert
from sqlalchemy.orm import scoped_session, sessionmaker
from waitress.server import create_server

from models import Item
from resources import ItemView, make_app
from serve import create_app
from web.database import create_tables
from web.router import Router

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

REQUESTS = {"unknown path": ("GET", "/nowhere"), "GET /1": ("GET", "/1"), "POST /": ("POST", "/")}
PICTURE = Path(__file__).parent.parent / "build" / "layers.svg"
COLOURS = {
    "server": "#5b6b7f",
    "router and JSON": "#8a6d1f",
    "middleware": "#28704a",
    "transaction": "#3f6ea8",
    "statements": "#7a4b94",
}


def always_open(engine: Any) -> Any:
    """Make a registry whose session begins once, and never ends."""
    return scoped_session(sessionmaker(engine))


def constant(url: str) -> Router:
    """The routes of the items, with handlers that know the answer."""
    app = make_app(scoped_session(sessionmaker()))
    for resource in app.resources.values():
        for routes in resource.methods.values():
            for route in routes.values():
                route.handler = lambda *_, **__: ItemView(1, "Item #1")
    return app


def empty(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    start_response("200 OK", [("Content-Length", "2")])
    return [b"{}"]


def managed(url: str) -> WSGIApplication:
    registry = scoped_session(sessionmaker(make_engine(url)))
    options: dict[str, Any] = {"attempts": 5, "confirm": True, "reader": make_reader(url)}
    return SessionMiddleware(constant(url), registry, **options)


STACKS: dict[str, Callable[[str], WSGIApplication]] = {
    "empty": lambda url: empty,
    "router": constant,
    "router, middleware": managed,
    "reading": lambda url: make_app(always_open(make_reader(url))),
    "writing": lambda url: make_app(always_open(make_engine(url))),
    "all": create_app,
}

CLIENT = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    connection.request("GET", "/")
    connection.getresponse().read()
"""


def play(stack: str, method: str, path: str) -> None:
    """Serve as many requests as each line of the input says; through a socket for *served*."""
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/items.db"
        engine = make_engine(url)
        create_tables(engine)
        with engine.begin() as connection:
            connection.execute(insert(Item).values(id=1, name="Item #1"))
        app = STACKS[stack](url)
        server = create_server(app, listen="127.0.0.1:0")
        threading.Thread(target=server.run, daemon=True).start()
        for line in sys.stdin:
            if method == "served":
                port = str(getattr(server, "effective_port"))  # noqa: B009  (not in its types)
                subprocess.run([sys.executable, "-c", CLIENT, port, line], check=True)
            else:
                for _ in range(int(line)):
                    request(app, method, path)
            print(0, flush=True)


def layers(method: str, path: str, server: float) -> dict[str, float]:
    """Thousands of instructions of each layer of one request."""
    handlers = "writing" if method == "POST" else "reading"
    router, middleware, statements, whole = (
        count(__file__, stack, method, path)
        for stack in ("router", "router, middleware", handlers, "all")
    )
    found = {
        "server": server,
        "router and JSON": router,
        "middleware": middleware - router,
        "transaction": whole - middleware - (statements - router),
        "statements": statements - router,
    }
    return {layer: max(0.0, value / 1000) for layer, value in found.items()}


def draw(bars: dict[str, dict[str, float]]) -> str:
    """Draw stacked bars, on a ground of their own for light and dark pages."""
    scale = 560 / max(sum(bar.values()) for bar in bars.values())
    height = 46 * len(bars) + 52
    parts = [f'<rect width="720" height="{height}" rx="6" fill="#f4f6f8"/>']
    for row, (name, bar) in enumerate(bars.items()):
        y, x = 14 + 46 * row, 120.0
        parts.append(f'<text x="110" y="{y + 20}" text-anchor="end">{name}</text>')
        for layer, value in bar.items():
            width = value * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="30" '
                f'fill="{COLOURS[layer]}"/>'
            )
            if width > 24:
                middle = x + width / 2
                parts.append(
                    f'<text x="{middle:.1f}" y="{y + 20}" text-anchor="middle" fill="white">'
                    f"{value:.0f}</text>"
                )
            x += width
    x = 120.0
    for layer, colour in COLOURS.items():
        parts.append(
            f'<rect x="{x:.0f}" y="{height - 27}" width="12" height="12" fill="{colour}"/>'
        )
        parts.append(f'<text x="{x + 17:.0f}" y="{height - 17}">{layer}</text>')
        x += 38 + 7 * len(layer)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" role="img" '
        'font-family="Helvetica,Arial,sans-serif" font-size="13" fill="#1c2430">\n'
        "<title>Thousands of instructions of a request, by layer</title>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    if shutil.which("valgrind") is None:
        print("\nvalgrind is not installed: no layers are counted")
        return
    server = count(__file__, "empty", "served", "/") - count(__file__, "empty", "GET", "/")
    bars = {name: layers(*asked, server) for name, asked in REQUESTS.items()}
    print("\nthousands of instructions of a request to the item service, SQLite")
    print(" " * 14 + "".join(f"{layer:>17}" for layer in COLOURS) + f"{'sum':>8}")
    for name, bar in bars.items():
        values = "".join(f"{value:17.0f}" for value in bar.values())
        print(f"  {name:12}{values}{sum(bar.values()):8.0f}")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(bars))
    print(f"drawn in {PICTURE.relative_to(PICTURE.parent.parent.parent)}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        play(*sys.argv[1:])
