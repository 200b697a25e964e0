"""Requests of an application that reports to Sentry, in a process of its own.

An SDK that was initialised once stays in its process: it has patched Flask, the standard
library and SQLAlchemy.  ``python extension_sentry.py URL`` prints what would have been sent.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import flask
import sentry_sdk
from sentry_sdk.transport import Transport
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import fetch, refuse_commit, serving

from models import Item

if TYPE_CHECKING:
    from sentry_sdk.envelope import Envelope


class Kept(Transport):
    """A transport that keeps what it is given to send."""

    def __init__(self) -> None:
        super().__init__()
        self.payloads: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.payloads += [item.payload.json for item in envelope.items if item.payload.json]


def make_app(registry: scoped_session[Session]) -> flask.Flask:
    app = flask.Flask(__name__)

    @app.post("/kept")
    def keep() -> str:
        registry.add(Item(name="kept"))  # flushed at COMMIT
        return "ok"

    @app.post("/refused")
    def refuse() -> str:
        refuse_commit(registry)
        return "ok"

    app.wsgi_app = SessionMiddleware(app.wsgi_app, registry)  # type: ignore[method-assign]
    return app


def main(url: str) -> None:
    kept = Kept()
    sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=kept, traces_sample_rate=1.0)
    engine = make_engine(url)
    app = make_app(scoped_session(sessionmaker(engine)))
    with serving(app) as port:
        statuses = [fetch(port, "POST", path).status for path in ("/kept", "/refused")]
    engine.dispose()
    json.dump({"statuses": statuses, "payloads": kept.payloads}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
