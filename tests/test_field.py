"""A slice of the field (`field`): each server, engine and application; and adapters to servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from apig_wsgi import make_lambda_handler
from field import APPS, ENGINES, SERVERS, SLICE, Cell, play
from sessionscope import Outcome, SessionMiddleware
from shapes import SHAPES
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session
from support import environ, names, refuse_commit

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

pytestmark = pytest.mark.long

Registry = scoped_session[Session]


def test_the_slice_has_everything_at_least_once() -> None:
    """Each server, each engine and each application is in the slice."""
    servers, engines, apps = map(set, zip(*SLICE, strict=True))
    assert (servers, engines, apps) == (set(SERVERS), set(ENGINES), set(APPS))


@pytest.mark.parametrize("cell", SLICE, ids=str)
def test_overlapping_requests_have_what_their_clients_were_told(
    cell: Cell, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Under load a complete 2xx has its row, an error has none, and nothing is left open."""
    url = request.getfixturevalue(f"{cell.engine}_url")
    report = play(cell, url, tmp_path)
    assert not report.wrong, f"{report}\n{(tmp_path / 'server.log').read_text()[-4000:]}"


# Adapters for functions as a service.


def apig(app: WSGIApplication) -> tuple[int, bytes]:
    """The adapter of Amazon's API gateway that is most used."""
    request = {"httpMethod": "POST", "path": "/", "headers": {"Host": "items.test"}}
    answer = make_lambda_handler(app)(request, None)
    return answer["statusCode"], answer["body"].encode()


def careless(app: WSGIApplication) -> tuple[int, bytes]:
    """One that never calls close()."""
    heads: list[str] = []

    def start_response(status: str, headers: Any, exc_info: Any = None, /) -> Any:
        heads.append(status)

    content = b"".join(app(environ("POST"), start_response))
    return int(heads[-1].split()[0]), content


@dataclass
class Function:
    """An application behind an adapter, and what the observer saw."""

    adapter: Callable[[WSGIApplication], tuple[int, bytes]]
    registry: Registry
    seen: list[Outcome] = field(default_factory=list)

    def call(self, shape: str, status: str, work: Callable[[], object]) -> tuple[int, bytes]:
        app = SHAPES[shape](work, status, [b"one,", b"two"], False)
        return self.adapter(SessionMiddleware(app, self.registry, observer=self.seen.append))

    def add(self) -> None:
        self.registry.add(Item(name="added"))
        self.registry.flush()


@pytest.fixture(params=[apig, careless])
def function(request: pytest.FixtureRequest, any_registry: Registry) -> Function:
    """Each adapter in turn, on each engine; at the end no connection may be out."""
    return Function(request.param, any_registry)


shapes = pytest.mark.parametrize("shape", ["list", "generator"])


@shapes
@pytest.mark.parametrize(
    ("status", "action", "kept"),
    [("200 OK", "commit", ["added"]), ("409 Conflict", "rollback", [])],
    ids=["kept", "refused"],
)
def test_a_function_is_reported_and_its_status_decides(
    shape: str, status: str, action: str, kept: list[str], function: Function, any_engine: Engine
) -> None:
    """Behind an adapter, one that never calls close() too, work and outcome follow the status."""
    assert function.call(shape, status, function.add) == (int(status[:3]), b"one,two")
    assert [outcome.action for outcome in function.seen] == [action]
    assert names(any_engine) == kept


@shapes
def test_a_function_that_fails_is_reported_and_leaves_nothing(
    shape: str, function: Function, any_engine: Engine
) -> None:
    """An exception from an application passes an adapter, and what it did is gone."""

    def fail() -> None:
        function.add()
        raise LookupError("on purpose")

    with pytest.raises(LookupError, match="on purpose"):
        function.call(shape, "200 OK", fail)
    assert [(one.action, type(one.error)) for one in function.seen] == [("rollback", LookupError)]
    assert names(any_engine) == []


@shapes
@pytest.mark.parametrize("adapter", [apig, careless])
def test_a_function_whose_commit_is_refused_answers_nothing(
    shape: str, adapter: Any, registry: Registry, outside: Engine
) -> None:
    """A COMMIT that fails leaves an adapter without an answer to give."""
    function = Function(adapter, registry)

    def work() -> None:
        function.add()
        refuse_commit(registry)

    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        function.call(shape, "200 OK", work)
    assert [(one.action, type(one.error)) for one in function.seen] == [
        ("rollback", IntegrityError)
    ]
    assert names(outside) == []
