"""Ways to give a request its session and transaction, around one and the same application.

The path says what that does: ``/`` nothing, ``/read`` reads an item, ``/refused`` too and
answers 404, ``/add`` adds one, ``/create`` one that is named after its id, ``/stream/N`` reads
one and sends N chunks, ``/lines/N`` reads its body by lines, ``/body`` at once.

Each contestant imports what it needs when it is made: what others do to SQLAlchemy, such as
listening to its events, must not slow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from plain import Item
from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

BODY = b'{"id": 1, "name": "Item #1"}'
HEADERS = [("Content-Type", "application/json")]


def work(
    session_of: Callable[[], Session], environ: WSGIEnvironment
) -> tuple[str, Iterable[bytes]]:
    """Do what the path says; the status and the body."""
    what, _, number = environ["PATH_INFO"][1:].partition("/")
    if what == "lines":
        for _ in environ["wsgi.input"]:
            pass
    elif what == "body":
        environ["wsgi.input"].read()
    elif what == "add":
        session_of().add(Item(name="a lamp"))
    elif what == "create":
        session, item = session_of(), Item()
        session.add(item)
        session.flush()
        item.name = f"Item #{item.id}"
    elif what:
        session_of().get(Item, 1)
    body = (BODY for _ in range(int(number))) if what == "stream" else [BODY]
    return "404 Not Found" if what == "refused" else "200 OK", body


def bare(session_of: Callable[[], Session]) -> WSGIApplication:
    """The application, which takes its session where *session_of* says."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status, body = work(session_of, environ)
        start_response(status, list(HEADERS))
        return body

    return app


def nothing(engine: Engine) -> WSGIApplication:
    """No management at all: one session for ever, on one connection in autocommit."""
    session = Session(engine.connect().execution_options(isolation_level="AUTOCOMMIT"))

    def forgetful() -> Session:
        session.expunge_all()
        return session

    return bare(forgetful)


def by_hand(engine: Engine) -> WSGIApplication:
    """commit, rollback, close: written out in the view."""
    factory = sessionmaker(engine)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        session = factory()
        try:
            status, body = work(lambda: session, environ)
            if status < "4":
                session.commit()
            else:
                session.rollback()
        except BaseException:
            session.rollback()
            raise
        finally:
            session.close()
        start_response(status, list(HEADERS))
        return body

    return app


def by_hand_beside(engine: Engine) -> WSGIApplication:
    """The same in a process that has imported sessionscope."""
    import sessionscope.middleware  # noqa: F401

    return by_hand(engine)


def sessionscope(engine: Engine, **options: Any) -> WSGIApplication:
    """This project's middleware."""
    from sessionscope import SessionMiddleware

    registry = scoped_session(sessionmaker(engine))
    return SessionMiddleware(bare(registry), registry, **options)


def with_debug_log(engine: Engine) -> WSGIApplication:
    """The same with its log at DEBUG, which a handler writes to standard error."""
    import logging

    logging.basicConfig()
    logging.getLogger("sessionscope").setLevel(logging.DEBUG)
    return sessionscope(engine)


def with_keys(engine: Engine) -> WSGIApplication:
    """The same with the layer that has requests with a key done once."""
    from sessionscope import SessionMiddleware
    from sessionscope.idempotency import Idempotency

    from models import keys

    registry = scoped_session(sessionmaker(engine))
    once = Idempotency(bare(registry), keys, scope=lambda environ: "")
    return SessionMiddleware(once, registry)


def repoze_tm2(engine: Engine) -> WSGIApplication:
    """repoze.tm2 with zope.sqlalchemy."""
    import zope.sqlalchemy
    from repoze.tm import TM, default_commit_veto

    registry = scoped_session(sessionmaker(engine))
    zope.sqlalchemy.register(registry)
    app: WSGIApplication = TM(bare(registry), commit_veto=default_commit_veto)
    return app


CONTESTANTS: dict[str, Callable[[Engine], WSGIApplication]] = {
    "no management": nothing,
    "by hand": by_hand,
    "by hand, beside sessionscope": by_hand_beside,
    "sessionscope": sessionscope,
    "attempts=3": lambda engine: sessionscope(engine, attempts=3),
    "observer": lambda engine: sessionscope(engine, observer=bool),
    "DEBUG": with_debug_log,
    "confirm=True": lambda engine: sessionscope(engine, confirm=True),
    "Idempotency": with_keys,
    "repoze.tm2": repoze_tm2,
}
