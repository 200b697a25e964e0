"""The whole item service, a client of it, and a second engine on its database.

A test module takes the fixtures that it wants: ``any_service = item_service.any_service``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.validate import validator

import pytest
from sessionscope.engines import make_engine
from sqlalchemy import Engine, select
from support import Reply, environ, serve_once
from webtest import TestApp

import serve
from models import Base, Item

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication


@dataclass
class Service:
    """The whole service, a client of it, and a second engine on its database."""

    app: WSGIApplication
    client: TestApp
    outside: Engine

    def rows(self) -> list[tuple[int, str | None]]:
        """What is durable."""
        with self.outside.connect() as connection:
            found = connection.execute(select(Item.id, Item.name).order_by(Item.id))
            return [(id, name) for id, name in found]

    def post(self, body: bytes, status: int, **options: Any) -> Any:
        options.setdefault("content_type", "application/json")
        return self.client.post("/", body, status=status, **options)

    def send(self, method: str, path: str, body: bytes = b"", **more: Any) -> Reply:
        """Send JSON with what *more* is in the environ."""
        return self.send_raw(method, path, body, **{"CONTENT_LENGTH": str(len(body)), **more})

    def send_raw(self, method: str, path: str, body: bytes, **more: Any) -> Reply:
        """Send JSON as a server would that knows only what *more* says of it."""
        stream = io.BytesIO(body)
        given = {"CONTENT_TYPE": "application/json", "wsgi.input": stream, **more}
        return serve_once(validator(self.app), environ(method, path, **given))


@contextmanager
def service_at(url: str, **options: Any) -> Iterator[Service]:
    """Run the service; at the end no connection may be out."""
    app = serve.create_app(url, **options)
    outside = make_engine(url)
    yield Service(app, TestApp(validator(app)), outside)
    left = [engine.pool.checkedout() for engine in app.engines.values()]  # type: ignore[attr-defined]
    app.dispose()
    Base.metadata.drop_all(outside)
    outside.dispose()
    assert not any(left), "a connection was not returned to its pool"


@pytest.fixture
def memory_url(tmp_path: Path) -> str:
    """A database in memory that a second engine of this process can look into."""
    return f"sqlite:///file:{tmp_path.name}?mode=memory&cache=shared&uri=true"


@pytest.fixture
def service(sqlite_url: str) -> Iterator[Service]:
    """The service on a SQLite file."""
    with service_at(sqlite_url) as made:
        yield made


@pytest.fixture(params=["sqlite", "memory", "postgresql", "mariadb"])
def any_service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """The service on each database in turn."""
    with service_at(request.getfixturevalue(f"{request.param}_url")) as made:
        yield made
