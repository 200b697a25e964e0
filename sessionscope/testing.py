"""Tests with real requests, real commits and rollbacks, and an unchanged database afterwards.

Inside `isolated`, the sessions of a registry share one connection, and one transaction on it
that is never committed.  A COMMIT releases a savepoint and a ROLLBACK goes back to one, so the
application behaves as in production, including its callbacks after the commit and its retries.
At the end everything is undone::

    import webtest
    from myapp import Item, Session, application
    from sqlalchemy import func, select

    from sessionscope.testing import isolated

    def test_an_item_is_made():
        with isolated(Session) as connection:
            webtest.TestApp(application).post("/items")
            assert connection.scalar(select(func.count(Item.id))) == 1

`sessionscope.pytest_plugin` has a fixture that does the same.  Create the tables beforehand.  Set
up rows for a request by ``Session.add()`` and ``Session.commit()`` in the block, or through the
connection.  A ``reader=`` is ignored, so that requests with safe methods see these rows.

Limits of one transaction:

- Sessions nest.  A session that began before a request, and is rolled back or closed after it,
  undoes what the request committed, with a warning.  End it before the request, or query the
  connection.
- Threads take turns: the requests of a threaded server wait for one another.  That requires a
  driver whose connections may change threads; SQLite in memory by default does not allow it.
- Checks at COMMIT, of a deferred constraint for instance, do not take place.  Isolation levels
  cannot be changed.  On PostgreSQL ``now()`` stands still.
- Work outside of the registry's sessions is not undone; nor are sequences and auto-increments of
  PostgreSQL and MariaDB, nor work before a DDL statement on MariaDB, which commits it.
- An error for which the database rolls back its whole transaction, as MariaDB does for a
  deadlock, also undoes what the block did before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from threading import Condition, get_ident
from typing import Any

from sessionscope.errors import require_registry
from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker

__all__ = ["Isolate", "isolated"]

Isolate = Callable[[scoped_session[Any]], Connection]
"""The type of the pytest fixture ``sessionscope_isolate``."""

PATIENCE = 10.0
"""Seconds for which a session waits for those of other threads to end."""

_ADVICE = "in an isolated() block, a session that begins before a request must end before it"


@contextmanager
def isolated(registry: scoped_session[Any]) -> Iterator[Connection]:
    """Undo, at the end of the block, everything that sessions of *registry* do in it.

    These are the sessions that its ``sessionmaker`` creates, with its other arguments
    unchanged; each Engine of ``binds``, or of a subclass's ``get_bind()``, gets a connection.
    Sessions that the registry holds before the block are set aside, and restored after it.
    Blocks may be nested.

    :param registry: the ``scoped_session`` of the application and its SessionMiddleware.
    :returns: a context manager; ``as`` gives the connection of the ``bind`` or, without one, of
        the first of ``binds``.
    :raises TypeError: if *registry* is no ``scoped_session`` with a ``sessionmaker``.
    """
    require_registry(registry)
    factory, sessions = registry.session_factory, registry.registry
    if not isinstance(factory, sessionmaker):
        raise TypeError(f"isolated() needs a registry with a sessionmaker, not {factory!r}")
    class_, settings = factory.class_, factory.kw
    with ExitStack() as stack:
        isolation = _Isolation(stack)
        connection = isolation.connection_of(_first_bind(factory))
        factory.class_ = isolation.subclass(class_)
        factory.kw = {
            **settings,
            "join_transaction_mode": "create_savepoint",
            "twophase": False,
        }
        if settings["bind"] is not None:
            factory.kw["bind"] = connection  # SessionMiddleware(reader=...) respects that
        registry.registry = scoped_session(factory, getattr(sessions, "scopefunc", None)).registry
        try:
            yield connection
        finally:
            factory.class_, factory.kw, registry.registry = class_, settings, sessions
            isolation.close_sessions()


def _first_bind(factory: sessionmaker[Any]) -> Any:
    binds = factory.kw.get("binds") or {}
    found = (bind for bind in (factory.kw["bind"], *binds.values()) if bind is not None)
    return next(found, None) or factory().get_bind()


class _Isolation:
    """The connections of one block, and the sessions that hold a savepoint on them."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.connections: dict[Engine | Connection, Connection] = {}
        self.turn = Condition()
        self.open: dict[Session, tuple[int, int]] = {}
        self.commits = 0

    def connection_of(self, bind: Engine | Connection) -> Connection:
        """Return the connection that replaces *bind*, in a transaction."""
        connection = self.connections.get(bind)
        if connection is None:
            connection = self.begin(bind)
            self.connections[bind] = self.connections[connection] = connection
        if connection.dialect.name == "sqlite":
            _begin_sqlite(connection)
        return connection

    def begin(self, bind: Engine | Connection) -> Connection:
        if isinstance(bind, Engine):
            bind = self.stack.enter_context(bind.connect())
        transaction = bind.begin_nested() if bind.in_transaction() else bind.begin()
        self.stack.enter_context(closing(transaction))
        return bind

    def subclass(self, base: Any) -> Any:
        connection_of = self.connection_of

        class Isolated(base):  # type: ignore[misc]
            def get_bind(self, *args: Any, **options: Any) -> Connection:
                return connection_of(super().get_bind(*args, **options))

        for name, listener in (
            ("after_transaction_create", self.begun),
            ("after_commit", self.committed),
            ("after_transaction_end", self.ended),
        ):
            event.listen(Isolated, name, listener)
            self.stack.callback(event.remove, Isolated, name, listener)
        return Isolated

    def begun(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            with self.turn:
                if not self.turn.wait_for(self.is_our_turn, PATIENCE):
                    raise RuntimeError(f"a session of another thread is still open: {_ADVICE}")
                self.open[session] = get_ident(), self.commits

    def is_our_turn(self) -> bool:
        return all(thread == get_ident() for thread, _ in self.open.values())

    def committed(self, session: Session) -> None:
        if not session.in_nested_transaction():
            self.end(session)
            self.commits += 1

    def ended(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None and self.end(session) != self.commits:
            message = f"this undoes what another session committed: {_ADVICE}"
            warnings.warn(message, stacklevel=2)

    def end(self, session: Session) -> int:
        """Let other threads go on; return the number of commits when *session* began."""
        with self.turn:
            self.turn.notify_all()
            return self.open.pop(session, (0, self.commits))[1]

    def close_sessions(self) -> None:
        for session in list(self.open):  # another thread may end one
            self.stack.callback(session.close)  # the last one first: savepoints nest
        self.open.clear()


def _begin_sqlite(connection: Connection) -> None:
    """Send the BEGIN that the driver leaves out: without it, RELEASE commits.

    https://www.sqlite.org/lang_savepoint.html
    """
    driver: Any = connection.connection.dbapi_connection
    if not driver.in_transaction:
        driver.execute("BEGIN")
