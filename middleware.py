"""One SQLAlchemy session per WSGI request, and a 2xx that can be trusted.

Wrap an application and write no commit, rollback or close in it again::

    from sqlalchemy.orm import scoped_session, sessionmaker

    Session = scoped_session(sessionmaker(engine))
    application = SessionMiddleware(app, Session)

Each request gets a new session, found by calling the registry (``Session()``) or
as ``environ["sessionscope.session"]``.  What becomes of its work:

=============================================  ===========================================
the application                                the session
=============================================  ===========================================
answers 2xx or 3xx                             COMMIT; only then is the response completed
answers anything else, or raises               ROLLBACK
swallowed an error that undid its transaction  ROLLBACK, ``TransactionDoomed``
removed a session that held work               ROLLBACK, ``TransactionDoomed``; a warning
                                               where a safe method had only read
lost the connection while COMMIT ran           nobody knows: ``CommitOutcomeUnknown``
streams, and the client hangs up               ROLLBACK
never used the session                         nothing is sent, no connection is taken
=============================================  ===========================================

The promise behind the table: *a complete successful response exists only where
COMMIT returned.*  A list is settled before its head leaves.  A stream of known
length keeps back the chunk that completes it; one of unknown length commits before
it ends.  A COMMIT that fails therefore shows as a clean 500 while nothing has left,
and otherwise as a response that the client can see is cut.

How the file is laid out: `SessionMiddleware` makes an `_Attempt`, which speaks to the
application (``start_response``, ``write``); a `_Body` speaks to the server when the
response is a stream; the attempt's `_UnitOfWork` owns the session and is the only code
here that commits; SQLAlchemy tells it what happens through the listeners after it.
`_Evidence` is what PostgreSQL can be asked with when the answer to COMMIT was lost.
`session_scope` is the same unit of work without HTTP.  At the end stands what drivers and
databases tell of their errors.

PEP 3333 (https://peps.python.org/pep-3333/) is the WSGI specification cited below.
"""

from __future__ import annotations

import io
import logging
import random
import re
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from tempfile import SpooledTemporaryFile
from threading import Lock, local
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from sqlalchemy import Connection, Engine, String, column, event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.util import ThreadLocalRegistry

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from sqlalchemy import Transaction
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.orm import SessionTransaction

    Registry = scoped_session[Any]
    Headers = list[tuple[str, str]]
    Callback = Callable[[], object]
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

RECORD_IN_MEMORY = 1024 * 1024
"""Bytes of a body that are kept in memory for another attempt; more go to a temporary file."""

RETRY_PAUSE = 0.01
"""Half the seconds that a second attempt waits at most; each later one up to twice as long."""

CONFIRM_PATIENCE = 5.0
"""Seconds for which *confirm* goes on asking what became of a COMMIT."""

LONG_TRANSACTION = 60.0
"""Seconds that a stream may keep a transaction open before the log says so."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, 9.2.1


class TransactionDoomed(SQLAlchemyError):
    """The application asked for success, but its work is already undone.

    Either it swallowed an error after which the database keeps nothing, or only a
    part, although COMMIT would return normally (the error is the ``__cause__``); or
    it closed or removed the session while that held work.  The transaction has been
    rolled back.
    """


class CommitOutcomeUnknown(SQLAlchemyError):
    """COMMIT was sent and its answer never came: the work may be durable, or not.

    The driver's error is the ``__cause__``.  Neither success nor failure may be
    concluded, and the work must not be repeated blindly.
    """


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request's session; given to the *observer*."""

    method: str
    """The request method."""
    path: str
    """``SCRIPT_NAME`` and ``PATH_INFO``, percent-encoded."""
    status: str | None
    """The status line given to ``start_response``; None where there was none."""
    action: Literal["commit", "rollback", "none", "unknown"]
    """``none`` where no transaction was begun, ``unknown`` where COMMIT was cut off."""
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
    return isinstance(status, str) and status[:4] in _SUCCESS


_SUCCESS = frozenset(f"{code}{end}" for code in range(200, 400) for end in ("", " "))


class SessionMiddleware:
    """A WSGI application that runs *app* with one session per request.

    :param app: the WSGI application to wrap.
    :param registry: the ``scoped_session`` through which *app* finds its session.
    :param commit_when: called with ``(environ, status, headers)`` when the outcome
        is decided, and true where the work shall be committed; a pure function.
        One that raises rolls back, and its exception is what the server sees.
    :param attempts: how often a request may be tried when the database says "try again":
        a serialization failure, a deadlock, a lock that is busy, a stale row, a connection
        found dead.  A new attempt starts from the beginning, with the environ and the
        body as they were; what the application did elsewhere (mail, HTTP, another
        engine) is done again, and `on_commit` is the cure.  Nothing is repeated once a
        byte has left, or anything was committed, or may have been.
    :param reader: an Engine that the sessions of safe methods (GET, HEAD, OPTIONS,
        TRACE; RFC 9110, 9.2.1) are bound to: a replica, or a read-only view of the
        same file.  It becomes the session's ``bind``, so ``binds=`` and an own
        ``get_bind()`` go first; a registry bound to a Connection ignores it.
    :param confirm: on PostgreSQL 13 or newer, ask what became of a COMMIT whose answer was
        lost.  It costs one statement before each COMMIT.  What is known to be committed is
        then a success, what is known to be aborted an ordinary failure; all else stays
        `CommitOutcomeUnknown`.  Other databases cannot be asked.
    :param observer: called once per request with its `Outcome`, when the session is
        out of the registry.  One that raises is logged and changes nothing.
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
        self.warned = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if _running.places:
            outer = _unit_of(_peek(self.registry))
            if outer is not None and outer.serves_this_thread():
                environ[SESSION_KEY] = outer.session
                return self.app(environ, start_response)
        if self.attempts > 1:
            return self._respond_at_last(environ, start_response)
        return _Attempt(self, environ, start_response).respond()  # type: ignore[return-value]

    def _respond_at_last(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Try until an attempt need not, or may not, be repeated."""
        position, number, began = _recorded(environ), 1, monotonic()
        at_entry = environ.copy()
        while True:
            attempt = _Attempt(self, environ, start_response, number, began)
            body = attempt.respond()
            if body is not None:
                return body
            # Full jitter: rivals must not meet again.
            sleep(random.uniform(0, RETRY_PAUSE * 2 ** min(number, 5)))
            _rewind(environ, at_entry, position)
            number += 1

    def _warn_once(self, message: str) -> None:
        if not self.warned:
            self.warned = True
            log.warning(message)


def _require(condition: bool, name: str, given: object, wanted: str) -> None:
    if not condition:
        raise TypeError(f"{name} must be {wanted}, not {given!r}")


