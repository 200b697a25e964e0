"""The item resources: what a client may ask for, and what becomes of it.

Handlers read like the pages they serve: they take a request, use the session of the
registry, and return what shall become JSON.  None of them begins, commits, rolls back
or closes anything, and none knows what database there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import urlencode

import msgspec
from sqlalchemy import Table, bindparam, insert, select, update
from sqlalchemy.orm import Session, scoped_session

from models import MAX_ID, Item
from web.health import Health
from web.openapi import Documentation
from web.router import (
    JSON_HEADERS,
    MAX_BODY,
    JSONRequest,
    Refusal,
    Response,
    Router,
    as_json,
    json_bytes,
)
from web.static import StaticFile

PAGE = Path(__file__).with_name("web") / "page"

PAGE_FILES = [
    ("/", "index.html", "text/html"),
    ("/page.css", "page.css", "text/css"),
    ("/page.js", "page.js", "text/javascript"),
]

MAX_PAGE = 1000
"""Items on a page; a list of more, if it is asked for as a whole, is streamed."""

CHUNK = 500
"""Items in a chunk of a stream."""

ItemId = Annotated[int, msgspec.Meta(ge=1, le=MAX_ID, description="The id of an item.")]

# PostgreSQL cannot store NUL in a text.
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=16, pattern=r"^[^\x00]*$")]
Limit = Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE, description="At most so many items.")]
After = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID, description="Only items with a larger id.")]


class NewItem(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends to create an item, which is named after its id if need be."""

    name: Name | msgspec.UnsetType = msgspec.UNSET


