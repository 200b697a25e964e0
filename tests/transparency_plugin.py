"""Wraps every WSGI application that another project's test suite calls.  PYTEST_DONT_REWRITE

`transparency_suites.py` loads it into pytest, and into each process that a suite starts, by a
``.pth`` file.  It does nothing unless TRANSPARENCY_SEAMS names where applications are called:
a seam is a place of the suite's tools at which an application passes by, and is patched there.

Each wrapped application begins a transaction, so that there is one to commit.  With the
sessions of Flask-SQLAlchemy that is left to the tests: most have no engine at that time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
from sessionscope import SessionMiddleware
from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    Registry = scoped_session[Any]

SEAMS = os.environ.get("TRANSPARENCY_SEAMS", "").split()
CALLS = os.environ.get("TRANSPARENCY_CALLS", os.devnull)
"""A file that grows by one byte with each call of a wrapped application."""

FIRST: Registry = scoped_session(sessionmaker(create_engine("sqlite://")))

SECOND: Registry = scoped_session(sessionmaker(create_engine("sqlite://")))
"""For a second wrap: one of the same registry would only join the request of the first."""


def wrap(app: WSGIApplication, registry: Registry | None = None) -> WSGIApplication:
    """Return *app* with one session per request; with Flask-SQLAlchemy, with its sessions."""
    session = registry or _registry_of(app)

    def begun(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        os.write(_calls, b".")
        if session in (FIRST, SECOND):
            session().connection()
        return app(environ, start_response)

    return SessionMiddleware(begun if callable(app) else app, session)


def _registry_of(app: object) -> Registry:
    extension = getattr(app, "extensions", {}).get("sqlalchemy")
    return FIRST if extension is None else extension.session


def patch(place: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace the function at *place*, ``module:name``, by what *make* makes of it."""
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, make(getattr(owner, name)))


def wrap_argument(
    position: int, registry: Registry | None = None
) -> Callable[[Any], Callable[..., Any]]:
    """Wrap the application that is the argument at *position*."""

    def make(original: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, app, after = args[:position], args[position], args[position + 1 :]
            return original(*before, wrap(app, registry), *after, **kwargs)

        return call

    return make


def wrap_both_sides(validator: Any) -> Callable[..., Any]:
    """Have a validator look at the middleware as a server does, and as an application does."""

    def call(app: Any, *args: Any) -> Any:
        return wrap(validator(wrap(app), *args), SECOND)

    return call


def wrap_method(method: Any) -> Callable[..., Any]:
    """Wrap *method*, which makes an object an application: its ``__call__``."""

    def call(self: Any, environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        return wrap(partial(method, self))(environ, start_response)

    return call


PATCHES: dict[str, dict[str, Callable[[Any], Callable[..., Any]]]] = {
    "wsgiref": {
        "wsgiref.validate:validator": wrap_both_sides,
        "wsgiref.simple_server:WSGIServer.set_app": wrap_argument(1),
    },
    "werkzeug": {
        "werkzeug.test:run_wsgi_app": wrap_argument(0),
        "werkzeug.serving:BaseWSGIServer.__init__": wrap_argument(3),
    },
    "webob": {"webob.request:BaseRequest.call_application": wrap_argument(1)},
    "webob-responses": {"webob.response:Response.__call__": wrap_method},
    "webtest": {
        "webtest.lint:middleware": wrap_argument(0, SECOND),  # its other side is WebOb's call
        "webtest.http:StopableWSGIServer.__init__": wrap_argument(1),
    },
    "pyramid": {"pyramid.router:Router.__call__": wrap_method},
    "tests": {},
}
"""The seams; at "tests" each test is itself the application, see `pytest_pyfunc_call`."""


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Iterator[None]:
    """Run a test inside a request whose session is that of its ``db`` fixture, if it has one."""
    test = pyfuncitem.obj
    if "tests" in SEAMS:
        db = pyfuncitem.funcargs.get("db")
        pyfuncitem.obj = partial(_as_request, test, FIRST if db is None else db.session)
    try:
        return (yield)
    finally:
        pyfuncitem.obj = test


def _as_request(test: Callable[..., object], registry: Registry, **fixtures: Any) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        test(**fixtures)
        start_response("204 No Content", [])
        return []

    environ: WSGIEnvironment = {"REQUEST_METHOD": "POST"}
    list(wrap(app, registry)(environ, lambda status, headers, exc_info=None: _ignore))


def _ignore(data: bytes) -> None:
    """Stand for the legacy ``write()``."""


if SEAMS:
    _calls = os.open(CALLS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _seam in SEAMS:
        for _place, _make in PATCHES[_seam].items():
            patch(_place, _make)
