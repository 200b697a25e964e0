"""COMMIT, the checks before it, and the exceptions for one that failed.

COMMIT may return although the work is lost: after an error that was swallowed, PostgreSQL
replies with a silent ROLLBACK, MariaDB keeps what came after the error, and SQLite nothing.  And
COMMIT may raise although it took effect, if the reply was lost.
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
    from sessionscope.transactions import Transaction


class CommittingSession(StagedSession):
    """A session whose COMMIT is checked, also if the application commits."""

    confirm = False
    """Query PostgreSQL for the outcome of a COMMIT whose reply was lost."""
    durable = False
    """Something may be durable, so the request must not be retried."""
    counted: Transaction | None = None
    """The transaction that was committed or rolled back because of the response."""
    committed: Transaction | None = None
    """The last transaction that the application committed itself."""
    doubt: Transaction | None = None
    """An earlier transaction whose COMMIT has an unknown outcome."""

    def commit_session(self) -> None:
        self.ending = True
        self.counted = transaction = self.transaction
        if self.has_failed():
            raise swallowed("a database error was swallowed") from transaction.error
        try:
            self.session.commit()
        except BaseException as error:
            if self.is_committed_after(transaction, error):
                return
            raise
        self.settle_doubt()
        if transaction.state is not State.COMMITTED:
            raise TransactionDoomed(
                "Session.commit() returned, but nothing was committed: a commit() that overrides "
                "it must call super().commit()"
            ) from transaction.error

    def is_committed_after(self, transaction: Transaction, error: BaseException) -> bool:
        """Return whether the work is durable although COMMIT raised *error*.

        :raises CommitOutcomeUnknown: if that cannot be found out.
        """
        if isinstance(error, TransactionDoomed):
            return False
        transaction.on_commit_raised(error)
        if transaction.state is not State.IN_DOUBT:
            return False
        if isinstance(error, Exception):
            return self.took_effect(transaction, error)
        self.resolve(transaction, ask=False)
        return False

    def in_doubt(self) -> Transaction | None:
        """Return the transaction whose COMMIT has an unknown outcome so far, or None."""
        if self.doubt is not None and self.doubt.state is State.IN_DOUBT:
            return self.doubt
        return self.transaction if self.transaction.state is State.IN_DOUBT else None

    def settle_doubt(self) -> None:
        """Find out the outcome of a COMMIT whose reply was lost, also of the application's.

        :raises TransactionDoomed: if it was aborted.
        :raises CommitOutcomeUnknown: if that cannot be found out.
        """
        transaction = self.in_doubt()
        if transaction is not None and not self.took_effect(transaction):
            raise swallowed("COMMIT failed") from transaction.error

    def took_effect(self, transaction: Transaction, error: BaseException | None = None) -> bool:
        """Return whether a COMMIT whose reply was lost took effect.

        :raises CommitOutcomeUnknown: if that cannot be found out.
        """
        self.resolve(transaction, ask=True)
        if transaction.state is State.IN_DOUBT:
            raise CommitOutcomeUnknown(
                "COMMIT was sent, but its outcome is unknown: the work may be stored or not, so "
                "check before you repeat it"
            ) from (transaction.error or error)
        return transaction.state is State.COMMITTED

    def resolve(self, transaction: Transaction, ask: bool) -> None:
        """Query the database for the outcome of COMMIT, if possible, and end *transaction*.

        :param ask: False to send no query.
        """
        if ask and transaction.evidence is not None:
            for participant in transaction.participants:
                participant.connection.invalidate()  # which leaves room in the pool to ask
            factory = self.registry.session_factory
            verdict = run_aside(self.stage, factory, transaction.evidence.verdict)
            log.warning("the reply to COMMIT was lost; PostgreSQL says: %s", verdict)
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
            transaction.on_commit_hook_error()  # no other hook must be told of a commit
            raise swallowed("a commit hook swallowed a database error") from transaction.error
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
        """Return the outcome of the last transaction that had a connection."""
        if self.doubt is not None and self.doubt.state is State.IN_DOUBT:
            return "unknown"
        transaction = self.counted or self.transaction
        if not transaction.has_begun():
            transaction = self.committed or self.previous or transaction
        return transaction.action()
