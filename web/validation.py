"""What is wrong with a body or query that can be decoded: in words, and for programs."""

import re
from typing import get_args, get_type_hints

import msgspec

from web.responses import FieldError, HTTPError

# A message of msgspec, a code for programs, and a sentence for the clients of the service.
_RULES = [
    (r"Object contains unknown field `(?P<field>.*)`", "unknown", "{field!r} is unknown"),
    (r"Object missing required field `(?P<field>\w+)`", "required", "{field} is required"),
    (r"Expected `(?P<kind>\w+)`, got `\w+`", "wrong_type", "{field} must be {kind}"),
    (r"Expected `int` >= (?P<limit>\d+)", "too_small", "{field} must be {limit} or more"),
    (r"Expected `int` <= (?P<limit>\d+)", "too_large", "{field} must be {limit} or less"),
    (r"(Number|Integer value) out of range", "too_large", "{field} is out of range"),
    (r"Invalid enum value .*?", "not_a_choice", "{field} must be {choices}"),
    (r".*?", "invalid", "{field} is invalid"),
]
_PLACE = r"(?: - at `\$\.?(?P<place>.*)`)?"
_KINDS = {"str": "text", "int": "a whole number", "object": "an object"}


class InvalidField(ValueError):
    """Raised by a struct's ``__post_init__`` to reject a field."""

    def __init__(self, message: str, field: str, code: str, limit: int | None = None) -> None:
        super().__init__(message)
        self.field_error = FieldError(field, code, limit)


def invalid(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> HTTPError:
    """Return the 422 for data that is not a valid *kind*."""
    cause = error.__cause__
    if isinstance(cause, InvalidField):
        return HTTPError(422, str(cause), None, cause.field_error)
    code, sentence, parts = next(
        (code, sentence, found.groupdict())
        for pattern, code, sentence in _RULES
        if (found := re.fullmatch(pattern + _PLACE, str(error), re.DOTALL))
    )
    name = parts.get("field", parts["place"]) or ""
    is_known = name in kind.__struct_fields__ or code == "unknown"
    limit = parts.get("limit")
    message = sentence.format(
        field=name if is_known else "the body",
        kind=_KINDS.get(parts.get("kind") or ""),
        limit=limit,
        choices=" or ".join(map(str, get_args(get_type_hints(kind).get(name)))),
    )
    errors = [FieldError(name, code, int(limit) if limit else None)] if is_known else []
    return HTTPError(422, message, None, *errors)
