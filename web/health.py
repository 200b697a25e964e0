"""Whether the database serves, told within a second even where it does not answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock, Thread
from time import monotonic

import msgspec

from web.router import JSONRequest, Refusal

log = logging.getLogger("items")


class Status(msgspec.Struct):
    """That all is well."""

    status: str


class Health:
    """The resource that a load balancer asks.

    One probe runs at a time, in a thread of its own, and serves all who ask meanwhile: a
    database that hangs is asked once, and keeps nobody waiting.

    :param probe: raises where the database does not serve; it may hang.
    :param patience: seconds from the beginning of a probe after which it has failed.
    """

    def __init__(self, probe: Callable[[], object], patience: float = 1.0) -> None:
        self.probe = probe
        self.patience = patience
        self.lock = Lock()
        self.latest: Run | None = None

    def show(self, request: JSONRequest) -> Status:
        """Tell whether the database serves."""
        run = self.run()
        try:
            reason = run.outcome.result(max(0.0, run.began + self.patience - monotonic()))
        except TimeoutError:
            reason = f"the database did not answer within {self.patience:g} s"
        if reason is not None:
            raise Refusal(503, reason, {"Retry-After": "1"})
        return Status("ok")

    def run(self) -> Run:
        """The run of the probe that is under way, or a new one."""
        with self.lock:
            if self.latest is None or self.latest.outcome.done():
                run = Run(monotonic(), Future())
                Thread(target=run.execute, args=[self.probe], name="health", daemon=True).start()
                self.latest = run
            return self.latest


@dataclass
class Run:
    """One run of the probe."""

    began: float
    outcome: Future[str | None]
    """Why the database does not serve, or None where it does."""

    def execute(self, probe: Callable[[], object]) -> None:
        reason: str | None = "the probe was stopped"
        try:
            probe()
            reason = None
        except Exception as error:
            log.warning("the database does not serve", exc_info=True)
            # Its name only: the message may tell hosts, users and files.
            reason = f"the database does not serve: {type(error).__name__}"
        finally:
            self.outcome.set_result(reason)