class ItemState(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends to replace an item."""

    name: Name


class ItemChange(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends to change an item; what is left out stays as it is."""

    name: Name | msgspec.UnsetType = msgspec.UNSET


class Page(msgspec.Struct, forbid_unknown_fields=True):
    """Which items a list shall have; all of them by default."""

    limit: Limit | msgspec.UnsetType = msgspec.UNSET
    after: After | msgspec.UnsetType = msgspec.UNSET


class ItemView(msgspec.Struct):
    """An item as clients see it."""

    id: int
    name: str | None


class ItemList(msgspec.Struct):
    """Items in the order of their ids."""

    items: Sequence[ItemView]


# Rows of the table rather than objects, on the session's own connection: for a request that
# shows them and forgets them they cost a third.
TABLE = cast(Table, Item.__table__)
ALL = select(TABLE.c.id, TABLE.c.name).order_by(TABLE.c.id).limit(bindparam("count"))
LATER = ALL.where(TABLE.c.id > bindparam("after"))
ONE = select(TABLE.c.id, TABLE.c.name).where(TABLE.c.id == bindparam("key"))
NEW = insert(TABLE).values(name=bindparam("name"))
RENAME = update(TABLE).where(TABLE.c.id == bindparam("key")).values(name=bindparam("name"))


class Items:
    """The item resources.

    :param session: the registry in which the session of the request is found.
    """

    def __init__(self, session: scoped_session[Session]) -> None:
        self.session = session

    def create(self, request: JSONRequest, body: NewItem) -> ItemView:
        """Create an item."""
        name = None if body.name is msgspec.UNSET else body.name
        connection = self.session.connection()
        made: Any = connection.execute(NEW, {"name": name})
        (id,) = made.inserted_primary_key
        if name is None:
            name = f"Item #{id}"
            connection.execute(RENAME, {"key": id, "name": name})
        return ItemView(id, name)

    def list(self, request: JSONRequest, query: Page) -> ItemList | Response:
        """List all items, or a page of them."""
        after = None if query.after is msgspec.UNSET else query.after
        limit = MAX_PAGE if query.limit is msgspec.UNSET else query.limit
        items = self.fetch(after, limit + 1)
        if len(items) <= limit:
            return ItemList(items)
        if query.limit is msgspec.UNSET:
            return Response(200, {**JSON_HEADERS}, written(self.onwards(items)))
        shown = items[:limit]
        return as_json(ItemList(shown), headers={"Link": next_page(limit, shown[-1].id)})

    def show(self, request: JSONRequest, id: ItemId) -> ItemView:
        """Show an item."""
        found = self.session.connection().execute(ONE, {"key": id}).first()
        if found is None:
            raise Refusal(404, "not found")
        return ItemView(*found)

    def replace(self, request: JSONRequest, id: ItemId, body: ItemState) -> ItemView:
        """Replace an item by one with another name."""
        item = self.lock(request, id)
        item.name = body.name
        return view(item)

    def change(self, request: JSONRequest, id: ItemId, body: ItemChange) -> ItemView:
        """Change what is given of an item."""
        item = self.lock(request, id)
        if body.name is not msgspec.UNSET:
            item.name = body.name
        return view(item)

    def delete(self, request: JSONRequest, id: ItemId) -> None:
        """Delete an item."""
        self.session.delete(self.lock(request, id))

    def lock(self, request: JSONRequest, id: int) -> Item:
        """Find an item that is to be changed, and keep rivals away until it is."""
        item = self.session.get(Item, id, with_for_update=True)
        if item is None:
            raise Refusal(404, "not found")
        request.require(view(item))
        return item

    def fetch(self, after: int | None, count: int) -> Sequence[ItemView]:
        """Fetch the first *count* items, of all or of those after a key."""
        query = ALL if after is None else LATER
        found = self.session.connection().execute(query, {"after": after, "count": count})
        return [ItemView(id, name) for id, name in found.all()]

    def onwards(self, items: Sequence[ItemView]) -> Iterator[Sequence[ItemView]]:
        """Yield *items*, and then all that come after them."""
        # By key rather than from one cursor: no transaction stays open as long as the
        # slowest client reads, and nothing is left to be fetched when one hangs up.  What
        # is there all the time is listed once, as it was when its chunk was read.
        while items:
            yield items
            items = self.fetch(items[-1].id, CHUNK)


def view(item: Item) -> ItemView:
    return ItemView(item.id, item.name)


def written(chunks: Iterable[Sequence[ItemView]]) -> Iterator[bytes]:
    """Write an `ItemList` chunk by chunk: no JSON until it is whole."""
    separator = b'{"items": ['
    for items in chunks:
        yield separator + json_bytes(items)[1:-1]
        separator = b", "
    yield b"]}"


def next_page(limit: int, after: int) -> str:
    """Say in a Link (RFC 8288, 3) where the next page is.

    The reference is relative to the request's own URL (RFC 3986, 5.2.2), as the client
    knows it: right behind any prefix and any proxy.
    """
    return f'<?{urlencode({"limit": limit, "after": after})}>; rel="next"'


def make_app(
    session: scoped_session[Session],
    *,
    probe: Callable[[], object] = bool,
    max_body: int = MAX_BODY,
) -> Router:
    """Make the WSGI application that serves items.

    :param session: the registry in which handlers find the session of the request.
    :param probe: called for ``/healthz``, in a thread of its own; it raises where the
        database does not serve.  By default the database is not asked.
    :param max_body: bytes that a request's body may have; a longer one is a 413.
    """
    items = Items(session)
    router = Router(max_body)
    link = {"Link": 'The next page, if there is one: a relative reference with rel="next".'}
    router.add("GET", "/", items.list, headers=link)
    router.add("POST", "/", items.create)
    router.add("GET", "/{id}", items.show, conditional=True)
    router.add("PUT", "/{id}", items.replace, conditional=True)
    router.add("PATCH", "/{id}", items.change, conditional=True)
    router.add("DELETE", "/{id}", items.delete, conditional=True)
    for pattern, name, kind in PAGE_FILES:
        show = StaticFile(PAGE / name, kind).show
        router.add("GET", pattern, show, media_type=kind, conditional=True, name=f"page_{kind[5:]}")
    router.add("GET", "/healthz", Health(probe).show)
    router.add("GET", "/openapi.json", Documentation(router).show, conditional=True)
    return router
