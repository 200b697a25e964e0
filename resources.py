"""The item resources: what clients may ask for, and what becomes of it.

A handler takes a request, uses the session of the registry, and returns what shall become JSON.
It reads columns and writes objects.  None begins, commits, rolls back or closes anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlencode

import msgspec
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session, scoped_session

from models import MAX_ID, MAX_NAME, Item
from web.health import Health
from web.requests import JSONRequest
from web.responses import JSON, HTTPError, Response, json_response, stream_json
from web.router import MAX_BODY, Router
from web.static import StaticFile, below
from web.validation import InvalidField

WEB = Path(__file__).with_name("web")

FILES = [
    ("/", "page/index.html", "text/html"),
    ("/icon.svg", "page/icon.svg", "image/svg+xml"),
    ("/page.css", "page/page.css", "text/css"),
    ("/page.js", "page/page.js", "text/javascript"),
    ("/openapi.json", "openapi.json", JSON),
]

MAX_PAGE = 1000
"""Items on a page; a longer list, if it is asked for as a whole, is streamed."""

BATCH = 500
"""Items in a chunk of a stream."""

MAX_COUNT = 10_000
"""Rows that are counted; it takes some milliseconds."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Unicode's default ignorable code points of the first plane, and a blank of Braille.
_INVISIBLE = re.compile(
    r"[\s\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8]*"
)


def check_text(name: str) -> str:
    """Return *name* if it may be a part of one.

    :raises InvalidField: if it is too long or has control characters.
    """
    if len(name) > MAX_NAME:
        message = f"name must have at most {MAX_NAME} characters"
        raise InvalidField(message, "name", "too_long", MAX_NAME)
    if _CONTROL.search(name):
        raise InvalidField("name must have no control characters", "name", "control_character")
    return name


def clean_name(name: str) -> str:
    """Return *name* without the blanks around it.

    :raises InvalidField: if something is wrong with the rest, or nothing of it can be seen.
    """
    name = check_text(name.strip())
    if _INVISIBLE.fullmatch(name):
        raise InvalidField("name must have a visible character", "name", "blank")
    return name


class NewItem(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends to create an item, which is named after its id if need be."""

    name: str | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.name is not msgspec.UNSET:
            self.name = clean_name(self.name)


class ItemChange(NewItem):
    """What a client sends to change an item; what is left out stays as it is."""


class ItemState(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends to replace an item."""

    name: str

    def __post_init__(self) -> None:
        self.name = clean_name(self.name)


class Filter(msgspec.Struct, forbid_unknown_fields=True):
    """Which items are meant: those between two ids whose names begin with a prefix."""

    after: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)] = 0
    before: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)] = MAX_ID + 1
    name: str = ""

    def __post_init__(self) -> None:
        self.name = check_text(self.name.strip())


