"""One SQLAlchemy session per WSGI request, and a 2xx you can trust.

Everything public is imported from here::

    from sessionscope import SessionMiddleware, on_commit, session_scope

`sessionscope.engines`, `sessionscope.idempotency`, `sessionscope.testing` and
`sessionscope.pastedeploy` are public modules, too.  Everything else may change without notice.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sessionscope.middleware import (
        CommitOutcomeUnknown,
        Outcome,
        SessionMiddleware,
        TransactionDoomed,
        commit_on_success,
        on_commit,
        session_scope,
    )

__all__ = [
    "CommitOutcomeUnknown",
    "Outcome",
    "SessionMiddleware",
    "TransactionDoomed",
    "commit_on_success",
    "on_commit",
    "session_scope",
]

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used (PEP 562).

    The middleware imports modules of this package, so it cannot be imported from here at once.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("sessionscope.middleware"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