@contextmanager
def session_scope(registry: Registry) -> Iterator[Session]:
    """Run one unit of work outside HTTP, in a script or a worker.

    A new session is in *registry* while the block runs, even inside a request; what
    was there is put back afterwards.  The end of the block commits, an exception
    rolls back, and the session is removed.  It never retries.

    :raises TransactionDoomed: where an error in the block was swallowed that undid
        the work, or the session was closed while it held some.
    :raises CommitOutcomeUnknown: where the answer to COMMIT was lost.
    """
    unit = _UnitOfWork(registry, joinable=False)
    try:
        with unit:
            try:
                yield unit.session
            except BaseException:
                unit.rollback()
                raise
            try:
                unit.commit()
            except BaseException:
                log.exception("the commit failed")
                unit.rollback()
                raise
    finally:
        unit.close()


def on_commit(session: Session | Registry, callback: Callback) -> None:
    """Run *callback* once, after the COMMIT that makes the session's work durable.

    Callbacks run in the order of their registration, after the next COMMIT of
    *session* (a Session, or the registry that holds it) and before the response is
    complete.  A rollback drops them; one to a savepoint drops those registered since
    the savepoint was taken.  They run with the session out of the registry, and what
    they open there is removed after them.  One that raises is logged, and spoils
    neither the response nor the others.

    :raises RuntimeError: where neither a SessionMiddleware nor a session_scope runs
        *session*.
    """
    found = _peek(session) if isinstance(session, scoped_session) else session
    unit = _unit_of(found)
    if found is None or unit is None:
        raise RuntimeError(
            f"on_commit: {session!r} has no session that a SessionMiddleware or a "
            "session_scope runs, so nothing here would ever call the callback"
        )
    if unit.callbacks is None:
        unit.callbacks = _Callbacks(unit.registry)
    unit.callbacks.add(callback, found.get_nested_transaction())


