"""Which session a ``scoped_session`` shows to which code.

A session belongs to the code of its request or ``session_scope``, wherever that runs: in
another thread or event loop, in a greenlet, under a changing ``scopefunc``.  So what is on
stage is kept in a context variable (PEP 567), as the top of an immutable linked list of
nodes.  The user's ``scoped_session`` gets a `StagedRegistry`, which asks that list first and
the user's own registry if nothing on it is of this registry.

The list is immutable, because tasks and threads that carry a copy of the context share its
nodes: each opens and leaves scopes of its own and disturbs nobody.  The one change that all of
them see is that an entry is closed; look-ups skip it then.

An `Entry` is what a node has on stage: the unit of work of a request or a scope, or an
`Aside`, which hides it from code that is not the request's.
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
    """What may be on stage, and what the calls of a ``scoped_session`` mean to it."""

    stage: StagedRegistry
    closed: bool

    def show(self) -> Session:
        """Return the session for ``registry()``."""

    def has(self) -> bool:
        """Tell whether there is a session that ``registry.remove()`` shall close."""

    def replace(self, session: Session) -> None:
        """Show *session* from now on."""

    def clear(self) -> None:
        """Hear of the end of ``registry.remove()``."""

    def on_begin_refused(self, error: BaseException) -> None:
        """Hear that BEGIN failed on a connection that belongs to no session yet."""

    def on_commit_of(self, transaction: object) -> None:
        """Hear that work of *transaction*, of whatever session, is durable or may be."""


class Node:
    """A place in the list of what is on stage."""

    __slots__ = ("entry", "parent")

    def __init__(self, entry: Entry, parent: Node | None) -> None:
        self.entry = entry
        self.parent = parent


_active: ContextVar[Node | None] = ContextVar("sessionscope", default=None)


def entries() -> list[Entry]:
    """Return what is on stage for the running code, the innermost first."""
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
    """Where the code of one request stands, between the calls in which it runs.

    ``with position:`` puts its session on stage and takes it off afterwards.  Scopes that
    the request left open, in a generator for instance, are suspended and resumed with it.
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
    """Put *entry* on stage while the block runs, for it and for what it starts.

    Whoever calls this closes the entry afterwards.
    """
    node = _open_node(entry)
    try:
        _active.set(node)
        yield
    finally:
        if _active.get() is node:  # not when it is closed elsewhere, by the garbage collector
            _active.set(node.parent)


class StagedRegistry(ScopedRegistry[Any]):
    """The registry of a ``scoped_session``: what is on stage, or else the user's own.

    ``createfunc``, ``scopefunc`` and ``registry`` are those of the user's own.
    """

    __slots__ = ("own",)

    def __init__(self, own: ScopedRegistry[Any]) -> None:
        self.own = own

    createfunc = property(lambda self: self.own.createfunc)
    scopefunc = property(lambda self: self.own.scopefunc)
    registry = property(lambda self: self.own.registry)

    def scope(self) -> object:
        """Return the scope of the running code, if the user's own registry tells one apart."""
        scopefunc = getattr(self.own, "scopefunc", None)
        try:
            return None if scopefunc is None else scopefunc()
        except Exception:  # Flask-SQLAlchemy's fails outside of an application context
            return None

    def shows(self, entry: Entry) -> bool:
        """Tell whether *entry* is of this registry."""
        return entry.stage.own is self.own

    def current(self) -> Entry | None:
        """Return what is on stage of this registry, for the running code."""
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
    """Return the `StagedRegistry` of *registry*, which is installed if there is none yet."""
    found = registry.registry
    if type(found) is not StagedRegistry:
        # No lock, which an interrupt could leave locked: if two threads do this at once, both
        # make one of the same registry, and look-ups don't tell those apart.
        found = registry.registry = StagedRegistry(found)
    return found


_MISSING: Any = object()


class AppContext:
    """The context variables (PEP 567) that the application's code sees.

    COMMIT, ROLLBACK and callbacks run when a framework has already taken back what it had
    set for the request.  They run in copies of the context in which the first of them was
    due, where each variable that has returned to its value before the call has the value that
    it had when the application called ``start_response``.
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
        """Return the current context, with what the framework has taken back."""
        context = copy_context()
        for variable, value in (self.at_start_response or {}).items():
            now = context.get(variable, _MISSING)
            if now is not value and now is self.before.get(variable, _MISSING):
                context.run(variable.set, value)
        return context

    def drop(self) -> None:
        """Let go of the values."""
        self.before, self.at_start_response, self.at_end = Context(), None, None


def caller() -> str:
    """Return file and line of the code that called into SQLAlchemy or into this library."""
    passed = ("sessionscope", "sqlalchemy", "contextlib")
    frames = (frame for frame, _ in walk_stack(currentframe()))
    found = next(
        frame
        for frame in frames
        if frame.f_globals.get("__name__", "").partition(".")[0] not in passed
    )
    return f"{found.f_code.co_filename}:{found.f_lineno}"
