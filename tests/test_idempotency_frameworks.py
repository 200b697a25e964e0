"""A keyed POST on each framework, with wsgiref.validate between all layers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import framework_apps
import pytest
from framework_apps import FRAMEWORKS
from sessionscope import SessionMiddleware
from sessionscope.idempotency import Idempotency, idempotency_table
from sqlalchemy import Engine, MetaData
from support import Reply, environ, names, serve_once

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

keys = idempotency_table(MetaData(), "once")

REPLAYED = ("Idempotent-Replayed", "true")

WORK = {"named": ["lamp"], "stream": ["first", "second"], "file": ["first"]}
"""What each action makes durable, once."""


def ask(app: WSGIApplication, action: str, body: bytes = b"lamp") -> Reply:
    request = environ(
        "POST",
        f"/{action}",
        HTTP_IDEMPOTENCY_KEY='"one"',
        CONTENT_LENGTH=str(len(body)),
        **{"wsgi.input": io.BytesIO(body), "wsgi.file_wrapper": FileWrapper},
    )
    return serve_once(app, request)


def lasting(reply: Reply) -> list[tuple[str, str]]:
    return [header for header in reply.headers if header[0] != "Date"]


@pytest.fixture(params=FRAMEWORKS)
def app(request: pytest.FixtureRequest, engine: Engine) -> Iterator[WSGIApplication]:
    """An application on each framework in turn, which carries out keyed requests once."""
    keys.create(engine)
    framework_apps.registry.configure(bind=engine)
    inner = validator(FRAMEWORKS[request.param]())
    once = validator(Idempotency(inner, keys, scope=lambda environ: "anybody"))
    yield validator(SessionMiddleware(once, framework_apps.registry))
    framework_apps.opened.clear()
    assert not framework_apps.registry.registry.has()
    keys.drop(engine)


@pytest.mark.parametrize("action", WORK)
def test_a_repeat_gets_the_response_of_the_first(
    app: WSGIApplication, action: str, outside: Engine
) -> None:
    """A page, a stream and a file are replayed with their headers, and nothing is done again."""
    first, repeat = ask(app, action), ask(app, action)
    assert str(first.status)[:3] == "200"
    assert REPLAYED not in first.headers
    assert (repeat.status, repeat.content) == (first.status, first.content)
    assert lasting(repeat) == [*lasting(first), REPLAYED]
    assert names(outside) == WORK[action]


def test_the_view_reads_the_body_that_was_compared(app: WSGIApplication, outside: Engine) -> None:
    """The view gets the client's bytes; another body under the key is refused without it."""
    assert ask(app, "named", b"lamp").content == b"item 1 is lamp"
    assert str(ask(app, "named", b"chair").status)[:3] == "422"
    assert names(outside) == ["lamp"]


def test_what_was_refused_may_be_tried_again(app: WSGIApplication, outside: Engine) -> None:
    """A refusal, made as the framework makes one, leaves the key free for another request."""
    refused = [ask(app, "refuse") for _ in range(2)]
    assert {str(reply.status)[:3] for reply in refused} <= {"403", "409"}
    assert not any(REPLAYED in reply.headers for reply in refused)
    assert ask(app, "named").content == b"item 1 is lamp"
    assert names(outside) == ["lamp"]
