"""What a client and the log are told when something fails that is not the client's fault."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import item_service
import pytest
from item_service import Service, service_at
from sessionscope import CommitOutcomeUnknown, engines
from sessionscope.engines import make_engine
from sqlalchemy import (
    CheckConstraint,
    Column,
    Constraint,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    Table,
    UniqueConstraint,
    insert,
)
from sqlalchemy import text as sql
from support import Server, environ, serve_once

from models import NAME, Base, Item
from web.errors import errors_as_json

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

memory_url, service, any_service = (
    item_service.memory_url,
    item_service.service,
    item_service.any_service,
)

INTERNAL = rb'\{"error": "internal server error", "id": "([0-9a-f]{8})"\}\n'


def raising(error: Exception) -> WSGIApplication:
    """The service around an application that raises *error*."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        raise error

    return errors_as_json(app)


@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("GET", "/"), ("GET", "/1")])
def test_an_unexpected_error_tells_nothing(
    method: str, path: str, any_service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the table is gone the client learns an id, under which the log has the traceback."""
    Base.metadata.drop_all(any_service.outside)
    answer = any_service.client.request(path, method=method, status=500)
    assert answer.content_type == "application/json"
    found = re.fullmatch(INTERNAL, answer.body)
    assert found is not None
    assert answer.headers["X-Request-Id"] == found[1].decode()
    (record,) = (record for record in caplog.records if record.name == "items")
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"{method} '{path}' failed, id {found[1].decode()}"
    assert record.exc_info is not None
    assert "items" in str(record.exc_info[1])


def test_an_unexpected_error_of_head_has_no_body(service: Service) -> None:
    """The 500 that answers HEAD has the headers of the one for GET, and no body."""
    Base.metadata.drop_all(service.outside)
    same = {"X-Request-Id": "same"}
    got, head = (
        service.client.request("/", method=name, headers=same, status=500)
        for name in ("GET", "HEAD")
    )
    assert head.headers == got.headers
    assert head.body == b""


def test_the_log_shows_a_path_on_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """A line break in a path is escaped in the log."""
    reply = serve_once(raising(RuntimeError("unexpected")), environ("GET", "/\nERROR forged"))
    assert re.fullmatch(INTERNAL, reply.content)
    assert caplog.messages[0].startswith(r"GET '/\nERROR forged' failed, id ")


def test_an_error_after_the_first_byte_is_the_servers() -> None:
    """What is raised when bytes have left reaches the server, which can cut the response."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        start_response("200 OK", [])(b"first")
        raise RuntimeError("unexpected")

    server = Server(errors_as_json(app))
    with pytest.raises(RuntimeError, match="unexpected"):
        server.run()
    assert server.reply.chunks == [b"first"]


def test_an_unknown_outcome_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody knows whether COMMIT took effect the client is told, and not to try again."""
    reply = serve_once(raising(CommitOutcomeUnknown("the connection is lost")))
    assert reply.status == "503 Service Unavailable"
    headers = dict(reply.headers)
    assert headers["Commit-Outcome"] == "unknown"
    assert "Retry-After" not in headers
    assert b"the work may be done or not; check before you repeat it" in reply.content
    assert caplog.records[0].exc_info is not None


def test_a_repeat_with_its_key_is_safe() -> None:
    """A client whose request had a key is told to repeat it with that."""
    app = raising(CommitOutcomeUnknown("the connection is lost"))
    reply = serve_once(app, environ("POST", HTTP_IDEMPOTENCY_KEY="one"))
    assert dict(reply.headers)["Commit-Outcome"] == "unknown"
    assert dict(reply.headers)["Retry-After"] == "1"
    assert b"repeat it with the same Idempotency-Key" in reply.content


def test_a_database_that_is_busy_is_no_error_of_ours(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another program keeps the database locked a change is a 503, to be tried again."""
    monkeypatch.setattr(engines, "BUSY_TIMEOUT", 0.0)
    with service_at(sqlite_url) as service:
        with service.outside.begin() as connection:
            connection.execute(insert(Item).values(name="soon"))
            answer = service.client.post("/", status=503)
        assert answer.headers["Retry-After"] == "1"
        assert answer.json == {"error": "the database is not available"}
        assert service.client.post("/").json["id"] == 2


RULES: dict[str, tuple[Callable[[], Column[Any] | Constraint], int]] = {
    "unique": (lambda: UniqueConstraint("name"), 409),
    "foreign-key": (lambda: ForeignKeyConstraint(["name"], ["allowed.name"]), 409),
    "check": (lambda: CheckConstraint("name <> 'chair'"), 500),
    "not-null": (lambda: Column("colour", Integer, nullable=False), 500),
}


@pytest.mark.parametrize("rule", RULES)
def test_only_other_data_is_a_conflict(rule: str, any_url: str) -> None:
    """A violated unique or foreign key is a 409 that shows no data; other rules are our mistake."""
    make, status = RULES[rule]
    metadata = MetaData()
    Table("allowed", metadata, Column("name", NAME, primary_key=True))
    id = Column("id", Integer, primary_key=True)
    Table("items", metadata, id, Column("name", NAME), make())
    with service_at(any_url) as service:
        Base.metadata.drop_all(service.outside)
        metadata.create_all(service.outside)
        service.client.post_json("/", {"name": "chair"}, status="*")
        answer = service.client.post_json("/", {"name": "chair"}, status=status)
        metadata.drop_all(service.outside)
    assert answer.json["error"] == (
        "conflict with existing data" if status == 409 else "internal server error"
    )


@pytest.mark.parametrize("any_url", ["sqlite", "postgresql"], indirect=True)
def test_a_conflict_at_commit_is_told(any_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where the database refuses COMMIT the client gets a 409, never a 200, and no row stays."""
    metadata = MetaData()
    Table("allowed", metadata, Column("name", NAME, primary_key=True))
    reference = ForeignKey("allowed.name", deferrable=True, initially="DEFERRED")
    id = Column("id", Integer, primary_key=True)
    Table("items", metadata, id, Column("name", NAME, reference))
    engine = make_engine(any_url)
    metadata.create_all(engine)
    try:
        with service_at(any_url) as service:
            error = service.client.post("/", status=409).json["error"]
            assert error == "conflict with existing data"
            assert service.rows() == []
            with service.outside.begin() as connection:
                connection.execute(sql("INSERT INTO allowed VALUES ('chair')"))
            assert service.post(b'{"name": "chair"}', 200).json["name"] == "chair"
            assert [name for _, name in service.rows()] == ["chair"]
    finally:
        metadata.drop_all(engine)
        engine.dispose()
    assert "the commit failed" in caplog.text
