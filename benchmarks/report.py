"""A table of what was measured: printed as it grows, and kept in ``build/bench.md``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

BUILD = Path(__file__).resolve().parent.parent / "build"


class Row(NamedTuple):
    """One measured cost.

    :ivar goal: what it is meant to be at most.
    :ivar beside: what else was measured in the same run.
    """

    what: str
    measured: str
    goal: str = ""
    beside: str = ""


HEAD = Row("what", "measured", "goal", "beside it")
