"""One transaction of a session, and its state.

A `Transaction` has a `Participant` for each of its connections, and a `State`, which only
`Transaction.handle` changes.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from sessionscope import databases
from sessionscope.errors import swallowed
from sessionscope.participants import Participant
from sessionscope.stage import entries, log
from sessionscope.states import TRANSITIONS, Action, Event, State, action_of
from sqlalchemy.exc import DBAPIError, PendingRollbackError

if TYPE_CHECKING:
    from sessionscope.confirm import Evidence
    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import SessionTransaction


def _nobody_asks() -> None:
    """Ignore that something was made durable."""


class Transaction:
    """One transaction of a session, from its beginning to its outcome.

    :param on_durable: called when a statement of a watched participant may have made work durable.
    """

    state = State.IDLE
    error: BaseException | None = None
    """The one that ended the transaction, else the first transient one, else the last one."""
    healed = False
    """A rollback to a savepoint has undone what `error` spoiled."""
    errors_before: WeakKeyDictionary[SessionTransaction, BaseException | None] | None = None
    """For each savepoint the error before it."""
    wrote = False
    since: float | None = None
    """When it began on a connection, in seconds of a monotonic clock."""
    commit_returned = False
    """Whether SQLAlchemy reports that COMMIT returned, even if nothing was committed."""
    evidence: Evidence | None = None

    def __init__(self, on_durable: Callable[[], None]) -> None:
        self.participants: list[Participant] = []
        self.on_durable = on_durable

    def handle(self, event: Event) -> None:
        """Go on to the next state."""
        self.state = TRANSITIONS[self.state].get(event, self.state)
        if event is Event.ANSWER_LOST:
            for entry in entries():
                entry.on_commit_of(self)

    def join(self, connection: Connection) -> Participant:
        if self.since is None:
            self.since = monotonic()
        participant = Participant(self, connection)
        self.participants.append(participant)
        self.handle(Event.JOINED)
        participant.refuse_if_inherited()
        return participant

    def begin_sqlite(self) -> None:
        """Keep SQLite from committing when the outermost savepoint is released."""
        for participant in self.participants:
            participant.begin_sqlite()

    def has_begun(self) -> bool:
        """Return whether a connection has ever joined it."""
        return self.since is not None

    def leave(self) -> None:
        """Release the connections; the state stays."""
        for participant in self.participants:
            participant.leave()
        self.participants.clear()
        self.on_durable = _nobody_asks

    def note_error(self, error: BaseException, final: bool = False) -> None:
        """Keep *error*, unless an earlier one counts more; *final*, if it lost the transaction."""
        if databases.error_code(error) == databases.REPEATS_EARLIER_ERROR:
            return
        lost = any(participant.aborted for participant in self.participants)
        counts = self.error is not None and (lost or databases.is_transient(self.error))
        if final or self.healed or not counts:
            self.error, self.healed = error, False

    def on_savepoint(self, savepoint: SessionTransaction) -> None:
        self.begin_sqlite()
        if self.errors_before is None:
            self.errors_before = WeakKeyDictionary()
        self.errors_before[savepoint] = self.error

    def on_savepoint_ended(self, savepoint: SessionTransaction, released: bool = False) -> None:
        """Handle the end of *savepoint*: unless it was *released*, an error since then is healed.

        It counts until the application writes something else, since it may have passed through
        the savepoint, and be the cause of an error page.
        """
        errors = self.errors_before
        before = self.error if errors is None else errors.pop(savepoint, self.error)
        lost = any(participant.aborted for participant in self.participants)
        if not (released or lost or self.error is before):
            self.healed = True
            for participant in self.participants:
                participant.on_savepoint_undone()

    def forget_errors(self) -> None:
        self.error = self.errors_before = None

    def on_statement(self, statement: str) -> None:
        """Handle a statement that succeeded; known only if the request may be retried."""
        reads = databases.is_read(statement)
        self.wrote |= not reads
        if self.healed and not reads and not databases.is_rollback(statement):
            self.error, self.healed = None, False

    def is_lost(self) -> bool:
        """Return whether the database has rolled back the transaction, or a part of it."""
        return any(participant.is_lost() for participant in self.participants)

    def check(self) -> None:
        """Check that the database has kept the work.

        :raises TransactionDoomed: if COMMIT would return although work is lost.
        """
        if self.is_lost():
            raise swallowed("a database error was swallowed") from self.error

    def has_written(self) -> bool:
        """Return whether it has certainly changed something."""
        return self.wrote or any(one.has_written() for one in self.participants)

    def on_committed(self) -> None:
        """Handle a COMMIT that has returned."""
        self.commit_returned = True
        self.handle(Event.COMMITTED)
        for participant in self.participants:
            participant.on_committed()

    def on_commit_error(self, error: BaseException) -> None:
        """Handle *error*, raised by COMMIT on one of the connections."""
        unknown = databases.leaves_commit_unknown(error) or self.is_partly_committed()
        self.handle(Event.ANSWER_LOST if unknown else Event.REFUSED)

    def on_commit_raised(self, error: BaseException | None) -> None:
        """Handle *error*, raised by ``Session.commit()``, if no driver has reported an error.

        A hook raised before COMMIT was sent, or after it returned; errors are hidden by
        ``skip_user_error_events``; or COMMIT was interrupted at an unknown point.
        """
        if self.state is not State.COMMITTING:
            return
        interrupted = error is not None and not isinstance(error, Exception)
        sent = [one for one in self.participants if one.is_touched()]
        if sent and all(one.commit_returned() for one in sent):
            self.commit_returned = True
            self.handle(Event.COMMITTED)
        elif isinstance(error, DBAPIError) and error.statement is None:
            self.on_commit_error(error)
        elif self.is_partly_committed() or (interrupted and sent):
            self.handle(Event.ANSWER_LOST)
        else:
            self.handle(Event.REFUSED)

    def on_undone(self) -> None:
        """Handle a rollback by SQLAlchemy, on each connection that was not committed yet."""
        if self.state is State.COMMITTING and self.is_partly_committed():
            self.handle(Event.ANSWER_LOST)
        else:
            self.handle(Event.UNDONE)

    def is_partly_committed(self) -> bool:
        """Return whether one of several connections was committed before another failed."""
        return sum(participant.commit_sent for participant in self.participants) > 1

    def is_commit_refused(self) -> bool:
        """Return whether COMMIT may have left the transaction open."""
        return self.state in (State.COMMITTING, State.REFUSED)

    def on_commit_allowed(self) -> None:
        """Handle the success of all checks: COMMIT is next."""
        if len(self.participants) > 1:
            for participant in self.participants:
                participant.watch_commit()
        self.handle(Event.ALLOWED)

    def resolve_doubt(self, committed: bool) -> None:
        """Handle the database's report about a COMMIT whose reply was lost."""
        self.handle(Event.COMMITTED if committed else Event.REFUSED)

    def on_commit_hook_error(self) -> None:
        """Handle a COMMIT that returned although a hook swallowed an error after the last check.

        PostgreSQL then keeps nothing, other databases what came before or after the error.
        """
        self.commit_returned = True
        engines = {participant.connection.dialect.name for participant in self.participants}
        self.handle(Event.REFUSED if engines == {"postgresql"} else Event.ANSWER_LOST)

    def action(self) -> Action:
        """Return its outcome."""
        return action_of(self.state) if self.has_begun() else "none"

    def seconds_open(self) -> float:
        """Return how long it has been open."""
        return monotonic() - self.since if self.since and self.participants else 0.0

    def transient_error(self, error: BaseException | None) -> BaseException | None:
        """Return the transient error of the database that caused *error*, or None.

        :param error: what the application raised; None if it returned a response.
        """
        noted = self.error
        # pg8000 lets through what its socket raises.
        transient = isinstance(noted, OSError) or databases.is_transient(noted)
        if transient and (error is None or _is_because_of(error, noted)):
            return noted
        return None


def _is_because_of(error: BaseException, noted: BaseException | None) -> bool:
    """Return whether *noted* caused *error*: a listener translated it, or it was swallowed."""
    code = databases.error_code(error)
    if isinstance(error, PendingRollbackError) or code == databases.REPEATS_EARLIER_ERROR:
        return True
    causes = (noted, getattr(noted, "orig", noted))
    seen: BaseException | None = error if isinstance(error, Exception) else None
    while seen is not None:
        if any(one in causes for one in (seen, getattr(seen, "orig", seen))):
            return True
        seen = seen.__cause__
    return False


_told_of_autocommit: WeakSet[Engine] = WeakSet()


def warn_of_autocommit(transaction: Transaction) -> None:
    """Log, once per engine, that a ROLLBACK undoes nothing in AUTOCOMMIT."""
    for participant in transaction.participants:
        engine = participant.connection.engine
        if engine not in _told_of_autocommit and participant.is_autocommit():
            _told_of_autocommit.add(engine)
            log.warning(
                "%r is in AUTOCOMMIT, so a request that is rolled back keeps what it wrote; use "
                "such an engine for reading only",
                engine,
            )
