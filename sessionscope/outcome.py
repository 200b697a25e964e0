"""What the *observer* is told of a request."""

from __future__ import annotations

from dataclasses import dataclass

from sessionscope.states import Action


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request's session; given to the *observer*."""

    method: str
    """The request method."""
    path: str
    """``SCRIPT_NAME`` and ``PATH_INFO``, percent-encoded."""
    status: str | None
    """The status line given to ``start_response``; None if there was none."""
    action: Action
    """``none`` if no transaction was begun, ``unknown`` if the answer to COMMIT was lost."""
    attempts: int
    """How often the application was called."""
    seconds: float
    """From the call of the middleware until now, when the transaction is over."""
    error: BaseException | None
    """What the application or the COMMIT raised."""
