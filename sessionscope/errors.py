"""The exceptions that the library raises, and their messages.

docs/troubleshooting.md has a heading for each message.
"""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import scoped_session


class TransactionDoomed(SQLAlchemyError):
    """The application returned success, but the database would not keep its work.

    Either the application swallowed an error after which the database keeps nothing, or only a
    part, although COMMIT would return normally; the error is the ``__cause__``.  Or it closed
    the session while that held work.  The transaction has been rolled back.
    """


class CommitOutcomeUnknown(SQLAlchemyError):
    """COMMIT was sent, but its outcome is unknown: the work may be durable or not.

    The connection was lost during COMMIT, or one of several databases failed after another had
    committed.  The driver's error is the ``__cause__``.  Report neither success nor failure, and
    check before you repeat the work.
    """


def swallowed(what: str) -> TransactionDoomed:
    """Return the exception to raise if *what* failed and the application went on.

    :param what: a clause that begins the message.
    """
    return TransactionDoomed(
        f"{what}, and the application went on as if its transaction were intact; it was rolled "
        "back. Expect such an error inside 'with session.begin_nested():', or call rollback()"
    )


def closed_with_work(place: str) -> str:
    """Return the message about a line that closed the session too early.

    :param place: file and line.
    """
    return (
        f"{place} closed the session while it held a transaction, which discarded its work. "
        "Delete that line, since the session is closed when its request or session_scope ends; "
        "to discard work on purpose, call rollback() instead"
    )


def closed_after_reading(place: str) -> str:
    """Return the message about a line that closed the session of a request that only reads.

    :param place: file and line.
    """
    return (
        f"{place} closed the session while a transaction was open that had only read, so nothing "
        "is lost. Delete that line, since the session is closed when its request ends"
    )


def require(condition: bool, name: str, given: object, wanted: str) -> None:
    """Check an argument.

    :param wanted: what it must be, in words.
    :raises TypeError: unless *condition* is true.
    """
    if not condition:
        raise TypeError(f"{name} must be {wanted}, not {given!r}")


def require_registry(given: object) -> None:
    """Check an argument that must be a registry.

    :raises TypeError: if it is something else, such as a sessionmaker.
    """
    require(isinstance(given, scoped_session), "registry", given, "a scoped_session")
