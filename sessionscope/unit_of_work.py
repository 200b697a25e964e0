"""The unit of work: one session, from its creation to its end by commit or rollback, and close.

Only `SessionMiddleware` and `session_scope` call `UnitOfWork.commit`, `UnitOfWork.rollback` and
`UnitOfWork.close`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import sessionscope.events  # noqa: F401
from sessionscope.callbacks import Callbacks
from sessionscope.committing import CommittingSession
from sessionscope.databases import is_transient
from sessionscope.errors import require_registry, swallowed
from sessionscope.participants import discard
from sessionscope.stage import log, on_stage
from sessionscope.states import State
from sessionscope.trackers import close_quietly, has_changes
from sessionscope.transactions import warn_of_autocommit
from sqlalchemy.orm import Session, scoped_session

if TYPE_CHECKING:
    from sessionscope.stage import Registry
    from sqlalchemy import Engine
    from sqlalchemy.orm import SessionTransaction

S = TypeVar("S", bound=Session)


class UnitOfWork(CommittingSession):
    """The session of one request or session_scope, with its commit, rollback and close.

    :param joinable: whether a nested `SessionMiddleware` uses the same session.

    The other parameters are those of `StagedSession` and `CommittingSession`.
    """

    callbacks: Callbacks | None = None

    def __init__(
        self,
        registry: Registry,
        *,
        reader: Engine | None = None,
        confirm: bool = False,
        joinable: bool = False,
        safe: bool = False,
        watched: bool = False,
        warned: set[str] | None = None,
    ) -> None:
        super().__init__(registry, reader, safe, watched, set() if warned is None else warned)
        self.confirm = confirm
        self.joinable = joinable

    def commit(self) -> None:
        """Make the work durable, or raise.

        :raises TransactionDoomed: if COMMIT would return although the work is lost.
        :raises CommitOutcomeUnknown: if the reply to COMMIT was lost.
        """
        self.refuse_lost_work()
        self.settle_doubt()
        transaction = self.transaction
        last = transaction
        if self.previous is not None and not (last.has_begun() or has_changes(self.session)):
            last = self.previous
        if last.state is State.ABANDONED:
            raise swallowed("a database error was swallowed") from last.error
        if self.session.in_transaction() and transaction.state is not State.COMMITTED:
            self.commit_session()
        else:
            self.counted = self.committed
        self.run_callbacks(committed=False)

    def rollback(self, error: BaseException | None = None) -> None:
        """Undo the work because of *error*; a failure to do so is logged."""
        self.ending = True
        self.counted = self.counted or self.transaction
        if self.session.in_transaction():
            self.transaction.on_commit_raised(error)
        try:
            doubtful = self.in_doubt()
            if doubtful is not None:
                self.resolve(doubtful, ask=error is None or isinstance(error, Exception))
            if self.session.in_transaction():
                self.roll_back_session()
        except Exception:
            log.exception("ROLLBACK failed, so the connection is discarded")
            self.discard_connections()

    def roll_back_session(self) -> None:
        transaction = self.transaction
        if transaction.commit_returned:
            self.session.close()  # a hook after COMMIT raised: there is nothing to roll back
            return
        if transaction.wrote or not self.safe:
            warn_of_autocommit(transaction)
        for participant in transaction.participants:
            participant.before_next()
        self.session.rollback()

    @contextmanager
    def extra_work(self, warning: str) -> Iterator[None]:
        """Roll back what the block does in the session, and warn if it wrote.

        The transaction before the block remains the one that the outcome reports.
        """
        counted, previous = self.transaction, self.previous
        try:
            yield
        finally:
            extra = self.transaction
            if extra is not counted:
                if self.session.in_transaction():
                    if extra.has_written() or has_changes(self.session):
                        log.warning(warning)
                    self.roll_back_session()
                self.transaction, self.previous = counted, previous

    def detach_objects(self) -> None:
        """Expunge all objects, as close() will: some servers and test clients never close."""
        try:
            self.session.expunge_all()
        except Exception:
            log.exception("a hook raised when objects were detached")

    def close(self) -> None:
        """Close the session, committed or not; may be called twice."""
        if self.closed:
            return
        self.ending = True
        try:
            close_quietly(self.session)
        finally:
            try:
                self.discard_connections()
            finally:
                self.forget_session()
                self.seat.close()
                if self.callbacks is not None:
                    self.callbacks.close()
                self.forget_errors()
        self.closed = True

    def discard_connections(self) -> None:
        """Close the connections that SQLAlchemy failed to close."""
        for participant in self.transaction.participants:
            if participant.connection is not self.session.bind:
                discard(participant.connection)
        self.transaction.leave()

    def on_end(self) -> None:
        super().on_end()
        state = self.transaction.state
        if state is State.COMMITTED:
            self.run_callbacks(committed=True)
        elif self.callbacks is not None and state is not State.IN_DOUBT:
            self.callbacks.clear()

    def add_callback(self, callback: Callable[[], object]) -> None:
        if self.callbacks is None:
            self.callbacks = Callbacks()
        self.callbacks.add(callback, self)

    def run_callbacks(self, committed: bool) -> None:
        """Run the callbacks that are due.

        :param committed: False if no COMMIT was needed.
        """
        if self.callbacks is None:
            return
        due = self.callbacks.due(committed)
        if not due:
            return
        self.durable = True  # what callbacks do must not be done twice
        with self.extra_work(
            "an on_commit callback used the session of the request, so its work is rolled back: "
            "use a session_scope in the callback"
        ):
            self.callbacks.run(due, self.stage, self.registry.session_factory)

    def on_savepoint_released(self, savepoint: SessionTransaction) -> None:
        super().on_savepoint_released(savepoint)
        if self.callbacks is not None:
            self.callbacks.on_savepoint_released(savepoint)

    def on_savepoint_ended(self, savepoint: SessionTransaction) -> None:
        super().on_savepoint_ended(savepoint)
        if self.callbacks is not None:
            self.callbacks.on_savepoint_ended(savepoint)

    def transient_error(self, error: BaseException | None) -> BaseException | None:
        """Return the error for which the request is to be retried; None if it must not be.

        :param error: what the application raised; None if it returned a response.
        """
        if self.durable or self.action() in ("commit", "unknown"):
            return None
        if is_transient(error):
            return error
        return self.transaction.transient_error(error)


@contextmanager
def session_scope(registry: scoped_session[S]) -> Iterator[S]:
    """Run one unit of work without HTTP, in a script or a worker.

    While the block runs, *registry* returns a new session, even inside a request, whose session
    it returns again afterwards.  The end of the block commits, an exception rolls back, and the
    session is closed.  It never retries.

    :param registry: a ``scoped_session``.
    :returns: a context manager; ``as`` gives the session.
    :raises TypeError: if *registry* is something else.
    :raises TransactionDoomed: if the block swallowed an error that undid its work, or closed
        the session while that held work.
    :raises CommitOutcomeUnknown: if the connection was lost during COMMIT.
    """
    require_registry(registry)
    unit = UnitOfWork(registry)
    session: Any = unit.session
    try:
        with on_stage(unit):
            try:
                yield session
            except BaseException as error:
                unit.rollback(error)
                raise
            try:
                unit.commit()
            except BaseException as error:
                log.exception(failure_of(unit))
                unit.rollback(error)
                raise
    finally:
        try:
            unit.close()
        finally:
            unit.close()  # also when an interrupt struck in the first


def failure_of(unit: UnitOfWork) -> str:
    """Return the log message for a commit that raised."""
    return "committed, but a hook raised" if unit.action() == "commit" else "the commit failed"
