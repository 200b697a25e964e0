"""Process each request exactly once, by a key that the client chooses.

A client that got no response repeats the request with the same ``Idempotency-Key``.  The work is
done once, and each repeat gets the same response::

    keys = idempotency_table(Base.metadata)
    once = Idempotency(app, keys, scope=lambda environ: environ["REMOTE_USER"])
    application = SessionMiddleware(once, Session, attempts=3)

The row of a key is inserted before the application runs, and the response is stored in it
afterwards, so one COMMIT makes work, key and response durable.  A row exists only if the work
does: none says "in progress", none expires by itself, and a crash leaves none behind.

The header is that of draft-ietf-httpapi-idempotency-key-header
(https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/).  Unlike in the draft
(2.6), only 2xx and 3xx are kept: everything else was rolled back, so a repeat is processed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary, ref

from sessionscope.attempt import SESSION_KEY
from sessionscope.errors import require
from sessionscope.keyed import (
    MAX_RESPONSE,
    Problem,
    Recording,
    digest,
    in_progress,
    parse_key,
    read_body,
    replay,
    request_digest,
)
from sessionscope.keys import Claim, idempotency_table, purge
from sessionscope.trackers import tracker_of
from sessionscope.unit_of_work import UnitOfWork
from sqlalchemy import Table

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from sessionscope.keys import Context

__all__ = ["Idempotency", "idempotency_table", "purge"]

log = logging.getLogger("sessionscope")

CLAIM_KEY = "sessionscope.idempotency"
"""The key in the environ for a reference to the claim of the request."""


class Idempotency:
    """A WSGI application that processes each request with a key once.

    It belongs inside `SessionMiddleware`.  The first request with a key calls *app*; a repeat
    gets the stored response, with ``Idempotent-Replayed: true``.  Other requests with a key are
    rejected with problem details (RFC 9457), and *app* is not called:

    ===  =========================================================================
    400  the key is malformed, or required and missing; the body is incomplete
    409  a request with this key is running; or was processed, and its response not kept
    411  the body has no Content-Length, and the server does not say where it ends
    413  the body has more than *limit* bytes
    422  the key was used for another request
    ===  =========================================================================

    :param app: the WSGI application to wrap.
    :param table: the table that `idempotency_table` returned.
    :param scope: called with the environ; it returns a str that identifies the caller, so that
        nobody gets the response of another.  *app* is not called for a replay, so authenticate
        in an outer layer.
    :param methods: the methods whose keys are considered.
    :param required: reject requests with these methods if they have no key.
    :param limit: maximum size, in bytes, of a request body, which is read into memory, and of a
        response body that is stored.  A longer response is sent, but a repeat gets a 409.
    :param help: the URI of your documentation, used as ``type`` of the problem details.
    :param context: returns a context manager in which the session is used.  Flask-SQLAlchemy
        finds its engine in the application context: ``context=app.app_context``.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if *limit* is below 1, or more than a row can hold.
    """

    def __init__(
        self,
        app: WSGIApplication,
        table: Table,
        *,
        scope: Callable[[WSGIEnvironment], str],
        methods: Collection[str] = ("POST", "PATCH"),
        required: bool = False,
        limit: int = 1_048_576,
        help: str = "about:blank",
        context: Context = nullcontext,
    ) -> None:
        require(callable(app), "app", app, "a WSGI application")
        require(isinstance(table, Table), "table", table, "a Table")
        require(callable(scope), "scope", scope, "callable")
        require(_are_names(methods), "methods", methods, "a collection of str")
        require(isinstance(required, bool), "required", required, "a bool")
        require(type(limit) is int, "limit", limit, "an int")
        require(isinstance(help, str), "help", help, "a str")
        require(callable(context), "context", context, "callable")
        if not 1 <= limit <= MAX_RESPONSE:
            raise ValueError(f"limit must be between 1 and {MAX_RESPONSE}, not {limit}")
        self.app = app
        self.table = table
        self.scope = scope
        self.methods = frozenset(methods)
        self.required = required
        self.limit = limit
        self.help = help
        self.context = context
        self.running: WeakValueDictionary[str, Claim] = WeakValueDictionary()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        unit = tracker_of(environ.get(SESSION_KEY))
        if not isinstance(unit, UnitOfWork):
            raise RuntimeError(
                "Idempotency needs the session of a SessionMiddleware around it: "
                "SessionMiddleware(Idempotency(app, ...), registry)"
            )
        field = environ.get("HTTP_IDEMPOTENCY_KEY")
        is_keyed = environ["REQUEST_METHOD"] in self.methods and not _is_claimed(environ)
        if not is_keyed or (field is None and not self.required):
            return self.app(environ, start_response)
        try:
            claim = self.claim(environ, field, unit)
            stored = self.stored_response(claim)
        except Problem as problem:
            log.debug("%s %r: %s", environ["REQUEST_METHOD"], environ.get("PATH_INFO"), problem)
            return problem.respond(start_response, self.help)
        if stored is not None:
            log.debug("%s %r: replayed", environ["REQUEST_METHOD"], environ.get("PATH_INFO"))
            return replay(stored, start_response)
        environ[CLAIM_KEY] = ref(claim)  # weak, because some servers and frameworks keep environs
        return FirstResponse(self, claim, start_response).begin(environ)

    def claim(self, environ: WSGIEnvironment, field: str | None, unit: UnitOfWork) -> Claim:
        """Read the request, and reject it if another one in this process has the same key.

        It would wait in the database, and one slow request could use up all threads.

        :raises Problem: if the request is malformed, or its key is in use.
        """
        if field is None:
            raise Problem(400, "Idempotency-Key is missing")
        key, scope = parse_key(field), self.scope(environ)
        require(isinstance(scope, str), "the result of scope", scope, "a str")
        body = read_body(environ, self.limit)
        environ["wsgi.input"] = BytesIO(body)
        request = request_digest(environ, body)
        claim = Claim(unit, self.table, digest(scope, key), request, self.context)
        # No lock, which a fork could copy while it is held: if two pass here at once, the second
        # waits in the database.
        rival = self.running.get(claim.id)
        if rival is not None and rival.is_running and rival.process == claim.process:
            raise in_progress()
        self.running[claim.id] = claim
        return claim

    def stored_response(self, claim: Claim) -> bytes | None:
        """Insert the row of *claim*, or return the response stored by an earlier request.

        :returns: None if the row was inserted.
        :raises Problem: if no response is stored, or the earlier request was a different one.
        """
        first = False
        try:
            first = claim.insert()
            found = None if first else claim.find()
        finally:
            claim.is_running = first
        if first:
            return None
        if found is None:
            raise in_progress()
        if found.request != claim.request:
            raise Problem(422, "Idempotency-Key was used for another request")
        if found.response is None:
            raise Problem(409, "The request was carried out, but its response was not kept")
        return bytes(found.response)


class FirstResponse:
    """The response to the first request with a key, which is recorded and stored."""

    def __init__(self, layer: Idempotency, claim: Claim, start_response: StartResponse) -> None:
        self.layer = layer
        self.claim = claim
        self.recording = Recording(start_response, layer.limit)

    def begin(self, environ: WSGIEnvironment) -> Iterable[bytes]:
        """Call the application."""
        try:
            body = self.layer.app(environ, self.recording.start_response)
            if type(body) not in (list, tuple):
                return RecordedBody(self, body)
            for chunk in body:
                self.recording.add(chunk)
        except BaseException:
            self.claim.is_running = False
            raise
        return self.end() or body

    def end(self) -> list[bytes]:
        """Store the response; return the body to send instead if another request has the key."""
        claim, recording = self.claim, self.recording
        try:
            if claim.unit.has_failed():
                return []  # SessionMiddleware raises TransactionDoomed
            if not recording.is_success:
                self.end_refused()
                return []
            if claim.store(recording.as_http()):
                return []
            raise in_progress()
        except Problem as problem:
            start_response = recording.server_start_response
            return problem.respond(start_response, self.layer.help, sys.exc_info())
        finally:
            claim.is_running = False

    def end_refused(self) -> None:
        """Keep the key if *commit_when* commits a response that is not 2xx or 3xx.

        The row is gone if the application has rolled back and worked again since.
        """
        claim = self.claim
        if claim.may_be_lost() and claim.unit.session.in_transaction():
            with suppress(Exception):  # the response is the application's, whatever happens
                claim.store(None)


class RecordedBody:
    """A body that is recorded while it is sent.  It ends before `SessionMiddleware` commits."""

    def __init__(self, response: FirstResponse, body: Any) -> None:
        self.response = response
        self.body = body
        self.iterator: Iterator[bytes] = iter(body)
        self.has_ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self.has_ended:
            raise StopIteration
        try:
            chunk = next(self.iterator)
        except StopIteration:
            self.has_ended = True
            for problem in self.response.end():
                return problem
            raise
        except BaseException:
            self.response.claim.is_running = False
            raise
        self.response.recording.add(chunk)
        return chunk

    def close(self) -> None:
        self.response.claim.is_running = False
        close = getattr(self.body, "close", None)
        if close is not None:
            close()


def _is_claimed(environ: WSGIEnvironment) -> bool:
    """Return whether this is a sub-request of one whose key is claimed."""
    reference = environ.get(CLAIM_KEY)
    claim = None if reference is None else reference()
    return claim is not None and claim.is_running


def _are_names(methods: object) -> bool:
    if isinstance(methods, str) or not isinstance(methods, Collection):
        return False
    return all(isinstance(method, str) for method in methods)
