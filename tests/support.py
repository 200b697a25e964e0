"""What several test modules need: an app's view of the database, and a server's of the app."""

from __future__ import annotations

import http.client
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

from sqlalchemy import Column, Engine, ForeignKey, Integer, MetaData, Table, insert, select
from sqlalchemy.orm import Session, scoped_session
from waitress import wasyncore
from waitress.server import create_server

from models import Base, Item
from web.database import create_tables

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    Registry = scoped_session[Session]

PATIENCE = 60.0
"""Seconds to wait for an event that is bound to come."""

debts = Table(
    "debts",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("item_id", ForeignKey(Item.__table__.c.id, deferrable=True, initially="DEFERRED")),
)
"""A row that refers to no item is refused by COMMIT, and by nothing before it."""


def make_tables(engine: Engine) -> None:
    """Create the items, and the debts where the engine knows deferred constraints."""
    create_tables(engine)
    if engine.dialect.name not in ("mysql", "mariadb"):
        debts.create(engine)


def drop_tables(engine: Engine) -> None:
    debts.drop(engine, checkfirst=True)
    Base.metadata.drop_all(engine)


def refuse_commit(session: Session | Registry) -> None:
    """Have the database itself refuse this transaction's COMMIT."""
    session.execute(insert(debts).values(item_id=-1))


def names(engine: Engine) -> list[str | None]:
    """The names of the items that are durable, in order, seen from outside."""
    with engine.connect() as connection:
        return list(connection.scalars(select(Item.name).order_by(Item.id)))


def environ(method: str = "GET", path: str = "/", **more: Any) -> WSGIEnvironment:
    made: WSGIEnvironment = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
    }
    setup_testing_defaults(made)
    made.setdefault("wsgi.input", io.BytesIO())
    made.update(more)
    return made


@dataclass
class Reply:
    """What reached the server of one request."""

    status: str | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    body: Any = None

    @property
    def content(self) -> bytes:
        return b"".join(self.chunks)


class Server:
    """The least that a WSGI server may be: it keeps what it gets, and obeys PEP 3333."""

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app
        self.reply = Reply()
        self.head_is_out = False

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        if exc_info is not None:
            if self.head_is_out:
                raise exc_info[1].with_traceback(exc_info[2])
        elif self.reply.status is not None:
            raise AssertionError("start_response was called twice")
        self.reply.status, self.reply.headers = status, list(headers)
        return self.write

    def write(self, chunk: bytes) -> None:
        assert self.reply.status is not None, "a chunk before start_response"
        assert type(chunk) is bytes, f"{chunk!r} is not bytes"
        if chunk:
            self.head_is_out = True
        self.reply.chunks.append(chunk)

    def begin(self, request: WSGIEnvironment | None = None) -> Iterator[bytes]:
        """Call the application; an iterator over its body."""
        self.reply.body = self.app(request or environ(), self.start_response)
        return iter(self.reply.body)

    def finish(self) -> None:
        close = getattr(self.reply.body, "close", None)
        if close is not None:
            close()

    def run(self, request: WSGIEnvironment | None = None) -> Reply:
        """Serve one request to its end."""
        try:
            for chunk in self.begin(request):
                self.write(chunk)
        finally:
            self.finish()
        return self.reply


def in_thread(action: Callable[[], object]) -> None:
    """Run *action* in another thread; what it raises is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


def serve_once(app: WSGIApplication, request: WSGIEnvironment | None = None) -> Reply:
    return Server(app).run(request)


@contextmanager
def serving(app: WSGIApplication, threads: int = 4, **options: Any) -> Iterator[int]:
    """Serve *app* with waitress on a free port of loopback."""
    server: Any = create_server(app, host="127.0.0.1", port=0, threads=threads, **options)
    stopping = threading.Event()

    def run() -> None:
        while server.active_channels or not stopping.is_set():  # clients have hung up by then
            wasyncore.loop(timeout=PATIENCE, map=server._map, count=1)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield int(server.effective_port)
    finally:
        stopping.set()
        server.pull_trigger()
        thread.join(PATIENCE)
        stopped = not thread.is_alive()
        server.task_dispatcher.shutdown()  # it would drop the requests that are left, and wait
        wasyncore.close_all(server._map, True)
    assert stopped, "a request went on, or a client did not hang up"


@dataclass
class Answer:
    """What reached a client; *complete* is False for a response that was visibly cut."""

    status: int | None
    headers: dict[str, str]
    content: bytes
    complete: bool


def fetch(
    port: int,
    method: str = "GET",
    path: str = "/",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """Make one request over a real socket."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path, body, headers or {})
        try:
            response = connection.getresponse()
        except (http.client.BadStatusLine, ConnectionError):
            return Answer(None, {}, b"", complete=False)
        found = {name.lower(): value for name, value in response.getheaders()}
        try:
            return Answer(response.status, found, response.read(), complete=True)
        except (http.client.IncompleteRead, ConnectionError) as error:
            return Answer(response.status, found, getattr(error, "partial", b""), complete=False)
    finally:
        connection.close()


def text(
    *chunks: bytes, status: str = "200 OK", sized: bool = False, before: Callable[[], object] = bool
) -> WSGIApplication:
    """An application that runs *before* and answers with a list of chunks."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        before()
        headers = [("Content-Type", "text/plain")]
        if sized:
            headers.append(("Content-Length", str(sum(map(len, chunks)))))
        start_response(status, headers)
        return list(chunks)

    return app
