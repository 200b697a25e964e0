"""The middleware in an ini file: what each setting does, and what is said of a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from paste.deploy import loadapp
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError
from support import environ, names, serve_once

import middleware
from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

registry = scoped_session(sessionmaker())
reader = create_engine("sqlite:///:memory:")
outcomes: list[middleware.Outcome] = []
"""What the ini files name; they name this module as theirs."""


def never(environ: WSGIEnvironment, status: str, headers: object) -> bool:
    return False


def app_factory(global_config: object) -> WSGIApplication:
    """An application that adds an item, and answers with the name of its database."""
    failures = iter([StaleDataError()])

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        session: Session = environ["sessionscope.session"]
        if environ["PATH_INFO"] == "/again":
            for failure in failures:
                raise failure
        if environ["REQUEST_METHOD"] == "POST":
            session.add(Item(name="chair"))
        start_response("404 Not Found" if environ["PATH_INFO"] == "/missing" else "200 OK", [])
        bind: Any = session.get_bind()
        return [bind.url.database.encode()]

    return app


Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path, engine: Engine) -> Iterator[Load]:
    """Load an application as the settings of its filter say, in the lines of an ini file."""
    registry.configure(bind=engine)
    loaded = []

    def load(*settings: str) -> Any:
        lines = [
            "[pipeline:main]",
            "pipeline = session app",
            "[app:app]",
            f"paste.app_factory = {__name__}:app_factory",
            "[filter:session]",
            "use = egg:sessionscope",
            *settings,
        ]
        file = tmp_path / "app.ini"
        file.write_text("\n".join(lines), "utf-8")
        loaded.append(loadapp(f"config:{file}"))
        return loaded[-1]

    yield load
    outcomes.clear()
    for app in loaded:
        assert not app.registry.registry.has(), "a session was left in the registry"
        for bind in (app.registry().get_bind(), app.reader):
            if bind is not None:
                bind.dispose()
        app.registry.remove()


NAMED = f"registry = {__name__}:registry"


def test_a_registry_is_a_name(load: Load, outside: Engine) -> None:
    """A named registry has the session of each request: a 200 commits, a 404 rolls back."""
    app = load(NAMED)
    serve_once(app, environ("POST"))
    serve_once(app, environ("POST", "/missing"))
    assert names(outside) == ["chair"]


def test_a_url_stands_for_a_registry(load: Load, sqlite_url: str, outside: Engine) -> None:
    """With a URL alone the application finds its session in the environ, and it commits."""
    reply = serve_once(load(f"url = {sqlite_url}"), environ("POST"))
    assert sqlite_url == f"sqlite:///{reply.content.decode()}"
    assert names(outside) == ["chair"]


def test_a_rule_is_a_name(load: Load, outside: Engine) -> None:
    """commit_when names the function that decides."""
    serve_once(load(NAMED, f"commit_when = {__name__}:never"), environ("POST"))
    assert names(outside) == []


def test_attempts_are_a_number_and_the_observer_a_name(load: Load) -> None:
    """A request that failed for now is tried again, and the observer is told."""
    app = load(NAMED, "attempts = 3", f"observer = {__name__}:outcomes.append")
    serve_once(app, environ("POST", "/again"))
    assert [(outcome.action, outcome.attempts) for outcome in outcomes] == [("commit", 2)]


@pytest.mark.parametrize(
    "setting", [f"reader = {__name__}:reader", "reader_url = sqlite:///:memory:"]
)
def test_a_reader_is_a_name_or_a_url(load: Load, setting: str, engine: Engine) -> None:
    """A GET works on the reader, whether it is named or made, and a POST does not."""
    app = load(NAMED, setting)
    assert serve_once(app, environ("GET")).content == b":memory:"
    assert serve_once(app, environ("POST")).content == str(engine.url.database).encode()


@pytest.mark.parametrize(("word", "meant"), [("true", True), ("Yes", True), ("off", False)])
def test_confirm_is_true_or_false(load: Load, word: str, meant: bool) -> None:
    """confirm is written as ini files write such things."""
    assert load(NAMED, f"confirm = {word}").confirm is meant


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param([], "registry or url is required", id="nothing"),
        pytest.param([NAMED, "url = sqlite://"], "registry and url exclude each other", id="both"),
        pytest.param(
            [NAMED, f"reader = {__name__}:reader", "reader_url = sqlite://"],
            "reader and reader_url exclude each other",
            id="two-readers",
        ),
        pytest.param([NAMED, "atempts = 3"], "there is no setting 'atempts', only", id="unknown"),
        pytest.param(["registry = nowhere:x"], "'registry' .* 'nowhere'", id="no-module"),
        pytest.param([f"registry = {__name__}:x"], "'registry' .* 'x'", id="no-name"),
        pytest.param(["registry = my app"], "'registry' .* 'my app'", id="no-such-name"),
        pytest.param(["url = items.db"], "'url' .* URL", id="no-url"),
        pytest.param([NAMED, "attempts = many"], "'attempts' .* 'many'", id="no-number"),
        pytest.param([NAMED, "attempts = 0"], "attempts must be 1 or more", id="zero"),
        pytest.param([NAMED, "confirm = maybe"], "'maybe' is neither true nor false", id="maybe"),
    ],
)
def test_a_wrong_setting_is_named(load: Load, settings: list[str], said: str) -> None:
    """A setting that is missing, unknown, doubled or cannot be read stops the start by name."""
    with pytest.raises(ValueError, match=said):
        load(*settings)


@pytest.mark.parametrize("setting", ["registry", "reader", "commit_when", "observer"])
def test_a_name_of_something_else_is_refused(load: Load, setting: str) -> None:
    """A name that stands for an object of another type stops the start by the setting's name."""
    settings = {"registry": f"{__name__}:registry", setting: f"{__name__}:NAMED"}
    with pytest.raises(TypeError, match=f"{setting} must be"):
        load(*(f"{name} = {value}" for name, value in settings.items()))


def test_a_password_is_not_told(load: Load) -> None:
    """Where a URL cannot be used the error keeps what stands in it to itself."""
    with pytest.raises(ValueError, match="'url' cannot be used") as caught:
        load("url = nodatabase://user:secret@localhost/items")
    assert "secret" not in str(caught.value)
