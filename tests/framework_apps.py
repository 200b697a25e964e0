"""One small application on each framework, for test_frameworks.py.

All of them answer ``/<action>`` with what `work` makes of it, through one registry, and
none commits, rolls back or closes anything itself.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import bottle
import django
import falcon
import flask
from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.core.handlers.wsgi import WSGIHandler
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.urls import path
from sqlalchemy import func, select
from sqlalchemy.orm import scoped_session, sessionmaker
from support import refuse_commit

from models import Item

with warnings.catch_warnings():
    # Pyramid 2.1 imports pkg_resources, which newer releases of setuptools deprecate.
    warnings.simplefilter("ignore")
    from pyramid.config import Configurator
    from pyramid.httpexceptions import HTTPConflict
    from pyramid.response import Response

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

registry = scoped_session(sessionmaker())

opened: list[io.BytesIO] = []
"""The files that were handed to the frameworks."""

PLAIN = "text/plain"


def work(action: str, body: Callable[[], bytes]) -> Any:
    """Do what *action* says; bytes, an iterator of bytes or a file to answer with.

    :param body: reads that of the request.
    """
    if action == "read":
        return b"%d items" % registry.scalars(select(func.count(Item.id))).one()
    if action == "late":
        return stream(action)
    name = body() if action == "named" else b"first"
    item = Item(name=name.decode())
    registry.add(item)
    if action == "crash":
        registry.flush()
        raise RuntimeError("crash, on purpose")
    if action in ("stream", "fail", "owe-stream"):
        return stream(action)
    if action in ("owe", "owe-file"):
        refuse_commit(registry)
    if action in ("file", "owe-file"):
        opened.append(io.BytesIO(b"from a file"))
        return opened[-1]
    registry.flush()
    return b"item %d is %b" % (item.id, name)


def stream(action: str) -> Iterator[bytes]:
    yield b"one,"
    registry.add(Item(name="second"))
    yield b"two,"
    if action == "fail":
        raise RuntimeError("midway, on purpose")
    if action == "owe-stream":
        refuse_commit(registry)
    yield b"three"


def flask_app() -> flask.Flask:
    app = flask.Flask(__name__)

    @app.route("/<action>", methods=["GET", "POST"])
    def view(action: str) -> flask.Response:
        made = work(action, flask.request.get_data)
        if action == "refuse":
            flask.abort(409)
        if action.endswith("file"):
            return flask.send_file(made, PLAIN)
        return flask.Response(made, mimetype=PLAIN)

    return app


def pyramid_app() -> WSGIApplication:
    def view(request: Any) -> Any:
        action = request.matchdict["action"]
        made = work(action, lambda: request.body)
        if action == "refuse":
            raise HTTPConflict
        if isinstance(made, bytes):
            return Response(made, content_type=PLAIN)
        if action.endswith("file"):
            made = request.environ["wsgi.file_wrapper"](made)
        return Response(app_iter=made, content_type=PLAIN)

    with Configurator() as configuration:
        configuration.add_route("action", "/{action}")
        configuration.add_view(view, route_name="action")
        app: WSGIApplication = configuration.make_wsgi_app()
    return app


def falcon_app() -> WSGIApplication:
    class Actions:
        def on_post(self, request: falcon.Request, response: falcon.Response, action: str) -> None:
            made = work(action, request.bounded_stream.read)
            if action == "refuse":
                raise falcon.HTTPConflict
            response.content_type = PLAIN
            if isinstance(made, bytes):
                response.data = made
            else:
                response.stream = made

        on_get = on_post

    app = falcon.App()
    app.add_route("/{action}", Actions())
    return app


def bottle_app() -> WSGIApplication:
    app = bottle.Bottle()

    def view(action: str) -> Any:
        made = work(action, bottle.request.body.read)
        if action == "refuse":
            bottle.abort(409)
        bottle.response.content_type = PLAIN
        return made

    app.route("/<action>", method=["GET", "POST"], callback=view)
    wsgi: WSGIApplication = app
    return wsgi


def django_view(request: Any, action: str) -> Any:
    made = work(action, lambda: request.body)
    if action == "refuse":
        raise PermissionDenied
    if isinstance(made, bytes):
        return HttpResponse(made, content_type=PLAIN)
    kind = FileResponse if action.endswith("file") else StreamingHttpResponse
    return kind(made, content_type=PLAIN)


urlpatterns = [path("<action>", django_view)]


settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    LOGGING_CONFIG=None,
    # As in every project that Django makes; it declares the Content-Length.
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
)
django.setup()


def django_app() -> WSGIApplication:
    app: WSGIApplication = WSGIHandler()
    return app


FRAMEWORKS: dict[str, Callable[[], WSGIApplication]] = {
    "flask": flask_app,
    "pyramid": pyramid_app,
    "falcon": falcon_app,
    "bottle": bottle_app,
    "django": django_app,
}
