"""A process that dies anywhere on the way of a keyed request: what the repeat gets.

It is a worker of a real server, which replaces it; `once_app` kills itself where it is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from itertools import count, product

import pytest
from databases import free_port
from once import Answer, ask, names, served, tables
from sqlalchemy import Engine

pytestmark = pytest.mark.long

BEFORE = [
    *product(["list", "stream"], ["before the work", "after the work", "before COMMIT"]),
    ("stream", "in the stream"),
]
"""Views, and where nothing of them is committed."""

AFTER = [
    *product(["list", "stream"], ["in on_commit"]),
    ("list", "after COMMIT"),  # and before the first byte
    ("stream", "before the end"),
]


@dataclass
class Site:
    """A server whose workers are replaced, and its database seen from outside."""

    port: int
    engine: Engine
    numbers: Iterator[int] = field(default_factory=count)

    def ask_and_repeat(self, view: str, death: str) -> tuple[Answer | None, list[str]]:
        """Have the process die, and ask again; the answer, and the payments that it made."""
        name, before = f"payment-{next(self.numbers)}", names(self.engine)
        assert ask(self.port, name, view=view, X_Die=death) is None
        answer = ask(self.port, name, view=view)
        assert ask(self.port, name, view=view) == answer
        made = names(self.engine)[len(before) :]
        assert set(made) <= {name}
        return answer, made


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Site]]:
    """Start the server on a database when a test first wants it; all are stopped at the end."""
    with ExitStack() as stack:

        @cache
        def start(url: str) -> Site:
            engine = stack.enter_context(tables(url))
            port, folder = stack.enter_context(free_port()), tmp_path_factory.mktemp("server")
            gunicorn = ["-m", "gunicorn", "--preload", "--bind", f"127.0.0.1:{port}", "once_app"]
            stack.enter_context(served(*gunicorn, urls=[url], port=port, folder=folder))
            return Site(port, engine)

        yield start


@pytest.fixture(scope="module")
def sqlite_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/items.db"


@pytest.fixture
def site(any_url: str, start: Callable[[str], Site]) -> Site:
    """The server on each engine in turn."""
    return start(any_url)


@pytest.mark.parametrize(("view", "death"), BEFORE)
def test_killed_before_the_commit(site: Site, view: str, death: str) -> None:
    """Of a process that died before COMMIT nothing is left, and the repeat executes."""
    answer, made = site.ask_and_repeat(view, death)
    assert answer is not None
    assert (answer.status, answer.replayed, len(made)) == (201, False, 1)


@pytest.mark.parametrize(("view", "death"), AFTER)
def test_killed_after_the_commit(site: Site, view: str, death: str) -> None:
    """What a process committed before it died stands, and the repeat gets its response."""
    answer, made = site.ask_and_repeat(view, death)
    assert answer is not None
    assert (answer.status, answer.replayed, len(made)) == (201, True, 1)


def test_killed_after_a_part_was_committed(site: Site) -> None:
    """Where the view committed early and died, a repeat doesn't execute: it is told so."""
    answer, made = site.ask_and_repeat("list", "after an early commit")
    assert answer is not None
    assert (answer.status, len(made)) == (409, 1)
    assert json.loads(answer.content)["title"].endswith("its response was not kept")
