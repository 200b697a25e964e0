"""Sessions that the registry shows instead of a request's own.

The application may put one there itself, and callbacks get one, because the request's session
is none of their business.  Whoever uses a guest ends its transactions; what is left in it is
closed, and never committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from sessionscope.stage import Position, StagedRegistry, log
from sessionscope.trackers import SessionTracker, close_quietly, has_changes, tracker_of
from sqlalchemy.orm import Session

T = TypeVar("T")


class Guest(SessionTracker):
    """A session that somebody else ends."""

    def work_left(self) -> Iterator[str]:
        """Iterate over sentences about work that was not committed."""
        for sentence, transaction in self.lost_work():
            if transaction.wrote:
                yield sentence
        if self.session.in_transaction() and (
            self.transaction.has_written() or has_changes(self.session)
        ):
            yield "a session that was put into the registry was not committed"

    def close(self) -> None:
        self.ending = True
        close_quietly(self.session)
        self.forget_session()
        self.forget_errors()


class Seat:
    """The place in the registry where guests may be, one after the other."""

    session: Session | None = None
    guests: tuple[Guest, ...] = ()

    def take(self, session: Session) -> None:
        """Show *session*; one that is followed already, by a session_scope, is no guest."""
        self.session = session
        if tracker_of(session) is None:
            self.guests += (Guest(session),)

    def leave(self) -> None:
        """Show it no more, because somebody has closed it or goes on using it elsewhere."""
        self.session = None

    def work_left(self) -> Iterator[str]:
        for guest in self.guests:
            yield from guest.work_left()

    def close(self) -> None:
        """Close what is left."""
        while self.guests:
            guest, self.guests = self.guests[-1], self.guests[:-1]
            guest.close()
        self.session = None


class Aside:
    """On stage, it hides a request's session from code that is not the request's."""

    def __init__(self, stage: StagedRegistry, factory: Callable[[], Any]) -> None:
        self.stage = stage
        self.factory = factory
        self.seat = Seat()
        self.closed = False

    def show(self) -> Session:
        if self.seat.session is None:
            self.seat.take(self.factory())
        assert self.seat.session is not None
        return self.seat.session

    def has(self) -> bool:
        return self.seat.session is not None

    def replace(self, session: Session) -> None:
        self.seat.take(session)

    def clear(self) -> None:
        self.seat.leave()

    def on_begin_refused(self, error: BaseException) -> None:
        """None of its business."""

    def on_commit_of(self, transaction: object) -> None:
        """None of its business."""

    def close(self) -> None:
        for sentence in self.seat.work_left():
            log.warning("on_commit: %s; what a callback writes it must commit", sentence)
        self.seat.close()
        self.closed = True


def run_aside(
    stage: StagedRegistry, factory: Callable[[], Any], function: Callable[..., T], *args: Any
) -> T:
    """Call *function* without the session that is on stage.

    What it opens through the registry is its own, and is closed after it.
    """
    entry = Aside(stage, factory)
    try:
        with Position(entry):
            return function(*args)
    finally:
        entry.close()
