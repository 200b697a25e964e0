"""Requests played to an application in a process of its own, timed or counted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import TracebackType
from typing import TYPE_CHECKING
from wsgiref.util import setup_testing_defaults

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

ENVIRONMENT = {**os.environ, "PYTHONHASHSEED": "0"}


def request(app: WSGIApplication, method: str, path: str) -> None:
    """Play a server that asks for *path*, and reads the response to its end."""
    environ = {"PATH_INFO": path, "REQUEST_METHOD": method}
    setup_testing_defaults(environ)
    body = app(environ, lambda *_: bool)
    assert b"".join(body)
    getattr(body, "close", bool)()


class Player:
    """A script in a process of its own, that plays as many requests as it is asked to."""

    def __init__(self, script: str, *arguments: str, under: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*under, sys.executable, script, *arguments],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if under else None,
            text=True,
        )

    def ask(self, times: int) -> float:
        """What the script answers to *times*."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(times, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def watch(self, state: str) -> None:
        """Have Callgrind count from now on, or no more."""
        command = ["callgrind_control", f"--instr={state}", str(self.process.pid)]
        subprocess.run(command, check=True, capture_output=True)

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        self.last_words = self.process.communicate()[1] or ""


def count(script: str, *arguments: str, warm: int = 50, times: int = 200) -> float:
    """Instructions of one request, by Callgrind, when *warm* others have gone before."""
    tool = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
    with Player(script, *arguments, under=(*tool, "--instr-atstart=no")) as player:
        player.ask(warm)
        player.watch("on")
        player.ask(times)
        player.watch("off")
    found = re.search(r"Collected : (\d+)", player.last_words)
    assert found is not None, player.last_words
    return int(found[1]) / times
