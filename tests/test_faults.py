"""Whatever call of the driver fails, no promise breaks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import faults
import pytest
from sessionscope import CommitOutcomeUnknown, SessionMiddleware
from sessionscope.engines import make_engine
from shapes import CONTENTS, SHAPES
from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support import Server, environ, make_tables, names

from models import Item

if TYPE_CHECKING:
    from shapes import Shape

pytestmark = pytest.mark.long

Registry = scoped_session[Session]

NONE_LEFT = 200
"""More calls than any of these requests makes."""


@pytest.fixture
def broken_engine(any_engine: Engine) -> Engine:
    """An engine of each kind, whose driver is about to fail."""
    any_engine.dispose()  # so that SQLite connects anew, to the driver that fails
    return any_engine


def work(registry: Registry) -> None:
    """A handler that reads, writes, and writes what it read."""
    item = Item()
    registry.add(item)
    registry.flush()
    item.name = f"{registry.scalar(select(Item.id).where(Item.id == item.id)) is not None}"


def careless(registry: Registry) -> None:
    """A handler that swallows what goes wrong after its first statement."""
    registry.execute(insert(Item).values(name="True"))
    with suppress(DBAPIError):
        registry.execute(select(Item.id)).all()
    with suppress(DBAPIError), registry.begin_nested():
        registry.execute(insert(Item).values(name="optional"))


def raised_from(error: BaseException | None, cause: BaseException) -> bool:
    """Whether *cause* shows anywhere in what *error* says of its origins."""
    while error is not None:
        if error is cause or getattr(error, "orig", None) is cause:
            return True
        error = error.__cause__ or error.__context__
    return False


def strike(
    application: SessionMiddleware, fault: faults.Faults, n: int, error: BaseException, after: bool
) -> type[BaseException] | None:
    """Make one request whose n-th call fails; the type of what it raised."""
    fault.arm(n, error, after)
    raised: BaseException | None = None
    try:
        Server(application).run(environ("POST"))
    except BaseException as caught:
        raised = caught
    fault.disarm()
    kind = None if raised is None else type(raised)
    assert kind is None or raised_from(raised, error), f"another error at call {n}: {raised!r}"
    return kind


def check_every_call(
    engine: Engine,
    shape: Shape,
    handler: Any,
    sized: bool,
    make_error: Any,
    after: bool,
    forget: Callable[[], object] = bool,
) -> int:
    """Fail each call in turn and check every promise; how many calls there were."""
    fault = faults.install(engine)
    outside = make_engine(engine.url.set(drivername=engine.url.get_backend_name()))
    registry = scoped_session(sessionmaker(engine))
    actions: list[str] = []
    app = shape(lambda: handler(registry), "200 OK", CONTENTS["three chunks"], sized)
    application = SessionMiddleware(app, registry, observer=lambda o: actions.append(o.action))
    rows = 0
    for n in range(1, NONE_LEFT):
        raised = strike(application, fault, n, make_error(engine), after)
        forget()
        [action] = actions
        actions.clear()
        found = names(outside).count("True") - rows
        rows += found
        if raised is None:
            assert (action, found) == ("commit", 1), f"a false receipt at call {n}"
        elif raised is CommitOutcomeUnknown or fault.in_commit:
            assert action == "unknown"
        elif action == "commit":
            # An interrupt after COMMIT returned undoes nothing.
            assert (raised, found) == (KeyboardInterrupt, 1)
        else:
            assert found == 0, f"a row without receipt at call {n}"
        assert engine.pool.checkedout() == 0, f"a connection is out after call {n}"  # type: ignore[attr-defined]
        assert not registry.registry.has(), f"a session is left after call {n}"
        if not fault.struck:
            assert raised is None
            outside.dispose()
            return n - 1
    raise AssertionError("the request never ended")


def driver_error(engine: Engine) -> BaseException:
    error: BaseException = engine.dialect.loaded_dbapi.OperationalError("injected")
    return error


every_handler = pytest.mark.parametrize("handler", [work, careless])
before_or_after = pytest.mark.parametrize("after", [True, False], ids=["answer lost", "not done"])
two_shapes = pytest.mark.parametrize(
    "shape", [SHAPES["list"], SHAPES["generator"]], ids=["list", "generator"]
)


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Engine]:
    engine = make_engine(sqlite_url)
    make_tables(engine)
    engine.dispose()
    yield engine
    engine.dispose()


@pytest.mark.parametrize("shape", [pytest.param(SHAPES[name], id=name) for name in SHAPES])
@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
@every_handler
@before_or_after
def test_no_failing_call_breaks_a_promise(
    sqlite: Engine, shape: Shape, sized: bool, handler: Any, after: bool
) -> None:
    """Whichever call to SQLite fails: no false receipt, no row without one, nothing left open."""
    assert check_every_call(sqlite, shape, handler, sized, driver_error, after) > 5


@two_shapes
@before_or_after
def test_no_interrupted_call_breaks_a_promise(
    sqlite: Engine, shape: Shape, after: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever call to SQLite is interrupted by a BaseException, the same promises hold."""

    def forget() -> None:
        # A traceback keeps SQLite's statements, and they keep a closed connection's lock.
        caplog.clear()
        gc.collect()

    def interrupt(engine: Engine) -> BaseException:
        return KeyboardInterrupt()

    assert check_every_call(sqlite, shape, work, True, interrupt, after, forget) > 5


@two_shapes
@every_handler
@before_or_after
def test_no_failing_call_breaks_a_promise_on_any_engine(
    broken_engine: Engine, shape: Shape, handler: Any, after: bool
) -> None:
    """Whichever call to the database fails, on any engine, the same promises hold."""
    assert check_every_call(broken_engine, shape, handler, True, driver_error, after) > 3
