"""Instructions, counted by Callgrind in a process of its own: blind to what else is running."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from types import TracebackType

from databases import find

TIMES = {"warm": 30, "count": 100}
"""How often a job is done before it is counted, and while it is."""


class Counter:
    """A script under Callgrind, which does what it is told by `play`.

    :param seed: of the hashes of strings.
    """

    def __init__(self, script: str, *arguments: str, seed: int) -> None:
        valgrind = [find("valgrind"), "--tool=callgrind", "--instr-atstart=no", "-q"]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  it is read when the script fails
        self.process = subprocess.Popen(
            [*valgrind, "--callgrind-out-file=/dev/null", sys.executable, script, *arguments],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def __enter__(self) -> Counter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        self.process.communicate()
        self.errors.close()

    def count(self, job: str) -> float:
        """Instructions of one repetition of *job*."""
        self.ask(f"warm {job}")
        self.control("--instr=on")
        self.control("--zero")
        self.ask(f"count {job}")
        table = self.control("-e", "Ir")
        self.control("--instr=off")
        threads = re.findall(r"Th \d+ +([\d,]+)", table)
        assert threads, table
        return sum(int(found.replace(",", "")) for found in threads) / TIMES["count"]

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        if not self.process.stdout.readline():
            self.errors.seek(0)
            raise RuntimeError(f"{line!r} failed:\n{self.errors.read().decode()}")

    def control(self, *options: str) -> str:
        command = ["callgrind_control", *options, str(self.process.pid)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def counts(script: str, *arguments: str, jobs: Iterable[str], seed: int = 0) -> dict[str, float]:
    """Instructions of each job, all done by one process."""
    with Counter(script, *arguments, seed=seed) as counter:
        return {job: counter.count(job) for job in jobs}


def play(do: Callable[[str, int], object]) -> None:
    """Be the script: *do* each job of the input, as often as it is to be done."""
    for line in sys.stdin:
        phase, job = line.rstrip("\n").split(" ", 1)
        do(job, TIMES[phase])
        if phase == "warm":  # the collector need not look at what is there by now
            gc.collect()
            gc.freeze()
        print("done", flush=True)
