"""What schemathesis does to its requests before it sends them."""

from __future__ import annotations

import re
from typing import Any
from uuid import uuid4

import schemathesis

KEY = re.compile(r" *[!#-+\--\[\]-~][ !#-+\--\[\]-~]{0,254}")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Give each request that has a key one of its own: the same with another body is refused."""
    key = (case.headers or {}).get("Idempotency-Key")
    if isinstance(key, str) and KEY.fullmatch(key):
        case.headers["Idempotency-Key"] = str(uuid4())
