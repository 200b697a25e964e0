"""Which session a ``scoped_session`` returns to which code.

A session belongs to the code of its request or ``session_scope``, wherever that runs: in
another thread or event loop, in a greenlet, under a changing ``scopefunc``.  The active sessions
(the stage) are therefore kept in a context variable (PEP 567), as the top of an immutable linked
list of nodes.  The user's ``scoped_session`` gets a `StagedRegistry`, which looks into that list
first, and into the user's registry if no node is of this registry.

The list is immutable, because tasks and threads that carry a copy of the context share its
nodes: the scopes that one of them opens and closes do not affect the others.  The one change
that all of them see is that an entry is closed; look-ups skip it then.

An `Entry` is the content of a node: the unit of work of a request or a scope, or an `Aside`,
which hides it from callbacks and observers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from inspect import currentframe
from traceback import walk_stack
from typing import Any, Protocol, TypeVar

from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import ScopedRegistry

Registry = scoped_session[Any]
T = TypeVar("T")

log = logging.getLogger("sessionscope")


class Entry(Protocol):
    """What a node of the stage holds; a ``scoped_session`` calls it through its registry."""

    stage: StagedRegistry
    closed: bool

    def show(self) -> Session:
        """Return the session for ``registry()``."""

    def has(self) -> bool:
        """Return whether there is a session that ``registry.remove()`` has to close."""

    def replace(self, session: Session) -> None:
        """Return *session* from `show` from now on."""

    def clear(self) -> None:
        """Handle the end of ``registry.remove()``."""

    def on_begin_refused(self, error: BaseException) -> None:
        """Handle a BEGIN that failed on a connection that belongs to no session yet."""

    def on_commit_of(self, transaction: object) -> None:
        """Handle a COMMIT of *transaction*, of any session, that took effect or may have."""


class Node:
    """A node of the linked list of entries."""

    __slots__ = ("entry", "parent")

    def __init__(self, entry: Entry, parent: Node | None) -> None:
        self.entry = entry
        self.parent = parent


_active: ContextVar[Node | None] = ContextVar("sessionscope", default=None)


def entries() -> list[Entry]:
    """Return the active entries of the running code, the innermost first."""
    found, node = [], _active.get()
    while node is not None:
        if not node.entry.closed:
            found.append(node.entry)
        node = node.parent
    return found


def _open_node(entry: Entry) -> Node:
    parent = _active.get()
    while parent is not None and parent.entry.closed:
        parent = parent.parent
    return Node(entry, parent)


class Position:
    """The active entries of one request, between the calls in which its code runs.

    ``with position:`` activates its session, and deactivates it afterwards.  Scopes that the
    request left open, in a generator for instance, are suspended and resumed with it.
    """

    def __init__(self, entry: Entry) -> None:
        self.base = self.top = _open_node(entry)
        self.outer: Node | None = None

    def __enter__(self) -> None:
        self.outer = _active.get()
        _active.set(self.top)

    def __exit__(self, *exc_info: object) -> None:
        self.top = _active.get() or self.base
        _active.set(self.outer)
        self.outer = None


@contextmanager
def on_stage(entry: Entry) -> Iterator[None]:
    """Activate *entry* for the block, and for what the block starts with its context.

    The caller closes the entry afterwards.
    """
    node = _open_node(entry)
    try:
        _active.set(node)
        yield
    finally:
        if _active.get() is node:  # not when it is closed elsewhere, by the garbage collector
            _active.set(node.parent)


class StagedRegistry(ScopedRegistry[Any]):
    """The registry of a ``scoped_session``: the active entry, or else the user's registry.

    ``createfunc``, ``scopefunc`` and ``registry`` are those of the user's registry.

    :param own: the registry that the ``scoped_session`` was created with.
    """

    __slots__ = ("own",)

    def __init__(self, own: ScopedRegistry[Any]) -> None:
        self.own = own

    createfunc = property(lambda self: self.own.createfunc)
    scopefunc = property(lambda self: self.own.scopefunc)
    registry = property(lambda self: self.own.registry)

    def scope(self) -> object:
        """Return the value of the user's ``scopefunc``; None if there is none, or it raises."""
        scopefunc = getattr(self.own, "scopefunc", None)
        try:
            return None if scopefunc is None else scopefunc()
        except Exception:  # Flask-SQLAlchemy's fails outside of an application context
            return None

    def shows(self, entry: Entry) -> bool:
        """Return whether *entry* belongs to this registry."""
        return entry.stage.own is self.own

    def current(self) -> Entry | None:
        """Return the innermost active entry of this registry for the running code."""
        node = _active.get()
        while node is not None:
            entry = node.entry
            if self.shows(entry) and not entry.closed:
                return entry
            node = node.parent
        return None

    def __call__(self) -> Any:
        entry = self.current()
        return self.own() if entry is None else entry.show()

    def has(self) -> bool:
        entry = self.current()
        return self.own.has() if entry is None else entry.has()

    def set(self, obj: Any) -> None:
        entry = self.current()
        if entry is None:
            self.own.set(obj)
        else:
            entry.replace(obj)

    def clear(self) -> None:
        entry = self.current()
        if entry is None:
            self.own.clear()
        else:
            entry.clear()


def staged(registry: Registry) -> StagedRegistry:
    """Return the `StagedRegistry` of *registry*; it is installed by the first call."""
    found = registry.registry
    if type(found) is not StagedRegistry:
        # No lock, which an interrupt could leave locked: if two threads do this at once, both
        # create one for the same registry, and look-ups treat the two alike.
        found = registry.registry = StagedRegistry(found)
    return found


_MISSING: Any = object()


class AppContext:
    """The context variables (PEP 567) of the application.

    COMMIT, ROLLBACK and callbacks run when a framework has already reset the variables that it
    had set for the request.  They run in copies of the context of the first of them, in which
    each variable that has been reset to its value before the call has the value that it had
    when the application called ``start_response``.
    """

    def __init__(self) -> None:
        self.before = copy_context()
        self.at_start_response: Context | None = None
        self.at_end: Context | None = None

    def note_start_response(self) -> None:
        self.at_start_response = copy_context()

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call *function* in the application's context."""
        if self.at_end is None:
            self.at_end = self.restored()
        return self.at_end.copy().run(function, *args)

    def restored(self) -> Context:
        """Return the current context, with the variables that the framework has reset."""
        context = copy_context()
        for variable, value in (self.at_start_response or {}).items():
            now = context.get(variable, _MISSING)
            if now is not value and now is self.before.get(variable, _MISSING):
                context.run(variable.set, value)
        return context

    def drop(self) -> None:
        """Drop the references to the values."""
        self.before, self.at_start_response, self.at_end = Context(), None, None


def caller() -> str:
    """Return file and line of the code that called into SQLAlchemy or into this library."""
    passed = ("sessionscope", "sqlalchemy", "contextlib")
    frames = (frame for frame, _ in walk_stack(currentframe()))
    for frame in frames:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in passed:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return "a thread or greenlet"  # that runs a method of the session, and nothing else
