"""The exceptions that the library raises, and what they say."""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError


class TransactionDoomed(SQLAlchemyError):
    """The application asked for success, but its work is already undone.

    Either it swallowed an error after which the database keeps nothing, or only a part,
    although COMMIT would return normally (the error is the ``__cause__``); or it closed the
    session while that held work.  The transaction has been rolled back.
    """


class CommitOutcomeUnknown(SQLAlchemyError):
    """COMMIT was sent and its answer never came: the work may be durable, or not.

    The driver's error is the ``__cause__``.  Conclude neither success nor failure, and do not
    repeat the work blindly.
    """


def swallowed(what: str) -> TransactionDoomed:
    """Return the exception for *what* has failed and did not stop the application."""
    return TransactionDoomed(
        f"{what}, and the application went on as if its transaction were whole; it was rolled "
        "back. Roll back yourself, or to a savepoint, where you handle such an error"
    )


def closed_with_work(place: str) -> str:
    """Return what is said of a line that closed the session too early."""
    return (
        f"{place} closed the session while it held a transaction, which threw its work away. "
        "Delete that line, since the session is closed when the response is complete; if its "
        "work was to be discarded, call rollback() instead"
    )


def require(condition: bool, name: str, given: object, wanted: str) -> None:
    """Raise a `TypeError` about the argument *name*, unless *condition* holds."""
    if not condition:
        raise TypeError(f"{name} must be {wanted}, not {given!r}")
