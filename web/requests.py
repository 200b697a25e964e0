"""Requests: reading a body of JSON, a query string, and preconditions.

What cannot be decoded is a 400; what can, but breaks a rule, is a 422 that names the field.
RFC 9110 (https://www.rfc-editor.org/rfc/rfc9110) is HTTP Semantics.
"""

from __future__ import annotations

import re
from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from webob import Request

from web.responses import JSON, FieldError, HTTPError, etag_of, json_bytes
from web.validation import invalid

MERGE_PATCH = "application/merge-patch+json"  # RFC 7396; its null would remove a member

_NUMBER = re.compile("0|[1-9][0-9]{0,17}")

Struct = TypeVar("Struct", bound=msgspec.Struct)

_ETAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')  # RFC 9110, 8.8.3


class JSONRequest(Request):
    """A request whose body, if it has one, is JSON."""

    def read_json(self, kind: type[Struct], limit: int) -> Struct:
        """Read the body as a *kind*; an absent body stands for one without members.

        :param limit: bytes that the body may have.
        :raises HTTPError: 400, 413, 415 or 422.
        """
        body = self.read_body(limit)
        if body:
            self.require_json()
        try:
            # First whether it is JSON at all, then whether it is what the handler takes.
            return msgspec.convert(msgspec.json.decode(body or b"{}"), kind)
        except msgspec.ValidationError as error:
            raise invalid(error, kind) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise HTTPError(400, f"the body is not JSON: {error}") from None

    def require_json(self) -> None:
        accepted = [MERGE_PATCH, JSON] if self.method == "PATCH" else [JSON]
        if self.content_type.lower() not in accepted:
            headers = {"Accept-Patch": ", ".join(accepted)} if self.method == "PATCH" else None
            raise HTTPError(415, f"the body must be {' or '.join(accepted)}", headers)
        if self.environ.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
            raise HTTPError(415, "the body must not be encoded")

    def read_body(self, limit: int) -> bytes:
        """Read a body of at most *limit* bytes, whether its length is known or not."""
        too_long = HTTPError(413, f"a body may have at most {limit} bytes")
        if self.http_version == "HTTP/1.0" and "HTTP_TRANSFER_ENCODING" in self.environ:
            # Servers don't look for the body then (RFC 9112, 6.1).
            raise HTTPError(400, "HTTP/1.0 has no Transfer-Encoding")
        if self.content_length is not None and self.content_length > limit:
            raise too_long
        try:
            body: bytes = self.body_file.read(limit + 1)
        except OSError:  # WebOb's DisconnectionError, and what servers raise themselves
            raise HTTPError(400, "the body is incomplete") from None
        if len(body) > limit:
            raise too_long
        return body

    def read_query(self, kind: type[Struct]) -> Struct:
        """Read the query string as a *kind*: numbers where the default is one, else text.

        :raises HTTPError: 400 or 422.
        """
        query = self.environ.get("QUERY_STRING", "")
        if not query:
            return kind()
        try:
            pairs = parse_qsl(query.encode("ascii").decode(), True, errors="strict")
        except UnicodeError:
            raise HTTPError(400, "the query is not percent-encoded UTF-8") from None
        fields = msgspec.structs.fields(kind)
        numbers = {field.name for field in fields if isinstance(field.default, int)}
        values: dict[str, int | str] = {}
        for name, text in pairs:
            if name in values:
                sentence = f"{name!r} is there more than once"
                raise HTTPError(422, sentence, errors=(FieldError(name, "repeated"),))
            values[name] = int(text) if name in numbers and _NUMBER.fullmatch(text) else text
        try:
            return msgspec.convert(values, kind)
        except msgspec.ValidationError as error:
            raise invalid(error, kind) from None

    def require(self, current: msgspec.Struct) -> None:
        """Go on only if the preconditions hold for *current*, which is to be changed.

        :raises HTTPError: 412.
        """
        if self.evaluate(etag_of(json_bytes(current))) != 200:
            raise precondition_failed()

    def evaluate(self, etag: str) -> int:
        """Evaluate the preconditions for a representation that exists (RFC 9110, 13.2.2).

        :returns: 200 to go on, 304, which for a change is as bad as 412, or 412.
        """
        wanted = self.environ.get("HTTP_IF_MATCH")
        if wanted is not None and not etag_matches(wanted, etag, weak=False):
            return 412
        unwanted = self.environ.get("HTTP_IF_NONE_MATCH")
        if unwanted is not None and etag_matches(unwanted, etag, weak=True):
            return 304
        return 200


def etag_matches(field: str, etag: str, *, weak: bool) -> bool:
    """Tell whether a list of entity tags has *etag* (RFC 9110, 8.8.3.2), or is ``*``."""
    # WebOb's own parser overlooks a tag that follows a comma without a space.
    tags = _ETAG.findall(field)
    return field.strip() == "*" or any(tag == etag and (weak or not mark) for mark, tag in tags)


def precondition_failed() -> HTTPError:
    return HTTPError(412, "a precondition of the request does not hold")
