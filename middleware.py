"""One SQLAlchemy session per WSGI request, and a 2xx that can be trusted.

Wrap an application and write no commit, rollback or close in it again::

    from sessionscope import SessionMiddleware
    from sqlalchemy.orm import scoped_session, sessionmaker

    Session = scoped_session(sessionmaker(engine))
    application = SessionMiddleware(app, Session)

Each request gets a new session: ``Session()`` returns it, to all code of the request, and
``environ["sessionscope.session"]`` holds it.  What becomes of its work:

=============================================  =====================================
the application                                the session
=============================================  =====================================
returns 2xx or 3xx                             COMMIT; then the response is completed
returns any other status, or raises            ROLLBACK
swallowed an error that undid its transaction  ROLLBACK, raises `TransactionDoomed`
closed a session that held work                ROLLBACK, raises `TransactionDoomed`
lost the connection during COMMIT              raises `CommitOutcomeUnknown`
streams, and the client hangs up               ROLLBACK
never used the session                         no statement, no connection
=============================================  =====================================

A complete successful response exists only if COMMIT returned.  A list is settled before its
head is sent.  A stream of known length keeps back the chunk that completes it; one of unknown
length commits before it ends.  So a COMMIT that fails shows as a 500 while nothing has been
sent, and otherwise as a response that the client can see is cut.

What happens to a request, in order: `SessionMiddleware.__call__` here, then
`sessionscope.attempt.Attempt.respond`.  The application's side is in
`sessionscope.application`, the server's in `sessionscope.response`, and the session's in
`sessionscope.unit_of_work`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from time import monotonic, sleep
from typing import TYPE_CHECKING

from sessionscope.attempt import SESSION_KEY, Attempt
from sessionscope.callbacks import on_commit
from sessionscope.errors import CommitOutcomeUnknown, TransactionDoomed, require
from sessionscope.outcome import Outcome
from sessionscope.participants import watch_binds
from sessionscope.replay import Replay
from sessionscope.response import is_success
from sessionscope.stage import log, staged
from sessionscope.unit_of_work import UnitOfWork, session_scope
from sqlalchemy import Engine
from sqlalchemy.orm import scoped_session

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
"""Half the seconds that a second attempt waits at most; each later one up to twice as long."""


def commit_on_success(environ: WSGIEnvironment, status: str, headers: Headers) -> bool:
    """Tell whether *status* is 2xx or 3xx: the default for *commit_when*.

    A pure function.  It is False, never an error, for a status that it cannot read.
    """
    return is_success(status)


class SessionMiddleware:
    """A WSGI application that runs *app* with one session per request.

    :param app: the WSGI application to wrap.
    :param registry: the ``scoped_session`` through which *app* finds its session.
    :param commit_when: called with ``(environ, status, headers)`` when the outcome is
        decided; true if the work is to be committed.  A pure function.  If it raises, the
        work is rolled back and the server gets its exception.
    :param attempts: how often a request may be tried when the database says "try again": a
        serialization failure, a deadlock, a lock that is busy, a stale row, a connection found
        dead.  A new attempt starts from the beginning, with the environ and the body as they
        were; what the application did elsewhere (mail, HTTP, another engine) is done again,
        unless `on_commit` does it.  Nothing is repeated once a byte was sent, or anything was
        committed, or may have been.
    :param reader: an Engine that the sessions of safe methods (GET, HEAD, OPTIONS, TRACE; RFC
        9110, 9.2.1) are bound to: a replica, or a read-only view of the same file.  It becomes
        the session's ``bind``, so ``binds=`` and ``get_bind()`` of a subclass go first; a
        registry bound to a Connection ignores it.
    :param confirm: on PostgreSQL 13 or newer, ask what became of a COMMIT whose answer was
        lost.  It costs one statement before each COMMIT.  What is known to be committed is
        then a success, what is known to be aborted an ordinary failure; all else stays
        `CommitOutcomeUnknown`.  Other databases cannot be asked.
    :param observer: called once per request with its `Outcome`, when the session is closed.
        If it raises, that is logged and changes nothing.
    :raises TypeError: for an argument of another type.
    :raises ValueError: for *attempts* below 1.
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
        require(isinstance(registry, scoped_session), "registry", registry, "a scoped_session")
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
        if attempts > 1:
            watch_binds(registry)

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
            # Full jitter: rivals must not meet again.
            sleep(random.uniform(0, RETRY_PAUSE * 2 ** min(number, 5)))
            replay.rewind()
            number += 1

    def should_retry(self, attempt: Attempt, error: BaseException | None) -> bool:
        """Tell whether the request may succeed when it is tried again, and may be tried.

        A framework may have turned the database's error into a page, or the application
        swallowed it, so the unit of work is asked what it has seen.

        :param error: what the attempt raised; None if it made a response.
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
