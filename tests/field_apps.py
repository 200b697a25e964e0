"""Applications of the field matrix (`field`), each written as its users write theirs.

``FIELD_APP`` names one of `APPS`, and ``FIELD_URL`` its database.  All but the item service
answer ``/<action>?name=x`` with what `work` makes of it.  The engine is made, and the tables
are created, when the server imports this module; a framework is imported only if it is served.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs

from sessionscope import SessionMiddleware
from sqlalchemy import Engine, create_engine, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from models import Base, Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

Registry = scoped_session[Session]

TAKEN = 1
"""The id of an item that is always there."""

PLAIN = "text/plain"


def connect_args(url: str) -> dict[str, Any]:
    """SQLite has one writer at a time, so users let the others wait."""
    return {"timeout": 30} if url.startswith("sqlite") else {}


def engine_at(url: str) -> Engine:
    engine = create_engine(url, connect_args=connect_args(url))
    Base.metadata.create_all(engine)
    # The server may fork now, and two processes must not share this connection.
    engine.dispose()
    return engine


def registry_at(url: str) -> Registry:
    return scoped_session(sessionmaker(engine_at(url)))


# What a request does.


def others_run() -> None:
    """Let other requests run in between, on every kind of server."""
    time.sleep(0.002)


def is_sqlite(session: Registry) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def add(session: Registry, name: str) -> None:
    session.add(Item(name=name))
    others_run()


def write(session: Registry, name: str) -> None:
    """Insert a row, and keep the transaction open for a while."""
    session.add(Item(name=name))
    session.flush()
    # Who waits for SQLite's lock stops all greenlets, also the one that has it.
    if not is_sqlite(session):
        others_run()


def core(session: Registry, name: str) -> None:
    session.execute(insert(Item).values(name=name))


def by_text(session: Registry, name: str) -> None:
    session.execute(text("INSERT INTO items (name) VALUES (:name)"), {"name": name})


def crash(session: Registry, name: str) -> None:
    write(session, name)
    raise RuntimeError("crash, on purpose")


def swallow(session: Registry, name: str) -> None:
    """On PostgreSQL, and with OR ROLLBACK on SQLite, the error takes the first row away."""
    write(session, name)
    verb = "INSERT OR ROLLBACK" if is_sqlite(session) else "INSERT"
    with suppress(DBAPIError):
        session.execute(text(f"{verb} INTO items (id, name) VALUES ({TAKEN}, 'again')"))


def killed(session: Registry, name: str) -> None:
    """A view that gevent kills while it waits for something else."""
    from gevent import Timeout

    with Timeout(0.02):
        # SQLite's lock must not be held then, as above.
        (add if is_sqlite(session) else write)(session, name)
        time.sleep(60)


def killed_in_query(session: Registry, name: str) -> None:
    """A view that gevent kills while it waits for the database."""
    from gevent import Timeout

    with Timeout(0.02):
        write(session, name)
        sleep = {"postgresql": func.pg_sleep, "mysql": func.sleep, "mariadb": func.sleep}
        session.execute(select(sleep[session.get_bind().dialect.name](0.5)))


ACTIONS: dict[str, Callable[[Registry, str], None]] = {
    "orm": add,
    "core": core,
    "text": by_text,
    "refuse": write,
    "crash": crash,
    "swallow": swallow,
    "killed": killed,
    "killed-in-query": killed_in_query,
}


def work(session: Registry, action: str, name: str) -> bytes | Iterator[bytes]:
    """Do what *action* says, and return what to answer with."""
    session.scalar(select(Item.name).where(Item.id == TAKEN))
    others_run()
    if action == "stream":
        return stream(session, name)
    ACTIONS[action](session, name)
    return name.encode()


def stream(session: Registry, name: str) -> Iterator[bytes]:
    yield b"one,"
    add(session, name)
    if not is_sqlite(session):  # as above
        session.flush()
    yield b"two,"
    others_run()
    yield b"three"
    write(session, f"{name}'")


# Ways to write an application.


def plain(url: str) -> WSGIApplication:
    session = registry_at(url)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        action = environ["PATH_INFO"].strip("/")
        made = work(session, action, parse_qs(environ["QUERY_STRING"])["name"][0])
        status = "409 Conflict" if action == "refuse" else "200 OK"
        headers = [("Content-Type", PLAIN)]
        if isinstance(made, bytes):
            headers.append(("Content-Length", str(len(made))))
        start_response(status, headers)
        return [made] if isinstance(made, bytes) else made

    return SessionMiddleware(app, session)


def flask(url: str) -> WSGIApplication:
    """Flask with the recipe of SQLAlchemy's documentation still in place."""
    from flask import Flask, Response, abort, request

    app, session = Flask(__name__), registry_at(url)

    @app.teardown_appcontext
    def remove(_error: BaseException | None) -> None:
        session.remove()

    @app.post("/<action>")
    def view(action: str) -> Response:
        made = work(session, action, request.args["name"])
        if action == "refuse":
            abort(409)
        return Response(made, mimetype=PLAIN)

    return SessionMiddleware(app, session)


