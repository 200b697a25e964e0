"""One SQLAlchemy session per WSGI request, and a 2xx you can trust.

Wrap an application and write no commit, rollback or close in it again::

    from sessionscope import SessionMiddleware
    from sqlalchemy.orm import scoped_session, sessionmaker

    Session = scoped_session(sessionmaker(engine))
    application = SessionMiddleware(app, Session)

Each request gets a new session.  ``Session()`` returns it to all code of the request, and
``environ["sessionscope.session"]`` holds it.

=============================================  =====================================
the application                                the session
=============================================  =====================================
returns 2xx or 3xx                             COMMIT; then the response is completed
returns any other status, or raises            ROLLBACK
swallowed an error that undid its transaction  ROLLBACK, raises `TransactionDoomed`
closed a session that held work                ROLLBACK, raises `TransactionDoomed`
lost the connection during COMMIT              raises `CommitOutcomeUnknown`
streams, and the client disconnects            ROLLBACK
never used the session                         no statement, no connection
=============================================  =====================================

A complete successful response means that COMMIT returned.  A list body is committed before any
headers are sent.  A stream with a Content-Length holds back its last chunk until COMMIT returns;
one of unknown length commits before it ends.  If COMMIT fails, the client gets a 500 or, if a
part was sent already, a response that is cut; a few servers cannot cut one of unknown length.

To follow a request through the code, begin at `SessionMiddleware.__call__` and go on to
`sessionscope.attempt.Attempt.respond`.  The application is called in `sessionscope.application`,
the response is in `sessionscope.response`, and the session in `sessionscope.unit_of_work`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from time import monotonic, sleep
from typing import TYPE_CHECKING

from sessionscope.attempt import SESSION_KEY, Attempt
from sessionscope.callbacks import on_commit
from sessionscope.errors import (
    CommitOutcomeUnknown,
    TransactionDoomed,
    require,
    require_registry,
)
from sessionscope.events import prepare
from sessionscope.outcome import Outcome
from sessionscope.participants import binds_of
from sessionscope.replay import Replay
from sessionscope.response import is_success
from sessionscope.stage import log, staged
from sessionscope.unit_of_work import UnitOfWork, session_scope
from sqlalchemy import Engine

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from sessionscope.response import Headers
    from sessionscope.stage import Registry

    CommitWhen = Callable[[WSGIEnvironment, str, Headers], bool]

__all__ = [
    "CommitOutcomeUnknown",
    "Outcome",
    "SessionMiddleware",
    "TransactionDoomed",
    "commit_on_success",
    "on_commit",
    "session_scope",
]

RETRY_PAUSE = 0.01
"""Half of the longest pause before the first retry, in seconds; it doubles with each retry."""


def commit_on_success(environ: WSGIEnvironment, status: str, headers: Headers) -> bool:
    """Return whether *status* is 2xx or 3xx; the default for *commit_when*.

    :param environ: not used.
    :param status: the status line.  False is returned for one that cannot be parsed.
    :param headers: not used.
    """
    return is_success(status)


class SessionMiddleware:
    """A WSGI application that runs *app* with one session per request.

    :param app: the WSGI application to wrap.
    :param registry: the ``scoped_session`` through which *app* finds its session.
    :param commit_when: called with ``(environ, status, headers)`` when the outcome is
        decided; true commits.  It should have no side effects.  If it raises, the work is
        rolled back and the server gets the exception.
    :param attempts: how often the application may be called for one request, if the database
        reports a serialization failure, a deadlock, a busy lock, a stale row or a dead
        connection.  A retry starts from the beginning, with the original environ and body.
        Side effects elsewhere (mail, HTTP, another engine) happen once per attempt, unless
        `on_commit` does them.  A request is not retried if a byte has been sent, or if
        anything has been committed or may have been.
    :param reader: an Engine for safe methods (GET, HEAD, OPTIONS, TRACE; RFC 9110, 9.2.1): a
        replica, or a read-only engine for the same SQLite file.  It should refuse to write,
        because a retry repeats what was done there.  It becomes the ``bind`` of their sessions,
        so ``binds=`` and the ``get_bind()`` of a subclass take precedence; a registry bound to
        a Connection ignores it.
    :param confirm: query PostgreSQL 13 or newer for the outcome of a COMMIT whose reply was
        lost.  It costs one statement before each COMMIT, but none for a safe method that has
        flushed nothing.  A transaction that turns out to be committed is a success, an aborted
        one an ordinary failure; if neither is certain, `CommitOutcomeUnknown` is raised.  Other
        databases have no such query.
    :param observer: called once per request with its `Outcome`, after the session has been
        closed.  If it raises, the exception is logged.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if *attempts* is below 1.
    """

    def __init__(
        self,
        app: WSGIApplication,
        registry: Registry,
        *,
        commit_when: CommitWhen = commit_on_success,
        attempts: int = 1,
        reader: Engine | None = None,
        confirm: bool = False,
        observer: Callable[[Outcome], object] | None = None,
    ) -> None:
        require(callable(app), "app", app, "a WSGI application")
        require_registry(registry)
        require(callable(commit_when), "commit_when", commit_when, "callable")
        require(type(attempts) is int, "attempts", attempts, "an int")
        if attempts < 1:
            raise ValueError(f"attempts must be 1 or more, not {attempts}")
        require(reader is None or isinstance(reader, Engine), "reader", reader, "an Engine")
        require(isinstance(confirm, bool), "confirm", confirm, "a bool")
        require(observer is None or callable(observer), "observer", observer, "callable")
        self.app = app
        self.registry = registry
        self.commit_when = commit_when
        self.attempts = attempts
        self.reader = reader
        self.confirm = confirm
        self.observer = observer
        self.warned: set[str] = set()
        staged(registry)
        prepare(binds_of(registry), watched=attempts > 1)
        prepare([reader], watched=False)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        outer = staged(self.registry).current()
        if isinstance(outer, UnitOfWork) and outer.joinable and not outer.ending:
            environ[SESSION_KEY] = outer.session
            return self.app(environ, start_response)
        if self.attempts == 1:
            return Attempt(self, environ, start_response).respond()  # type: ignore[return-value]
        replay, number, began = Replay(environ), 1, monotonic()
        while True:
            attempt = Attempt(self, environ, start_response, replay, number, began)
            body = attempt.respond()
            if body is not None:
                return body
            # Full jitter, so that requests that conflicted do not start together again.
            sleep(random.uniform(0, RETRY_PAUSE * 2 ** min(number, 5)))
            replay.rewind()
            number += 1

    def should_retry(self, attempt: Attempt, error: BaseException | None) -> bool:
        """Return whether the request is to be retried.

        A framework may have turned the database's error into a page, or the application may
        have swallowed it, so the unit of work knows the error rather than *error*.

        :param error: what the attempt raised; None if it returned a response.
        """
        head, replay = attempt.head, attempt.replay
        if replay is None or attempt.number == self.attempts:
            return False
        if error is None and (head is None or str(head.status)[:1] != "5"):
            return False
        if (head is not None and head.sent) or not replay.is_possible():
            return False
        reason = attempt.unit.transient_error(error)
        if reason is not None:
            numbers = attempt.number, self.attempts
            log.warning("%s: attempt %d of %d failed, retrying: %r", attempt.name, *numbers, reason)
        return reason is not None
