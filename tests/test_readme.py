"""What the README says is so."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
from processes import serve as serving_items
from sessionscope import TransactionDoomed
from sqlalchemy import create_engine, insert, orm, select
from sqlalchemy.exc import IntegrityError
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from webtest import TestApp

import serve
from web.options import make_parser

PATH = Path(serve.__file__).with_name("README.md")
README = PATH.read_text("utf-8")


class Base(orm.DeclarativeBase): ...


class Order(Base):
    __tablename__ = "readme_orders"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    item: orm.Mapped[str]


class Coupon(Base):
    __tablename__ = "readme_coupons"
    code: orm.Mapped[str] = orm.mapped_column(primary_key=True)


def test_its_length() -> None:
    """The README can be read in one sitting: at most 120 lines, the middleware before line 30."""
    lines = README.splitlines()
    assert 90 <= len(lines) <= 120
    assert "application = SessionMiddleware(app, Session)" in lines[:29]


@pytest.fixture
def shop(postgresql_url: str) -> Iterator[dict[str, Any]]:
    """The names that the README takes for granted, on a PostgreSQL where the coupon is used."""
    engine = create_engine(postgresql_url)
    Base.metadata.create_all(engine)
    session = orm.scoped_session(orm.sessionmaker(engine))
    with engine.begin() as connection:
        connection.execute(insert(Coupon).values(code="WELCOME"))
    yield {
        "app": flask.Flask(__name__),
        "Session": session,
        "Order": Order,
        "Coupon": Coupon,
        "insert": insert,
        "IntegrityError": IntegrityError,
        "engine": engine,
    }
    session.remove()
    Base.metadata.drop_all(engine)
    engine.dispose()


def items(names: dict[str, Any]) -> list[str]:
    with names["engine"].connect() as connection:
        return list(connection.scalars(select(Order.item)))


def test_its_view_loses_an_order_until_it_is_wrapped(shop: dict[str, Any]) -> None:
    """The view loses its order with a 200; wrapped it is a 500, with and without its commit()."""
    document = Sybil([PythonCodeBlockParser()]).parse(PATH)
    view, middleware, *_ = (str(example.parsed) for example in document.examples())
    exec(view, shop)
    assert TestApp(shop["app"]).post("/orders").text == "ordered"
    shop["Session"].remove()
    assert items(shop) == []
    exec(middleware, shop)
    TestApp(shop["application"]).post("/orders", status=500)
    shop["app"] = flask.Flask("without its commit()")
    exec(view.replace("    Session.commit()\n", ""), shop)
    exec(middleware, shop)
    with pytest.raises(TransactionDoomed) as caught:
        TestApp(shop["application"]).post("/orders")
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert items(shop) == []


def test_its_python_runs(shop: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Each Python block of the README runs, in order, and does what it says."""
    document = Sybil([PythonCodeBlockParser()]).parse(PATH)
    document.namespace.update(shop)
    blocks = list(document.examples())
    for block in blocks:
        block.evaluate()
    assert len(blocks) == README.count("```python")
    assert items(shop) == ["chair"]
    assert capsys.readouterr().out == "mail sent\n"


def test_its_curls_print_what_it_shows(sqlite_url: str) -> None:
    """Each curl of the README, sent to the service on an empty file, prints the next line."""
    asked = re.findall(r"^\$ (curl .*)\n(.*)$", README, re.M)
    assert asked
    with serving_items("--database-url", sqlite_url) as server:
        for command, shown in asked:
            words = shlex.split(command.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}"))
            done = subprocess.run([*words, "-sS"], capture_output=True, text=True, check=True)
            assert done.stdout.strip() == shown, command


def test_its_make_targets_exist() -> None:
    """Each `make` that the README names is a target that make knows how to reach."""
    targets = set(re.findall(r"(?:\$ |`)make ([a-z-]+)", README))
    assert targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=PATH.parent, check=True, stdout=subprocess.PIPE)


def test_its_options_exist() -> None:
    """Each option of the command line that the README names is one."""
    named = set(re.findall(r"--[a-z][a-z-]+", README)) - {"--strict", "--help"}
    assert named
    assert named <= set(re.findall(r"--[a-z][a-z-]+", make_parser().format_help()))


def test_its_links_lead_somewhere() -> None:
    """Each file that the README links to is there."""
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (PATH.parent / link).is_file(), link
