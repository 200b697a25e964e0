"""The tracker of a Session, which `sessionscope.events` notifies."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sessionscope.stage import caller, entries, log
from sessionscope.states import Event, State
from sessionscope.transactions import Transaction
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sessionscope.participants import Participant
    from sqlalchemy import Connection
    from sqlalchemy.orm import SessionTransaction

_MARK = "_sessionscope"
"""The attribute of a Session that holds its tracker."""


class SessionTracker:
    """Tracks the transactions of one session; `sessionscope.events` notifies it.

    :param safe: whether the request's method is safe (RFC 9110, 9.2.1).
    :param watched: inspect each statement, too.
    """

    losses: Mapping[str, Transaction] = {}
    """Transactions that the application closed while they held work, by place."""
    previous: Transaction | None = None
    """The last transaction before `transaction` that had a connection."""
    ending = False
    """The library has begun to end the session, so its events are not the application's."""

    def __init__(self, session: Session, safe: bool = False, watched: bool = True) -> None:
        self.session = session
        self.safe = safe
        self.watched = watched
        self.transaction = self.new_transaction()
        """The transaction that began last, even if it is over; an idle one before the first."""
        setattr(session, _MARK, self)

    def new_transaction(self) -> Transaction:
        return Transaction(self.on_made_durable)

    def forget_session(self) -> None:
        """Stop tracking the session."""
        setattr(self.session, _MARK, None)

    def on_durable(self) -> None:
        """Handle work that was made durable, or may have been."""

    def on_made_durable(self) -> None:
        """Notify the requests and scopes around this one, too: none must be retried."""
        self.on_durable()
        for entry in entries():
            entry.on_commit_of(None)

    def on_commit_of(self, transaction: object) -> None:
        if transaction is not self.transaction:
            self.on_durable()

    def on_begin_refused(self, error: BaseException) -> None:
        if self.transaction.error is None:  # it may be of another engine, and no cause
            self.transaction.note_error(error)

    def on_create(self) -> None:
        if self.transaction.has_begun():
            self.previous = self.transaction
            self.previous.forget_errors()
        self.transaction = self.new_transaction()

    def on_join(self, connection: Connection) -> None:
        participant = self.transaction.join(connection)
        if self.watched and not self.may_be_repeated(participant):
            participant.watch()
        if self.session.in_nested_transaction():
            self.transaction.begin_sqlite()

    def may_be_repeated(self, participant: Participant) -> bool:
        """Return whether a retry may repeat what was made durable on this connection."""
        return self.safe and participant.is_autocommit()

    def on_savepoint(self, savepoint: SessionTransaction) -> None:
        self.transaction.on_savepoint(savepoint)

    def on_savepoint_released(self, savepoint: SessionTransaction) -> None:
        """Handle a RELEASE: the work of *savepoint* belongs to the transaction around it."""
        self.transaction.on_savepoint_ended(savepoint, released=True)

    def on_savepoint_ended(self, savepoint: SessionTransaction) -> None:
        """Handle the end of *savepoint*, by RELEASE, rollback or close."""
        self.transaction.on_savepoint_ended(savepoint)

    def on_flush(self) -> None:
        self.transaction.wrote = True
        for participant in self.transaction.participants:
            participant.on_flush()

    def on_pending(self) -> None:
        """Handle an added object, which ``close()`` drops before its first event."""
        self.transaction.wrote = True

    def on_before_commit(self) -> None:
        """Handle the last moment before COMMIT, after every other hook."""
        self.transaction.on_commit_allowed()

    def on_commit(self) -> None:
        """Handle a COMMIT that has returned."""
        self.transaction.on_committed()

    def on_undone(self) -> None:
        """Handle a rollback by SQLAlchemy."""
        self.transaction.on_undone()

    def on_flush_ended(self, failed: bool) -> None:
        """Handle the end of a flush.

        :param failed: whether SQLAlchemy has rolled back in it, perhaps to a savepoint only.
        """
        self.transaction.handle(Event.FLUSH_FAILED)
        error = sys.exc_info()[1]
        if failed and isinstance(error, StaleDataError):
            self.transaction.note_error(error)  # the ORM's own: no driver has raised it

    def on_end(self) -> None:
        """Handle the end of the session's transaction, by commit, rollback or close."""
        transaction = self.transaction
        transaction.wrote = transaction.has_written()
        if transaction.wrote or transaction.has_begun():
            transaction.handle(Event.CLOSED)
        transaction.leave()
        if transaction.state is State.DISCARDED and not self.ending:
            self.note_loss(transaction)

    def note_loss(self, transaction: Transaction) -> None:
        """Record where a transaction was closed, and for each place the worst case."""
        place = caller()
        known = self.losses.get(place)
        if known is None or transaction.wrote or known.state is not State.DISCARDED:
            self.losses = {**self.losses, place: transaction}

    def lost_work(self) -> Iterator[tuple[str, Transaction]]:
        """Yield the losses that ``Session.rollback()`` does not explain, and their places."""
        for place, transaction in self.losses.items():
            if transaction.state is State.DISCARDED:
                yield place, transaction

    def forget_errors(self) -> None:
        """Drop the references to errors, whose tracebacks refer back to this object."""
        for transaction in (self.transaction, self.previous, *self.losses.values()):
            if transaction is not None:
                transaction.forget_errors()

    def on_rollback(self) -> None:
        """Handle ``Session.rollback()``, after the end of the transaction."""
        self.transaction.handle(Event.ROLLED_BACK)


def tracker_of(session: Session | None) -> SessionTracker | None:
    """Return the tracker of *session*, or None."""
    tracker: SessionTracker | None = getattr(session, _MARK, None)
    return tracker


def has_changes(session: Session) -> bool:
    """Return whether a flush would have something to do."""
    return bool(session.new or session.deleted or session.identity_map.check_modified())


def close_quietly(session: Session) -> bool:
    """Close *session*; if that fails, log it and return False."""
    try:
        session.close()
    except Exception:
        log.exception("a session could not be closed")
        return False
    return True
