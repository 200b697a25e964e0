"""Sessions that the registry returns instead of the request's.

The application may have put one there, and callbacks get a new one, because they must not use
the session of the request.  Whoever uses such a guest commits or rolls it back; if work is left
in it, it is closed and never committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from sessionscope.errors import closed_with_work
from sessionscope.stage import Position, StagedRegistry, log
from sessionscope.trackers import SessionTracker, close_quietly, has_changes, tracker_of
from sqlalchemy.orm import Session

T = TypeVar("T")


class Guest(SessionTracker):
    """A session that somebody else commits or rolls back."""

    def work_left(self) -> Iterator[str]:
        """Yield a message for each piece of work that was not committed."""
        for place, transaction in self.lost_work():
            if transaction.wrote:
                yield closed_with_work(place)
        if self.session.in_transaction() and (
            self.transaction.has_written() or has_changes(self.session)
        ):
            yield "a session that was put into the registry was not committed: its work is lost"

    def close(self) -> None:
        self.ending = True
        close_quietly(self.session)
        self.transaction.leave()
        self.forget_session()
        self.forget_errors()


class Seat:
    """The slot for guests in the registry, which one after the other may occupy."""

    session: Session | None = None
    guests: tuple[Guest, ...] = ()

    def take(self, session: Session) -> None:
        """Return *session* from now on; one that a session_scope tracks already is no guest."""
        self.session = session
        if tracker_of(session) is None:
            self.guests += (Guest(session),)

    def leave(self) -> None:
        """Stop returning it: somebody has closed it, or goes on using it elsewhere."""
        self.session = None

    def work_left(self) -> Iterator[str]:
        for guest in self.guests:
            yield from guest.work_left()

    def close(self) -> None:
        """Close the guests."""
        while self.guests:
            guest, self.guests = self.guests[-1], self.guests[:-1]
            guest.close()
        self.session = None


class Aside(Seat):
    """An entry that hides the session of the request from callbacks and observers."""

    closed = False

    def __init__(self, stage: StagedRegistry, factory: Callable[[], Any]) -> None:
        self.stage = stage
        self.factory = factory

    def show(self) -> Session:
        if self.session is None:
            self.take(self.factory())
        assert self.session is not None
        return self.session

    def has(self) -> bool:
        return self.session is not None

    replace = Seat.take
    clear = Seat.leave

    def on_begin_refused(self, error: BaseException) -> None:
        """Do nothing: it keeps no record of errors."""

    def on_commit_of(self, transaction: object) -> None:
        """Do nothing: it keeps no record of commits."""

    def close(self) -> None:
        for sentence in self.work_left():
            log.warning("%s; a callback or an observer must commit what it writes", sentence)
        super().close()
        self.closed = True


def run_aside(
    stage: StagedRegistry, factory: Callable[[], Any], function: Callable[..., T], *args: Any
) -> T:
    """Call *function* without the active session.

    A session that it gets from the registry is a new one, and is closed after it.
    """
    entry = Aside(stage, factory)
    try:
        with Position(entry):
            return function(*args)
    finally:
        entry.close()
