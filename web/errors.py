"""What the client is told when something fails, and what the log."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
from sessionscope import CommitOutcomeUnknown
from sessionscope.databases import is_unavailable
from sqlalchemy.exc import IntegrityError

from web.router import Refusal, Response, as_json

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger("items")


class Failure(msgspec.Struct):
    """That something failed, and the id under which the log has the rest."""

    error: str
    id: str


def errors_as_json(app: WSGIApplication) -> WSGIApplication:
    """Answer in JSON for what *app* raises before its response has begun.

    Wrapped around the session middleware, it also answers for a COMMIT that failed.  Later
    the exception goes to the server, which can cut the response.
    """

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            return app(environ, start_response)
        except Exception as error:
            request = f"{environ['REQUEST_METHOD']} {environ.get('PATH_INFO', '')!r}"
            response = response_to(error, request)
            return response.begin(start_response, environ["REQUEST_METHOD"], sys.exc_info())

    return answer


def response_to(error: Exception, request: str) -> Response:
    """Make the response that tells of *error*, and log it.

    :param request: what was asked for, in words for the log.
    """
    if isinstance(error, CommitOutcomeUnknown):
        log.error("%s: the outcome is unknown", request, exc_info=error)
        return OUTCOME_UNKNOWN.response()
    if is_unavailable(error):
        log.warning("%s: the database is not available: %s", request, error)
        return UNAVAILABLE.response()
    if isinstance(error, IntegrityError):
        log.info("%s: a conflict: %s", request, error)
        return CONFLICT.response()
    id = secrets.token_hex(4)
    log.error("%s failed, id %s", request, id, exc_info=error)
    return as_json(Failure("internal server error", id), 500)


# No Retry-After: what may have been done must not be done again blindly.
OUTCOME_UNKNOWN = Refusal(
    503,
    "the database was lost while it stored this: it may have been done, or not",
    {"Commit-Outcome": "unknown"},
)
UNAVAILABLE = Refusal(503, "the database is not available", {"Retry-After": "1"})
CONFLICT = Refusal(409, "conflict with what is stored")
