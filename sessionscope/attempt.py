"""One attempt at a request: what `SessionMiddleware` does with one call of the application.

`Attempt.respond` calls the application and ends the session's work once, by `Attempt.settle`
or by `Attempt.roll_back`.  If the response is streamed, that happens when the server asks for
the last chunk, and `Attempt.finish` follows when it closes the body.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sessionscope.application import Call
from sessionscope.guests import aside
from sessionscope.outcome import Outcome
from sessionscope.response import END, SAFE_METHODS, Head, StreamedBody
from sessionscope.stage import AppContext, Position, log
from sessionscope.unit_of_work import UnitOfWork, failure_of

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from sessionscope.replay import Replay

    from middleware import SessionMiddleware

SESSION_KEY = "sessionscope.session"

LONG_TRANSACTION = 60.0
"""Seconds that a stream may keep a transaction open before the log says so."""

LATE_WORK = "work done in close(), after the end of the response, is rolled back"


class Attempt:
    """One call of the application, the session for it, and the decision about both.

    :param number: how many attempts this makes.
    :param began: when the first of them began, in seconds of a monotonic clock.
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
        self.replay = replay
        self.number = number
        self.began = monotonic() if began is None else began
        # Read at entry: the environ is the application's to change.
        self.method: str = environ.get("REQUEST_METHOD", "")
        self.script_name, self.path_info = environ.get("SCRIPT_NAME"), environ.get("PATH_INFO")
        self.context = AppContext()
        on_start = self.context.note_start_response
        self.call = Call(environ, self.method, start_response, on_start)
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
        self.error: BaseException | None = None
        self.settled = self.returned = self.finished = self.reported = self.warned = False

    def __str__(self) -> str:
        return f"{self.method} {self.path()}"

    def path(self) -> str:
        path = f"{self.script_name or ''}{self.path_info or ''}"
        return quote(path, safe="/;=,", encoding="latin-1", errors="replace")

    @property
    def head(self) -> Head | None:
        return self.call.head

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
            self.call.send_head()
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
                body = self.call.begin(self.middleware.app)
                if self.call.exhausted:
                    self.settle()
                    return body
            except BaseException as error:
                self.roll_back(error)
                raise
        stream = StreamedBody(self, self.__str__)
        stream.prefetch()
        return stream

    def pull(self) -> Any:
        """Return the next chunk; END when the application has ended and is settled."""
        call = self.call
        if call.ahead:
            return call.ahead.pop(0)
        if call.exhausted:
            return END
        try:
            with self.position:
                try:
                    try:
                        chunk = call.next()
                    finally:
                        self.warn_if_long()
                    if call.exhausted:
                        self.settle()
                except BaseException as error:
                    self.roll_back(error)
                    raise
        finally:
            if self.returned and self.settled:
                self.report()
        if self.returned:
            call.send_head()  # if start_response was called late
        return call.put_written_before(chunk)

    def settle(self) -> None:
        """End the transaction as the response wants it: COMMIT or ROLLBACK."""
        head = self.head
        try:
            wanted = self.wants_commit()
            if wanted and head is not None and head.may_be_refused:
                self.call.send_head()
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
            log.exception("%s: %s", str(self), failure_of(self.unit))
            self.context.run(self.unit.rollback, error)
            if not self.returned:
                self.call.replace_head()
            raise

    def wants_commit(self) -> bool:
        given = self.call.status_and_headers()
        return given is not None and bool(self.middleware.commit_when(self.call.environ, *given))

    def roll_back(self, error: BaseException | None) -> None:
        """End the transaction because of *error*, of the status, or of a client that left."""
        if not self.settled:
            self.settled = True
            self.error = error
            self.context.run(self.unit.rollback, error)

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
            self.warn_if_long()
            with self.position:
                try:
                    with self.unit.extra_work(LATE_WORK) if self.settled else nullcontext():
                        self.call.close()
                except BaseException as raised:
                    error = raised if error is None else error
                    raise
                finally:
                    self.roll_back(error)
        finally:
            self.release()
            self.report()
            self.error = None
            self.call.forget()

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
