"""The meaning of the errors of drivers and databases, and the state of a driver's connection.

Every function here takes an exception or a connection of a driver, and returns one fact about it.
The facts were observed on real servers; the documentation of each database is cited if it
confirms them.
"""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, select
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    OperationalError,
    StatementError,
    TimeoutError,
)
from sqlalchemy.orm.exc import StaleDataError

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext

Code = str | int


@dataclass(frozen=True, slots=True)
class Errors:
    """The meaning of a database's error codes; each pattern is matched against a whole code."""

    transient: re.Pattern[str]
    """The same request may succeed if it is retried."""
    aborts: re.Pattern[str]
    """The database rolls back the whole transaction, or may do so."""
    in_doubt: re.Pattern[str]
    """Raised by COMMIT, it leaves open whether COMMIT took effect."""
    unavailable: re.Pattern[str]
    """The database is not available now, but may be a little later."""


# https://www.postgresql.org/docs/current/errcodes-appendix.html.  Every error aborts the
# transaction there, and `is_aborted` checks for that.
POSTGRESQL = Errors(
    transient=re.compile("40001|40P01"),  # serialization failure, deadlock
    aborts=re.compile("$^"),
    in_doubt=re.compile("40003|08007"),  # statement completion, transaction resolution unknown
    # Connection lost, try again, out of resources, an operator stepped in; a lock or a statement
    # that timed out, a primary that has become a standby.
    unavailable=re.compile("(08|40|53|57)...|55P03|25P03|25006"),
)
# https://mariadb.com/kb/en/mariadb-error-code-reference/
MARIADB = Errors(
    transient=re.compile("1205|1213|1020"),  # lock timeout, deadlock, changed since the snapshot
    aborts=re.compile("1213|1020|1206|1637|1205"),  # the last only with a setting of the server
    # Connection lost; Galera: not connected to the primary component, not ready.
    in_doubt=re.compile("2013|1180|1047"),
    unavailable=re.compile("1020|1040|1047|1053|1180|1203|1205|1213|1290|2002|2003|2006|2013"),
)
# https://www.sqlite.org/rescode.html; "aborts" is from
# https://www.sqlite.org/lang_transaction.html, "Response To Errors Within A Transaction".
SQLITE = Errors(
    transient=re.compile("SQLITE_(BUSY|LOCKED).*"),
    aborts=re.compile("SQLITE_(FULL|IOERR|NOMEM|BUSY|INTERRUPT|CONSTRAINT).*"),
    in_doubt=re.compile("SQLITE_IOERR.*"),
    unavailable=re.compile("SQLITE_(BUSY|LOCKED|FULL|IOERR|CANTOPEN).*"),
)

NODE_LOST = frozenset({1047, 1180})
"""A Galera node outside the primary component: its connections are of no use."""

_LEGACY = -1
"""``sqlite3.LEGACY_TRANSACTION_CONTROL`` (Python 3.12): the driver begins before a change."""

REPEATS_EARLIER_ERROR = "25P02"
"""PostgreSQL: an earlier error has aborted the transaction."""


def error_code(error: BaseException | None) -> Code | None:
    """Return MariaDB's number, PostgreSQL's SQLSTATE or SQLite's name of an error, or None.

    The number goes first, because MariaDB's drivers give their errors an SQLSTATE as well.
    """
    if isinstance(error, StatementError) and not isinstance(error, DBAPIError):
        return None  # such as KeyError(7), which a type of the application has raised
    original = getattr(error, "orig", error)
    arguments = getattr(original, "args", ())
    first = arguments[0] if arguments else None
    if isinstance(first, int):
        return first
    if isinstance(first, dict) and isinstance(first.get("C"), str):  # pg8000
        return str(first["C"])
    for name in ("errno", "sqlstate", "pgcode", "sqlite_errorname"):  # MariaDB Connector: errno
        code = getattr(original, name, None)
        if isinstance(code, Code):
            return code
    return None


def _errors_with(code: Code) -> Errors:
    if isinstance(code, int):
        return MARIADB
    return SQLITE if code.startswith("SQLITE_") else POSTGRESQL


