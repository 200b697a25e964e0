"""The item service, and the same three routes in other ways, on the same database.

Each writes what it is given to a disk before it answers: SQLite with ``synchronous=FULL`` and
a write-ahead log, PostgreSQL with its defaults.  Each imports what it needs when it is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from plain import PRAGMAS, Base, Item, make_durable, make_engine
from sqlalchemy import make_url, select
from sqlalchemy.orm import Session, scoped_session, sessionmaker

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

NOT_FOUND = {"error": "not found"}


def registry_at(url: str) -> scoped_session[Session]:
    return scoped_session(sessionmaker(make_engine(url)))


def shown(item: Any) -> dict[str, Any]:
    return {"id": item.id, "name": item.name}


def create(session: Any) -> dict[str, Any]:
    item = Item()
    session.add(item)
    session.flush()
    item.name = f"Item #{item.id}"
    return shown(item)


def index(session: Any) -> dict[str, Any]:
    return {"items": [shown(item) for item in session.scalars(select(Item).order_by(Item.id))]}


def show(session: Any, id: int) -> dict[str, Any] | None:
    item = session.get(Item, id)
    return None if item is None else shown(item)


def ours(url: str) -> WSGIApplication:
    """The item service with its defaults, which log each request."""
    from serve import create_app

    return create_app(url)


def floor(url: str) -> WSGIApplication:
    """No framework: a function that does what the path says, between begin and commit."""
    factory = sessionmaker(make_engine(url))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        session = factory()
        try:
            if path != "/":
                answer = show(session, int(path[1:]))
            elif environ["REQUEST_METHOD"] == "POST":
                answer = create(session)
            else:
                answer = index(session)
            session.commit()
        except BaseException:
            session.rollback()
            raise
        finally:
            session.close()
        body = json.dumps(answer or NOT_FOUND).encode()
        status = "200 OK" if answer else "404 Not Found"
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response(status, headers)
        return [body]

    return app


def article(url: str) -> WSGIApplication:
    """Flask, with a context manager in each view: a recipe that was published in 2016."""
    registry = registry_at(url)

    @contextmanager
    def session_scope() -> Iterator[Session]:
        session = registry()
        try:
            yield session
            session.commit()
        except BaseException:
            session.rollback()
            raise
        finally:
            registry.remove()

    def view(operation: Callable[..., Any]) -> Callable[..., Any]:
        def within(**arguments: int) -> Any:
            with session_scope() as session:
                return operation(session, **arguments)

        return within

    return with_flask(view)


def flask_sqlalchemy(url: str) -> WSGIApplication:
    """Flask-SQLAlchemy: the view commits what it has written."""
    from flask_sqlalchemy import SQLAlchemy

    database = SQLAlchemy(model_class=Base)

    def view(operation: Callable[..., Any]) -> Callable[..., Any]:
        def within(**arguments: int) -> Any:
            answer = operation(database.session, **arguments)
            if operation is create:
                database.session.commit()
            return answer

        return within

    app: Any = with_flask(view)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    database.init_app(app)
    with app.app_context():
        make_durable(database.engine)
    return app  # type: ignore[no-any-return]


def with_flask(view: Callable[[Callable[..., Any]], Callable[..., Any]]) -> WSGIApplication:
    from flask import Flask

    app = Flask(__name__)
    app.add_url_rule("/", "index", view(index))
    app.add_url_rule("/", "create", view(create), methods=["POST"])
    found = view(show)
    app.add_url_rule("/<int:id>", "show", lambda id: found(id=id) or (NOT_FOUND, 404))
    return app


def django(url: str) -> WSGIApplication:
    """Django with its own ORM, and ATOMIC_REQUESTS."""
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application

    parts = make_url(url)
    database: dict[str, Any] = {
        "ENGINE": f"django.db.backends.{parts.get_backend_name().replace('sqlite', 'sqlite3')}",
        "NAME": parts.database,
        "USER": parts.username,
        "HOST": parts.host,
        "PORT": parts.port,
        "ATOMIC_REQUESTS": True,
        "CONN_MAX_AGE": None,
    }
    if "sqlite" in url:
        database["OPTIONS"] = {"init_command": "; ".join(PRAGMAS)}
    settings.configure(
        SECRET_KEY="benchmark",
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF="items_in_django",
        DATABASES={"default": database},
        LOGGING_CONFIG=None,
    )
    return get_wsgi_application()  # type: ignore[no-any-return]


SERVICES: dict[str, Callable[[str], WSGIApplication]] = {
    "item service": ours,
    "floor": floor,
    "article": article,
    "Flask-SQLAlchemy": flask_sqlalchemy,
    "Django": django,
}
