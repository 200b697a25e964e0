"""The connections of a transaction, and the state of their drivers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import ref

from sessionscope import databases
from sessionscope.forks import refusal
from sessionscope.stage import log
from sessionscope.states import State
from sqlalchemy import Engine, event

if TYPE_CHECKING:
    from sessionscope.stage import Registry
    from sessionscope.transactions import Transaction
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext

_MARK = "sessionscope"
"""The key in ``Connection.info`` that holds its participants: sessions may share it."""


def participants_of(info: dict[Any, Any]) -> list[Participant]:
    """Return the participants of the transactions that a connection is in."""
    return [one for reference in list(info.get(_MARK, ())) if (one := reference()) is not None]


def _watched_on(connection: Connection) -> list[Participant]:
    found = participants_of(connection.info)
    return [one for one in found if one.watched and one.connection is connection]


def _before_cursor_execute(connection: Connection, *_context: object) -> None:
    for participant in _watched_on(connection):
        participant.before_next()


def _after_cursor_execute(
    connection: Connection, cursor: object, statement: str, *_context: object
) -> None:
    for participant in _watched_on(connection):
        participant.on_statement(statement)


def _commit(connection: Connection, *_xid: object) -> None:
    for participant in _watched_on(connection):
        participant.on_commit()


_WATCHERS: dict[str, Callable[..., None]] = {
    "before_cursor_execute": _before_cursor_execute,
    "commit": _commit,
    "commit_twophase": _commit,
    "after_cursor_execute": _after_cursor_execute,  # last, so that it tells that all are there
}


def watch(engine: Engine) -> None:
    """Listen to the statements and COMMITs of *engine* from now on.

    The listeners stay, which costs less than new ones for each request.
    """
    if _after_cursor_execute not in engine.dispatch.after_cursor_execute:
        for name, listener in _WATCHERS.items():
            event.listen(engine, name, listener)


def binds_of(registry: Registry) -> list[object]:
    """Return the engines and connections that the sessions of *registry* are bound to."""
    options = getattr(registry.session_factory, "kw", {})
    return [options.get("bind"), *(options.get("binds") or {}).values()]


class DriverState:
    """What the driver of a connection knows of its transaction; SQLite's knows most.

    :param connection: it has just begun.
    """

    wrote = False
    """Whether SQLite's driver had changed rows when the connection was returned."""
    pooled: Any = None
    """The pool's proxy of SQLite's driver; empty when that was returned or invalidated."""
    begun = False
    """Whether the driver has been in a transaction at some check; SQLite's, or if it is watched."""
    changes = 0
    """Number of rows that SQLite's driver had changed when the transaction began."""
    in_autocommit: bool | None = None

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.transaction = connection.get_nested_transaction() or connection.get_transaction()
        if connection.dialect.name == "sqlite":
            self.pooled = connection.connection
            driver = self.pooled.dbapi_connection
            self.begun, self.changes = driver.in_transaction, driver.total_changes
            self.in_autocommit = not self.begun and databases.is_sqlite_in_autocommit(driver)

    def sqlite(self) -> Any:
        """Return SQLite's driver; None if the connection has lost it, or is of another database."""
        return None if self.pooled is None else self.pooled.dbapi_connection

    def on_flush(self) -> None:
        driver = self.sqlite()
        if driver is None or self.begun:
            return
        if not self.connection.in_nested_transaction():  # RELEASE of its own savepoint may COMMIT
            self.begun = driver.in_transaction

    def begin_sqlite(self) -> None:
        """Send the BEGIN that SQLite's driver has not sent yet."""
        if self.sqlite() is not None and not self.begun:
            databases.begin_sqlite(self.connection)
            self.on_flush()

    def is_autocommit(self) -> bool:
        """Return whether the driver commits each statement by itself."""
        if self.in_autocommit is None and not self.connection.invalidated:
            self.in_autocommit = databases.is_autocommit(self.connection)
        return bool(self.in_autocommit)

    def has_written(self) -> bool:
        """Return whether SQLite's driver has changed rows; False if that is unknown."""
        driver = self.sqlite()
        return self.wrote if driver is None else bool(driver.total_changes != self.changes)

    def had_work(self) -> bool:
        """Return whether the driver was in a transaction, or has changed rows."""
        return self.begun or self.has_written()

    def is_touched(self) -> bool:
        """Return whether a COMMIT or a ROLLBACK was begun on this connection."""
        return self.transaction is not None and not self.transaction.is_active

    def is_ended(self) -> bool:
        """Return whether the transaction is over although SQLAlchemy has not ended it."""
        lost = self.connection.invalidated or self.connection.closed
        if lost or self.is_touched() or not self.had_work():
            return False
        driver = databases.driver_connection(self.connection)
        return not databases.is_in_transaction(driver, unknown=True)

    def commit_returned(self) -> bool:
        """Return whether COMMIT succeeded on this connection, if nobody has rolled back.

        SQLAlchemy removes a transaction from its connection if COMMIT returns, and leaves it
        there, inactive, if COMMIT raises.
        """
        connection = self.connection
        present = connection.get_nested_transaction(), connection.get_transaction()
        return self.transaction not in present


