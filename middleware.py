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

This module has what happens to a request, in order: `SessionMiddleware.__call__`, then
`_Attempt.respond`.  The session's side is in `sessionscope.unit_of_work`, the server's in
`sessionscope.response`.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sessionscope.callbacks import on_commit
from sessionscope.errors import CommitOutcomeUnknown, TransactionDoomed
from sessionscope.guests import aside
from sessionscope.replay import Replay
from sessionscope.response import END, SAFE_METHODS, Head, StreamedBody, is_success, is_whole
from sessionscope.stage import AppContext, Position, staged
from sessionscope.states import Action
from sessionscope.unit_of_work import UnitOfWork, failure_of, session_scope
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

log = logging.getLogger("sessionscope")

SESSION_KEY = "sessionscope.session"

RETRY_PAUSE = 0.01
"""Half the seconds that a second attempt waits at most; each later one up to twice as long."""

LONG_TRANSACTION = 60.0
"""Seconds that a stream may keep a transaction open before the log says so."""

LATE_WORK = "work done in close(), after the end of the response, is rolled back"


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
        _require(callable(app), "app", app, "a WSGI application")
        _require(isinstance(registry, scoped_session), "registry", registry, "a scoped_session")
        _require(callable(commit_when), "commit_when", commit_when, "callable")
        _require(type(attempts) is int, "attempts", attempts, "an int")
        if attempts < 1:
            raise ValueError(f"attempts must be 1 or more, not {attempts}")
        _require(reader is None or isinstance(reader, Engine), "reader", reader, "an Engine")
        _require(isinstance(confirm, bool), "confirm", confirm, "a bool")
        _require(observer is None or callable(observer), "observer", observer, "callable")
        self.app = app
        self.registry = registry
        self.commit_when = commit_when
        self.attempts = attempts
        self.reader = reader
        self.confirm = confirm
        self.observer = observer
        self.warned: set[str] = set()
        staged(registry)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        outer = staged(self.registry).current()
        if isinstance(outer, UnitOfWork) and outer.joinable and not outer.ending:
            environ[SESSION_KEY] = outer.session
            return self.app(environ, start_response)
        if self.attempts == 1:
            return _Attempt(self, environ, start_response).respond()  # type: ignore[return-value]
        replay, number, began = Replay(environ), 1, monotonic()
        while True:
            attempt = _Attempt(self, environ, start_response, replay, number, began)
            body = attempt.respond()
            if body is not None:
                return body
            # Full jitter: rivals must not meet again.
            sleep(random.uniform(0, RETRY_PAUSE * 2 ** min(number, 5)))
            replay.rewind()
            number += 1


def _require(condition: bool, name: str, given: object, wanted: str) -> None:
    if not condition:
        raise TypeError(f"{name} must be {wanted}, not {given!r}")