class Selection(Filter):
    """Which of them a list shows, and in which order."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 0
    order: Literal["oldest", "newest"] = "oldest"


class ItemView(msgspec.Struct):
    """An item as clients see it."""

    id: int
    name: str | None


class ItemList(msgspec.Struct):
    """Items in the order of their ids."""

    items: Sequence[ItemView]


class Count(msgspec.Struct):
    """How many items there are; at least so many if it is not exact."""

    count: int
    exact: bool


class Items:
    """The item resources.

    :param session: the registry in which the session of the request is found.
    """

    def __init__(self, session: scoped_session[Session]) -> None:
        self.session = session

    def create(self, request: JSONRequest, body: NewItem) -> Response:
        """Create an item."""
        item = Item(name=None if body.name is msgspec.UNSET else body.name)
        self.session.add(item)
        self.session.flush()  # which gives it its id
        item.name = item.name or f"Item #{item.id}"
        return json_response(view(item), headers={"Location": below(request, item.id)})

    def index(self, request: JSONRequest, query: Selection) -> ItemList | Response:
        """List items: all of them, or a page."""
        limit = query.limit or MAX_PAGE
        items = self.fetch(query, limit + 1)
        if len(items) <= limit:
            return ItemList(items)
        if not query.limit:
            return stream_json("items", self.batches(query, items))
        page = items[:limit]
        return json_response(ItemList(page), headers={"Link": next_link(query, page[-1])})

    def count(self, request: JSONRequest, query: Filter) -> Count:
        """Count items, up to a limit."""
        counted = matching(query, select(Item.id)).limit(MAX_COUNT + 1).subquery()
        count = self.session.execute(select(func.count()).select_from(counted)).scalar_one()
        return Count(min(count, MAX_COUNT), exact=count <= MAX_COUNT)

    def show(self, request: JSONRequest, id: int) -> ItemView:
        """Show an item."""
        row = self.session.execute(select(Item.id, Item.name).where(Item.id == id)).first()
        if row is None:
            raise HTTPError(404, "not found")
        return ItemView(*row)

    def replace(self, request: JSONRequest, id: int, body: ItemState) -> ItemView:
        """Replace an item by one with another name."""
        item = self.get_for_update(request, id)
        item.name = body.name
        return view(item)

    def change(self, request: JSONRequest, id: int, body: ItemChange) -> ItemView:
        """Change what is given of an item."""
        item = self.get_for_update(request, id)
        if body.name is not msgspec.UNSET:
            item.name = body.name
        return view(item)

    def delete(self, request: JSONRequest, id: int) -> None:
        """Delete an item."""
        self.session.delete(self.get_for_update(request, id))

    def get_for_update(self, request: JSONRequest, id: int) -> Item:
        """Get an item and keep rivals away from it, if it is what the client expects it to be."""
        item = self.session.get(Item, id, with_for_update=True)
        if item is None:
            raise HTTPError(404, "not found")
        request.require(view(item))
        return item

    def fetch(self, query: Selection, count: int) -> list[ItemView]:
        """Fetch the first *count* of the items."""
        first = Item.id.desc() if query.order == "newest" else Item.id
        statement = matching(query, select(Item.id, Item.name)).order_by(first).limit(count)
        return [ItemView(*row) for row in self.session.execute(statement)]

    def batches(self, query: Selection, items: list[ItemView]) -> Iterator[list[ItemView]]:
        """Yield *items*, and then all that come after them."""
        # By key rather than from one cursor: no transaction stays open as long as the
        # slowest client reads, and nothing is left to be fetched when one hangs up.  What
        # is there all the time is listed once, as it was when its batch was read.
        while items:
            yield items
            items = self.fetch(following(query, items[-1]), BATCH)


def view(item: Item) -> ItemView:
    return ItemView(item.id, item.name)


Statement = TypeVar("Statement", bound=Select[*tuple[Any, ...]])


def matching(query: Filter, statement: Statement) -> Statement:
    """Restrict *statement* to the items that *query* means."""
    if query.after:
        statement = statement.where(Item.id > query.after)
    if query.before <= MAX_ID:
        statement = statement.where(Item.id < query.before)
    if query.name:  # a range of the index, whose last name is filled up with the last character
        last = query.name.ljust(MAX_NAME, "\U0010ffff")
        statement = statement.where(Item.name.between(query.name, last))
    return statement


def following(query: Selection, last: ItemView) -> Selection:
    """Return the query for what comes after *last*."""
    key = "before" if query.order == "newest" else "after"
    return msgspec.structs.replace(query, **{key: last.id})


def next_link(query: Selection, last: ItemView) -> str:
    """Return a Link (RFC 8288, 3) to the next page.

    The reference is relative to the request's own URL (RFC 3986, 5.2.2), as the client
    knows it: right behind any prefix and any proxy.
    """
    after = following(query, last)
    fields = msgspec.structs.fields(Selection)
    values = {field.name: getattr(after, field.name) for field in fields}
    given = {
        field.name: values[field.name] for field in fields if values[field.name] != field.default
    }
    return f'<?{urlencode(given)}>; rel="next"'


def make_app(
    session: scoped_session[Session],
    *,
    probe: Callable[[], object] = bool,
    max_body: int = MAX_BODY,
) -> Router:
    """Make the WSGI application that serves items.

    :param session: the registry in which handlers find the session of the request.
    :param probe: called for ``/readyz``, in a thread of its own; it raises if the database
        does not serve.  By default the database is not asked.
    :param max_body: bytes that a request's body may have; a longer one is a 413.
    """
    items, health = Items(session), Health(probe)
    router = Router(max_body)
    router.add("GET", "/", items.index)
    router.add("POST", "/", items.create)
    router.add("GET", "/count", items.count)
    router.add("GET", "/{id}", items.show, etag=True)
    router.add("PUT", "/{id}", items.replace)  # no tag: it would name what the client sent
    router.add("PATCH", "/{id}", items.change, etag=True)
    router.add("DELETE", "/{id}", items.delete)
    router.add("GET", "/livez", health.live)
    router.add("GET", "/readyz", health.ready)
    router.add("GET", "/healthz", health.ready)
    for path, name, media_type in FILES:
        file = StaticFile((WEB / name).read_bytes(), media_type)
        router.add("GET", path, file.show, media_type=media_type)
    return router
