"""Query PostgreSQL for the outcome of a COMMIT whose reply was lost.

https://www.postgresql.org/docs/current/functions-info.html, "Transaction ID and Snapshot
Information Functions".
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, Literal

from sqlalchemy import Connection, Engine, String, column, text
from sqlalchemy.exc import SQLAlchemyError

PATIENCE = 5.0
"""Seconds for which the query is repeated while PostgreSQL reports the transaction as running."""

# The timeline of pg_control_checkpoint() is that of the last checkpoint, and so not yet the
# current one for a while after a promotion.
_HISTORY = """
    CAST((pg_control_checkpoint()).checkpoint_lsn AS text),
    CASE WHEN NOT pg_is_in_recovery()
         THEN left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END"""
# Named columns need not be looked up in each result.
_EVIDENCE = text(f"SELECT CAST(pg_current_xact_id_if_assigned() AS text), {_HISTORY}").columns(
    column("xact_id", String), column("checkpoint", String), column("timeline", String)
)
_STATUS = text(f"SELECT pg_xact_status(CAST(:id AS xid8)), {_HISTORY}")

Verdict = Literal["committed", "aborted", "unknown"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The state of a transaction and its server just before COMMIT."""

    engine: Engine
    transaction: str | None
    """The transaction's id.  None is no proof that it wrote nothing: postgres_fdw and NOTIFY
    need no id before COMMIT."""
    checkpoint: str
    timeline: str | None

    @classmethod
    def take(cls, connection: Connection) -> Evidence | None:
        """Query the evidence just before COMMIT; return None if the database is no PostgreSQL.

        :param connection: the only connection of the transaction, and not in AUTOCOMMIT.
        """
        if connection.dialect.name != "postgresql" or connection.in_nested_transaction():
            return None
        return cls(connection.engine, *connection.execute(_EVIDENCE).one())

    def verdict(self) -> Verdict:
        """Query on a new connection until the result is final, for at most `PATIENCE` seconds."""
        if self.transaction is None:
            return "unknown"
        deadline = monotonic() + PATIENCE
        while True:
            status, checkpoint, timeline = self.ask()
            if timeline is not None:  # a standby cannot know what its primary has done
                if status == "aborted":
                    return "aborted"
                if status == "committed":
                    # A server that crashed gives the id of a transaction whose log was not
                    # yet on disk to another one.  It makes a checkpoint first; a standby
                    # that is promoted begins a timeline.
                    same = (checkpoint, timeline) == (self.checkpoint, self.timeline)
                    return "committed" if same else "unknown"
            if monotonic() > deadline:
                return "unknown"
            sleep(0.05)

    def ask(self) -> Any:
        with suppress(SQLAlchemyError), self.engine.connect() as connection:
            return connection.execute(_STATUS, {"id": self.transaction}).one()
        return None, None, None
