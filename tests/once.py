"""A client of `once_app` and what a server of it needs."""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import databases
from once_app import keys
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.pool import NullPool
from support import PATIENCE

from models import Base, Item

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Answer:
    """All of a response that must be the same in each answer to a key.

    :ivar replayed: whether it was said to be a replay.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    content: bytes
    replayed: bool = field(compare=False)

    @classmethod
    def read(cls, response: http.client.HTTPResponse) -> Answer:
        """The answer, once it is there as a whole."""
        content = response.read()
        of_the_view = ("content-type", "location")
        headers = [pair for pair in response.getheaders() if pair[0].lower() in of_the_view]
        replayed = response.headers["Idempotent-Replayed"] == "true"
        return cls(response.status, tuple(headers), content, replayed)


def headers(name: str, key: str, caller: str = "Ada", view: str = "list") -> dict[str, str]:
    """The head of a request for a payment of this name."""
    return {
        "Authorization": caller,
        "Idempotency-Key": f'"{key}"',
        "Content-Length": str(len(name)),
        "X-View": view,
    }


def ask(
    port: int, name: str, *, key: str | None = None, view: str = "list", **more: str
) -> Answer | None:
    """Ask once for a payment, under a key of the same name; None if the answer was cut off.

    :param more: headers, with an underscore for each hyphen.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    told = {header.replace("_", "-"): value for header, value in more.items()}
    head = headers(name, key or name, view=view) | told
    try:
        if "Transfer-Encoding" in head:
            del head["Content-Length"]
            connection.request("POST", "/", iter([name.encode()]), head, encode_chunked=True)
        else:
            connection.request("POST", "/", name.encode(), head)
        with connection.getresponse() as response:
            return Answer.read(response)
    except (http.client.HTTPException, ConnectionError):
        return None
    finally:
        connection.close()


@contextmanager
def tables(url: str) -> Iterator[Engine]:
    """Have the tables in a database while the block runs."""
    engine = create_engine(url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    keys.create(engine)
    try:
        yield engine
    finally:
        keys.drop(engine)
        Base.metadata.drop_all(engine)


def names(engine: Engine) -> list[str]:
    """The payments that are durable."""
    with engine.connect() as connection:
        return [str(name) for name in connection.scalars(select(Item.name).order_by(Item.id))]


def responses(engine: Engine) -> Sequence[bytes | None]:
    """What is kept for each key."""
    with engine.connect() as connection:
        return connection.scalars(select(keys.c.response)).all()


@contextmanager
def served(
    *arguments: str, urls: Sequence[str], port: int, folder: Path, keyed: bool = True
) -> Iterator[int]:
    """Run Python with these *arguments* to serve `once_app` on *port*; the pid."""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environ = [f"PYTHONPATH={path}", f"ONCE_DATABASE={' '.join(urls)}"]
    command = ["env", *environ, f"ONCE_KEYS={'yes' if keyed else 'no'}", sys.executable, *arguments]
    with databases.running(command, user=None, folder=folder, port=port) as process:
        yield process.pid
