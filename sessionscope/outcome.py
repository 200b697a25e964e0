"""The outcome of a request, for the log and the *observer*."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from sessionscope.stage import log
from sessionscope.states import Action

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment


class RequestName:
    """Method and path of a request, even if the application changes the environ."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        self.method: str = environ.get("REQUEST_METHOD", "")
        self.script_name = environ.get("SCRIPT_NAME")
        self.path_info = environ.get("PATH_INFO")

    def __str__(self) -> str:
        return f"{self.method} {self.path()}"

    def path(self) -> str:
        path = f"{self.script_name or ''}{self.path_info or ''}"
        return quote(path, safe="/;=,", encoding="latin-1", errors="replace")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one request's session, which the *observer* gets."""

    method: str
    """The request method."""
    path: str
    """``SCRIPT_NAME`` and ``PATH_INFO``, percent-encoded."""
    status: str | None
    """The status line given to ``start_response``; None if there was none."""
    action: Action
    """``commit``, ``rollback``, ``none`` if no transaction began, or ``unknown`` if the
    connection was lost during COMMIT."""
    attempts: int
    """How often the application was called."""
    seconds: float
    """Seconds from the call of the middleware to the end of the transaction."""
    error: BaseException | None
    """What the application or COMMIT raised."""


def tell(outcome: Outcome, observer: Callable[[Outcome], object] | None) -> None:
    """Write a line to the log and call *observer*, whose exceptions are logged."""
    done = outcome.action, outcome.method, outcome.path
    if outcome.error is None:
        log.debug("%s %s %s %s", *done, outcome.status)
    else:
        log.debug("%s %s %s %r", *done, outcome.error)  # by logging: a repr() may raise
    if observer is not None:
        try:
            observer(outcome)
        except Exception:
            log.exception("the observer failed on %r", outcome)
