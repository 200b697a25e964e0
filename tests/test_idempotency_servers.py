"""A keyed request on each real server: the first and its repeat, over the wire."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest
from databases import free_port
from once import Answer, ask, names, served, tables
from sqlalchemy import Engine

SERVERS = {
    "gunicorn": "-m gunicorn --bind 127.0.0.1:{port} --workers 2 once_app",
    "gunicorn-gthread": "-m gunicorn --bind 127.0.0.1:{port} --threads 2 once_app",
    "gunicorn-gevent": "-m gunicorn --bind 127.0.0.1:{port} --worker-class gevent once_app",
    "waitress": "-m waitress --listen 127.0.0.1:{port} once_app:application",
    "granian": "-m granian --interface wsgi --port {port} once_app:application",
    "uwsgi": "-c 'import pyuwsgi; pyuwsgi.run()' --die-on-term --need-app "
    "--http-socket 127.0.0.1:{port} --module once_app",
}

Site = tuple[int, Engine]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Site]]:
    """Start the server of a name when a test first wants it; all are stopped at the end."""
    with ExitStack() as stack:

        @cache
        def start(name: str) -> Site:
            port, folder = stack.enter_context(free_port()), tmp_path_factory.mktemp(name)
            url = f"sqlite:///{folder}/items.db"
            engine = stack.enter_context(tables(url))
            arguments = shlex.split(SERVERS[name].format(port=port))
            stack.enter_context(served(*arguments, urls=[url], port=port, folder=folder))
            return port, engine

        yield start


@pytest.fixture(params=SERVERS)
def site(request: pytest.FixtureRequest, start: Callable[[str], Site]) -> Site:
    """Each server in turn: its port, and its database seen from outside."""
    return start(request.param)


def asked(port: int, name: str, view: str = "list", **more: str) -> Answer:
    answer = ask(port, name, view=view, **more)
    assert answer is not None, "cut off"
    return answer


@pytest.mark.parametrize("view", ["list", "stream"])
def test_a_repeat_gets_the_response_of_the_first(site: Site, view: str) -> None:
    """A repeat gets status, headers and every byte of the first, and nothing is done again."""
    port, engine = site
    first = asked(port, view, view)
    assert (first.status, first.replayed) == (201, False)
    for _ in range(2):
        repeat = asked(port, view, view)
        assert (repeat, repeat.replayed) == (first, True)
    assert names(engine).count(view) == 1


def test_an_error_is_not_kept(site: Site) -> None:
    """After an error, which left nothing, the same request under its key is carried out."""
    port, engine = site
    failed = asked(port, "later", "fail")
    assert (failed.status, names(engine).count("later")) == (503, 0)
    assert asked(port, "later").status == 201
    assert asked(port, "later", "fail").status == 201  # the view is not asked any more
    assert names(engine).count("later") == 1


@pytest.mark.parametrize("site", ["uwsgi"], indirect=True)
def test_a_chunked_body_of_which_the_server_knows_no_end(site: Site) -> None:
    """It is a 411 on uWSGI, or cut off since nobody reads it, and is not carried out."""
    port, engine = site
    answer = ask(port, "sofa", key="sofa", Transfer_Encoding="chunked")
    assert answer is None or answer.status == 411
    assert "sofa" not in names(engine)


@pytest.mark.parametrize("site", [name for name in SERVERS if name != "uwsgi"], indirect=True)
def test_a_chunked_body_is_compared(site: Site) -> None:
    """A body of unknown length is what the view gets, and another is refused under its key."""
    port, engine = site
    lamp, repeat, chair = [
        asked(port, name, key="chunked", Transfer_Encoding="chunked")
        for name in ("lamp", "lamp", "chair")
    ]
    assert (repeat, repeat.replayed) == (lamp, True)
    assert chair.status == 422
    assert names(engine).count("lamp") == 1
    assert "chair" not in names(engine)
