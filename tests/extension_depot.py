"""Requests of an application whose rows have files, in a process of its own.

Depot listens to every Session of its process.  ``python extension_depot.py URL FOLDER WORK STATUS
...`` makes requests that do such work and answer with such a status; the files are in the folder.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from depot.fields.sqlalchemy import UploadedFileField
from depot.manager import DepotManager
from sessionscope import SessionMiddleware
from sessionscope.engines import make_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from support import environ, refuse_commit, serve_once

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


class Base(DeclarativeBase):
    """The tables of this module."""


class Document(Base):
    """A row and its file."""

    __tablename__ = "documents"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[bytes] = mapped_column(UploadedFileField)


def make_app(registry: scoped_session[Session]) -> WSGIApplication:
    """An application that does the work of the path, and answers with the status of the query."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        work = environ["PATH_INFO"].strip("/")
        if work.startswith("replace"):
            registry.get_one(Document, 1).file = b"new content"
        else:
            registry.add(Document(id=1, file=b"content"))
        if work == "flush":
            registry.flush()
        if work == "replace-in-vain":
            refuse_commit(registry)
        start_response(f"{environ['QUERY_STRING']} Told", [])
        return []

    return SessionMiddleware(app, registry)


def main(url: str, folder: str, *requests: str) -> None:
    DepotManager.configure("default", {"depot.storage_path": folder})
    engine = make_engine(url)
    Base.metadata.create_all(engine)
    app = make_app(scoped_session(sessionmaker(engine)))
    for work, status in zip(requests[::2], requests[1::2], strict=True):
        with suppress(IntegrityError):
            serve_once(app, environ("POST", f"/{work}", QUERY_STRING=status))
    engine.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:])