def flask_sqlalchemy(url: str) -> WSGIApplication:
    from flask import Flask, Response, abort, request, stream_with_context
    from flask_sqlalchemy import SQLAlchemy

    app, db = Flask(__name__), SQLAlchemy()
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"connect_args": connect_args(url)}
    db.init_app(app)
    with app.app_context():
        Base.metadata.create_all(db.engine)
        db.engine.dispose()  # before the server forks
    session = cast(Registry, db.session)

    @app.post("/<action>")
    def view(action: str) -> Response:
        made = work(session, action, request.args["name"])
        if action == "refuse":
            abort(409)
        if not isinstance(made, bytes):
            made = stream_with_context(made)  # db.session needs the application's context
        return Response(made, mimetype=PLAIN)

    wsgi_app: WSGIApplication = app.wsgi_app
    app.wsgi_app = SessionMiddleware(wsgi_app, session)  # type: ignore[method-assign]
    return app


def flask_async(url: str) -> WSGIApplication:
    from flask import Flask, Response, abort, request

    app, session = Flask(__name__), registry_at(url)

    @app.post("/<action>")
    async def view(action: str) -> Response:
        made = work(session, action, request.args["name"])
        if action == "refuse":
            abort(409)
        return Response(made, mimetype=PLAIN)

    return SessionMiddleware(app, session)


urlpatterns: list[Any] = []
"""Where Django looks for them."""


def django_async(url: str) -> WSGIApplication:
    import django
    from django.conf import settings
    from django.core.exceptions import BadRequest
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpResponse, StreamingHttpResponse
    from django.urls import path

    session = registry_at(url)

    async def chunks(made: Iterator[bytes]) -> AsyncIterator[bytes]:
        for chunk in made:
            yield chunk

    async def view(request: Any, action: str) -> Any:
        made = work(session, action, request.GET["name"])
        if action == "refuse":
            raise BadRequest
        if isinstance(made, bytes):
            return HttpResponse(made, content_type=PLAIN)
        return StreamingHttpResponse(chunks(made), content_type=PLAIN)

    urlpatterns.append(path("<action>", view))
    settings.configure(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        # As in every project that Django makes; it declares the Content-Length.
        MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    )
    django.setup()
    return SessionMiddleware(get_wsgi_application(), session)


def pyramid(url: str) -> WSGIApplication:
    from pyramid.config import Configurator
    from pyramid.httpexceptions import HTTPConflict
    from pyramid.response import Response

    session = registry_at(url)

    def view(request: Any) -> Any:
        action = request.matchdict["action"]
        made = work(request.dbsession, action, request.GET["name"])
        if action == "refuse":
            raise HTTPConflict
        if isinstance(made, bytes):
            return Response(made, content_type=PLAIN)
        return Response(app_iter=made, content_type=PLAIN)

    with Configurator() as config:
        config.add_request_method(lambda request: session(), "dbsession", reify=True)
        config.add_route("action", "/{action}")
        config.add_view(view, route_name="action")
        app: WSGIApplication = config.make_wsgi_app()
    return SessionMiddleware(app, session)


def falcon(url: str) -> WSGIApplication:
    from falcon import App, HTTPConflict, Request, Response

    session = registry_at(url)

    class Actions:
        def on_post(self, request: Request, response: Response, action: str) -> None:
            made = work(session, action, request.get_param("name", required=True))
            if action == "refuse":
                raise HTTPConflict
            response.content_type = PLAIN
            if isinstance(made, bytes):
                response.data = made
            else:
                response.stream = made

    app = App()
    app.add_route("/{action}", Actions())
    return SessionMiddleware(app, session)


def bottle(url: str) -> WSGIApplication:
    from bottle import Bottle, abort, request, response

    app, session = Bottle(), registry_at(url)

    @app.post("/<action>")  # type: ignore[untyped-decorator]
    def view(action: str) -> bytes | Iterator[bytes]:
        made = work(session, action, request.query.name)
        if action == "refuse":
            abort(409)
        response.content_type = PLAIN
        return made

    return SessionMiddleware(app, session)


def service(url: str) -> WSGIApplication:
    from serve import create_app

    return create_app(url)


APPS: dict[str, Callable[[str], WSGIApplication]] = {
    "plain": plain,
    "flask": flask,
    "flask-sqlalchemy": flask_sqlalchemy,
    "flask-async": flask_async,
    "django-async": django_async,
    "pyramid": pyramid,
    "falcon": falcon,
    "bottle": bottle,
    "service": service,
}

application = APPS[os.environ["FIELD_APP"]](os.environ["FIELD_URL"])


# Adapters for ASGI servers.


def a2wsgi() -> Any:
    from a2wsgi import WSGIMiddleware

    return WSGIMiddleware(cast(Any, application))


def asgiref() -> Any:
    from asgiref.wsgi import WsgiToAsgi

    adapter: Any = WsgiToAsgi
    return adapter(application)


def starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.middleware.wsgi import WSGIMiddleware

    app = Starlette()
    app.mount("/", WSGIMiddleware(application))
    return app
