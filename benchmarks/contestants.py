"""Ways to give a request its session and transaction, around one and the same application.

Each contestant answers any path with the same bytes; for ``/touch`` it reads one item
through its session before.  Each imports what it needs when it is made: what others do to
SQLAlchemy, such as listening to its events, must not slow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

BODY = b'{"id": 1, "name": "Item #1"}'


def bare(session_of: Callable[[], Session]) -> WSGIApplication:
    """The application, which takes its session where *session_of* says."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/touch":
            session_of().get(Item, 1)
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))]
        start_response("200 OK", headers)
        return [BODY]

    return app


def nothing(engine: Engine) -> WSGIApplication:
    """No management at all: one session for ever, on one connection in autocommit."""
    session = Session(engine.connect().execution_options(isolation_level="AUTOCOMMIT"))

    def forgetful() -> Session:
        session.expunge_all()
        return session

    return bare(forgetful)


def by_hand(engine: Engine) -> WSGIApplication:
    """try, commit, except, rollback, finally, close: written out in the view."""
    factory = sessionmaker(engine)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        session = factory()
        try:
            if environ["PATH_INFO"] == "/touch":
                session.get(Item, 1)
            session.commit()
        except BaseException:
            session.rollback()
            raise
        finally:
            session.close()
        return bare(factory)({"PATH_INFO": "/"}, start_response)

    return app


def sessionscope(engine: Engine) -> WSGIApplication:
    """This project's middleware, with its defaults."""
    return attempting(engine, 1)


def sessionscope_attempts(engine: Engine) -> WSGIApplication:
    """The same with ``attempts=3``, where nothing fails."""
    return attempting(engine, 3)


def attempting(engine: Engine, attempts: int) -> WSGIApplication:
    from sessionscope import SessionMiddleware

    registry = scoped_session(sessionmaker(engine))
    return SessionMiddleware(bare(registry), registry, attempts=attempts)


def repoze_tm2(engine: Engine) -> WSGIApplication:
    """repoze.tm2 with zope.sqlalchemy."""
    import zope.sqlalchemy
    from repoze.tm import TM, default_commit_veto

    registry = scoped_session(sessionmaker(engine))
    zope.sqlalchemy.register(registry)
    app: WSGIApplication = TM(bare(registry), commit_veto=default_commit_veto)
    return app


def article(engine: Engine) -> WSGIApplication:
    """The article's way in Flask: a context manager in each view."""
    import flask

    app = flask.Flask(__name__)
    factory = scoped_session(sessionmaker(engine))

    def view() -> flask.Response:
        session = factory()
        try:
            if flask.request.path == "/touch":
                session.get(Item, 1)
            session.commit()
        except BaseException:
            session.rollback()
            raise
        finally:
            session.close()
        return flask.Response(BODY, content_type="application/json")

    app.add_url_rule("/", view_func=view)
    app.add_url_rule("/touch", view_func=view)
    return app


CONTESTANTS: dict[str, Callable[[Engine], WSGIApplication]] = {
    "no management": nothing,
    "by hand": by_hand,
    "sessionscope": sessionscope,
    "sessionscope, attempts=3": sessionscope_attempts,
    "repoze.tm2": repoze_tm2,
    "the article, Flask": article,
}
