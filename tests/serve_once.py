"""``serve.py`` as it is, but for the keys: each item is made once for its Idempotency-Key."""

from __future__ import annotations

from typing import Any

from sessionscope.idempotency import Idempotency, idempotency_table
from sqlalchemy.orm import Session, scoped_session

import resources
import serve
from models import Base

keys = idempotency_table(Base.metadata)


def make_app(session: scoped_session[Session], **options: Any) -> Idempotency:
    return Idempotency(resources.make_app(session, **options), keys, scope=lambda environ: "")


if __name__ == "__main__":
    vars(serve)["make_app"] = make_app
    serve.main()
