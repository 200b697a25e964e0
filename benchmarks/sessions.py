"""What the session of a request costs, by this middleware and by others, in instructions.

A ratio is to what `contestants.by_hand` costs; what the application costs itself, measured by
`contestants.nothing`, is taken from both.
"""

from __future__ import annotations

from collections.abc import Iterator

from databases import postgresql
from measuring import SEEDS, count, count_all, fill, median
from report import Row

TITLE = "The session of a request, in instructions"
MINUTES = 6

ENDS = {
    "GET /": ("session not used, to by hand", 0.35),
    "GET /read": ("one object read, to by hand", 1.05),
    "GET /refused": ("one object read, then 404, to by hand", 1.05),
}
STREAMS = ("GET /stream/60", "GET /stream/10")
LINES = ("POST /lines/60", "POST /lines/10")
CREATE = "POST /create"
KEYED = {"POST /add": "without a key", "POST /add new": "with a key", "POST /add same": "repeated"}

# All begin with the same ones: what a process has done before moves a count by half a percent.
JOBS: dict[str, list[str]] = {
    "no management": [*ENDS, *STREAMS, *LINES],
    "by hand": [*ENDS, "POST /add"],
    "by hand, beside sessionscope": [*ENDS, "POST /add"],
    "sessionscope": [*ENDS, "POST /add", *STREAMS],
    "attempts=3": [*ENDS, *LINES],
    "observer": [*ENDS],
    "DEBUG": [*ENDS],
    "Idempotency": [*ENDS, *KEYED],
    "repoze.tm2": [*ENDS, *STREAMS],
}

Counts = dict[str, dict[str, float]]


def rows() -> Iterator[Row]:
    found = count_all("session", JOBS)
    ours, once = found["sessionscope"], found["Idempotency"]
    hand, beside_us = found["by hand"], found["by hand, beside sessionscope"]
    for job, (what, goal) in ENDS.items():
        others = (f"{name} {ratio(found, name, job)}" for name in ("attempts=3", "repoze.tm2"))
        yield Row(what, ratio(found, "sessionscope", job), f"{goal}", ", ".join(others))
    other = f"repoze.tm2 {each(found, 'repoze.tm2', STREAMS)}"
    yield Row("a chunk of a stream", each(found, "sessionscope", STREAMS), "8 thousand", other)
    yield Row("attempts=3: a line of a body", each(found, "attempts=3", LINES), "6 thousand")
    for name, limit in (("observer", "20 thousand"), ("DEBUG", "60 thousand")):
        more = found[name]["GET /read"] - ours["GET /read"]
        yield Row(f"{name}, beyond one object read", thousands(more), limit)
    for job, limit in (("GET /read", "1.5 %"), ("POST /add", "3.5 %")):
        more_percent = percent(beside_us[job], hand[job])
        yield Row(f"a Session of somebody else's, {job}", more_percent, limit)
    for job, what in KEYED.items():
        yield Row(f"Idempotency, {what}", thousands(once[job] - ours["POST /add"]))
    with postgresql() as node:
        fill(node.url, 100)
        asking, plain = (
            median([count("session", name, node.url, [CREATE], seed) for seed in SEEDS])[CREATE]
            for name in ("confirm=True", "sessionscope")
        )
        yield Row(f"confirm=True, {CREATE} on PostgreSQL", percent(asking, plain), "10 %")


def ratio(found: Counts, name: str, job: str) -> str:
    base = found["no management"][job]
    return f"{(found[name][job] - base) / (found['by hand'][job] - base):.2f}"


def each(found: Counts, name: str, jobs: tuple[str, str]) -> str:
    """What one more of something costs, without what the application does for it."""
    more, fewer = jobs
    own = found["no management"]
    difference = (found[name][more] - found[name][fewer]) - (own[more] - own[fewer])
    return thousands(difference / 50)


def thousands(instructions: float) -> str:
    return f"{instructions / 1000:.1f} thousand"


def percent(more: float, base: float) -> str:
    return f"{100 * (more / base - 1):.1f} %"
