"""Requests: reading a JSON body, a query string and preconditions.

What cannot be decoded is a 400; what can, but breaks a rule, is a 422 that names the field.
RFC 9110 (https://www.rfc-editor.org/rfc/rfc9110) is HTTP Semantics.
"""

import re
from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from webob import Request

from web.responses import JSON, FieldError, HTTPError, etag_of, json_bytes
from web.validation import invalid

MERGE_PATCH = "application/merge-patch+json"  # RFC 7396; its null would remove a member

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, 9.2.1

_NUMBER = re.compile("0|-?[1-9][0-9]{0,17}")
_ETAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')  # RFC 9110, 8.8.3

Struct = TypeVar("Struct", bound=msgspec.Struct)


class JSONRequest(Request):
    """A request whose body, if it has one, is JSON."""

    def read_json(self, kind: type[Struct], limit: int) -> Struct:
        """Read the body as a *kind*; no body stands for an empty object.

        :param limit: the largest number of bytes.
        :raises HTTPError: 400, 413, 415 or 422.
        """
        body = self.read_body(limit)
        if body:
            self.require_json()
        try:
            # Decoding alone comes first, so that a body that is not JSON is always a 400.
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
        if self.http_version == "HTTP/1.0" and "HTTP_TRANSFER_ENCODING" in self.environ:
            # Servers ignore such a body (RFC 9112, 6.1).
            raise HTTPError(400, "HTTP/1.0 has no Transfer-Encoding")
        try:
            is_too_long = (self.content_length or 0) > limit
            body: bytes = b"" if is_too_long else self.body_file.read(limit + 1)
        except OSError:  # WebOb's DisconnectionError, or the server's error
            raise HTTPError(400, "the body is incomplete") from None
        if is_too_long or len(body) > limit:
            raise HTTPError(413, f"a body may have at most {limit} bytes")
        return body

    def read_query(self, kind: type[Struct]) -> Struct:
        """Read the query string as a *kind*: numbers if the default is one, else text.

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
                error = FieldError(name, "repeated")
                raise HTTPError(422, f"{name!r} is given more than once", None, error)
            values[name] = int(text) if name in numbers and _NUMBER.fullmatch(text) else text
        try:
            return msgspec.convert(values, kind)
        except msgspec.ValidationError as error:
            raise invalid(error, kind) from None

    def require_current(self, current: msgspec.Struct) -> None:
        """Require the preconditions to hold for *current*, which is about to be changed.

        :raises HTTPError: 412.
        """
        self.has_representation(etag_of(json_bytes(current)))

    def has_representation(self, etag: str) -> bool:
        """Return whether the client has the representation with this *etag* already.

        :raises HTTPError: 412 if a precondition fails (RFC 9110, 13.2.2).
        """
        wanted, unwanted = map(self.environ.get, ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"))
        found = unwanted is not None and etag_matches(unwanted, etag, weak=True)
        is_lost = wanted is not None and not etag_matches(wanted, etag, weak=False)
        if is_lost or (found and self.method not in SAFE_METHODS):
            raise HTTPError(412, "a precondition of the request does not hold")
        return found

    def accepts_gzip(self) -> bool:
        """Return whether the client names gzip; ``*`` alone is rare, and not enough."""
        if "gzip" not in self.environ.get("HTTP_ACCEPT_ENCODING", ""):
            return False
        return bool(self.accept_encoding.acceptable_offers(["gzip"]))


def etag_matches(field: str, etag: str, *, weak: bool) -> bool:
    """Return whether a list of entity tags has *etag* (RFC 9110, 8.8.3.2), or is ``*``."""
    # WebOb's own parser overlooks a tag that follows a comma without a space.
    tags = _ETAG.findall(field)
    return field.strip() == "*" or any(tag == etag and (weak or not mark) for mark, tag in tags)
