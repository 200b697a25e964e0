"""The states of a transaction, and the events that lead from one to the next.

::

    IDLE -> ACTIVE -> COMMITTING -> COMMITTED
                                 -> REFUSED      COMMIT raised, and nothing is durable
                                 -> IN_DOUBT     the reply to COMMIT was lost
                   -> UNDONE                     SQLAlchemy has rolled back
                      -> FAILED                  because of a flush: the session must, too
                      -> ROLLED_BACK
                   -> ABANDONED                  rolled back by remove(), after an error
                   -> DISCARDED                  the session was closed, and its work lost
                      -> ROLLED_BACK             no: Session.rollback() closed it

Whether an error has aborted a transaction is not a state: on PostgreSQL a transaction recovers if
the application rolls back to a savepoint, so that is checked when it matters, in
`sessionscope.participants.Participant.is_lost`.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal

Action = Literal["commit", "rollback", "none", "unknown"]
"""The outcome of a request's session, as `Outcome` has it."""


class State(Enum):
    """The state of a transaction."""

    __hash__ = object.__hash__  # that of Enum is written in Python

    IDLE = auto()
    ACTIVE = auto()
    COMMITTING = auto()
    COMMITTED = auto()
    REFUSED = auto()
    IN_DOUBT = auto()
    UNDONE = auto()
    FAILED = auto()
    ABANDONED = auto()
    DISCARDED = auto()
    ROLLED_BACK = auto()


class Event(Enum):
    """An event in the life of a transaction."""

    __hash__ = object.__hash__

    JOINED = auto()
    """A connection has begun."""
    ALLOWED = auto()
    """All checks have passed, so COMMIT is next."""
    COMMITTED = auto()
    REFUSED = auto()
    ANSWER_LOST = auto()
    UNDONE = auto()
    """SQLAlchemy has rolled back, by ``Session.rollback()`` or because of a flush."""
    FLUSH_FAILED = auto()
    """SQLAlchemy has rolled back because of a flush; the session needs ``rollback()``."""
    REMOVED = auto()
    """The application called ``remove()`` after an error."""
    CLOSED = auto()
    """The session's transaction has ended."""
    ROLLED_BACK = auto()
    """It has ended by ``Session.rollback()``."""


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.IDLE: {
        Event.JOINED: State.ACTIVE,
        Event.COMMITTED: State.COMMITTED,
        Event.CLOSED: State.DISCARDED,
    },
    State.ACTIVE: {
        Event.ALLOWED: State.COMMITTING,
        Event.COMMITTED: State.COMMITTED,
        Event.UNDONE: State.UNDONE,
        Event.REMOVED: State.ABANDONED,
        Event.CLOSED: State.DISCARDED,
    },
    State.COMMITTING: {
        Event.COMMITTED: State.COMMITTED,
        Event.REFUSED: State.REFUSED,
        Event.ANSWER_LOST: State.IN_DOUBT,
        Event.UNDONE: State.UNDONE,
        Event.CLOSED: State.DISCARDED,
    },
    State.REFUSED: {
        Event.ANSWER_LOST: State.IN_DOUBT,
        Event.UNDONE: State.UNDONE,
        Event.REMOVED: State.ABANDONED,
        Event.CLOSED: State.DISCARDED,
    },
    State.UNDONE: {Event.FLUSH_FAILED: State.FAILED, Event.CLOSED: State.ROLLED_BACK},
    State.FAILED: {Event.REMOVED: State.ABANDONED, Event.CLOSED: State.DISCARDED},
    State.DISCARDED: {Event.ROLLED_BACK: State.ROLLED_BACK},
    # Only the database can resolve a doubt.
    State.IN_DOUBT: {
        Event.COMMITTED: State.COMMITTED,
        Event.REFUSED: State.ROLLED_BACK,
    },
    State.COMMITTED: {},
    State.ABANDONED: {},
    State.ROLLED_BACK: {},
}
"""For each state, the events that change it, and the next state."""

_ACTIONS: dict[State, Action] = {State.COMMITTED: "commit", State.IN_DOUBT: "unknown"}


def action_of(state: State) -> Action:
    """Return the action that an `Outcome` reports for a transaction that had begun."""
    return _ACTIONS.get(state, "rollback")
