"""What a request to the item service costs, beside other ways to write it, in instructions."""

from __future__ import annotations

from collections.abc import Iterator

from measuring import count_all
from report import Row

TITLE = "A request to the item service, in instructions (SQLite, 100 items)"
MINUTES = 5

# POST comes last, because it makes the list longer.
TO_FLOOR = {"GET /1": 0.75, "GET /999999999": 0.75, "GET /": 0.35, "POST /": 1.05}
TO_ARTICLE = {"GET /1": 0.65, "GET /999999999": 0.65, "GET /": 0.40, "POST /": 0.85}


def rows() -> Iterator[Row]:
    yield from compare("service", "floor", "to a function written by hand", TO_FLOOR)
    yield from compare("served", "article", "in waitress, to the recipe for Flask", TO_ARTICLE)


def compare(kind: str, other: str, what: str, goals: dict[str, float]) -> Iterator[Row]:
    requests = [*goals]
    found = count_all(kind, {"item service": requests, other: requests})
    for request, goal in goals.items():
        ours, theirs = found["item service"][request], found[other][request]
        beside = f"{ours / 1000:.0f} and {theirs / 1000:.0f} thousand"
        yield Row(f"{request}, {what}", f"{ours / theirs:.2f}", f"{goal:.2f}", beside)