class _Attempt:
    """One call of the application, and what is promised to it.

    It plays the server for the application: it keeps the head back until the
    response may begin, and settles the unit of work exactly once.
    """

    iterable: object = None
    head: _Head | None = None
    head_sent = settled = finished = reported = False
    error: BaseException | None = None

    def __init__(
        self,
        middleware: SessionMiddleware,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        number: int = 1,
        began: float | None = None,
    ) -> None:
        self.middleware = middleware
        self.environ = environ
        self.server_start_response = start_response
        self.number = number
        # Read at entry: the environ is the application's to change.
        method: str = environ.get("REQUEST_METHOD", "")
        self.method = method
        self.script_name, self.path_info = environ.get("SCRIPT_NAME"), environ.get("PATH_INFO")
        self.began = monotonic() if began is None else began
        self.written: list[bytes] = []
        reader = middleware.reader if method in SAFE_METHODS else None
        self.unit = unit = _UnitOfWork(middleware.registry, reader, middleware.confirm)
        environ[SESSION_KEY] = session = unit.session
        if middleware.attempts > 1 and session.bind is not None:
            _watch_errors(session.bind)  # its very first BEGIN may be refused

    def __str__(self) -> str:
        return f"{self.method} {self.path()}"

    def path(self) -> str:
        path = f"{self.script_name or ''}{self.path_info or ''}"
        return quote(path, safe="/;=,", encoding="latin-1", errors="replace")

    def respond(self) -> Iterable[bytes] | None:
        """Call the application; what the server may send, or None for another attempt."""
        try:
            body: Any = self.call_app()
            streamed = type(body) is _Body
            if streamed:
                body.prime()
            if self.failed_for_now(None):
                self.abandon(None)
                return None
            if not streamed:
                self.unit.close()
            self.report()
            self.send_head()
        except BaseException as error:
            failed_for_now = self.failed_for_now(error)
            self.abandon(error, quietly=failed_for_now)
            if failed_for_now:
                return None
            raise
        return body  # type: ignore[no-any-return]

    def failed_for_now(self, error: BaseException | None) -> bool:
        """Tell whether the request may succeed when it is tried again, and may be tried.

        A framework may have turned the database's error into a page, or the application
        swallowed it, so we ask what the unit of work has seen.
        """
        if error is None and (self.head is None or str(self.head.status)[:1] != "5"):
            return False
        if self.number == self.middleware.attempts or self.head_sent:
            return False
        if self.unit.durable != "nothing" or self.unit.fate != "rollback":
            return False
        reason = self.unit.transient_reason(error)
        if reason is not None:
            of = self.middleware.attempts
            log.warning("%s: attempt %d of %d failed, again: %r", self, self.number, of, reason)
        return reason is not None

    def abandon(self, error: BaseException | None, quietly: bool = True) -> None:
        """Finish a response that the server does not get, and so does not close."""
        self.reported = quietly
        try:
            self.finish(error)
        except Exception:
            log.exception("close() failed")

    def call_app(self) -> Any:
        unit = self.unit
        unit.enter()
        try:
            body: Any = self.middleware.app(self.environ, self.start_response)
            self.iterable = body
            if self.written and type(body) in (list, tuple):
                body = [self.take_written(), *body]
            whole = type(body) is list or _is_whole(body, self.environ)
            if self.written or not whole:
                return _Body(self, iter(body))
            self.settle(True)
            return body
        except BaseException as error:
            self.roll_back(error)
            raise
        finally:
            unit.exit()

    def finish(self, error: BaseException | None = None) -> None:
        """Close the application's iterable, once, and let go of the session.

        Before the end of the response it rolls back, because of *error* or of a client
        that hung up.
        """
        if self.finished:
            return
        self.finished = True
        try:
            with self.unit:
                try:
                    close = getattr(self.iterable, "close", None)
                    if close is not None:
                        close()
                except BaseException as raised:
                    error = error or raised
                    raise
                finally:
                    if self.settled:
                        self.unit.drop_late_work()
                    self.roll_back(error)
        finally:
            self.unit.close()
            self.report()

    def start_response(
        self, status: str, headers: Headers, exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Keep the head (PEP 3333, "The start_response() Callable").

        One that replaces another also replaces what was kept of that one's body.
        """
        if exc_info is not None:
            if self.head_sent:
                raise exc_info[1].with_traceback(exc_info[2])
            self.written.clear()
        elif self.head is not None:
            raise AssertionError("start_response was called again without exc_info (PEP 3333)")
        self.head = _Head(self.method, status, headers, exc_info)
        return self.write

    def write(self, data: bytes) -> None:
        """Keep what the legacy ``write()`` is given, to go in front of the body."""
        if not isinstance(data, bytes):
            raise TypeError(f"write() takes bytes, not {data!r} (PEP 3333)")
        self.written.append(data)

    def take_written(self) -> bytes:
        data = b"".join(self.written)
        self.written.clear()
        return data

    def send_head(self) -> None:
        """Give the head to the server, which may refuse it by raising."""
        head = self.head
        if head is None:
            return  # the server says itself what it thinks of a body without a head
        self.head_sent = True
        head.send(self.server_start_response)
        if head.fault and commit_on_success(self.environ, head.status, head.headers):
            # The work was rolled back because no server should send this head.
            # One that would all the same must not answer success.
            raise ValueError(f"the response was refused: {head.fault}")

    def settle(self, whole: bool) -> None:
        """End the transaction as the response wants it: COMMIT or ROLLBACK.

        :param whole: that no code of the application runs any more.
        """
        try:
            wanted = self.wants_commit()
        except BaseException as error:
            self.roll_back(error)
            raise
        if not wanted:
            self.roll_back(None, whole)
            return
        self.settled = True
        if self.unit.lost:
            self.excuse_reads()
        try:
            self.unit.commit()
        except BaseException as error:
            self.error = error
            self.unit.rollback(error)
            log.exception("%s: the commit failed", self)
            raise

    def roll_back(self, error: BaseException | None, removing: bool = False) -> None:
        """End the transaction because of *error*, of the status, or of a client that left."""
        if not self.settled:
            self.settled = True
            self.error = error
            self.unit.rollback(error, removing)

    def wants_commit(self) -> bool:
        head = self.head
        if head is None or head.fault:
            return False
        return bool(self.middleware.commit_when(self.environ, head.status, list(head.headers)))

    def excuse_reads(self) -> None:
        """Only warn of a session that a safe method threw away when it had but read."""
        unit = self.unit
        if self.method in SAFE_METHODS and not unit.wrote:
            self.middleware._warn_once(unit.loss())
            unit.lost.clear()

    def report(self) -> None:
        """Tell the log and the observer, once, what became of the request."""
        observer = self.middleware.observer
        if observer is None and not log.isEnabledFor(logging.DEBUG):
            return
        if self.reported or not self.settled:
            return
        self.reported = True
        outcome = Outcome(
            method=self.method,
            path=self.path(),
            status=None if self.head is None else self.head.status,
            action=self.unit.fate if self.unit.begun else "none",
            attempts=self.number,
            seconds=monotonic() - self.began,
            error=self.error,
        )
        told = outcome.status if self.error is None else repr(self.error)
        log.debug("%s %s %s %s", outcome.action, outcome.method, outcome.path, told)
        if observer is not None:
            with _vacated(self.middleware.registry):
                try:
                    observer(outcome)
                except Exception:
                    log.exception("the observer failed on %r", outcome)


class _Head:
    """Status and headers as the application gave them, and what they mean to us."""

    def __init__(self, method: str, status: str, headers: Headers, exc_info: Any) -> None:
        self.method = method
        self.status = status
        # The application may change its list afterwards, and the server the one that it
        # gets, so each has its own and we read a third.
        self.headers: Any = headers if isinstance(headers, (tuple, dict)) else list(headers)
        self.exc_info = exc_info
        self.fault = _fault(status, self.headers)

    @cached_property
    def length(self) -> int | None:
        """After how many bytes the response is complete; None where only its end tells."""
        return None if self.fault else _body_length(self.method, self.status, self.headers)

    def send(self, start_response: StartResponse) -> None:
        headers = self.headers.copy() if type(self.headers) is list else self.headers
        if self.exc_info is None:
            start_response(self.status, headers)
        else:
            exc_info, self.exc_info = self.exc_info, None  # PEP 3333: no cycle of frames
            start_response(self.status, headers, exc_info)


class _Body:
    """A response that is made while it is sent, and what is promised to the server.

    An iterator with ``close()`` rather than a generator: a generator that is closed
    before its first ``next()`` never runs its ``finally``.
    """

    def __init__(self, attempt: _Attempt, iterator: Iterator[bytes]) -> None:
        self.attempt = attempt
        self.iterator = iterator
        self.ready: list[Any] = []
        self.pushed_back: list[Any] = []
        self.received = 0
        self.exhausted = False
        self.warned = False

    def prime(self) -> None:
        """Get the first chunk that has bytes.

        Inside the call, because some servers take the head between the call and the
        first ``next()``.
        """
        self.ready.append(self.advance())

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        chunk = self.ready.pop() if self.ready else self.advance()
        if chunk is _END:
            raise StopIteration
        return chunk  # type: ignore[no-any-return]

    def advance(self) -> Any:
        """Return the next chunk that may leave; _END after the last.

        The chunk that completes the Content-Length may leave only when the
        application has no more to say and its work is durable.
        """
        held = _END
        head = self.attempt.head
        while (chunk := self.take()) is not _END:
            if self.attempt.head is not head:
                head, held, self.received = self.attempt.head, _END, 0
            length = None if head is None else head.length
            size = _size(chunk)
            if size == 0:
                if self.attempt.head_sent and held is _END:
                    return chunk
            elif length is not None and self.received >= length:
                self.note_excess(size)
            else:
                self.received += size
                held = chunk
                if length is None or self.received < length:
                    return held
        return held

    def take(self) -> Any:
        """Take a chunk from the application; _END when it has ended and is settled."""
        if self.pushed_back:
            return self.pushed_back.pop()
        if self.exhausted:
            return _END
        attempt = self.attempt
        with attempt.unit:
            try:
                chunk = next(self.iterator, _END)
            except BaseException as error:
                self.exhausted = True
                self.warn_if_long()
                attempt.roll_back(error)
                raise
            self.warn_if_long()
            if chunk is _END:
                self.exhausted = True
                attempt.settle(False)
        if attempt.head_sent:
            attempt.report()
        if attempt.written:
            if chunk is not _END:
                self.pushed_back.append(chunk)
            return attempt.take_written()
        return chunk

    def warn_if_long(self) -> None:
        if not self.warned and self.attempt.unit.seconds_open() > LONG_TRANSACTION:
            self.warned = True
            log.warning(
                "%s: a stream has kept its transaction open for more than %g s; a handler with "
                "a long stream should commit before its first yield",
                self.attempt,
                LONG_TRANSACTION,
            )

    def note_excess(self, size: int) -> None:
        # A server must not send what a HEAD response has in its body (RFC 9110,
        # 9.3.2), and many applications leave dropping it to the server.
        if self.attempt.method != "HEAD":
            log.warning("%s: %d bytes beyond the Content-Length were dropped", self.attempt, size)

    def close(self) -> None:
        """End the request: PEP 3333 has the server call this, whatever happened."""
        self.ready.clear()
        self.pushed_back.clear()
        self.exhausted = True
        self.warn_if_long()
        self.attempt.finish()


_END: Any = object()


class _Place:
    """A session's place in its registry.

    ``with place:`` shows the session there, and afterwards puts back what was there.
    What the code within leaves there, a session_scope that is still open for instance,
    is what it finds again the next time.
    """

    registry: Registry
    session: Session
    shown: Session
    joinable: bool
    displaced: Session | None
    outer: _Place | None
    inner: Sequence[_Place]

    def enter(self) -> None:
        sessions, scope = _slot(self.registry)
        if scope in sessions:
            self.displaced = sessions[scope]
            self.outer = _unit_of(self.displaced)
        sessions[scope] = self.shown
        places = _running.places
        places.append(self)
        if self.inner:
            places.extend(self.inner)
            self.inner = ()

    def exit(self) -> None:
        places = _running.places
        # Joinable ones are entered and left by our own code, in one call.
        here = self.joinable or self.is_here(places)
        if places and places[-1] is self:
            places.pop()
        elif self in places:
            # A scope that is still open inside is suspended, and resumed, with us.
            at = places.index(self)
            self.inner = places[at + 1 :]
            del places[at:]
        sessions, scope = _slot(self.registry)
        found = sessions.get(scope)
        if here or found is self.session:
            self.shown = self.session if found is None else found
            if here and self.displaced is not None:
                sessions[scope] = self.displaced
            else:
                sessions.pop(scope, None)
        self.displaced = self.outer = None

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *exc_info: object) -> None:
        self.exit()

    def is_here(self, places: Sequence[_Place]) -> bool:
        """False when the garbage collector closes a scope where others are at work."""
        return self in places and (self.outer is None or self.outer in places)

    def serves_this_thread(self) -> bool:
        return self.joinable and self in _running.places

    def leave(self) -> None:
        """Give the place up, and close a session that has taken it."""
        taken_by, session = self.shown, self.session
        if taken_by is not session:
            self.shown = session
            if _unit_of(taken_by) is None:
                _close_quietly(taken_by)
        setattr(session, _MARK, None)


class _Callbacks:
    """What waits for the COMMIT of one session, each with the savepoint it was added in."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.waiting: list[tuple[Callback, SessionTransaction | None]] = []

    def add(self, callback: Callback, savepoint: SessionTransaction | None) -> None:
        self.waiting.append((callback, savepoint))

    def release(self, savepoint: SessionTransaction) -> None:
        """Those of a savepoint become those of what it was taken in."""
        self.waiting = [
            (callback, savepoint.parent if added_in is savepoint else added_in)
            for callback, added_in in self.waiting
        ]

    def drop(self, savepoint: SessionTransaction) -> None:
        """Those added since a savepoint that was not released are gone with it."""
        self.waiting = [entry for entry in self.waiting if not _within(entry[1], savepoint)]

    def clear(self) -> None:
        self.waiting.clear()

    def run(self) -> None:
        while self.waiting:
            callbacks, self.waiting = self.waiting, []
            with _vacated(self.registry):
                for callback, _ in callbacks:
                    try:
                        callback()
                    except Exception:
                        log.exception("on_commit callback %r failed", callback)


class _UnitOfWork(_Place):
    """One session from its making to its removal, and the truth about its transactions.

    `commit`, `rollback` and `close` are the only ends it has.  The other methods are
    for the listeners further down, through which SQLAlchemy tells what happens.
    """

    def __init__(
        self,
        registry: Registry,
        reader: Engine | None = None,
        confirm: bool = False,
        joinable: bool = True,
    ) -> None:
        self.registry = registry
        self.session = self.shown = session = _new_session(registry)
        if reader is not None and not isinstance(session.bind, Connection):
            session.bind = reader
        setattr(session, _MARK, self)
        self.joinable = joinable
        self.confirm = confirm
        self.displaced = self.outer = None
        self.inner = ()
        # All are made here, though few requests need them: where attributes come later,
        # CPython gives an instance a dict of its own.
        self.begun = self.wrote = self.ending = False
        self.fate: Literal["commit", "rollback", "unknown"] = "rollback"
        self.commit_is: Literal["not sent", "sent", "done"] = "not sent"
        self.durable: Literal["nothing", "perhaps", "something"] = "nothing"
        self.since = 0.0
        self.evidence: _Evidence | None = None
        self.callbacks: _Callbacks | None = None
        self.connections: dict[Connection, Transaction | None] = {}
        self.explicit: dict[Connection, Any] = {}
        self.errors: dict[Transaction | None, tuple[BaseException, bool]] = {}
        self.lost: dict[SessionTransaction | None, str] = {}

    def seconds_open(self) -> float:
        """How long the session has kept its transaction open."""
        return monotonic() - self.since if self.connections else 0.0

    def commit(self) -> None:
        """Make the work durable, or raise.

        :raises TransactionDoomed: where COMMIT would return for work that is lost.
        :raises CommitOutcomeUnknown: where the answer to COMMIT was lost.
        """
        if self.lost:
            raise TransactionDoomed(self.loss())
        if self.session.in_transaction():
            self.ending = True
            self.fate = "rollback"
            try:
                self.send_commit()
            except BaseException as error:
                if not self.took_effect(error):
                    raise
            self.fate = "commit"
        if self.callbacks is not None and self.callbacks.waiting:
            self.durable = "something"  # what they do is not done twice
            self.callbacks.run()

    def send_commit(self) -> None:
        session = self.session
        transaction = session.get_transaction()
        if transaction is None or not session.is_active:
            raise _doomed("a flush or a COMMIT failed") from self.first_error()
        if not _hears_commit(session):
            self.before_commit()
            sole = self.sole_transaction(transaction)
            if sole is not None:
                sole.commit()
                self.committed()
                transaction.close()
                return
        self.check_last()
        session.expire_on_commit = False  # it is closed next, and nothing read again
        session.commit()
        if self.commit_is != "done" and self.fate != "commit":
            raise TransactionDoomed("Session.commit() returned, but nothing was committed")

    def sole_transaction(self, transaction: SessionTransaction) -> Transaction | None:
        """The transaction to commit where ``Session.commit()`` would do that and no more.

        Then it is left out: most of its time is for what is not there.
        """
        session = self.session
        if len(self.connections) != 1 or session.in_nested_transaction() or session.twophase:
            return None
        if not session._is_clean():
            return None
        ((connection, own),) = self.connections.items()
        joined = not transaction._connections[connection][2]  # from outside, and left to it
        return None if joined or connection.in_nested_transaction() else own

    def committed(self) -> None:
        self.commit_is, self.durable, self.fate = "done", "something", "commit"
        for outer in _running.places:
            outer.durable = "something"

    def took_effect(self, error: BaseException) -> bool:
        """Tell whether a COMMIT that failed with *error* was done all the same.

        :raises CommitOutcomeUnknown: where nobody knows.
        """
        if not self.is_in_doubt(error):
            return False
        self.resolve(error)
        if self.fate == "unknown" and isinstance(error, Exception):
            raise _in_doubt() from (self.first_error() or error)
        return self.fate == "commit"

    def first_error(self) -> BaseException | None:
        """What failed first in the transaction that the session is in."""
        owned = (*self.connections.values(), None)
        causes = (self.errors.get(own, (None,))[0] for own in owned)
        return next(filter(None, causes), None)

    def resolve(self, error: BaseException | None) -> None:
        """Find out what became of a COMMIT that is in doubt, and end its transaction."""
        self.fate, evidence = "unknown", self.evidence
        if evidence is not None and (error is None or isinstance(error, Exception)):
            for connection in self.connections:
                connection.invalidate()  # which leaves room in the pool for one to ask on
            with _vacated(self.registry):
                self.fate = evidence.verdict()
            log.warning("the answer to COMMIT was lost; asked, the database says: %s", self.fate)
        if self.fate == "commit":
            self.commit_is, self.durable = "done", "something"
        elif self.fate == "rollback" and self.durable == "perhaps":
            self.durable = "nothing"
        self.session.invalidate()

    def check_last(self) -> None:
        """Have the check before COMMIT see what the user's own hooks before COMMIT do."""
        if len(self.session.dispatch.before_commit) > 1:
            hook = self.session, "before_commit", _before_commit
            if event.contains(*hook):
                event.remove(*hook)
            event.listen(*hook)

    def is_in_doubt(self, error: BaseException | None) -> bool:
        """Tell whether a COMMIT has failed in a way that leaves its outcome unknown.

        SQLAlchemy takes a transaction from its connection when COMMIT returned, or when
        it rolled back by itself, and leaves it there, inactive, when COMMIT raised.
        """
        if self.commit_is == "done" or self.fate == "unknown":
            return self.fate == "unknown"  # a hook after COMMIT raised; or it is known already
        if error is None and not self.errors and self.commit_is == "not sent":
            return False
        left = [
            own
            for connection, own in self.connections.items()
            if own in (connection.get_nested_transaction(), connection.get_transaction())
        ]
        refused = next((own for own in left if own is not None and not own.is_active), None)
        if refused is None:
            return False  # no COMMIT was sent
        error = self.errors.get(refused, (error,))[0]
        return len(left) < len(self.connections) or _leaves_commit_unknown(error)

    def check(self) -> None:
        """Refuse to commit a transaction that the database has already given up."""
        for connection, own in self.connections.items():
            error, undone = self.errors.get(connection.get_transaction(), _NO_ERROR)
            if undone or connection.invalidated or self.has_ended(connection, error):
                raise _doomed("an error of the database was swallowed") from (
                    error or self.errors.get(own, _NO_ERROR)[0]
                )

    def has_ended(self, connection: Connection, error: BaseException | None) -> bool:
        """Tell whether the driver, or the database, knows of no transaction to commit."""
        driver = self.explicit.get(connection)
        return _is_aborted(connection, error) if driver is None else not driver.in_transaction

    def before_commit(self) -> None:
        """Flush and check, so that what fails afterwards is COMMIT itself."""
        if not self.session._is_clean():
            self.check()
            self.session.flush()
        self.check()
        if self.confirm:
            self.evidence = _evidence(self.connections)
        self.commit_is = "sent"

    def loss(self) -> str:
        return next(iter(self.lost.values()))

    def rollback(self, error: BaseException | None = None, removing: bool = False) -> None:
        """Undo the work because of *error*.

        A failure to do so is logged, and the connections are discarded.

        :param removing: that nothing can look at the session before it is removed.
        """
        session = self.session
        transaction = session.get_transaction()
        if transaction is None:
            return
        self.ending = True
        try:
            if self.commit_is == "done":  # COMMIT returned, and a hook after it raised
                session.close()
                return
            if self.fate == "commit":  # of an earlier transaction
                self.fate = "rollback"
            if self.is_in_doubt(error):
                self.resolve(error)
            elif removing and self.rollback_is_plain():
                transaction.close()  # rolls back too
            else:
                session.rollback()
        except Exception:
            log.exception("ROLLBACK failed")
            self.discard_connections()

    def rollback_is_plain(self) -> bool:
        """Tell whether ``Session.rollback()`` would send ROLLBACK, and have nothing to reset."""
        session = self.session
        return not (
            self.wrote
            or session.identity_map
            or session.in_nested_transaction()
            or _hears_rollback(session)
        )

    def transient_reason(self, error: BaseException | None) -> BaseException | None:
        """The error that the database calls transient, where there is one behind *error*.

        :param error: what the attempt raised; None where it made a response.
        """
        if isinstance(error, TransactionDoomed):
            error = error.__cause__
        elif error is None or isinstance(error, PendingRollbackError) or _code(error) == "25P02":
            # What it says is that an earlier error was swallowed: that one counts.
            return next((e for e, _ in self.errors.values() if _is_transient(e)), None)
        return error if _is_transient(error) else None

    def drop_late_work(self) -> None:
        if self.session.in_transaction():
            log.warning("work done in close(), after the end of the response, is rolled back")
            fate = self.fate
            self.rollback()
            self.fate = fate

    def close(self) -> None:
        """Let go of the session, whatever became of its work."""
        session = self.session
        try:
            used = self.begun or self.ending
            if session.in_transaction() or (used and not _is_spent(session)):
                self.ending = True
                if not _close_quietly(session):
                    self.discard_connections()
        finally:
            self.errors.clear()
            self.leave()

    def discard_connections(self) -> None:
        """Close what SQLAlchemy failed to close, before another request gets it."""
        for connection in self.connections:
            try:
                if not connection.closed and connection is not self.session.bind:
                    connection.invalidate()
                    connection.close()
            except Exception:
                log.exception("a connection could not be discarded")
        self.connections.clear()

    def joined(self, connection: Connection) -> None:
        if not self.connections:
            self.begun = True
            self.since = monotonic()
            self.check_last()
        self.connections[connection] = (
            connection.get_nested_transaction() or connection.get_transaction()
        )
        driver = _driver(connection)
        if getattr(driver, "in_transaction", False):
            self.explicit[connection] = driver  # SQLite, and BEGIN was sent already
        units = getattr(connection, _MARK, None)
        if units is None:
            setattr(connection, _MARK, [self])
            _watch_errors(connection)
        else:
            units.append(self)

    def failed(self, context: ExceptionContext, connection: Connection) -> None:
        error = context.sqlalchemy_exception or context.original_exception
        transaction = connection.get_transaction() if connection in self.connections else None
        _, known = self.errors.get(transaction, _NO_ERROR)
        # 25P02 only repeats that an earlier error aborted the transaction.
        if not known and _code(error) != "25P02":
            undone = transaction is not None and _undoes_transaction(connection, error)
            self.errors[transaction] = (error, undone)
            if undone:
                _begin_again(connection)
        if self.commit_is == "sent" and context.statement is None:
            self.commit_failed(context, connection, error)

    def commit_failed(
        self, context: ExceptionContext, connection: Connection, error: BaseException
    ) -> None:
        if _leaves_commit_unknown(error):
            # Whatever the application makes of it, the request is not made again.
            self.durable = "perhaps" if self.durable == "nothing" else self.durable
            for outer in _running.places:
                if outer is not self:
                    outer.durable = "something"
        if not context.is_disconnect:
            # Session.close() would now send no ROLLBACK, and the connection's next user
            # would commit this work.
            with suppress(context.dialect.loaded_dbapi.Error):
                context.dialect.do_rollback(connection.connection)

    def ended(self, transaction: SessionTransaction) -> None:
        """A transaction of the session is over: committed, rolled back or closed."""
        for connection in self.connections:
            getattr(connection, _MARK).remove(self)
        self.connections.clear()
        self.explicit.clear()
        self.evidence = None
        done, self.commit_is = self.commit_is == "done", "not sent"
        callbacks = self.callbacks
        if done:
            self.wrote = self.wrote and bool(self.lost)
            if callbacks is not None:
                callbacks.run()
        else:
            if callbacks is not None:
                callbacks.clear()
            if not self.ending:
                self.lost[transaction] = _removed(_caller())


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What PostgreSQL is asked with when the answer to a COMMIT was lost.

    https://www.postgresql.org/docs/current/functions-info.html, "Transaction ID and
    Snapshot Information Functions".
    """

    engine: Engine
    transaction: str | None
    """The transaction's id; None where it wrote nothing."""
    checkpoint: str
    timeline: str | None

    def verdict(self) -> Literal["commit", "rollback", "unknown"]:
        """Ask on a fresh connection until the answer is final, for CONFIRM_PATIENCE at most."""
        if self.transaction is None:
            return "commit"
        deadline = monotonic() + CONFIRM_PATIENCE
        while True:
            status, checkpoint, timeline = self.ask()
            if timeline is not None:  # a standby cannot know what its primary has done
                if status == "aborted":
                    return "rollback"
                if status == "committed":
                    # A server that crashed gives the id of a transaction whose log was not
                    # yet on disk to another one.  It makes a checkpoint first; a standby
                    # that is promoted begins a timeline.
                    same = (checkpoint, timeline) == (self.checkpoint, self.timeline)
                    return "commit" if same else "unknown"
            if monotonic() > deadline:
                return "unknown"
            sleep(0.05)

    def ask(self) -> Any:
        with suppress(SQLAlchemyError), self.engine.connect() as connection:
            return connection.execute(_STATUS, {"id": self.transaction}).one()
        return None, None, None


# The timeline of pg_control_checkpoint() is that of the last checkpoint, and so not yet the
# current one for a while after a promotion.
_HISTORY = """
    CAST((pg_control_checkpoint()).checkpoint_lsn AS text),
    CASE WHEN NOT pg_is_in_recovery()
         THEN left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END"""
# Columns that are named need not be looked up in each answer.
_EVIDENCE = text(f"SELECT CAST(pg_current_xact_id_if_assigned() AS text), {_HISTORY}").columns(
    column("xact_id", String), column("checkpoint", String), column("timeline", String)
)
_STATUS = text(f"SELECT pg_xact_status(CAST(:id AS xid8)), {_HISTORY}")


def _evidence(connections: Collection[Connection]) -> _Evidence | None:
    """Take what will be needed; None where COMMIT is several, or none that can be asked for."""
    connection = next(iter(connections), None)
    if (
        connection is None
        or connection.dialect.name != "postgresql"
        or len(connections) > 1
        or connection.in_nested_transaction()
        or connection._is_autocommit_isolation()
    ):
        return None
    return _Evidence(connection.engine, *connection.execute(_EVIDENCE).one())


# Sessions and registries.

_NO_ERROR: tuple[None, bool] = (None, False)

_MARK = "_sessionscope"
"""The attribute of a session that names its unit, of a connection its units, and of a
dialect that its errors are watched."""

_REPLACED = (
    "the registry no longer holds this request's session, so work would be lost: the "
    "application removed it and went on, or the registry's scope changed in the meantime"
)


def _new_session(registry: Registry) -> Session:
    factory: Any = registry.session_factory
    # A call of the sessionmaker would copy its settings first.
    made = factory.class_(**factory.kw) if type(factory) is sessionmaker else factory()
    return made  # type: ignore[no-any-return]


def _unit_of(session: Session | None) -> _UnitOfWork | None:
    unit = getattr(session, _MARK, None)
    # Another copy of this module, imported by another name, answers for its own.
    return unit if type(unit) is _UnitOfWork and unit.session is session else None


def _slot(registry: Registry) -> tuple[dict[Any, Any], Any]:
    """Where the registry keeps the session of the present scope: a dict, and the key in it."""
    scope: Any = registry.registry
    if isinstance(scope, ThreadLocalRegistry):
        return scope.registry.__dict__, "value"
    return scope.registry, scope.scopefunc()


def _peek(registry: Registry) -> Session | None:
    """The session in the registry; unlike ``registry()`` it makes none."""
    sessions, scope = _slot(registry)
    return sessions.get(scope)


def _put(registry: Registry, session: Session | None) -> None:
    sessions, scope = _slot(registry)
    if session is None:
        sessions.pop(scope, None)
    else:
        sessions[scope] = session


@contextmanager
def _vacated(registry: Registry) -> Iterator[None]:
    """Empty the registry for code that is not the request's, and clean up after it."""
    inside, places = _peek(registry), _running.places
    _put(registry, None)
    _running.places = []
    try:
        yield
    finally:
        opened = _peek(registry)
        _put(registry, inside)
        _running.places = places
        if opened is not None:
            _close_quietly(opened)


def _close_quietly(session: Session) -> bool:
    try:
        session.close()
    except Exception:
        log.exception("a session could not be closed")
        return False
    return True


_RESETS = Session()._close_state
"""That a session can be used again after ``close()``, as it can by default."""


def _is_spent(session: Session) -> bool:
    """Tell whether ``close()`` would do nothing after a transaction, which takes it long."""
    return (
        not session.identity_map
        and type(session).close is Session.close
        and session._close_state is _RESETS
    )


def _hears_commit(session: Session) -> bool:
    """Tell whether ``commit()`` is more to somebody than COMMIT; one listener is ours."""
    dispatch = session.dispatch
    return (
        type(session).commit is not Session.commit
        or len(dispatch.before_commit) > 1
        or len(dispatch.after_commit) > 1
    )


def _hears_rollback(session: Session) -> bool:
    """Tell whether ``rollback()`` is more to somebody than ROLLBACK; one listener is ours."""
    dispatch = session.dispatch
    return (
        type(session).rollback is not Session.rollback
        or len(dispatch.after_rollback) > 0
        or len(dispatch.after_soft_rollback) > 1
    )


def _within(savepoint: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while savepoint is not None and savepoint is not outer:
        savepoint = savepoint.parent
    return savepoint is not None


def _doomed(reason: str) -> TransactionDoomed:
    return TransactionDoomed(
        f"{reason}, and the application went on as if its transaction were whole; it was "
        "rolled back. Roll back yourself, or to a savepoint, where you handle such an error"
    )


def _in_doubt() -> CommitOutcomeUnknown:
    return CommitOutcomeUnknown("COMMIT was sent, but whether it took effect is not known")


def _removed(place: str) -> str:
    return (
        f"{place} closed or removed the session while it held a transaction, which threw its "
        "work away; delete that line: the session is removed when the response is complete"
    )


# Listeners.  Those of sessions are registered once, for every Session of the process: they
# keep nothing alive, and cost a session that is none of ours a look at an attribute per
# transaction.  Registered per class they would run twice where one class inherits from
# another.  handle_error is registered on the dialects that our sessions used; it costs
# nothing until there is an error, where connection events would slow every statement.


class _Running(local):
    """The units of work whose code runs in this thread."""

    def __init__(self) -> None:
        self.places: list[Any] = []


_running = _Running()
_watching = Lock()


def _watch_errors(bind: Engine | Connection) -> None:
    if not hasattr(bind.dialect, _MARK):
        with _watching:
            event.listen(bind.engine, "handle_error", _handle_error)
            setattr(bind.dialect, _MARK, True)


def _handle_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    if _code(context.original_exception) in _NODE_LOST:
        context.is_disconnect = True  # SQLAlchemy does not count it as one (Galera)
        context.invalidate_pool_on_disconnect = False
    marked = getattr(connection, _MARK, ())
    owners = [unit for unit in marked if connection in unit.connections]
    # A connection whose BEGIN fails belongs to no unit yet, so those that run are told.
    for unit in owners or _running.places:
        unit.failed(context, connection)


def _answerable(session: Session) -> _UnitOfWork | None:
    """The unit that answers for a session: its own, or the one whose place it has taken."""
    own = _unit_of(session)
    if own is not None or not _running.places:
        return own
    taken = (unit for unit in reversed(_running.places) if _peek(unit.registry) is session)
    return next(taken, None)


@event.listens_for(Session, "after_transaction_create", insert=True)
def _after_transaction_create(session: Session, transaction: SessionTransaction) -> None:
    if _unit_of(session) is None and transaction.parent is None:
        unit = _answerable(session)
        if unit is not None:
            unit.lost[transaction] = _REPLACED


@event.listens_for(Session, "after_begin", insert=True)
def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    unit = _unit_of(session)
    if unit is not None and not transaction.nested:
        unit.joined(connection)


@event.listens_for(Session, "before_commit", insert=True)
def _before_commit(session: Session) -> None:
    unit = _unit_of(session)
    if unit is not None and not session.in_nested_transaction():
        unit.before_commit()


@event.listens_for(Session, "after_commit", insert=True)
def _after_commit(session: Session) -> None:
    unit = _unit_of(session)
    savepoint = session.get_nested_transaction()
    if savepoint is not None:
        if unit is not None and unit.callbacks is not None:
            unit.callbacks.release(savepoint)
        return
    if unit is None:
        _forgive(session, session.get_transaction())
        for outer in _running.places:
            outer.durable = "something"
    else:
        unit.committed()


@event.listens_for(Session, "after_transaction_end", insert=True)
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    unit = _unit_of(session)
    if unit is not None:
        if transaction.parent is None:
            unit.ended(transaction)
        elif transaction.nested and unit.callbacks is not None:
            unit.callbacks.drop(transaction)


@event.listens_for(Session, "after_soft_rollback", insert=True)
def _after_soft_rollback(session: Session, previous_transaction: SessionTransaction) -> None:
    # Comes after the end of the transaction; a close() has no such event.
    _forgive(session, previous_transaction)
    unit, error = _unit_of(session), sys.exc_info()[1]
    if unit is not None and isinstance(error, StaleDataError):
        unit.errors[None] = (error, False)  # the ORM's own: no driver has raised it


@event.listens_for(Session, "after_flush", insert=True)
def _after_flush(session: Session, flush_context: object) -> None:
    _note_write(session)


@event.listens_for(Session, "transient_to_pending", insert=True)
def _transient_to_pending(session: Session, instance: object) -> None:
    _note_write(session)  # close() drops pending objects before it says that it closes


def _forgive(session: Session, transaction: SessionTransaction | None) -> None:
    """Take back that a transaction's work is lost: it was committed, or rolled back."""
    own = _unit_of(session)
    for unit in _running.places if own is None else [own]:
        unit.lost.pop(transaction, None)


def _note_write(session: Session) -> None:
    unit = _answerable(session)
    if unit is not None:
        unit.wrote = True


def _caller() -> str:
    """File and line of the code that called into SQLAlchemy."""
    frame = sys._getframe(1)
    passed = (__name__.partition(".")[0], "sqlalchemy", "contextlib")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in passed:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# Responses.

_LENGTH = re.compile(r"[ \t]*0*([0-9]{1,19})[ \t]*")  # RFC 9110, 5.5: space around is no part
_CONTROL = bytes(byte == 127 or (byte < 32 and byte != 9) for byte in range(256))


def _fault(status: str, headers: Headers) -> str | None:
    """Say what a server would refuse in a head only when it gets it (PEP 3333, "Unicode
    Issues"; RFC 9110, 5.5), or None."""
    head = ""
    try:
        head += status
        for name, value in headers:
            head += name + value
    except (TypeError, ValueError):
        return "status must be a native string, and headers pairs of them"
    try:
        if 1 in head.encode("latin-1").translate(_CONTROL):
            return "its status or headers have a control character"
    except UnicodeEncodeError:
        return "its status or headers are not Latin-1"
    return None


def _body_length(method: str, status: str, headers: Headers) -> int | None:
    """After how many bytes the response is complete; None where only its end tells."""
    if method == "HEAD" or (isinstance(status, str) and status[:3] in ("204", "304")):
        return 0
    lengths = []
    for header in headers:
        if header[0].lower() == "content-length":
            found = _LENGTH.fullmatch(header[-1])
            if found is not None:
                lengths.append(int(found[1]))
    return min(lengths, default=None)


def _is_whole(body: object, environ: WSGIEnvironment) -> bool:
    """Tell whether iterating *body* runs none of the application's code."""
    if isinstance(body, (list, tuple)):
        return type(body).__iter__ in (list.__iter__, tuple.__iter__)
    if not hasattr(body, "__iter__") and not hasattr(body, "__getitem__"):
        return True  # no body at all: the server shall say so
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, type):
        return isinstance(body, wrapper)
    # uWSGI's wrapper is a function that returns the file itself.
    return wrapper is not None and isinstance(body, io.IOBase)


def _size(chunk: Any) -> int:
    """Bytes in a chunk; what has no size is the server's to refuse, and so not empty."""
    if isinstance(chunk, memoryview):
        return chunk.nbytes
    return len(chunk) if hasattr(chunk, "__len__") else 1


def _recorded(environ: WSGIEnvironment) -> int:
    """Have the body recorded for another attempt; its position, which is kept as well.

    It is recorded as the application reads it, in memory and then on disk, unless the
    server's input can be rewound.
    """
    stream: Any = environ.get("wsgi.input")
    try:
        if stream.seekable():
            return stream.tell()  # type: ignore[no-any-return]
    except (AttributeError, OSError):
        pass
    if stream is not None:
        environ["wsgi.input"] = _Recorder(stream)
    return 0


def _rewind(environ: WSGIEnvironment, at_entry: WSGIEnvironment, position: int) -> None:
    environ.clear()
    environ.update(at_entry)
    stream: Any = environ.get("wsgi.input")
    if stream is not None:
        stream.seek(position)


class _Recorder:
    """The methods of ``wsgi.input`` (PEP 3333, "Input and Error Streams") over a recording."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.record = SpooledTemporaryFile(max_size=RECORD_IN_MEMORY)  # noqa: SIM115
        self.finalizer = weakref.finalize(self, self.record.close)

    def seek(self, position: int) -> None:
        self.record.seek(position)

    def read(self, *size: int) -> bytes:
        return self.more(self.record.read, self.source.read, *size)

    def readline(self, *size: int) -> bytes:
        known = self.record.readline(*size)
        if known.endswith(b"\n"):
            return known
        self.record.seek(-len(known), io.SEEK_CUR)
        return self.more(self.record.readline, self.source.readline, *size)

    def more(
        self, replay: Callable[..., bytes], receive: Callable[..., bytes], *size: int
    ) -> bytes:
        """What is recorded, and then what the server has not given yet."""
        known = replay(*size)
        if not size or size[0] < 0:
            return known + self.keep(receive(*size))
        left = size[0] - len(known)
        return known + self.keep(receive(left)) if left else known

    def readlines(self, *hint: int) -> list[bytes]:
        return list(self)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def keep(self, data: bytes) -> bytes:
        self.record.write(data)
        return data


# What drivers and databases tell of their errors: psycopg and psycopg2 a SQLSTATE,
# sqlite3 a name, PyMySQL and mysqlclient a number.

_TRANSIENT = frozenset({"40001", "40P01", 1205, 1213, 1020})
_SQLITE_TRANSIENT = re.compile(r"SQLITE_(BUSY|LOCKED)")
_UNKNOWN_AT_COMMIT = frozenset({"40003", "08007", 2013, 1180, 1047})
_NODE_LOST = frozenset({1047, 1180})  # Galera, outside the primary component
# Deadlock, changed since the snapshot, lock table full, too many transactions.
_MARIADB_UNDOES = frozenset({1213, 1020, 1206, 1637})
_SQLITE_UNDOES = re.compile(r"SQLITE_(FULL|IOERR|NOMEM|BUSY|INTERRUPT|CONSTRAINT)")


def _code(error: BaseException | None) -> str | int | None:
    """Error number, SQLSTATE or error name of a driver's error; None where it has none."""
    original = getattr(error, "orig", error)
    arguments = getattr(original, "args", ())
    if arguments and isinstance(arguments[0], int):
        return arguments[0]
    for name in ("sqlstate", "pgcode", "sqlite_errorname"):
        code = getattr(original, name, None)
        if isinstance(code, str):
            return code
    return None


def _is_transient(error: BaseException | None) -> bool:
    """Tell whether the same request may succeed when it is made again."""
    if isinstance(error, StaleDataError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code = _code(error)
    return (
        error.connection_invalidated
        or code in _TRANSIENT
        or (isinstance(code, str) and _SQLITE_TRANSIENT.match(code) is not None)
    )


def _undoes_transaction(connection: Connection, error: BaseException) -> bool:
    """Tell whether the engine answered *error* by undoing the whole transaction."""
    code = _code(error)
    if connection.dialect.name == "sqlite":
        # https://www.sqlite.org/lang_transaction.html, "Response To Errors Within A
        # Transaction": these errors may roll back, and the driver knows whether they did.
        return (
            isinstance(code, str)
            and _SQLITE_UNDOES.match(code) is not None
            and not _driver(connection).in_transaction
            # There is no public way to ask; without a transaction none can be undone.
            and not connection._is_autocommit_isolation()
        )
    if connection.dialect.name not in ("mysql", "mariadb"):
        return False
    return code in _MARIADB_UNDOES or (code == 1205 and _undoes_on_timeout(connection))


def _undoes_on_timeout(connection: Connection) -> bool:
    try:
        with _driver(connection).cursor() as cursor:
            cursor.execute("SELECT @@innodb_rollback_on_timeout")
            return bool(cursor.fetchone()[0])
    except connection.dialect.loaded_dbapi.Error:
        return True  # a node outside its cluster's majority, say, has no answer


def _begin_again(connection: Connection) -> None:
    """Keep SQLite from committing each later statement of a lost transaction by itself."""
    driver = _driver(connection)
    if connection.dialect.name == "sqlite" and driver.isolation_level is None:
        driver.execute("BEGIN")


def _is_aborted(connection: Connection, error: BaseException | None) -> bool:
    """Tell whether COMMIT would be answered with a silent ROLLBACK, as PostgreSQL does."""
    info = getattr(_driver(connection), "info", None)
    status = getattr(info, "transaction_status", None)
    if status is not None:
        return bool(status == 3)  # INERROR: libpq's PQTRANS_INERROR
    if error is None or connection.dialect.name in ("sqlite", "mysql", "mariadb"):
        return False
    try:
        connection.execute(select(1))  # a driver that does not know: ask the server
    except DBAPIError:
        return True
    return False


def _driver(connection: Connection) -> Any:
    return connection.connection.dbapi_connection


def _leaves_commit_unknown(error: BaseException | None) -> bool:
    """Tell whether COMMIT may have taken effect although it raised *error*."""
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return True
    code = _code(error)
    if code is None:
        return not isinstance(error, IntegrityError)
    return code in _UNKNOWN_AT_COMMIT or str(code).startswith("SQLITE_IOERR")
