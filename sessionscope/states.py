"""What can become of a transaction: the states, and what leads from one to the next.

::

    IDLE -> ACTIVE -> COMMITTING -> COMMITTED
                                 -> REFUSED      COMMIT raised, and nothing is durable
                                 -> IN_DOUBT     the answer to COMMIT was lost
                   -> UNDONE                     SQLAlchemy has rolled back
                      -> FAILED                  because of a flush: the session must, too
                      -> ROLLED_BACK
                   -> ABANDONED                  rolled back by remove(), after an error
                   -> DISCARDED                  the session was closed, and its work lost
                      -> ROLLED_BACK             no: Session.rollback() closed it

Whether an error has aborted a transaction is no state: PostgreSQL heals one when the
application goes back to a savepoint, so it is asked when it matters
(`sessionscope.participants.Participant.is_lost`).
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal

Action = Literal["commit", "rollback", "none", "unknown"]
"""What `Outcome` says became of a request's session."""


class State(Enum):
    """What has become of a transaction."""

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
    """What happens to a transaction."""

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
    """It was because of a flush, and the session is of no use until ``Session.rollback()``."""
    REMOVED = auto()
    """The application called ``remove()`` after an error."""
    CLOSED = auto()
    """The session's transaction is over."""
    ROLLED_BACK = auto()
    """It was over because of ``Session.rollback()``."""


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
"""What leads from one state to the next; any other event changes nothing."""

_ACTIONS: dict[State, Action] = {State.COMMITTED: "commit", State.IN_DOUBT: "unknown"}


def action_of(state: State) -> Action:
    """Return what an `Outcome` says of a transaction that had begun."""
    return _ACTIONS.get(state, "rollback")
