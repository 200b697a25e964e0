"""What the client and the log are told when something fails."""

import logging
import sys
from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from sessionscope import CommitOutcomeUnknown
from sessionscope.databases import error_code, is_unavailable
from sqlalchemy.exc import IntegrityError

from web.logs import request_id
from web.responses import Error, HTTPError, Response, json_response

log = logging.getLogger("items")

CONFLICTS = frozenset(
    {
        *("23505", "23503"),  # PostgreSQL: unique violation, foreign key violation
        *(1062, 1451, 1452),  # MariaDB: duplicate entry, row is referenced, no referenced row
        *("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY", "SQLITE_CONSTRAINT_ROWID"),
        "SQLITE_CONSTRAINT_FOREIGNKEY",
    }
)
"""Violations caused by other data; any other violation is a bug in the service."""


def errors_as_json(app: WSGIApplication) -> WSGIApplication:
    """Send JSON for what *app* raises before its response has begun.

    Wrapped around the session middleware, it also handles a COMMIT that fails.  Later exceptions
    go to the server, which can cut the response.  A server that refuses a request itself puts an
    `HTTPError` into the environ as ``items.refusal``.
    """

    def respond(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        refusal: HTTPError | None = environ.get("items.refusal")
        if refusal is not None:
            return refusal.response()(environ, start_response)
        try:
            return app(environ, start_response)
        except Exception as error:
            response = response_to(error, environ)
            return response(environ, start_response, sys.exc_info())

    return respond


def response_to(error: Exception, environ: WSGIEnvironment) -> Response:
    """Log *error*, and return the response for it."""
    request = f"{environ['REQUEST_METHOD']} {environ.get('PATH_INFO', '')!r}"
    if isinstance(error, CommitOutcomeUnknown):
        log.error("%s: the outcome is unknown", request, exc_info=error)
        message = "the database connection was lost during COMMIT: the work may be done or not; "
        headers = {"Commit-Outcome": "unknown"}
        if "HTTP_IDEMPOTENCY_KEY" in environ:
            headers["Retry-After"] = "1"
            message += "repeat it with the same Idempotency-Key, and it is done once"
        else:
            message += "check before you repeat it"
        return HTTPError(503, message, headers).response()
    if is_unavailable(error):
        log.warning("%s: the database is not available: %s", request, error)
        return HTTPError(503, "the database is not available", {"Retry-After": "1"}).response()
    if isinstance(error, IntegrityError) and error_code(error) in CONFLICTS:
        log.info("%s: a conflict: %s", request, error)
        return HTTPError(409, "conflict with existing data").response()
    id = request_id(environ)
    log.error("%s failed, id %s", request, id, exc_info=error)
    return json_response(Error("internal server error", id=id), 500)
