"""Where the instructions of a request to the item service go, layer by layer.

Each layer is what is left of a stack that has it when one that has it not is taken away::

    server             waitress, a client on the same connection, and an empty application
    router and JSON    the service with handlers that look nothing up
    middleware         the same under SessionMiddleware, and the Session that it makes
    statements         the real handlers, on a connection that is always open
    transaction        all together: what the stacks above do not explain

It is drawn in ``build/layers.svg``, too.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counting import counts, play
from measuring import fill
from playing import directly, served
from report import BUILD, Row
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine, make_reader
from sqlalchemy.orm import scoped_session, sessionmaker

from resources import ItemView, make_app
from serve import create_app
from web.router import Router

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

TITLE = "A request to the item service by layer, in thousands of instructions (SQLite)"
MINUTES = 2

REQUESTS = {"unknown path": "GET /nowhere", "GET /1": "GET /1", "POST /": "POST /"}
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


def rows() -> Iterator[Row]:
    reads, writes = ["GET /nowhere", "GET /1"], ["POST /"]
    jobs = {"reading": reads, "writing": writes, "empty": ["GET /"]}
    found = {stack: count(stack, "directly", jobs.get(stack, reads + writes)) for stack in STACKS}
    server = count("empty", "served", ["GET /"])["GET /"] - found["empty"]["GET /"]
    bars = {name: layers(found, job, server) for name, job in REQUESTS.items()}
    for name, bar in bars.items():
        parts = ", ".join(f"{layer} {value:.0f}" for layer, value in bar.items())
        yield Row(name, f"{sum(bar.values()):.0f}", beside=parts)
    BUILD.mkdir(exist_ok=True)
    BUILD.joinpath("layers.svg").write_text(draw(bars))


def count(stack: str, how: str, jobs: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder, 'items.db')}"
        fill(url, 1)
        return counts(__file__, stack, how, url, jobs=jobs)


def layers(found: dict[str, dict[str, float]], job: str, server: float) -> dict[str, float]:
    """Thousands of instructions of each layer of one request."""
    handlers = "writing" if job.startswith("POST") else "reading"
    router, middleware, statements, whole = (
        found[stack][job] for stack in ("router", "router, middleware", handlers, "all")
    )
    parts = {
        "server": server,
        "router and JSON": router,
        "middleware": middleware - router,
        "transaction": whole - middleware - (statements - router),
        "statements": statements - router,
    }
    return {layer: max(0.0, value / 1000) for layer, value in parts.items()}


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


if __name__ == "__main__":
    stack, how, url = sys.argv[1:]
    logging.disable()
    play({"directly": directly, "served": served}[how](STACKS[stack](url)))
