"""The table of idempotency keys, and the row of one request."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from time import sleep, time_ns
from typing import TYPE_CHECKING, Any

from sessionscope.databases import error_code, is_transient
from sessionscope.errors import require
from sessionscope.keyed import MAX_RESPONSE, in_progress
from sessionscope.unit_of_work import session_scope
from sqlalchemy import (
    BigInteger,
    Column,
    LargeBinary,
    MetaData,
    String,
    Table,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from sessionscope.stage import Registry
    from sessionscope.unit_of_work import UnitOfWork
    from sqlalchemy import Connection, Engine, Executable, Insert, Row
    from sqlalchemy.orm import Session

    Context = Callable[[], AbstractContextManager[object]]

# MariaDB creates a MEDIUMBLOB for either; only with the second Alembic finds no difference.
_RESPONSE = LargeBinary(MAX_RESPONSE).with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")

WAITED_TOO_LONG = frozenset({"55P03", "57014", 1205, 1969})
"""Lock and statement timeouts of PostgreSQL and MariaDB: another request still has the key."""

PURGE_ATTEMPTS = 5
"""How often `purge` tries to delete a batch if it conflicts with other transactions."""


def idempotency_table(metadata: MetaData, name: str = "idempotency_keys", **options: Any) -> Table:
    """Define the table of the keys, which must be in the same database as the work.

    A row contains neither the key nor the scope in clear text.

    :param metadata: the metadata of the application, in which ``create_all()`` and Alembic find
        the table.
    :param name: the name of the table.
    :param options: further arguments of `sqlalchemy.Table`, ``schema`` for instance.
    """
    return Table(
        name,
        metadata,
        Column("id", String(64), primary_key=True),  # SHA-256 of scope and key
        Column("request", String(64), nullable=False),  # SHA-256 of the request
        Column("created", BigInteger, nullable=False, index=True),  # ns since 1970
        Column("response", _RESPONSE),  # NULL: processed, but not kept
        **options,
    )


def purge(registry: Registry, table: Table, older_than: timedelta, batch: int = 500) -> int:
    """Delete keys, and return their number.

    A purged key counts as new: a repeat is processed again.  Requests and other purges may run
    at the same time.

    :param registry: a ``scoped_session``; each batch is found in one transaction and deleted in
        another.
    :param table: the table that `idempotency_table` returned.
    :param older_than: the minimum age of the keys to delete.
    :param batch: maximum number of rows that one transaction deletes.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if *older_than* is negative, or *batch* is below 1.
    """
    require(isinstance(older_than, timedelta), "older_than", older_than, "a timedelta")
    if older_than < timedelta(0) or batch < 1:
        raise ValueError("older_than must not be negative, and batch must be 1 or more")
    before = max(0, time_ns() - older_than // timedelta(microseconds=1) * 1000)
    total, stuck = 0, None
    while True:
        found, deleted = _purge_patiently(registry, table, before, batch)
        total += deleted
        # Rows that are found again are kept by the database; others went to a quicker purge.
        if len(found) < batch or found == stuck:
            return total
        stuck = None if deleted else found


def _purge_patiently(
    registry: Registry, table: Table, before: int, batch: int
) -> tuple[Sequence[str], int]:
    for attempt in range(1, PURGE_ATTEMPTS):
        try:
            return _purge_batch(registry, table, before, batch)
        except DBAPIError as error:
            if not is_transient(error):
                raise
        sleep(random.uniform(0, 0.01 * 2**attempt))
    return _purge_batch(registry, table, before, batch)


def _purge_batch(
    registry: Registry, table: Table, before: int, batch: int
) -> tuple[Sequence[str], int]:
    """Delete one batch; return the ids of the rows found, and the number of rows deleted."""
    is_old = table.c.created < before
    oldest = select(table.c.id).where(is_old).order_by(table.c.created, table.c.id)
    with session_scope(registry) as session:
        begin(session)
        found = session.scalars(oldest.limit(batch)).all()
    # In a transaction of its own: in one with a snapshot, MariaDB raises if another purge has
    # deleted a row meanwhile.  A request may even have inserted it again.
    with session_scope(registry) as session:
        begin(session)
        done: Any = session.execute(delete(table).where(table.c.id.in_(found), is_old))
        return found, done.rowcount


class Claim:
    """The row of one request, in the transaction of its work.

    :param id: the digest of scope and key.
    :param request: the digest of the request.
    :param context: returns a context manager in which to use the session.
    """

    def __init__(
        self, unit: UnitOfWork, table: Table, id: str, request: str, context: Context
    ) -> None:
        self.unit = unit
        self.table = table
        self.id = id
        self.request = request
        self.context = context
        self.bind: Engine | Connection | None = None
        self.created = time_ns()
        self.process = os.getpid()
        self.transaction = unit.transaction
        self.is_running = True

    def insert(self, response: bytes | None = None) -> bool:
        """Insert the row unless it exists, and return whether it was inserted.

        Waits for a request that has inserted it and not committed yet.

        :raises RuntimeError: if the engine is in AUTOCOMMIT, or the database not supported.
        """
        values = {"id": self.id, "request": self.request, "created": self.created}
        with self.session_in_use() as bind:
            statement = insert_unless_there(self.table, bind.dialect.name)
            self.refuse_autocommit()
            done = self.execute(statement.values(**values, response=response))
        self.transaction = self.unit.transaction
        return bool(done.rowcount)

    def find(self) -> Row[Any, Any] | None:
        """Return the row of an earlier request; None if it has been purged since."""
        row = self.table.c
        query = select(row.request, row.response).where(row.id == self.id)
        with self.session_in_use() as bind:
            if bind.dialect.name in ("mysql", "mariadb"):
                query = query.with_for_update(read=True)  # it may be younger than our snapshot
            return self.execute(query).first()  # type: ignore[no-any-return]

    def store(self, response: bytes | None) -> bool:
        """Store *response* in the row; return False if another request has the key.

        If the application has rolled the row back, it is inserted again.
        """
        row = self.table.c
        own = (row.id == self.id) & (row.created == self.created)
        with self.session_in_use():
            done = self.execute(update(self.table).where(own).values(response=response))
        return bool(done.rowcount) or self.insert(response)

    @contextmanager
    def session_in_use(self) -> Iterator[Engine | Connection]:
        """Run a block that uses the session on the engine for writing.

        :raises Problem: 409 if a statement waited longer than the database allows.
        """
        try:
            with self.context():
                begin(self.unit.session)
                if self.bind is None:
                    self.bind = self.unit.session.get_bind(clause=update(self.table))
                yield self.bind
        except Exception as error:
            if error_code(error) in WAITED_TOO_LONG:
                raise in_progress() from error
            raise

    def execute(self, statement: Executable) -> Any:
        # On the connection, since a get_bind() of the application may ignore the bind.
        connection = self.unit.session.connection({"bind": self.bind})
        options = {"preserve_rowcount": True}  # of an INSERT, too
        return connection.execute(statement, execution_options=options)

    def refuse_autocommit(self) -> None:
        """Check that key and work are in one transaction.

        :raises RuntimeError: if the engine is in AUTOCOMMIT.
        """
        self.unit.session.connection({"bind": self.bind})
        if any(one.is_autocommit() for one in self.unit.transaction.participants):
            raise RuntimeError("Idempotency needs transactions, but the engine is in AUTOCOMMIT")

    def may_be_lost(self) -> bool:
        """Return whether the application has ended the transaction that inserted the row."""
        return self.transaction is not self.unit.transaction


def begin(session: Session) -> None:
    """Begin a transaction if there is none; a session may have ``autobegin=False``."""
    if not session.in_transaction():
        session.begin()


def insert_unless_there(table: Table, dialect: str) -> Insert:
    """Return an INSERT that does nothing if the row exists.

    :raises RuntimeError: if the database is not supported.
    """
    if dialect == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    if dialect == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    if dialect in ("mysql", "mariadb"):
        return insert(table).prefix_with("IGNORE")  # the values fit, so nothing else is ignored
    raise RuntimeError(f"Idempotency supports PostgreSQL, MariaDB, MySQL and SQLite, not {dialect}")
