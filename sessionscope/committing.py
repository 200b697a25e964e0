"""COMMIT, the checks before it, and what is said of one that failed.

A COMMIT that returns is not yet a commit: after an error that was swallowed PostgreSQL answers
it with a silent ROLLBACK, MariaDB keeps what came after the error, and SQLite nothing.  And one
that raises has not always failed: its answer may have been lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sessionscope.confirm import Evidence
from sessionscope.errors import CommitOutcomeUnknown, TransactionDoomed, swallowed
from sessionscope.guests import run_aside
from sessionscope.stage import log
from sessionscope.staged_session import StagedSession
from sessionscope.states import Action, State
from sessionscope.trackers import has_changes

if TYPE_CHECKING:
    from sessionscope.stage import Registry
    from sessionscope.transactions import Transaction
    from sqlalchemy import Engine


class CommittingSession(StagedSession):
    """A session whose COMMIT is checked, also one that the application sends itself.

    :param confirm: ask PostgreSQL about a COMMIT whose answer was lost.

    The others are those of `StagedSession`.
    """

    durable = False
    """Something may be durable, so the request must not be repeated."""
    counted: Transaction | None = None
    """The one that was committed or rolled back because of the response."""
    committed: Transaction | None = None
    """The last that the application committed itself."""
    doubt: Transaction | None = None
    """An earlier one whose COMMIT nobody knows about."""

    def __init__(
        self,
        registry: Registry,
        reader: Engine | None,
        safe: bool,
        watched: bool,
        warned: set[str],
        confirm: bool,
    ) -> None:
        super().__init__(registry, reader, safe, watched, warned)
        self.confirm = confirm

    def commit_session(self) -> None:
        self.ending = True
        self.counted = transaction = self.transaction
        if self.has_failed():
            raise swallowed("an error of the database was swallowed") from transaction.error
        try:
            self.session.commit()
        except BaseException as error:
            if self.is_committed_after(transaction, error):
                return
            raise
        self.settle_doubt()
        if transaction.state is not State.COMMITTED:
            raise TransactionDoomed(
                "Session.commit() returned, but nothing was committed"
            ) from transaction.error

    def is_committed_after(self, transaction: Transaction, error: BaseException) -> bool:
        """Tell whether the database says that a COMMIT that raised *error* was done.

        :raises CommitOutcomeUnknown: if nobody knows.
        """
        if isinstance(error, TransactionDoomed):
            return False
        transaction.on_commit_raised(error)
        if transaction.state is not State.IN_DOUBT:
            return False
        if isinstance(error, Exception):
            self.settle_doubt(error)
            return True
        self.resolve(transaction, ask=False)
        return False

    def in_doubt(self) -> Transaction | None:
        """Return the transaction of which nobody knows yet what became of its COMMIT."""
        if self.doubt is not None and self.doubt.state is State.IN_DOUBT:
            return self.doubt
        return self.transaction if self.transaction.state is State.IN_DOUBT else None

    def settle_doubt(self, error: BaseException | None = None) -> None:
        """Find out what became of a COMMIT whose answer was lost, the application's own, too.

        :raises TransactionDoomed: if it was not done; *error* instead, if that is given.
        :raises CommitOutcomeUnknown: if nobody knows.
        """
        transaction = self.in_doubt()
        if transaction is None:
            return
        self.resolve(transaction, ask=True)
        if transaction.state is State.IN_DOUBT:
            raise CommitOutcomeUnknown(
                "COMMIT was sent, but whether it took effect is not known"
            ) from (transaction.error or error)
        if transaction.state is not State.COMMITTED:
            raise error or swallowed("COMMIT failed") from transaction.error

    def resolve(self, transaction: Transaction, ask: bool) -> None:
        """Ask the database, if that is possible, what became of COMMIT, and end *transaction*."""
        if ask and transaction.evidence is not None:
            for participant in transaction.participants:
                participant.connection.invalidate()  # which leaves room in the pool to ask
            factory = self.registry.session_factory
            verdict = run_aside(self.stage, factory, transaction.evidence.verdict)
            log.warning("the answer to COMMIT was lost; PostgreSQL says: %s", verdict)
            if verdict != "unknown":
                transaction.resolve_doubt(verdict == "committed")
        if transaction is self.transaction:
            self.session.invalidate()

    def on_before_commit(self) -> None:
        """Flush and check, so that what fails afterwards is COMMIT itself."""
        transaction = self.transaction
        transaction.check()
        for _ in range(100):  # as Session.commit() does, which gives up then
            if not has_changes(self.session):
                break
            self.session.flush()
            transaction.check()
        if self.confirm and len(transaction.participants) == 1:
            (participant,) = transaction.participants
            if (transaction.wrote or not self.safe) and not participant.is_autocommit():
                transaction.evidence = Evidence.take(participant.connection)
        super().on_before_commit()

    def on_commit(self) -> None:
        self.durable = True
        transaction = self.transaction
        if any(participant.aborted for participant in transaction.participants):
            transaction.on_commit_hook_error()  # no other hook shall hear of a commit
            raise swallowed("a hook of COMMIT failed") from transaction.error
        super().on_commit()
        if transaction.has_begun() and not self.ending:
            self.committed = transaction

    def on_durable(self) -> None:
        self.durable = True

    def on_create(self) -> None:
        if self.in_doubt() is not None:
            self.doubt, self.durable = self.in_doubt(), True
        super().on_create()

    def action(self) -> Action:
        """Return what became of the work: of the last transaction that had a connection."""
        if self.doubt is not None and self.doubt.state is State.IN_DOUBT:
            return "unknown"
        transaction = self.counted or self.transaction
        if not transaction.has_begun():
            transaction = self.committed or self.previous or transaction
        return transaction.action()