class _Attempt:
    """One call of the application, and what is promised to it.

    It plays the server for the application: it keeps the head back until the response may
    begin, and ends the unit of work once, by `settle` or by `roll_back`.
    """

    def __init__(
        self,
        middleware: SessionMiddleware,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        replay: Replay | None = None,
        number: int = 1,
        began: float | None = None,
    ) -> None:
        self.middleware = middleware
        self.environ = environ
        self.server_start_response = start_response
        self.replay = replay
        self.number = number
        self.began = monotonic() if began is None else began
        # Read at entry: the environ is the application's to change.
        self.method: str = environ.get("REQUEST_METHOD", "")
        self.script_name, self.path_info = environ.get("SCRIPT_NAME"), environ.get("PATH_INFO")
        self.head: Head | None = None
        self.error: BaseException | None = None
        self.iterable: object = None
        self.iterator: Iterator[Any] = iter(())
        self.written: list[Any] = []
        """What was given to ``write()``, to go in front of the body."""
        self.ahead: list[Any] = []
        """Chunks that are pulled already."""
        self.settled = self.returned = self.exhausted = self.finished = self.reported = False
        self.warned = False
        self.context = AppContext()
        safe = self.method in SAFE_METHODS
        self.unit = UnitOfWork(
            middleware.registry,
            reader=middleware.reader if safe else None,
            confirm=middleware.confirm,
            joinable=True,
            safe=safe,
            watched=middleware.attempts > 1,
            warned=middleware.warned,
        )
        self.position = Position(self.unit)
        environ[SESSION_KEY] = self.unit.session

    def __str__(self) -> str:
        return f"{self.method} {self.path()}"

    def path(self) -> str:
        path = f"{self.script_name or ''}{self.path_info or ''}"
        return quote(path, safe="/;=,", encoding="latin-1", errors="replace")

    def respond(self) -> Iterable[bytes] | None:
        """Call the application; return what the server may send, or None to try again."""
        try:
            body = self.call_app()
            if self.should_retry(None):
                self.discard_response(None)
                return None
            if not isinstance(body, StreamedBody):
                self.release()
            self.report()
            self.send_head()
            self.returned = True
            return body  # type: ignore[no-any-return]
        except BaseException as error:
            try:
                retry = self.should_retry(error)
                self.discard_response(error, quietly=retry)
            finally:
                self.release()  # also when an interrupt struck in the line above
            if retry:
                return None
            raise

    def call_app(self) -> Any:
        """Call the application, and settle what needs none of its code any more."""
        with self.position:
            try:
                body: Any = self.middleware.app(self.environ, self.start_response)
                self.iterable = body
                if self.written and type(body) in (list, tuple):
                    body = [*self.take_written(), *body]
                if not self.written and is_whole(body, self.environ):
                    self.settle()
                    return body
                self.iterator = iter(body)
            except BaseException as error:
                self.roll_back(error)
                raise
        stream = StreamedBody(self, self.__str__)
        stream.prefetch()
        return stream

    def start_response(
        self, status: str, headers: Headers, exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Keep the head (PEP 3333, "The start_response() Callable").

        One that replaces another also replaces what was kept of that one's body.
        """
        if exc_info is not None:
            if self.head is not None and self.head.sent:
                raise exc_info[1].with_traceback(exc_info[2])
            self.written.clear()
        elif self.head is not None:
            raise AssertionError("start_response was called again without exc_info (PEP 3333)")
        self.head = Head(self.method, status, headers, exc_info)
        self.context.note_start_response()
        return self.written.append

    def take_written(self) -> list[Any]:
        taken = self.written.copy()
        self.written.clear()
        return taken

    def pull(self) -> Any:
        """Return the next chunk; END when the application has ended and is settled."""
        if self.ahead:
            return self.ahead.pop(0)
        if self.exhausted:
            return END
        with self.position:
            try:
                try:
                    chunk = next(self.iterator, END)
                finally:
                    self.warn_if_long()
                if chunk is END:
                    self.exhausted = True
                    self.settle()
            except BaseException as error:
                self.exhausted = True
                self.roll_back(error)
                raise
            finally:
                if self.exhausted and self.returned:
                    self.report()
        if self.returned and self.head is not None and not self.head.sent:
            self.send_head()  # start_response was called late
        if self.written:
            first, *self.ahead = [*self.take_written(), chunk]
            return first
        return chunk

    def settle(self) -> None:
        """End the transaction as the response wants it: COMMIT or ROLLBACK."""
        try:
            wanted = self.wants_commit()
            if wanted and self.head is not None and self.head.may_be_refused:
                self.send_head()
        except BaseException as error:
            self.roll_back(error)
            raise
        if not wanted:
            self.roll_back(None)
            return
        self.settled = True
        try:
            self.context.run(self.unit.commit)
        except BaseException as error:
            self.error = error
            log.exception("%s: %s", self, failure_of(self.unit))
            self.context.run(self.unit.rollback, error)
            self.replace_head()
            raise

    def wants_commit(self) -> bool:
        head = self.head
        if head is None:
            return False
        headers = list(head.headers) if isinstance(head.headers, Iterable) else []
        return bool(self.middleware.commit_when(self.environ, head.status, headers))

    def roll_back(self, error: BaseException | None) -> None:
        """End the transaction because of *error*, of the status, or of a client that left."""
        if not self.settled:
            self.settled = True
            self.error = error
            self.context.run(self.unit.rollback, error)

    def send_head(self) -> None:
        """Give the head to the server; it says itself what it thinks if there is none."""
        if self.head is not None and not self.head.sent:
            self.head.send(self.server_start_response)

    def replace_head(self) -> None:
        """Take back a successful head that the server got before COMMIT failed.

        uWSGI would send it, although an exception follows.
        """
        if self.head is not None and self.head.sent and not self.returned:
            with suppress(Exception):
                headers = [("Content-Length", "0")]
                self.server_start_response("500 Internal Server Error", headers, sys.exc_info())

    def should_retry(self, error: BaseException | None) -> bool:
        """Tell whether the request may succeed when it is tried again, and may be tried.

        A framework may have turned the database's error into a page, or the application
        swallowed it, so the unit of work is asked what it has seen.
        """
        head = self.head
        if error is None and (head is None or str(head.status)[:1] != "5"):
            return False
        if self.replay is None or not self.replay.is_possible():
            return False
        if self.number == self.middleware.attempts or (head is not None and head.sent):
            return False
        reason = self.unit.transient_error(error)
        if reason is not None:
            of = self.middleware.attempts
            log.warning("%s: attempt %d of %d failed, retrying: %r", self, self.number, of, reason)
        return reason is not None

    def discard_response(self, error: BaseException | None, quietly: bool = True) -> None:
        """Finish a response that the server does not get, and so does not close."""
        self.reported = quietly
        try:
            self.finish(error)
        except Exception:
            log.exception("close() failed")

    def finish(self, error: BaseException | None = None) -> None:
        """Close the application's iterable, once, and let go of the session.

        Before the end of the response it rolls back, because of *error* or of a client that
        hung up.
        """
        if self.finished:
            return
        self.finished = True
        try:
            with self.position:
                try:
                    self.warn_if_long()
                    with self.unit.extra_work(LATE_WORK) if self.settled else nullcontext():
                        close = getattr(self.iterable, "close", None)
                        if close is not None:
                            close()
                except BaseException as raised:
                    error = error or raised
                    raise
                finally:
                    self.roll_back(error)
        finally:
            self.release()
            self.report()
            if self.head is not None:
                self.head.exc_info = None  # a traceback that leads back to here

    def release(self) -> None:
        """Close the session, which takes it off stage; may be called twice."""
        try:
            self.context.run(self.unit.close)
        finally:
            self.context.drop()

    def warn_if_long(self) -> None:
        """Say once that a stream keeps a transaction open."""
        if self.returned and not self.warned and self.unit.seconds_open() > LONG_TRANSACTION:
            self.warned = True
            log.warning(
                "%s: a stream has kept its transaction open for more than %g s; a handler with "
                "a long stream should commit before its first yield",
                self,
                LONG_TRANSACTION,
            )

    def report(self) -> None:
        """Tell the log and the observer, once, what became of the request."""
        if self.reported or not self.settled:
            return
        self.reported = True
        error, self.error = self.error, None  # whose traceback leads back to here
        observer = self.middleware.observer
        if observer is None and not log.isEnabledFor(logging.DEBUG):
            return
        outcome = Outcome(
            method=self.method,
            path=self.path(),
            status=None if self.head is None else self.head.status,
            action=self.unit.action(),
            attempts=self.number,
            seconds=monotonic() - self.began,
            error=error,
        )
        told = outcome.status if error is None else repr(error)
        log.debug("%s %s %s %s", outcome.action, outcome.method, outcome.path, told)
        if observer is not None:
            with aside(self.unit.stage, self.middleware.registry.session_factory):
                try:
                    observer(outcome)
                except Exception:
                    log.exception("the observer failed on %r", outcome)