class Participant(DriverState):
    """One connection of a transaction, and what happens on it.

    :param owner: the transaction.
    """

    watched = False
    error: BaseException | None = None
    """The first error on this connection."""
    aborted = False
    """Whether an error made the database roll back the whole transaction."""
    commit_sent = False
    """Known only if the transaction has several connections, or is watched."""

    def __init__(self, owner: Transaction, connection: Connection) -> None:
        super().__init__(connection)
        self.owner = owner
        self.listeners: list[tuple[str, Callable[..., None]]] = []
        # Weak, since the pool keeps it: a stream that is dropped without close() must be freed.
        # Another thread may have the connection already when this one leaves: so a set, whose
        # methods are atomic, as those of WeakSet are not.
        self.others: set[ref[Participant]] = connection.info.setdefault(_MARK, set())
        self.shared_with = participants_of(connection.info)
        for participant in self.shared_with:
            participant.on_flush()
        self.mark = ref(self, self.others.discard)
        self.others.add(self.mark)

    def leave(self) -> None:
        self.others.discard(self.mark)
        while self.shared_with:
            self.shared_with.pop().refresh()
        while self.listeners:
            event.remove(self.connection, *self.listeners.pop())

    def refuse_if_inherited(self) -> None:
        """Raise an error if another process opened the connection."""
        error = refusal(self.connection)
        if error is not None:
            self.aborted = True
            self.owner.note_error(error)
            try:
                raise error
            finally:
                del error  # whose traceback leads back to here

    def watch(self) -> None:
        """Inspect each statement and COMMIT: it may make work durable."""
        self.watched = True
        watch(self.connection.engine)

    def watch_commit(self) -> None:
        """Listen to COMMIT before the hooks of the engine, which may refuse it."""
        for name in ("commit", "commit_twophase"):
            event.listen(self.connection, name, self.on_commit)
            self.listeners.append((name, self.on_commit))

    def is_lost(self) -> bool:
        """Return whether COMMIT would keep nothing, or only a part."""
        connection = self.connection
        if self.aborted or connection.invalidated:
            return True
        if self.pooled is not None:
            driver = self.sqlite()
            return driver is None or (self.begun and not driver.in_transaction)
        return databases.is_aborted(connection, self.error)

    def on_savepoint_undone(self) -> None:
        """Forget the error if it is certain that this connection was rolled back, too.

        It was not if it had not been used in the savepoint, or RELEASE or ROLLBACK failed.
        """
        connection = self.connection
        if self.error is None or connection.closed or connection.invalidated:
            return
        if databases.is_sound(connection):
            self.error = None

    def on_committed(self) -> None:
        """Handle a COMMIT: all transactions on the same connection of the driver are committed.

        SQLite in memory gives each thread one connection, whatever its sessions.
        """
        if len(self.others) > 1:
            for participant in participants_of(self.connection.info):
                driver = participant.sqlite()
                participant.begun = driver is not None and driver.in_transaction

    def refresh(self) -> None:
        """Notice that another session, which shares SQLite's driver, has rolled back."""
        driver = self.sqlite()
        if driver is not None and not driver.in_transaction:
            self.aborted = self.aborted or self.begun

    def on_return(self, driver: Any, claimed: bool) -> None:
        """Handle the return of the connection to its pool.

        :param claimed: whether SQLAlchemy considers its transaction over.  It is not if COMMIT
            failed and the session was closed: the next user would commit this work.
        """
        if self.pooled is not None:
            self.wrote = driver.total_changes != self.changes
        if claimed and databases.is_in_transaction(driver, self.owner.is_commit_refused()):
            driver.rollback()

    def on_statement(self, statement: str) -> None:
        self.owner.on_statement(statement)
        if self.pooled is None and not databases.is_read(statement):
            driver = databases.driver_connection(self.connection)
            self.begun = databases.is_in_transaction(driver, unknown=False)
        autocommit, had_work = self.is_autocommit(), self.had_work()
        if autocommit or databases.may_have_committed(self.connection, statement, had_work):
            self.owner.on_durable()

    def before_next(self) -> None:
        """Notice the driver's own ``commit()`` before a statement, or our ROLLBACK, hides it."""
        if not self.watched or self.aborted or self.owner.state is not State.ACTIVE:
            return
        if self.is_ended():
            self.owner.on_durable()

    def on_commit(self, *_details: object) -> None:
        if self.owner.state is State.COMMITTING:
            self.commit_sent = True
        else:
            self.owner.on_durable()  # Connection.commit(), called by the application

    def on_error(self, context: ExceptionContext) -> None:
        """Handle an error of the connection, before anything can swallow or translate it."""
        error = context.sqlalchemy_exception or context.original_exception
        owner, connection = self.owner, self.connection
        if isinstance(error, OSError) or databases.error_code(error) in databases.NODE_LOST:
            context.is_disconnect = True  # SQLAlchemy does not count it as one
            context.invalidate_pool_on_disconnect = False
        if self.watched and databases.may_be_durable(context, self.is_autocommit()):
            owner.on_durable()
        owner.note_error(error)
        if context.is_disconnect or databases.error_code(error) is not None:
            self.error = self.error or error
        if not (self.aborted or context.is_disconnect or self.is_autocommit()):
            self.aborted = databases.aborts_transaction(connection, error, self.had_work())
            if self.aborted:
                owner.note_error(error, final=True)
                databases.begin_sqlite_again(connection)
        if owner.state is State.COMMITTING:
            if databases.is_of_commit(context):
                owner.on_commit_error(error)
            elif connection.dialect.name == "postgresql":
                self.aborted = True  # by a hook of COMMIT, after the last check


def discard(connection: Connection) -> None:
    """Close a connection that SQLAlchemy failed to close, before another request gets it."""
    try:
        if not connection.closed:
            connection.invalidate()
            connection.close()
    except Exception:
        log.exception("a connection could not be discarded")
