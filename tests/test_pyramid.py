"""A project in Pyramid: its settings, scripts, shell, and the request at COMMIT."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sessionscope import SessionMiddleware, session_scope
from sqlalchemy import Engine, engine_from_config, event, inspect
from sqlalchemy.orm import Session, scoped_session
from support import PATIENCE, environ, names, serve_once

from models import Item

with warnings.catch_warnings():
    # Pyramid 2.1 imports pkg_resources, which newer releases of setuptools deprecate.
    warnings.simplefilter("ignore")
    import pyramid.paster
    from pyramid.config import Configurator
    from pyramid.threadlocal import get_current_request

Registry = scoped_session[Session]

ROOT = Path(__file__).parents[1]
SCRIPT, SHELL = re.findall(
    "```python\n(.*?)```", (ROOT / "docs/pyramid.md").read_text("utf-8"), re.S
)
"""The code of the page about Pyramid."""


@pytest.fixture
def ini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The ini file of the example, in a folder of its own."""
    shutil.copy(ROOT / "examples/development.ini", tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield str(tmp_path / "development.ini")
    example = sys.modules.pop("pyramid_items", None)
    engine = example and example.Session.session_factory.kw["bind"]
    if engine is not None:
        engine.dispose()


def items(ini: str) -> list[str]:
    """The names of the items that are durable, seen from outside."""
    with closing(sqlite3.connect(Path(ini).with_name("items.db"))) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM items ORDER BY id")]


def test_the_applications_settings_are_found(ini: str) -> None:
    """A script that reads the settings, as Alembic's env.py does, gets the application's."""
    engine = engine_from_config(pyramid.paster.get_appsettings(ini))
    assert engine.url.database == str(Path(ini).with_name("items.db"))


def test_the_application_is_wrapped(ini: str) -> None:
    """What the ini file makes commits an item, and rolls one back that was not found."""
    app = pyramid.paster.get_app(ini)
    assert isinstance(app, SessionMiddleware)
    serve_once(app, environ("POST"))
    assert items(ini) == ["Item #1"]


Rename = Callable[[str, str, str], object]


@pytest.fixture
def rename(ini: str) -> Rename:
    """The script of the page, which renames the items of the example."""
    pyramid.paster.get_app(ini)
    shop = sys.modules["pyramid_items"]
    with session_scope(shop.Session) as session:
        session.add(shop.Item(name="lamp"))
    source = SCRIPT.replace("Order.item", "Order.name").replace("item=new", "name=new")
    script: dict[str, Any] = {"Session": shop.Session, "Order": shop.Item}
    exec(source, script)
    made: Rename = script["rename"]
    return made


def test_a_script_is_a_scope(ini: str, rename: Rename) -> None:
    """A script that goes well has committed what it did through its request."""
    rename(ini, "lamp", "chair")
    assert items(ini) == ["chair"]


def test_a_script_that_fails_leaves_nothing(ini: str, rename: Rename) -> None:
    """One that fails after its work has done nothing."""
    session = sys.modules["pyramid_items"].Session

    @event.listens_for(session, "before_commit")
    def fail(_: Session) -> None:
        assert inspect(session.connection())
        raise LookupError

    with pytest.raises(LookupError):
        rename(ini, "lamp", "chair")
    event.remove(session, "before_commit", fail)
    assert items(ini) == ["lamp"]


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        pytest.param("", ["lamp"], id="left"),
        pytest.param("session.rollback()\n", [], id="rolled back"),
    ],
)
def test_the_shell_commits_when_it_is_left(typed: str, kept: list[str], ini: str) -> None:
    """What was typed into pshell is durable once it was left, unless it was taken back."""
    setup = f"from sessionscope import session_scope\nfrom pyramid_items import Session\n\n{SHELL}"
    Path(ini).with_name("shop_shell.py").write_text(setup, "utf-8")
    with Path(ini).open("a") as file:
        file.write("\n[pshell]\nsetup = shop_shell:setup\n")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("pshell")), "-p", "python", ini],
        input=f"from pyramid_items import Item\nsession.add(Item(name='lamp'))\n{typed}",
        env={"PYTHONPATH": f"{ROOT / 'examples'}:{Path(ini).parent}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "Error" not in done.stderr
    assert items(ini) == kept


@pytest.mark.parametrize(
    ("cure", "named"), [("nothing", None), ("flush", "/order"), ("info", "/order")]
)
def test_the_current_request_is_gone_at_commit(
    cure: str, named: str | None, registry: Registry, outside: Engine
) -> None:
    """What needs the request at COMMIT has it in the view, or in the info of the session."""

    def path_of_request() -> str | None:
        request = get_current_request() or registry.info.get("request")
        return None if request is None else str(request.path)

    def view(request: Any) -> Any:
        request.dbsession.add(Item())
        if cure == "flush":
            request.dbsession.flush()
        if cure == "info":
            request.dbsession.info["request"] = request
        return request.response

    @event.listens_for(registry, "before_flush")
    def name(session: Session, *_: object) -> None:
        for item in session.new:
            item.name = path_of_request()

    with Configurator() as config:
        config.add_request_method(lambda request: registry(), "dbsession", reify=True)
        config.add_route("order", "/order")
        config.add_view(view, route_name="order")
        app = SessionMiddleware(config.make_wsgi_app(), registry)
    serve_once(app, environ("POST", "/order"))
    assert names(outside) == [named]
