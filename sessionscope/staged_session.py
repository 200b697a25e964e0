"""The session of a unit of work as the application finds it in its registry.

It tells `sessionscope.stage` which session the registry returns and what ``remove()`` does, and
records work that the application has discarded and sessions that it has put into the registry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sessionscope.errors import TransactionDoomed, closed_after_reading, closed_with_work
from sessionscope.guests import Seat
from sessionscope.participants import binds_of
from sessionscope.stage import caller, entries, log, staged
from sessionscope.states import Event, State
from sessionscope.trackers import SessionTracker, has_changes
from sqlalchemy import Connection, Engine

if TYPE_CHECKING:
    from sessionscope.participants import Participant
    from sessionscope.stage import Registry
    from sqlalchemy.orm import Session


class StagedSession(SessionTracker):
    """A new session of a registry, which returns it to the code of one request or scope.

    :param registry: creates the session.
    :param reader: an Engine to bind the session to.
    :param safe: whether the request's method is safe (RFC 9110, 9.2.1).
    :param watched: whether the request may be retried, so that every statement is inspected.
    :param warned: messages that were logged already; each is logged once.
    """

    closed = False
    scope: object = None
    """The value of ``scopefunc`` when the session was first used for its transaction.

    A ``remove()`` with another value is ignored: Flask-SQLAlchemy calls one at the end of each
    nested application context.
    """
    removed_at: str | None = None
    """File and line that called ``remove()`` while the session held work."""

    def __init__(
        self,
        registry: Registry,
        reader: Engine | None,
        safe: bool,
        watched: bool,
        warned: set[str],
    ) -> None:
        session, around = registry.session_factory(), entries()
        if any(getattr(entry, "session", None) is session for entry in around):
            raise RuntimeError(
                f"{registry.session_factory!r} returned a session that is in use already, but "
                "each request and each session_scope needs a new one"
            )
        own = session.bind
        if reader is not None and not isinstance(own, Connection):
            session.bind = reader
        # A request around this scope may be retried.
        watched = watched or any(getattr(entry, "watched", False) for entry in around)
        super().__init__(session, safe, watched)
        self.reader = None if reader is own else reader
        self.registry = registry
        self.stage = staged(registry)
        self.warned = warned
        self.seat = Seat()

    def may_be_repeated(self, participant: Participant) -> bool:
        engine = participant.connection.engine
        if engine is self.reader and engine not in binds_of(self.registry):
            return True  # it has only safe requests, and refuses to write
        return super().may_be_repeated(participant)

    def show(self) -> Session:
        if self.scope is None or not self.session.in_transaction():
            self.scope = self.stage.scope()
        if self.removed_at is not None:
            self.warn_once(
                f"{self.removed_at} removed a session that held work, and the application uses "
                "the registry again: the work is kept, and the response decides. Delete that "
                "line, or call rollback() to discard the work"
            )
            self.removed_at = None
        return self.seat.session or self.session

    def has(self) -> bool:
        """Return False for the session itself, so that ``remove()`` never closes it."""
        return self.seat.session is not None

    def replace(self, session: Session) -> None:
        if session is self.session:
            self.seat.leave()
        else:
            self.seat.take(session)

    def clear(self) -> None:
        """Keep the work on ``remove()``, unless an error has aborted the transaction."""
        if self.seat.session is not None:
            self.seat.leave()
            return
        transaction = self.transaction
        if not self.session.in_transaction() or self.stage.scope() != self.scope:
            return
        self.scope = None
        if self.has_failed():
            transaction.handle(Event.REMOVED)
            self.session.rollback()
        elif transaction.has_begun() or has_changes(self.session):
            self.removed_at = caller()

    def has_failed(self) -> bool:
        """Return whether the transaction can only be rolled back."""
        transaction = self.transaction
        if transaction.state is State.COMMITTING and self.session.twophase:
            # The application has prepared it, unless a COMMIT was tried already.
            return any(participant.is_touched() for participant in transaction.participants)
        return not self.session.is_active or transaction.is_lost()

    def refuse_lost_work(self) -> None:
        """Check that the application has not discarded work.

        A request with a safe method that only read has lost nothing: that is a warning, once
        per place.

        :raises TransactionDoomed: if work was discarded.
        """
        for sentence in self.seat.work_left():
            raise TransactionDoomed(sentence)
        for place, transaction in self.lost_work():
            if transaction.wrote or not self.safe:
                raise TransactionDoomed(closed_with_work(place))
            self.warn_once(closed_after_reading(place))

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            log.warning(message)
