"""Health: whether the process serves, and whether its database does, within a second."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread

import msgspec

from web.requests import JSONRequest
from web.responses import HTTPError

log = logging.getLogger("items")


class Status(msgspec.Struct):
    """That it is well."""

    status: str


class Health:
    """The resources that a load balancer or a supervisor asks.

    One probe runs at a time, in a thread of its own, and serves all who ask meanwhile: a
    database that hangs, driver and all, is asked once and keeps nobody waiting for long.

    :param probe: raises if the database does not serve; it may hang.
    :param patience: seconds to wait for a probe.
    """

    def __init__(self, probe: Callable[[], object], patience: float = 1.0) -> None:
        self.probe = probe
        self.patience = patience
        self.lock = Lock()
        self.latest: Future[None] | None = None

    def live(self, request: JSONRequest) -> Status:
        """Tell that the process serves."""
        return Status("ok")

    def ready(self, request: JSONRequest) -> Status:
        """Tell whether the database can read and write."""
        try:
            self.run().result(self.patience)
        except TimeoutError:
            reason = f"the database did not answer within {self.patience:g} s"
        except Exception as error:
            # Its name only: the message may tell hosts, users and files.
            reason = f"the database does not serve: {type(error).__name__}"
        else:
            return Status("ok")
        raise HTTPError(503, reason, {"Retry-After": "1"})

    def run(self) -> Future[None]:
        """Return the run of the probe that is under way, or a new one."""
        with self.lock:
            if self.latest is None or self.latest.done():
                self.latest = Future()
                Thread(target=self.execute, args=[self.latest], name="health", daemon=True).start()
            return self.latest

    def execute(self, run: Future[None]) -> None:
        try:
            self.probe()
        except BaseException as error:
            log.warning("the database does not serve", exc_info=True)
            run.set_exception(error)
        else:
            run.set_result(None)
