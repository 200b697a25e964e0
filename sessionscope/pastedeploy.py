"""The session middleware as a PasteDeploy filter, for ``pserve`` and other users of ini files.

In the ini file of an application::

    [app:main]
    use = egg:myapp
    filter-with = session

    [filter:session]
    use = egg:sessionscope
    registry = myapp.models:Session
    attempts = 3

The settings are the arguments of `SessionMiddleware`:

===============  =========================================================================
``registry``     the name of the application's ``scoped_session``, ``module:name``
``url``          instead of a registry: the URL of the database; the application then finds its
                 session at ``environ["sessionscope.session"]``
``reader``       the name of an Engine for safe methods
``reader_url``   instead of a reader: the URL of the database for them
``commit_when``  the name of a function ``(environ, status, headers)``
``observer``     the name of a function that is called with each ``Outcome``
``attempts``     a whole number
``confirm``      ``true`` or ``false``
===============  =========================================================================

In ini files ``%`` is written ``%%``, also in the password of a URL.  This module does not import
PasteDeploy, because a factory is just a function
(https://docs.pylonsproject.org/projects/pastedeploy/, "paste.filter_app_factory").
"""

from __future__ import annotations

from collections.abc import Callable
from configparser import ConfigParser
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from sessionscope import SessionMiddleware
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

__all__ = ["filter_app_factory"]


def filter_app_factory(
    app: WSGIApplication, global_config: object, **settings: str
) -> SessionMiddleware:
    """Wrap *app* with the settings of a section of an ini file.

    :param app: the WSGI application to wrap.
    :param global_config: the section ``[DEFAULT]``, which is ignored.
    :param settings: the section of the filter; the table above lists the settings.
    :raises ValueError: if a setting is unknown, missing, given twice, or cannot be read.
    :raises TypeError: if a name refers to an object of the wrong type.
    """
    arguments: dict[str, Any] = {}
    for setting, text in settings.items():
        if setting not in _SETTINGS:
            raise ValueError(f"there is no setting {setting!r}, only {', '.join(_SETTINGS)}")
        argument, read = _SETTINGS[setting]
        if argument in arguments:
            names = [name for name, (stands_for, _) in _SETTINGS.items() if stands_for == argument]
            raise ValueError(f"{' and '.join(names)} exclude each other")
        try:
            arguments[argument] = read(text)
        except Exception as error:  # whatever the module raised in which a name is
            raise ValueError(f"the setting {setting!r} cannot be used: {error}") from error
    if "registry" not in arguments:
        raise ValueError("registry or url is required")
    return SessionMiddleware(app, **arguments)


def _registry_at(url: str) -> scoped_session[Session]:
    return scoped_session(sessionmaker(create_engine(url)))


def _boolean(text: str) -> bool:
    if text.lower() not in ConfigParser.BOOLEAN_STATES:
        raise ValueError(f"{text!r} is neither true nor false")
    return ConfigParser.BOOLEAN_STATES[text.lower()]


_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "registry": ("registry", resolve_name),
    "url": ("registry", _registry_at),
    "reader": ("reader", resolve_name),
    "reader_url": ("reader", create_engine),
    "commit_when": ("commit_when", resolve_name),
    "observer": ("observer", resolve_name),
    "attempts": ("attempts", int),
    "confirm": ("confirm", _boolean),
}
"""For each setting, its argument and the function that reads its text."""
