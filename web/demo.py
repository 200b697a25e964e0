"""``--demo``: a panel on the page that shows the outcome of each session, and three failures.

The outcomes are sent as server-sent events (https://html.spec.whatwg.org/multipage/
server-sent-events.html).  A stream uses no session and ends after a few seconds, when the browser
opens another.  If no thread can be spared, it ends at once, and the panel is only slower.
"""

from collections import deque
from collections.abc import Iterator
from threading import Condition, Semaphore
from time import monotonic, time_ns

import msgspec
from sqlalchemy import event
from sqlalchemy.orm import Session, scoped_session

from models import Item
from resources import WEB
from web.logs import Exchange
from web.requests import JSONRequest
from web.responses import HTTPError, Response
from web.router import Router
from web.static import StaticFile

STREAM = "text/event-stream"

HEADERS = {"Content-Type": STREAM, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}

PAUSE = 1000
"""Milliseconds after which the browser opens the next stream."""

DURATION = 4.0
"""Seconds after which a stream ends."""

KEPT = 12
"""Outcomes that are kept for streams that begin later."""

PANEL = b"""  <link rel="stylesheet" href="demo.css">
  <script type="module" src="demo.js"></script>
</head>"""


class Shown(msgspec.Struct):
    """What the panel shows of a request."""

    method: str
    path: str
    status: str
    action: str
    ms: int
    attempts: int


class Outcomes:
    """The latest outcomes, and the streams that wait for the next.

    :param streams: how many threads may wait at once.
    """

    def __init__(self, streams: int) -> None:
        self.changed = Condition()
        self.kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT)
        self.number = time_ns() // 1000  # beyond those of an earlier process
        self.free = Semaphore(streams)

    def add(self, exchange: Exchange) -> None:
        """Keep the outcome of a request's session, if it used one."""
        if exchange.action == "none":
            return
        shown = Shown(
            exchange.method,
            exchange.path,
            exchange.status,
            exchange.action,
            round(exchange.seconds * 1000),
            exchange.attempts,
        )
        with self.changed:
            self.number += 1
            self.kept.append((self.number, msgspec.json.encode(shown)))
            self.changed.notify_all()

    def stream(self, request: JSONRequest) -> Response:
        """Send the outcomes that the client does not have yet, and those to come."""
        last = request.environ.get("HTTP_LAST_EVENT_ID", "")
        may_wait = bool(request.environ["wsgi.multithread"])
        number = int(last) if last.isdecimal() and len(last) < 20 else 0
        return Response(200, HEADERS, self.events(number, may_wait))

    def events(self, last: int, may_wait: bool) -> Iterator[bytes]:
        waits = may_wait and self.free.acquire(blocking=False)
        began, left = monotonic(), 0.0
        try:
            yield f"retry: {PAUSE}\n\n".encode()
            while left >= 0:
                for number, shown in self.after(last, left):
                    yield b"id: %d\ndata: %b\n\n" % (number, shown)
                    last = number
                left = began + DURATION - monotonic() if waits else -1
        finally:
            if waits:
                self.free.release()

    def after(self, last: int, seconds: float) -> list[tuple[int, bytes]]:
        """Return the outcomes after *last*; wait for one for some *seconds*."""
        with self.changed:
            self.changed.wait_for(lambda: self.kept and self.kept[-1][0] > last, seconds)
            return [each for each in self.kept if each[0] > last]


class Failures:
    """Three ways to fail after an item was added; none of them stores it."""

    def __init__(self, session: scoped_session[Session]) -> None:
        self.session = session

    def add(self) -> None:
        self.session.add(Item(name="never committed"))
        self.session.flush()

    def conflict(self, request: JSONRequest) -> None:
        """Send a 409."""
        self.add()
        raise HTTPError(409, "a conflict, as you asked")

    def error(self, request: JSONRequest) -> None:
        """Raise."""
        self.add()
        raise RuntimeError("an error, as you asked")

    def commit(self, request: JSONRequest) -> None:
        """Return a success, whose COMMIT then fails."""
        self.add()

        def fail(session: Session) -> None:
            raise RuntimeError("a COMMIT that fails, as you asked")

        event.listen(self.session(), "before_commit", fail, once=True)


def add_demo(router: Router, session: scoped_session[Session], threads: int) -> Outcomes:
    """Add the panel to the page; return the outcomes, to which each exchange is added.

    :param threads: how many requests can run at once.
    """
    outcomes, failures = Outcomes(threads // 4), Failures(session)
    page = (WEB / "page/index.html").read_bytes().replace(b"</head>", PANEL)
    router.add("GET", "/", StaticFile(page, "text/html").show, media_type="text/html")
    for name, media_type in [("demo.css", "text/css"), ("demo.js", "text/javascript")]:
        file = StaticFile((WEB / "page" / name).read_bytes(), media_type)
        router.add("GET", f"/{name}", file.show, media_type=media_type)
    router.add("GET", "/demo/outcomes", outcomes.stream, media_type=STREAM)
    router.add("POST", "/demo/conflict", failures.conflict)
    router.add("POST", "/demo/error", failures.error)
    router.add("POST", "/demo/commit", failures.commit)
    return outcomes
