"""The item endpoints.

A handler takes a request, uses the session of the registry, and returns what is sent as JSON.  It
reads columns and writes objects.  It never begins, commits, rolls back or closes anything.
"""

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
"""Items on a page; a longer list without a limit is streamed."""

BATCH = 500
"""Items in each chunk of a stream."""

MAX_COUNT = 10_000
"""The largest number that is counted, which takes a few milliseconds."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Unicode's default ignorable code points of the first plane, and the Braille blank.
_INVISIBLE = re.compile(
    r"[\s\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8]*"
)


def check_text(name: str) -> str:
    """Return *name*, which may be a part of a name.

    :raises InvalidField: if it is too long or has control characters.
    """
    if len(name) > MAX_NAME:
        message = f"name must have at most {MAX_NAME} characters"
        raise InvalidField(message, "name", "too_long", MAX_NAME)
    if _CONTROL.search(name):
        raise InvalidField("name must have no control characters", "name", "control_character")
    return name


def clean_name(name: str) -> str:
    """Return *name* without whitespace around it.

    :raises InvalidField: also if nothing of it is visible.
    """
    name = check_text(name.strip())
    if _INVISIBLE.fullmatch(name):
        raise InvalidField("name must have a visible character", "name", "blank")
    return name


class ItemChange(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a PATCH; a field that is left out stays as it is."""

    name: str | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.name is not msgspec.UNSET:
            self.name = clean_name(self.name)


class NewItem(ItemChange):
    """The body of a POST; without a name, the item is named after its id."""


class ItemState(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a PUT."""

    name: str

    def __post_init__(self) -> None:
        self.name = clean_name(self.name)


class Filter(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Items between two ids whose names begin with a prefix."""

    after: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)] = 0
    before: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID + 1)] = MAX_ID + 1
    name: str = ""

    def __post_init__(self) -> None:
        self.name = check_text(self.name.strip())


class Selection(Filter):
    """How many of these items to list, and in which order."""

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
    """A number of items; if it is not exact, there are more."""

    count: int
    exact: bool


class Items:
    """The item endpoints.

    :param session: the registry of the requests' sessions.
    """

    def __init__(self, session: scoped_session[Session]) -> None:
        self.session = session

    def create(self, request: JSONRequest, body: NewItem) -> Response:
        item = Item(name=None if body.name is msgspec.UNSET else body.name)
        self.session.add(item)
        self.session.flush()  # sets the id
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
        counted = matching(query, select(COLUMNS.id)).limit(MAX_COUNT + 1).subquery()
        count = self.session.execute(select(func.count()).select_from(counted)).scalar_one()
        return Count(min(count, MAX_COUNT), exact=count <= MAX_COUNT)

    def show(self, request: JSONRequest, id: int) -> ItemView:
        row = self.session.execute(ROWS.where(COLUMNS.id == id)).first()
        if row is None:
            raise HTTPError(404, "not found")
        return ItemView(*row)

    def replace(self, request: JSONRequest, id: int, body: ItemState) -> ItemView:
        item = self.get_for_update(request, id)
        item.name = body.name
        return view(item)

    def change(self, request: JSONRequest, id: int, body: ItemChange) -> ItemView:
        item = self.get_for_update(request, id)
        if body.name is not msgspec.UNSET:
            item.name = body.name
        return view(item)

    def delete(self, request: JSONRequest, id: int) -> None:
        self.session.delete(self.get_for_update(request, id))

    def get_for_update(self, request: JSONRequest, id: int) -> Item:
        """Get and lock an item, if it is in the state that the client expects."""
        item = self.session.get(Item, id, with_for_update=True)
        if item is None:
            raise HTTPError(404, "not found")
        request.require_current(view(item))
        return item

    def fetch(self, query: Selection, count: int) -> list[ItemView]:
        """Fetch the first *count* of the items."""
        first = COLUMNS.id.desc() if query.order == "newest" else COLUMNS.id
        statement = matching(query, ROWS).order_by(first).limit(count)
        return [ItemView(*row) for row in self.session.execute(statement).all()]

    def batches(self, query: Selection, items: list[ItemView]) -> Iterator[list[ItemView]]:
        """Yield *items*, and then all that follow them."""
        # By key rather than from one cursor: nothing is left to fetch when a client disconnects,
        # and on a database server no transaction is open while it reads.
        while items:
            yield items
            items = self.fetch(following(query, items[-1]), BATCH)


COLUMNS = Item.__table__.c  # rows of the table cost less than those of the class
ROWS = select(COLUMNS.id, COLUMNS.name)

Statement = TypeVar("Statement", bound=Select[*tuple[Any, ...]])


def view(item: Item) -> ItemView:
    return ItemView(item.id, item.name)


def matching(query: Filter, statement: Statement) -> Statement:
    """Restrict *statement* to the items that match *query*."""
    if query.after:
        statement = statement.where(COLUMNS.id > query.after)
    if query.before <= MAX_ID:
        statement = statement.where(COLUMNS.id < query.before)
    if query.name:  # a range of the index, up to the prefix padded with the last character
        last = query.name.ljust(MAX_NAME, "\U0010ffff")
        statement = statement.where(COLUMNS.name.between(query.name, last))
    return statement


def following(query: Selection, last: ItemView) -> Selection:
    """Return the query for the items after *last*."""
    key = "before" if query.order == "newest" else "after"
    return msgspec.structs.replace(query, **{key: last.id})


def next_link(query: Selection, last: ItemView) -> str:
    """Return a Link to the next page (RFC 8288, 3).

    It is relative to the URL that the client used (RFC 3986, 5.2.2), so it is right behind any
    prefix and any proxy.
    """
    return f'<?{urlencode(msgspec.to_builtins(following(query, last)))}>; rel="next"'


def make_app(
    session: scoped_session[Session], probe: Callable[[], object] = bool, max_body: int = MAX_BODY
) -> Router:
    """Make the WSGI application that serves items.

    :param session: the registry of the requests' sessions.
    :param probe: called for ``/readyz``, in its own thread; it raises if the database is not
        available.  By default the database is not queried.
    :param max_body: the largest number of bytes in a request's body; more is a 413.
    """
    items, health = Items(session), Health(probe)
    router = Router(max_body)
    router.add("GET", "/{id}", items.show, etag=True)
    router.add("PUT", "/{id}", items.replace)  # a tag would name the body that the client sent
    router.add("PATCH", "/{id}", items.change, etag=True)
    router.add("DELETE", "/{id}", items.delete)
    router.add("GET", "/", items.index)
    router.add("POST", "/", items.create)
    router.add("GET", "/count", items.count)
    router.add("GET", "/livez", health.live)
    router.add("GET", "/readyz", health.ready)
    router.add("GET", "/healthz", health.ready)
    for path, name, media_type in FILES:
        file = StaticFile((WEB / name).read_bytes(), media_type)
        router.add("GET", path, file.show, media_type=media_type)
    return router
