"""Health: whether the process and its database serve, known within a second."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread

import msgspec

from web.requests import JSONRequest
from web.responses import HTTPError

log = logging.getLogger("items")


class Status(msgspec.Struct):
    """Good health; anything else is an error."""

    status: str


class Health:
    """The endpoints for load balancers and supervisors.

    One probe runs at a time, in its own thread, for all requests that arrive meanwhile.  A
    database that hangs, driver and all, is probed once and keeps nobody waiting for long.

    :param probe: raises if the database is not available; it may hang.
    :param patience: seconds to wait for a probe.
    """

    def __init__(self, probe: Callable[[], object], patience: float = 1.0) -> None:
        self.probe = probe
        self.patience = patience
        self.lock = Lock()
        self.latest: Future[None] | None = None

    def live(self, request: JSONRequest) -> Status:
        """Report that the process serves."""
        return Status("ok")

    def ready(self, request: JSONRequest) -> Status:
        """Report whether the database can be read and written."""
        try:
            self.current_run().result(self.patience)
        except TimeoutError:
            reason = f"the database did not respond within {self.patience:g} s"
        except Exception as error:
            # Its name only: the message may contain hosts, users and files.
            reason = f"the database is not available: {type(error).__name__}"
        else:
            return Status("ok")
        raise HTTPError(503, reason, {"Retry-After": "1"})

    def current_run(self) -> Future[None]:
        """Return the probe that is running; start one if there is none."""
        with self.lock:
            if self.latest is None or self.latest.done():
                self.latest = Future()
                Thread(target=self.run, args=[self.latest], name="health", daemon=True).start()
            return self.latest

    def run(self, future: Future[None]) -> None:
        try:
            self.probe()
        except BaseException as error:
            log.warning("the database is not available", exc_info=True)
            future.set_exception(error)
        else:
            future.set_result(None)
