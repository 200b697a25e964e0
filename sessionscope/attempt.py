"""One attempt at a request: one call of the application, with a session.

`Attempt.respond` calls the application and ends the transaction once, by `Attempt.settle` or
`Attempt.roll_back`.  If the response is streamed, that happens when the server requests the last
chunk, and `Attempt.finish` follows when the server closes the body.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any

from sessionscope.application import Call
from sessionscope.guests import run_aside
from sessionscope.outcome import Outcome, RequestName, tell
from sessionscope.response import END, SAFE_METHODS, Head, StreamedBody
from sessionscope.stage import AppContext, Position, log
from sessionscope.unit_of_work import UnitOfWork, failure_of

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from sessionscope.middleware import SessionMiddleware
    from sessionscope.replay import Replay

SESSION_KEY = "sessionscope.session"

LONG_TRANSACTION = 60.0
"""Seconds for which a stream may keep its transaction open without a warning."""

LONG_STREAM = (
    "%s: a stream has kept its transaction open for more than %g s; a handler with a long stream "
    "should commit before its first yield"
)

LATE_WORK = (
    "work done in close(), after the end of the response, is rolled back: do it before the body "
    "ends, or in an on_commit callback"
)


class Attempt:
    """One call of the application, its session, and the decision to commit or roll back.

    :param replay: rewinds the request for a retry; None if there are no retries.
    :param number: 1 for the first attempt, which *began* at that second of a monotonic clock.
    """

    error: BaseException | None = None
    """The exception to report to the log and the observer."""
    settled = False
    """The session's work has been committed or rolled back."""
    returned = False
    """The server has the response, or its body."""
    finished = reported = warned = False

    def __init__(
        self,
        middleware: SessionMiddleware,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        replay: Replay | None = None,
        number: int = 1,
        began: float | None = None,
    ) -> None:
        self.middleware, self.replay, self.number = middleware, replay, number
        self.began = monotonic() if began is None else began
        self.name, self.context = RequestName(environ), AppContext()
        on_start, safe = self.context.note_start_response, self.name.method in SAFE_METHODS
        self.call = Call(environ, self.name.method, start_response, on_start)
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

    @property
    def head(self) -> Head | None:
        return self.call.head

    def respond(self) -> Iterable[bytes] | None:
        """Call the application; return the body for the server, or None to retry."""
        try:
            body = self.call_app()
            if self.middleware.should_retry(self, None):
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
                retry = self.middleware.should_retry(self, error)
                self.call.replace_head()
                self.discard_response(error, quietly=retry)
            finally:
                self.release()  # also when an interrupt struck in the line above
            if retry:
                return None
            raise

    def call_app(self) -> Any:
        """Call the application; return its body, settled unless it is streamed."""
        with self.position:
            try:
                body = self.call.begin(self.middleware.app)
                if self.call.exhausted:
                    self.settle()
                    return body
            except BaseException as error:
                self.roll_back(error)
                raise
        stream = StreamedBody(self, self.name)
        stream.prefetch()
        return stream

    def pull(self) -> Any:
        """Return the next chunk; END when the body is exhausted and the transaction over."""
        call = self.call
        if call.ahead:
            return call.ahead.pop(0)
        if call.exhausted:
            return END
        try:
            with self.position:
                chunk = self.advance()
        finally:
            if self.settled:
                self.context.run(self.unit.detach_objects)
                if self.returned:
                    self.report()
        if self.returned:
            call.send_head()  # if start_response was called late
        return call.put_written_before(chunk) if call.written else chunk

    def advance(self) -> Any:
        """Run the application for its next chunk; settle when it has ended."""
        try:
            chunk = self.call.next()
            if monotonic() - self.began > LONG_TRANSACTION:
                self.warn_if_long()
            if chunk is END:
                self.settle()
        except BaseException as error:
            self.roll_back(error)
            raise
        return chunk

    def settle(self) -> None:
        """End the transaction as *commit_when* decides: by COMMIT or ROLLBACK."""
        head, given = self.head, self.call.status_and_headers()
        try:
            wanted = given is not None and self.middleware.commit_when(self.call.environ, *given)
            if wanted and head is not None and head.may_be_refused():
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
            log.exception("%s: %s", str(self.name), failure_of(self.unit))
            self.context.run(self.unit.rollback, error)
            raise

    def roll_back(self, error: BaseException | None) -> None:
        """Roll back because of *error*, of the status, or of a client that disconnected."""
        if not self.settled:
            self.warn_if_long()
            self.settled, self.error = True, error
            self.context.run(self.unit.rollback, error)

    def discard_response(self, error: BaseException | None, quietly: bool = True) -> None:
        """Finish a response that the server does not get; *quietly*, without an outcome."""
        self.reported = self.reported or quietly
        try:
            self.finish(error)
        except Exception:
            log.exception("close() of the response body failed")

    def finish(self, error: BaseException | None = None) -> None:
        """Close the application's iterable, once, and release the session.

        Unless the transaction is over, roll back because of *error* or of a client's disconnect.
        """
        if self.finished:
            return
        self.finished = True
        try:
            with self.position:
                try:
                    with self.unit.extra_work(LATE_WORK) if self.settled else nullcontext():
                        self.call.close()
                except BaseException as raised:
                    error = raised if error is None else error
                    raise
                finally:
                    self.roll_back(error)
                    del error  # whose traceback may lead back to here
        finally:
            self.release()
            self.report()
            self.error = None
            self.call.forget()

    def release(self) -> None:
        """Close the session, which deactivates it; may be called twice."""
        try:
            self.context.run(self.unit.close)
        finally:
            self.context.drop()

    def warn_if_long(self) -> None:
        seconds = self.unit.transaction.seconds_open() if self.returned else 0.0
        if seconds > LONG_TRANSACTION and not self.warned:
            self.warned = True
            log.warning(LONG_STREAM, str(self.name), LONG_TRANSACTION)

    def report(self) -> None:
        """Report the outcome of the request to the log and the observer, once."""
        if self.reported or not self.settled:
            return
        self.reported, observer = True, self.middleware.observer
        error, self.error = self.error, None  # whose traceback leads back to here
        if observer is not None or log.isEnabledFor(logging.DEBUG):
            factory = self.middleware.registry.session_factory
            run_aside(self.unit.stage, factory, tell, outcome_of(self, error), observer)


def outcome_of(attempt: Attempt, error: BaseException | None) -> Outcome:
    """Return the outcome of *attempt*, which is the request's last and raised *error*."""
    return Outcome(
        method=attempt.name.method,
        path=attempt.name.path(),
        status=None if attempt.head is None else attempt.head.status,
        action=attempt.unit.action(),
        attempts=attempt.number,
        seconds=monotonic() - attempt.began,
        error=error,
    )