def is_transient(error: BaseException | None) -> bool:
    """Return whether the same request may succeed if it is retried.

    A connection that was found dead counts, because COMMIT was not sent on it.
    """
    if isinstance(error, StaleDataError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code = error_code(error)
    if error.connection_invalidated:
        return True
    return code is not None and _errors_with(code).transient.fullmatch(str(code)) is not None


def leaves_commit_unknown(error: BaseException | None) -> bool:
    """Return whether COMMIT may have taken effect although it raised *error*."""
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return True
    code = error_code(error)
    if code is None:
        return not isinstance(error, IntegrityError)
    return _errors_with(code).in_doubt.fullmatch(str(code)) is not None


def is_unavailable(error: BaseException) -> bool:
    """Return whether the database is not available now, but may be a little later.

    It is down or starting, has no free connection, is locked, or reported one conflict after
    another.
    """
    if isinstance(error, TimeoutError):
        return True  # of the pool
    if not isinstance(error, DBAPIError):
        return False
    code = error_code(error)
    if code is None:  # psycopg: no server has replied
        return error.connection_invalidated or isinstance(error, OperationalError)
    return _errors_with(code).unavailable.fullmatch(str(code)) is not None


_COMMIT_PREPARED = re.compile(r"\s*(COMMIT PREPARED|XA COMMIT)", re.IGNORECASE)


def is_of_transaction(context: ExceptionContext) -> bool:
    """Return whether BEGIN, COMMIT or ROLLBACK of the driver failed, and no statement or fetch."""
    return context.statement is None and context.execution_context is None


def is_of_commit(context: ExceptionContext) -> bool:
    """Return whether an error, raised while COMMIT is under way, is COMMIT's own.

    SQLAlchemy reports one of PREPARE or COMMIT PREPARED twice, with its statement first.
    """
    if context.statement is not None:
        return _COMMIT_PREPARED.match(context.statement) is not None
    return is_of_transaction(context) and not isinstance(context.original_exception, StatementError)


def is_of_dialects_commit(context: ExceptionContext) -> bool:
    """Return whether COMMIT failed, of a connection of which nothing else is known.

    Only the traceback tells it from a ROLLBACK.
    """
    if context.statement is not None:
        return is_of_commit(context)
    frames = walk_tb(context.original_exception.__traceback__)
    names = {frame.f_code.co_name for frame, _ in frames}
    return not names.isdisjoint({"do_commit", "do_commit_twophase"})


def driver_connection(connection: Connection) -> Any:
    """Return the driver's own connection."""
    return connection.connection.dbapi_connection


def is_autocommit(connection: Connection) -> bool:
    """Return whether the driver commits each statement by itself; False for SQLite."""
    try:
        return connection.dialect.detect_autocommit_setting(driver_connection(connection))
    except NotImplementedError:
        return False


def _libpq_status(driver: Any) -> int | None:
    """Return libpq's transaction status; None if the driver is not made of libpq."""
    return getattr(getattr(driver, "info", None), "transaction_status", None)


def is_in_transaction(driver: Any, unknown: bool) -> bool:
    """Return whether the driver has an open transaction.

    :param unknown: returned for a driver that does not know.
    """
    if isinstance(driver, sqlite3.Connection):
        return driver.in_transaction
    status = _libpq_status(driver)
    if status is not None:
        return status != 0  # PQTRANS_IDLE
    flags = getattr(driver, "server_status", None)  # PyMySQL
    return unknown if flags is None else bool(flags & 1)  # SERVER_STATUS_IN_TRANS


def aborts_transaction(connection: Connection, error: BaseException, had_work: bool) -> bool:
    """Return whether the database rolled back the whole transaction because of *error*.

    :param had_work: on SQLite, whether there was a transaction that could be rolled back.
    """
    code = error_code(error)
    if code is None or not _errors_with(code).aborts.fullmatch(str(code)):
        return False
    if isinstance(code, str):  # SQLite may undo only the statement; the driver knows
        return had_work and not driver_connection(connection).in_transaction
    return code != 1205 or _aborts_on_timeout(connection)


def _aborts_on_timeout(connection: Connection) -> bool:
    """Query MariaDB for what a lock timeout undoes: the statement, or the transaction."""
    try:
        with driver_connection(connection).cursor() as cursor:
            cursor.execute("SELECT @@innodb_rollback_on_timeout")
            return bool(cursor.fetchone()[0])
    except connection.dialect.loaded_dbapi.Error:
        return True  # a node outside its cluster's majority, for instance, does not reply


def is_aborted(connection: Connection, error: BaseException | None) -> bool:
    """Return whether PostgreSQL would reply to COMMIT with a silent ROLLBACK.

    :param error: the first error of the transaction on this connection, or None.
    """
    if connection.dialect.name != "postgresql":
        return False
    status = _libpq_status(driver_connection(connection))
    if status == 3:  # PQTRANS_INERROR
        return True
    if error is None or is_autocommit(connection):
        return False
    if status is not None:
        return status == 0  # PQTRANS_IDLE after an error: it was committed as text
    try:
        connection.execute(select(1))  # pg8000 does not know: query the server
    except DBAPIError:
        return True
    return False


def is_sound(connection: Connection) -> bool:
    """Return whether PostgreSQL's driver knows of a transaction that no error has aborted."""
    return _libpq_status(driver_connection(connection)) == 2  # PQTRANS_INTRANS


def is_sqlite_in_autocommit(driver: Any) -> bool:
    """Return whether SQLite's driver leaves it to others to begin a transaction."""
    return driver.isolation_level is None or getattr(driver, "autocommit", _LEGACY) is True


def begin_sqlite(connection: Connection) -> None:
    """Send the BEGIN that SQLite's driver leaves out, so that RELEASE does not commit.

    https://www.sqlite.org/lang_savepoint.html.  In AUTOCOMMIT there must be none.
    """
    driver = driver_connection(connection)
    if not driver.in_transaction and not is_sqlite_in_autocommit(driver):
        driver.execute("BEGIN")


def begin_sqlite_again(connection: Connection) -> None:
    """Keep SQLite from committing each later statement of a lost transaction by itself."""
    if connection.dialect.name == "sqlite":
        driver = driver_connection(connection)
        if driver.isolation_level is None or getattr(driver, "autocommit", _LEGACY) != _LEGACY:
            driver.execute("BEGIN")


_READS = frozenset({"SELECT", "VALUES", "WITH", "EXPLAIN", "SHOW", "PRAGMA", "DESCRIBE"})
_STAYS_OPEN = _READS | {
    "INSERT", "UPDATE", "DELETE", "REPLACE", "MERGE", "SAVEPOINT", "RELEASE", "ROLLBACK", "SIGNAL",
}  # fmt: skip
_MARIADB_STAYS_OPEN = _STAYS_OPEN | {"DESC", "DO", "USE"}
_BLANK = r"\s|/\*(?:[^*]|\*(?!/))*\*/|(?:--|\#)[^\n]*\n"  # and comments
_FIRST_WORD = re.compile(rf"(?:\(|{_BLANK})*(\w*)")
_COMMITS_LATER = re.compile(rf";(?:{_BLANK})*COMMIT\b", re.IGNORECASE)


def is_read(statement: str) -> bool:
    """Return whether the first word of *statement* is that of one that only reads."""
    return _first_word(statement) in _READS


def is_rollback(statement: str) -> bool:
    """Return whether *statement* is a ROLLBACK, also to a savepoint."""
    return _first_word(statement) == "ROLLBACK"


def may_have_committed(connection: Connection, statement: str, had_work: bool) -> bool:
    """Return whether *statement*, which succeeded, may have made the transaction durable.

    COMMIT as text does, DDL on MariaDB, or a RELEASE of SQLite's outermost savepoint.

    :param had_work: on SQLite, whether there was a transaction to commit.
    """
    if _commits(statement):
        return True
    driver = driver_connection(connection)
    if connection.dialect.name == "sqlite":
        return not driver.in_transaction and (had_work or not is_read(statement))
    status = _libpq_status(driver)
    if status is not None:
        return status == 0  # PQTRANS_IDLE
    if connection.dialect.name == "postgresql":  # where DDL is part of the transaction
        return _first_word(statement) == "PREPARE"
    return _commits_on_mariadb(statement)


def may_be_durable(context: ExceptionContext, autocommit: bool) -> bool:
    """Return whether something of a statement that failed may be durable.

    In AUTOCOMMIT: the statement, if its reply was lost; the first of many rows; what a procedure
    did before.  In a transaction: what a procedure or DDL of MariaDB committed before it failed,
    or a COMMIT as text whose reply was lost.
    """
    statement, execution = context.statement, context.execution_context
    if statement is None:
        return False
    if autocommit:
        several = execution is not None and execution.executemany
        return context.is_disconnect or several or _first_word(statement) not in _STAYS_OPEN
    if context.dialect.name in ("mysql", "mariadb"):
        return _COMMITS_LATER.search(statement) is not None or _commits_on_mariadb(statement)
    several = ";" in statement.rstrip("; \t\r\n")
    return (context.is_disconnect or several) and _commits(statement)


def _commits(statement: str) -> bool:
    """Return whether *statement* contains a COMMIT."""
    first = _first_word(statement)
    return first in ("COMMIT", "END") or _COMMITS_LATER.search(statement) is not None


def _commits_on_mariadb(statement: str) -> bool:
    """Return whether *statement* may commit on MariaDB, as DDL and procedures do."""
    first = _first_word(statement)
    return "autocommit" in statement.lower() if first == "SET" else first not in _MARIADB_STAYS_OPEN


def _first_word(statement: str) -> str:
    found = _FIRST_WORD.match(statement)
    return found[1].upper() if found else ""
