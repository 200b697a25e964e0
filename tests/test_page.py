"""The page for people, as somebody in a real browser sees it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import processes
import pytest
from databases import free_port
from sessionscope import CommitOutcomeUnknown, __version__
from sqlalchemy import Engine, delete, insert, select, update
from sqlalchemy.exc import TimeoutError as PoolTimeout
from support import PATIENCE, names

from models import Item
from serve import Service, create_app
from web.errors import errors_as_json

try:
    from browser import Missing, Visitor, chromium, visiting, visiting_app
    from playwright.sync_api import Browser, expect
except ImportError as error:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip(f"left out: {error}", allow_module_level=True)

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    Wrap = Callable[[WSGIApplication], WSGIApplication]

pytestmark = pytest.mark.long

TOO_LONG = "Name must have at most 16 characters."
NO_RESPONSE = "The service does not respond. Trying again…"
WIDTHS = [360, 390, 768, 1280]

HOSTILE = [
    "<b>bold</b>",
    "<img src=x>",
    "<script>x",
    '"><i>',
    "&lt;u&gt;",
    "${1}{{2}}",
    "\u202egnp.exe",
    "a\nb",
    "Ã\u0301\u0302\u0303\u0304\u0305\u0306",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        with chromium() as running:
            yield running
    except Missing as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"left out: {missing}")


class Visit(Protocol):
    def __call__(
        self, path: str = "/", *, wrap: Wrap = ..., **options: Any
    ) -> AbstractContextManager[Visitor]: ...


@pytest.fixture
def visit(browser: Browser, sqlite_url: str, outside: Engine) -> Iterator[Visit]:
    """Visit the whole service on an empty SQLite file, with something around it if need be."""
    yield from visits(browser, create_app(sqlite_url))


@pytest.fixture
def visit_demo(browser: Browser, sqlite_url: str, outside: Engine) -> Iterator[Visit]:
    """The same with the panel that shows sessions."""
    yield from visits(browser, create_app(sqlite_url, demo=True))


def visits(browser: Browser, service: Service) -> Iterator[Visit]:
    def visit(
        path: str = "/", *, wrap: Wrap = lambda app: app, **options: Any
    ) -> AbstractContextManager[Visitor]:
        return visiting_app(browser, wrap(service), path, **options)

    yield visit
    service.dispose()


def store(engine: Engine, *names: str | None) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Item), [{"name": name} for name in names])


def store_many(engine: Engine, count: int) -> list[str]:
    """Store so many items; their names."""
    made = [f"Item #{number}" for number in range(1, count + 1)]
    store(engine, *made)
    return made


def rename_behind(engine: Engine, old: str, new: str) -> None:
    """Rename an item as somebody else would."""
    with engine.begin() as connection:
        connection.execute(update(Item).where(Item.name == old).values(name=new))


def delete_behind(engine: Engine, *names: str) -> None:
    with engine.begin() as connection:
        connection.execute(delete(Item).where(Item.name.in_(names)))


def before(method: str, act: Callable[[], object]) -> Wrap:
    """Do *act* whenever such a request has arrived, before the service gets it."""

    def wrap(app: WSGIApplication) -> WSGIApplication:
        def acting(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            if environ["REQUEST_METHOD"] == method:
                act()
            return app(environ, start_response)

        return acting

    return wrap


def failing_after(method: str, error: Exception, lasts: threading.Event | None = None) -> Wrap:
    """Have the service do what such a request asks for, and then fail with *error*.

    Once, or as long as it *lasts*.
    """
    once = iter([True])

    def fails() -> bool:
        return next(once, False) if lasts is None else lasts.is_set()

    def wrap(app: WSGIApplication) -> WSGIApplication:
        def failing(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            if environ["REQUEST_METHOD"] != method or not fails():
                return app(environ, start_response)
            list(app(environ, lambda *head: bool))
            raise error

        return errors_as_json(failing)

    return wrap


def unavailable(busy: threading.Event) -> Wrap:
    """Have the service fail as without a database while *busy* is set."""

    def wrap(app: WSGIApplication) -> WSGIApplication:
        def failing(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            if busy.is_set():
                raise PoolTimeout("no connection")
            return app(environ, start_response)

        return errors_as_json(failing)

    return wrap


def mounted(prefix: str) -> Wrap:
    """Serve the application under *prefix*, and nothing elsewhere."""

    def wrap(app: WSGIApplication) -> WSGIApplication:
        def at_prefix(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path != prefix and not path.startswith(f"{prefix}/"):
                start_response("404 Not Found", [("Content-Length", "0")])
                return []
            environ["SCRIPT_NAME"] = prefix
            environ["PATH_INFO"] = path.removeprefix(prefix)
            return app(environ, start_response)

        return at_prefix

    return wrap


def not_the_service(method: str) -> Wrap:
    """Have a login page respond to such requests, those for the page itself left out."""

    def wrap(app: WSGIApplication) -> WSGIApplication:
        def responding(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            is_asked = environ.get("HTTP_ACCEPT") == "application/json"
            if environ["REQUEST_METHOD"] != method or not is_asked:
                return app(environ, start_response)
            start_response("200 OK", [("Content-Type", "text/html"), ("Content-Length", "5")])
            return [b"Login"]

        return responding

    return wrap


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What the requests wait for that `held` holds."""
    event = threading.Event()
    yield event
    event.set()


def held(released: threading.Event, method: str = "POST") -> Wrap:
    return before(method, lambda: released.wait(PATIENCE))


# What is there


def test_the_items_are_shown(visit: Visit, outside: Engine) -> None:
    """The page shows the items that are stored, and one without a name as such."""
    store(outside, "lamp", "chair", None)
    with visit() as visitor:
        visitor.sees("lamp", "chair", "")
        expect(visitor.rows.locator(".number")).to_have_text(["1", "2", "3"])
        expect(visitor.page).to_have_title("Items")


def test_an_empty_list_says_so(visit: Visit) -> None:
    """Where there is no item the page says so and offers no other pages."""
    with visit() as visitor:
        expect(visitor.list.get_by_text("There is nothing here yet.")).to_be_visible()
        expect(visitor.button("Next")).to_be_hidden()


def test_what_others_did_is_shown_on_demand(visit: Visit, outside: Engine) -> None:
    """Refresh shows what others changed meanwhile, and leaves an open editor as it is."""
    store(outside, "lamp", "chair", "desk")
    with visit() as visitor:
        visitor.button("Rename chair").click()
        visitor.editor("chair").fill("stool")
        delete_behind(outside, "lamp")
        store(outside, "sofa")
        visitor.button("Refresh").click()
        expect(visitor.rows).to_have_count(3)
        visitor.sees("chair", "desk", "sofa")
        expect(visitor.editor("chair")).to_have_value("stool")


def test_an_open_editor_learns_what_others_did(visit: Visit, outside: Engine) -> None:
    """An editor whose item turns out to be changed says so before anything is saved."""
    store(outside, "lamp")
    with visit() as visitor:
        visitor.button("Rename lamp").click()
        rename_behind(outside, "lamp", "chair")
        visitor.button("Refresh").click()
        visitor.is_told(
            "Someone else changed this to “\u2068chair\u2069”. Save again to overwrite."
        )
        expect(visitor.editor("chair")).to_have_value("lamp")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text(visit: Visit, outside: Engine, name: str) -> None:
    """A name is shown as the text that it is, in the list, in its forms and in what is said."""
    store(outside, name)
    with visit() as visitor:
        expect(visitor.names).to_have_count(1)
        assert visitor.names.all_text_contents() == [name]
        visitor.rows.locator("button.rename").click()
        visitor.rows.locator("button[type=reset]").first.click()
        visitor.rows.locator("button.delete").click()
        visitor.button("Delete").click()
        expect(visitor.news).to_contain_text("Deleted")
        assert visitor.news.text_content() == f"Deleted “\u2068{name}\u2069”."
        assert visitor.page.locator("main :is(b, i, u, img, script)").count() == 0


# Pages


def test_pages_go_forward_and_back(visit: Visit, outside: Engine) -> None:
    """45 items are shown in three pages, forward and back again, and the heading says which."""
    items = store_many(outside, 45)
    with visit() as visitor:
        expect(visitor.heading).to_have_text("1\u201320 of 45")
        visitor.sees(*items[:20])
        expect(visitor.button("Previous")).to_be_disabled()
        visitor.button("Next").click()
        expect(visitor.heading).to_have_text("21\u201340 of 45")
        visitor.sees(*items[20:40])
        visitor.button("Next").click()
        expect(visitor.heading).to_have_text("41\u201345 of 45")
        visitor.sees(*items[40:])
        expect(visitor.button("Next")).to_be_disabled()
        visitor.button("Previous").click()
        visitor.sees(*items[20:40])
        visitor.button("Previous").click()
        visitor.sees(*items[:20])


def test_the_address_keeps_the_place(visit: Visit, outside: Engine) -> None:
    """Reload stays on the page, and Back and Forward go through those that were shown."""
    items = store_many(outside, 45)
    with visit() as visitor:
        visitor.button("Next").click()
        visitor.sees(*items[20:40])
        visitor.page.reload()
        visitor.sees(*items[20:40])
        visitor.search("Item #3")
        visitor.sees("Item #3", *items[29:39])
        visitor.order.select_option("Newest first")
        visitor.sees(*items[38:28:-1], "Item #3")
        visitor.page.reload()
        visitor.sees(*items[38:28:-1], "Item #3")
        expect(visitor.search_field).to_have_value("Item #3")
        for _ in range(2):
            visitor.page.go_back()
        visitor.sees(*items[20:40])
        expect(visitor.search_field).to_have_value("")
        expect(visitor.order).to_have_value("")
        visitor.page.go_forward()
        visitor.sees("Item #3", *items[29:39])


def test_the_address_says_what_to_show(visit: Visit, outside: Engine) -> None:
    """Who is sent an address sees that page; what makes no sense in it is ignored."""
    items = store_many(outside, 45)
    with visit("/?order=newest&before=26&limit=3&after=x") as visitor:
        visitor.sees(*items[24:4:-1])
        expect(visitor.heading).to_have_text("21\u201340 of 45")
        expect(visitor.order).to_have_value("newest")


@pytest.mark.parametrize(
    ("query", "heading"),
    [("after=2147483647", "26\u201345 of 45"), ("order=newest&before=0", "26\u201345 of 45")],
)
def test_an_address_beyond_the_end_shows_the_last_page(
    visit: Visit, outside: Engine, query: str, heading: str
) -> None:
    """No id is too large, nor too small, for the page before it."""
    store_many(outside, 45)
    with visit(f"/?{query}") as visitor:
        expect(visitor.heading).to_have_text(heading)
        visitor.is_told()


def test_the_newest_can_come_first(visit: Visit, outside: Engine) -> None:
    """Newest first, the pages go the other way, and a new item is on the first."""
    items = store_many(outside, 45)[::-1]
    with visit() as visitor:
        visitor.order.select_option("Newest first")
        visitor.sees(*items[:20])
        visitor.button("Next").click()
        visitor.sees(*items[20:40])
        visitor.add("lamp")
        visitor.button("Show it").click()
        visitor.sees("lamp", *items[:19])
        visitor.button("Next").click()
        visitor.button("Previous").click()
        visitor.sees("lamp", *items[:19])


def test_items_are_found_by_name(visit: Visit, outside: Engine) -> None:
    """A search shows whose name begins so, says so if there is none, and is left by clearing."""
    items = store_many(outside, 45)
    with visit() as visitor:
        visitor.search("Item #1")
        visitor.sees("Item #1", *items[9:19])
        expect(visitor.heading).to_have_text("1\u201311 of 11")
        visitor.search("lamp")
        expect(visitor.list.get_by_text("No name begins with “\u2068lamp\u2069”.")).to_be_visible()
        expect(visitor.heading).to_have_text("No items")
        visitor.search_field.fill("")
        visitor.sees(*items[:20])


def test_a_search_that_makes_no_sense_is_told(visit: Visit, outside: Engine) -> None:
    """What the service does not search for is told beside the field, until it is mended."""
    store(outside, "lamp")
    with visit(allowed=["422"]) as visitor:
        visitor.search("a name that is too long")
        visitor.is_told(TOO_LONG)
        expect(visitor.search_field).to_have_attribute("aria-invalid", "true")
        visitor.search("la")
        visitor.sees("lamp")
        visitor.is_told()


def test_many_items_are_not_counted(visit: Visit, outside: Engine) -> None:
    """Beyond 10,000 items the heading says so, and beyond the first 10,000 how many it shows."""
    store_many(outside, 10_050)
    with visit() as visitor:
        expect(visitor.heading).to_have_text("1\u201320 of more than 10,000")
        visitor.page.goto(f"{visitor.page.url}?after=10005")
        expect(visitor.heading).to_have_text("20 of more than 10,000")


def test_an_empty_page_gives_way(visit: Visit, outside: Engine) -> None:
    """When the last item of the last page is deleted, the page before is shown."""
    items = store_many(outside, 21)
    with visit() as visitor:
        visitor.button("Next").click()
        visitor.button("Delete Item #21").click()
        visitor.button("Delete").click()
        visitor.sees(*items[:20])


def test_an_item_added_elsewhere_can_be_shown(visit: Visit, outside: Engine) -> None:
    """An item that is added to a later page is a click away, and from there it goes back."""
    items = store_many(outside, 45)
    with visit() as visitor:
        visitor.search("Item #4")
        visitor.add("lamp")
        visitor.button("Show it").click()
        visitor.sees(*items[26:], "lamp")
        expect(visitor.button("Show it")).to_be_hidden()
        expect(visitor.heading).to_be_focused()
        expect(visitor.heading).to_have_text("27\u201346 of 46")
        visitor.button("Previous").click()
        visitor.sees(*items[6:26])
        visitor.button("Previous").click()
        visitor.sees(*items[:20])


def test_old_news_go(visit: Visit, outside: Engine) -> None:
    """What was said of the last change, and the way to it, goes with the next that is done."""
    store_many(outside, 40)
    with visit(allowed=["422"]) as visitor:
        visitor.add("lamp")
        expect(visitor.button("Show it")).to_be_visible()
        visitor.add("a name that is too long")
        visitor.is_told(TOO_LONG)
        expect(visitor.news).to_be_empty()
        expect(visitor.button("Show it")).to_be_hidden()
        visitor.add("chair")
        expect(visitor.news).not_to_be_empty()
        visitor.button("Next").click()
        expect(visitor.news).to_be_empty()


# Changes


def test_an_item_is_added(visit: Visit, outside: Engine) -> None:
    """A name and Add make an item; then the field is empty and ready for the next."""
    with visit() as visitor:
        visitor.add("lamp")
        visitor.sees("lamp")
        expect(visitor.news).to_have_text("Added “\u2068lamp\u2069”, number 1.")
        expect(visitor.field).to_have_value("")
        expect(visitor.field).to_be_focused()
    assert names(outside) == ["lamp"]


def test_an_item_is_added_without_a_name(visit: Visit, outside: Engine) -> None:
    """Add alone makes an item that is named after its number."""
    with visit() as visitor:
        visitor.add()
        visitor.sees("Item #1")
    assert names(outside) == ["Item #1"]


def test_characters_are_counted_as_the_service_does(visit: Visit, outside: Engine) -> None:
    """A name may have 16 characters, however many units JavaScript makes of them."""
    with visit() as visitor:
        visitor.add("🪑" * 16)
        visitor.sees("🪑" * 16)
    assert names(outside) == ["🪑" * 16]


def test_a_wrong_name_is_told_beside_the_form(visit: Visit, outside: Engine) -> None:
    """A name that is refused is told beside the form until it is changed; nothing is lost."""
    with visit(allowed=["422"]) as visitor:
        visitor.add("a name that is too long")
        visitor.is_told(TOO_LONG)
        expect(visitor.page.locator("#add").get_by_role("alert")).to_have_text(TOO_LONG)
        expect(visitor.field).to_have_value("a name that is too long")
        expect(visitor.field).to_be_focused()
        expect(visitor.field).to_have_attribute("aria-invalid", "true")
        visitor.field.fill("a shorter name")
        visitor.is_told()
        expect(visitor.field).to_have_attribute("aria-invalid", "false")
        visitor.button("Add").click()
        visitor.sees("a shorter name")
    assert names(outside) == ["a shorter name"]


def test_a_name_is_trimmed(visit: Visit, outside: Engine) -> None:
    """Blanks around a name are left out, and blanks alone are no name."""
    with visit() as visitor:
        visitor.add(" lamp ")
        visitor.sees("lamp")
        visitor.add("  ")
        visitor.sees("lamp", "Item #2")
        expect(visitor.field).to_have_value("")


def test_an_item_is_renamed(visit: Visit, outside: Engine) -> None:
    """Rename opens an editor in the row; Save stores the new name and returns to the button."""
    store(outside, "lamp", "chair")
    with visit() as visitor:
        visitor.button("Rename lamp").click()
        expect(visitor.editor("lamp")).to_be_focused()
        expect(visitor.editor("lamp")).to_have_value("lamp")
        visitor.page.keyboard.type("torch")  # what is there is selected
        visitor.page.keyboard.press("Enter")
        visitor.sees("torch", "chair")
        expect(visitor.button("Rename torch")).to_be_focused()
        expect(visitor.news).to_have_text("Renamed to “\u2068torch\u2069”.")
    assert names(outside) == ["torch", "chair"]


@pytest.mark.parametrize("leave", ["Escape", "Cancel"])
def test_a_rename_can_be_left(visit: Visit, outside: Engine, leave: str) -> None:
    """Escape and Cancel leave the editor, change nothing and return to the button."""
    store(outside, "lamp")
    with visit() as visitor:
        visitor.button("Rename lamp").click()
        visitor.editor("lamp").fill("torch")
        if leave == "Escape":
            visitor.editor("lamp").press("Escape")
        else:
            visitor.button("Cancel").click()
        expect(visitor.button("Rename lamp")).to_be_focused()
        visitor.sees("lamp")
    assert names(outside) == ["lamp"]


def test_what_was_typed_when_it_was_saved_is_stored(
    visit: Visit, outside: Engine, released: threading.Event
) -> None:
    """A rename stores what the editor had when it was saved, whatever is typed meanwhile."""
    store(outside, "lamp")
    with visit(wrap=held(released, "PATCH")) as visitor:
        visitor.rename("lamp", "torch")
        visitor.editor("lamp").fill("candle")
        released.set()
        visitor.sees("torch")
    assert names(outside) == ["torch"]


def test_the_focus_is_not_taken_away(
    visit: Visit, outside: Engine, released: threading.Event
) -> None:
    """Who goes on to something else while a rename is being made is not called back."""
    store(outside, "lamp")
    with visit(wrap=held(released, "PATCH")) as visitor:
        visitor.rename("lamp", "torch")
        visitor.field.fill("chair")
        released.set()
        visitor.sees("torch")
        expect(visitor.field).to_be_focused()


def test_an_empty_name_is_told_in_the_row(visit: Visit, outside: Engine) -> None:
    """A rename to nothing is told in the row, and the editor stays open."""
    store(outside, "lamp")
    with visit(allowed=["422"]) as visitor:
        visitor.rename("lamp", "")
        message = "Name must have a visible character."
        expect(visitor.rows.get_by_role("alert")).to_have_text(message)
        expect(visitor.editor("lamp")).to_be_focused()
    assert names(outside) == ["lamp"]


def test_an_item_is_deleted(visit: Visit, outside: Engine) -> None:
    """Delete asks once more, deletes, and moves on to the item above."""
    store(outside, "lamp", "chair", "desk")
    with visit() as visitor:
        visitor.button("Delete chair").click()
        expect(visitor.page.get_by_role("group", name="Delete chair?")).to_be_visible()
        visitor.button("Delete").click()
        visitor.sees("lamp", "desk")
        expect(visitor.button("Delete lamp")).to_be_focused()
        expect(visitor.news).to_have_text("Deleted “\u2068chair\u2069”.")
    assert names(outside) == ["lamp", "desk"]


def test_the_first_item_is_deleted(visit: Visit, outside: Engine) -> None:
    """Where there is no item above the one that is deleted, the list's heading is next."""
    store(outside, "lamp")
    with visit() as visitor:
        visitor.button("Delete lamp").click()
        visitor.button("Delete").click()
        expect(visitor.heading).to_be_focused()
        expect(visitor.list.get_by_text("There is nothing here yet.")).to_be_visible()
    assert names(outside) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_two_taps_in_one_place_never_delete(visit: Visit, outside: Engine, width: int) -> None:
    """Cancel lies where Delete was: who taps twice anywhere on Delete has deleted nothing."""
    items = ["lamp", "W" * 16]
    store(outside, *items)
    size = {"width": width, "height": 800}
    with visit(viewport=size, has_touch=True) as visitor:
        for item in items:
            box = visitor.button(f"Delete {item}").bounding_box()
            assert box is not None
            for x in (box["x"] + 4, box["x"] + box["width"] - 4):  # its corners are round
                for y in (box["y"] + 4, box["y"] + box["height"] - 4):
                    visitor.page.touchscreen.tap(x, y)
                    expect(visitor.page.get_by_role("group")).to_be_visible()
                    visitor.page.touchscreen.tap(x, y)
                    expect(visitor.page.get_by_role("group")).to_be_hidden()
    assert names(outside) == items


def test_a_key_held_down_never_deletes(visit: Visit, outside: Engine) -> None:
    """Neither a double click on Delete nor Enter held down on it deletes anything."""
    store(outside, "lamp")
    with visit() as visitor:
        visitor.button("Delete lamp").dblclick()
        visitor.button("Delete lamp").focus()
        for _ in range(4):
            visitor.page.keyboard.press("Enter")
        expect(visitor.button("Delete lamp")).to_be_focused()
        visitor.sees("lamp")
    assert names(outside) == ["lamp"]


def test_a_double_click_adds_once(visit: Visit, outside: Engine, released: threading.Event) -> None:
    """While an item is being added its form is busy, and a second click is no second item."""
    with visit(wrap=held(released)) as visitor:
        visitor.field.fill("lamp")
        visitor.button("Add").dblclick()
        expect(visitor.page.locator("#add")).to_have_attribute("aria-busy", "true")
        released.set()
        visitor.sees("lamp")
        expect(visitor.page.locator("#add")).to_have_attribute("aria-busy", "false")
    assert names(outside) == ["lamp"]


def test_the_next_name_can_be_typed_meanwhile(visit: Visit, released: threading.Event) -> None:
    """What is typed while an item is being added stays in the field."""
    with visit(wrap=held(released)) as visitor:
        visitor.add("lamp")
        visitor.field.fill("chair")
        released.set()
        visitor.sees("lamp")
        expect(visitor.field).to_have_value("chair")


# Lost races


def test_a_change_by_somebody_else_is_told(visit: Visit, outside: Engine) -> None:
    """Who renames an item that changed since they saw it is told so, and may then insist."""
    store(outside, "lamp")
    with visit() as visitor:
        visitor.sees("lamp")
        rename_behind(outside, "lamp", "chair")
        visitor.rename("lamp", "torch")
        visitor.is_told(
            "Someone else changed this to “\u2068chair\u2069”. Save again to overwrite."
        )
        assert names(outside) == ["chair"]
        expect(visitor.editor("chair")).to_have_value("torch")
        visitor.button("Save").click()
        visitor.sees("torch")
        visitor.is_told()
    assert names(outside) == ["torch"]


def test_a_change_in_the_last_moment_is_told(visit: Visit, outside: Engine) -> None:
    """An item that changes when the new name is already on its way keeps the other's name."""
    store(outside, "lamp")
    rival = before("PATCH", lambda: rename_behind(outside, "lamp", "chair"))
    with visit(wrap=rival, allowed=["412"]) as visitor:
        visitor.rename("lamp", "torch")
        visitor.is_told(
            "Someone else changed this to “\u2068chair\u2069”. Save again to overwrite."
        )
    assert names(outside) == ["chair"]


def test_what_has_changed_is_not_deleted(visit: Visit, outside: Engine) -> None:
    """Who deletes an item that changed since they saw it is told so and asked about that."""
    store(outside, "lamp")
    with visit() as visitor:
        visitor.button("Delete lamp").click()
        rename_behind(outside, "lamp", "chair")
        visitor.button("Delete").click()
        visitor.is_told("Someone else changed this to “\u2068chair\u2069”. Delete it anyway?")
        expect(visitor.page.get_by_role("group", name="Delete chair?")).to_be_visible()
    assert names(outside) == ["chair"]


def test_a_deletion_by_somebody_else_is_told(visit: Visit, outside: Engine) -> None:
    """Who renames an item that is gone is told so above the list, where it is no more."""
    store(outside, "lamp", "chair")
    with visit(allowed=["404"]) as visitor:
        visitor.sees("lamp", "chair")
        delete_behind(outside, "lamp")
        visitor.rename("lamp", "torch")
        visitor.is_told("“\u2068lamp\u2069” has already been deleted.")
        visitor.sees("chair")
        expect(visitor.heading).to_be_focused()


# Failures

LOST = CommitOutcomeUnknown("the connection died")


def test_an_item_whose_response_is_lost_is_added_once(visit: Visit, outside: Engine) -> None:
    """Where nobody knows whether an item was added the page repeats that, and adds it once."""
    lost = threading.Event()
    lost.set()
    with visit(wrap=failing_after("POST", LOST, lost), allowed=["503"]) as visitor:
        visitor.add("lamp")
        expect(visitor.trouble).to_contain_text("Trying again…")
        lost.clear()
        expect(visitor.news).to_have_text("Added “\u2068lamp\u2069”, number 1.")
        expect(visitor.trouble).to_be_empty()
        visitor.sees("lamp")
        visitor.is_told()
    assert names(outside) == ["lamp"]


def test_a_rename_whose_response_is_lost_is_repeated(visit: Visit, outside: Engine) -> None:
    """A rename that was made although its response was lost is not told as somebody else's."""
    store(outside, "lamp")
    with visit(wrap=failing_after("PATCH", LOST), allowed=["503"]) as visitor:
        visitor.rename("lamp", "torch")
        expect(visitor.news).to_have_text("Renamed to “\u2068torch\u2069”.")
        visitor.sees("torch")
        visitor.is_told()


def test_a_deletion_whose_response_is_lost_is_repeated(visit: Visit, outside: Engine) -> None:
    """A deletion that was made although its response was lost is told as what it is."""
    store(outside, "lamp")
    with visit(wrap=failing_after("DELETE", LOST), allowed=["503", "404"]) as visitor:
        visitor.button("Delete lamp").click()
        visitor.button("Delete").click()
        expect(visitor.news).to_have_text("Deleted “\u2068lamp\u2069”.")
        expect(visitor.heading).to_have_text("No items")
        visitor.is_told()


@pytest.mark.parametrize("reloaded", [False, True])
def test_who_does_not_want_to_wait_stops(visit: Visit, outside: Engine, reloaded: bool) -> None:
    """Stop ends the repeats; who then adds the same once more has still added it once."""
    lost = threading.Event()
    lost.set()
    # 409: what was stopped in the midst of a repeat may still run in the service.
    with visit(wrap=failing_after("POST", LOST, lost), allowed=["503", "409"]) as visitor:
        visitor.add("lamp")
        visitor.button("Try now").click()
        expect(visitor.trouble).to_contain_text("Trying again…")
        visitor.button("Stop").click()
        visitor.is_told("The service has not confirmed this. It is safe to try again.")
        expect(visitor.trouble).to_be_empty()
        lost.clear()
        if reloaded:
            visitor.page.reload()
        visitor.add("lamp")
        expect(visitor.news).to_have_text("Added “\u2068lamp\u2069”, number 1.")
        visitor.is_told()
        visitor.add("lamp")
        visitor.sees("lamp", "lamp")
    assert names(outside) == ["lamp", "lamp"]


def test_a_browser_that_stores_nothing_adds_items(visit: Visit, outside: Engine) -> None:
    """Where the page may not use the browser's storage it does all but that."""
    forbid = "Object.defineProperty(window, 'sessionStorage', { get() { throw new Error(); } });"
    with visit() as visitor:
        visitor.page.add_init_script(forbid)
        visitor.page.reload()
        visitor.add("lamp")
        visitor.sees("lamp")
    assert names(outside) == ["lamp"]


def test_who_is_offline_stops_once(visit: Visit) -> None:
    """One Stop ends all repeats, and the keyboard goes on from the list's heading."""
    with visit(allowed=["ERR_INTERNET_DISCONNECTED"]) as visitor:
        expect(visitor.heading).to_have_text("No items")
        visitor.page.context.set_offline(True)
        visitor.add("lamp")
        visitor.button("Stop").click()
        visitor.is_told("The service has not confirmed this. It is safe to try again.")
        expect(visitor.trouble).to_be_empty()
        expect(visitor.heading).to_be_focused()


@pytest.mark.parametrize("method", ["POST", "DELETE", "GET"])
def test_a_login_page_is_no_success(visit: Visit, outside: Engine, method: str) -> None:
    """A response that is not the service's is told as such, and nothing is said to be done."""
    store(outside, "lamp")
    with visit(wrap=not_the_service(method)) as visitor:
        if method == "POST":
            visitor.add("chair")
        if method == "DELETE":
            visitor.button("Delete lamp").click()
            visitor.button("Delete").click()
        visitor.is_told("The server responded 200, but not as this service does.")
        expect(visitor.news).to_be_empty()
    assert names(outside) == ["lamp"]


def test_without_a_secure_site_there_are_keys_too(visit: Visit, outside: Engine) -> None:
    """Where the browser has no `randomUUID` the page makes up its keys in another way."""
    with visit(wrap=failing_after("POST", LOST), allowed=["503"]) as visitor:
        visitor.page.evaluate("() => { crypto.randomUUID = undefined; }")
        visitor.add("lamp")
        visitor.sees("lamp")
        visitor.add("lamp")
        visitor.sees("lamp", "lamp")
    assert names(outside) == ["lamp", "lamp"]


def test_a_database_that_is_busy_is_waited_for(visit: Visit, outside: Engine) -> None:
    """The list of a database that is not available is asked for until it is there."""
    store(outside, "lamp")
    busy = threading.Event()
    with visit(wrap=unavailable(busy), allowed=["503"]) as visitor:
        visitor.sees("lamp")
        store(outside, "chair")
        busy.set()
        visitor.button("Refresh").click()
        expect(visitor.trouble).to_have_text("The database is not available. Trying again…")
        busy.clear()
        visitor.sees("lamp", "chair")
        expect(visitor.trouble).to_be_empty()


def test_a_failure_has_an_id(visit: Visit) -> None:
    """A failure of the service itself is told with the id that its log has, and not repeated."""
    broken = failing_after("POST", RuntimeError("a bug"))
    with visit(wrap=broken, allowed=["500"]) as visitor:
        visitor.add("lamp")
        expect(visitor.alerts).to_contain_text("Internal server error. The log has more under ")
        expect(visitor.trouble).to_be_empty()


def test_a_service_that_is_down_is_waited_for(browser: Browser, sqlite_url: str) -> None:
    """While the service is down the page says so; when it is back all is done that was asked."""
    with free_port() as port:
        command = ["--database-url", sqlite_url, "--listen", f"127.0.0.1:{port}"]
        with (
            processes.serve(*command) as server,
            visiting(browser, f"http://127.0.0.1:{port}/", allowed=["ERR_CONNECTION"]) as visitor,
        ):
            visitor.add("lamp")
            visitor.sees("lamp")
            server.process.kill()
            server.process.wait(PATIENCE)
            visitor.rename("lamp", "torch")
            expect(visitor.trouble).to_have_text(NO_RESPONSE)
            visitor.add("chair")
            visitor.button("Refresh").click()
            with processes.serve(*command):
                visitor.sees("torch", "chair")
                expect(visitor.trouble).to_be_empty()
                visitor.is_told()
                visitor.page.context.close()


# Sessions


def test_the_panel_shows_outcomes(visit_demo: Visit) -> None:
    """With --demo the page shows what became of each session, as it happens."""
    with visit_demo() as visitor:
        visitor.add("lamp")
        line = visitor.page.locator("#sessions li").filter(has_text="POST /")
        expect(line).to_have_text(re.compile(r"^POST /COMMIT200, \d+ ms, 1 attempt$"))


@pytest.mark.parametrize(
    ("button", "path", "status"),
    [
        ("Respond with 409", "conflict", "409 Conflict"),
        ("Raise an error", "error", "500 Internal Server Error"),
        ("Fail at COMMIT", "commit", "500 Internal Server Error"),
    ],
)
def test_the_panel_shows_a_rollback(
    visit_demo: Visit, outside: Engine, button: str, path: str, status: str
) -> None:
    """Each of the three buttons ends in a ROLLBACK, and leaves the list as it was."""
    store(outside, "lamp")
    with visit_demo(allowed=[status[:3]]) as visitor:
        visitor.button(button).click()
        panel = visitor.page.locator("#sessions")
        expect(panel.get_by_role("status")).to_have_text(
            f"{status}: ROLLBACK, the list still has 1 item."
        )
        line = panel.get_by_role("listitem").filter(has_text=f"POST /demo/{path}")
        expect(line).to_contain_text(f"ROLLBACK{status[:3]}, ")
        visitor.sees("lamp")
    assert names(outside) == ["lamp"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing_in_the_panel(visit_demo: Visit, scheme: Any, width: int) -> None:
    """The panel is for everybody, too, and fits beside or above the list."""
    options: dict[str, Any] = {"color_scheme": scheme}
    size = {"width": width, "height": 800}
    with visit_demo(viewport=size, allowed=["500"], **options) as visitor:
        visitor.button("Fail at COMMIT").click()
        expect(visitor.page.locator("#sessions .rollback")).to_be_visible()
        assert visitor.violations() == []
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width


# Everybody, everywhere


def test_the_keyboard_is_enough(visit: Visit, outside: Engine) -> None:
    """Adding, renaming, deleting and paging need no pointer."""
    store_many(outside, 20)
    with visit() as visitor:
        keyboard = visitor.page.keyboard
        expect(visitor.rows).to_have_count(20)
        keyboard.press("Tab")
        expect(visitor.field).to_be_focused()
        keyboard.type("lamp")
        keyboard.press("Enter")
        expect(visitor.button("Show it")).to_be_visible()
        places = [visitor.button(name) for name in ("Add", "Show it", "Search", "Next")]
        places[2:2] = [visitor.search_field]
        places[4:4] = [visitor.order]
        for place in places:
            keyboard.press("Tab")
            expect(place).to_be_focused()
        keyboard.press("Enter")
        visitor.sees("lamp")
        expect(visitor.button("Previous")).to_be_focused()
        for name in ("Refresh", "Rename lamp"):
            keyboard.press("Tab")
            expect(visitor.button(name)).to_be_focused()
        keyboard.press("Enter")
        keyboard.type("torch")
        keyboard.press("Enter")
        expect(visitor.button("Rename torch")).to_be_focused()
        keyboard.press("Tab")
        keyboard.press("Enter")
        expect(visitor.button("Cancel")).to_be_focused()
        keyboard.press("Shift+Tab")
        keyboard.press("Enter")
        expect(visitor.rows).to_have_count(20)
    assert "torch" not in names(outside)


@pytest.mark.parametrize("path", ["/shop", "/shop/"])
def test_the_page_works_behind_a_prefix(visit: Visit, outside: Engine, path: str) -> None:
    """Mounted somewhere, asked for with a slash or without, the page does all that it does."""
    store_many(outside, 21)
    with visit(path, wrap=mounted("/shop")) as visitor:
        visitor.button("Next").click()
        visitor.sees("Item #21")
        visitor.add("lamp")
        visitor.sees("Item #21", "lamp")
        visitor.rename("lamp", "torch")
        visitor.sees("Item #21", "torch")
        visitor.button("Delete torch").click()
        visitor.button("Delete").click()
        visitor.sees("Item #21")
    with outside.connect() as connection:
        assert connection.scalar(select(Item.name).where(Item.id == 21)) == "Item #21"
    assert len(names(outside)) == 21


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, *WIDTHS])
def test_axe_finds_nothing(visit: Visit, outside: Engine, scheme: str, width: int) -> None:
    """Empty, filled, editing and in error, in light and dark, wide and narrow: axe is content."""
    busy = threading.Event()
    size, allowed = {"width": width, "height": 800}, ["422", "503"]
    options: dict[str, Any] = {"color_scheme": scheme, "viewport": size, "allowed": allowed}
    with visit(wrap=unavailable(busy), **options) as visitor:
        expect(visitor.list.get_by_text("There is nothing here yet.")).to_be_visible()
        assert visitor.violations() == []
        store(outside, "lamp", "chair", "desk", None, "W" * 16)
        store_many(outside, 20)
        visitor.button("Refresh").click()
        expect(visitor.rows).to_have_count(20)
        assert visitor.violations() == []
        visitor.button("Rename lamp").click()
        visitor.button("Delete chair").click()
        assert visitor.violations() == []
        rename_behind(outside, "lamp", "torch")
        visitor.button("Save").click()
        visitor.add("a name that is too long")
        expect(visitor.alerts).to_have_count(2)
        assert visitor.violations() == []
        busy.set()
        visitor.button("Refresh").click()
        expect(visitor.trouble).not_to_be_empty()
        assert visitor.violations() == []
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_colours_follow_the_system(visit: Visit) -> None:
    """Who prefers dark gets light letters on a dark ground."""
    shades = []
    for scheme in ("light", "dark"):
        with visit(color_scheme=scheme) as visitor:
            colour = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
            shades.append(sum(int(part) for part in colour.strip("rgb()").split(",")))
    assert shades[0] > 3 * 200
    assert shades[1] < 3 * 50


def test_the_footer_says_what_this_is(visit: Visit) -> None:
    """The footer has the version, and links to what describes and what watches the service."""
    with visit() as visitor:
        footer = visitor.page.locator("footer")
        expect(footer).to_contain_text(f"sessionscope {__version__}")
        expect(footer.get_by_role("link")).to_have_count(2)
        for link in footer.get_by_role("link").all():
            address = link.evaluate("(link) => link.href")
            assert visitor.page.request.get(address).ok


def test_without_javascript_the_page_says_so(visit: Visit) -> None:
    """A browser without JavaScript is told where the items are, and shown no dead form."""
    with visit(java_script_enabled=False) as visitor:
        expect(visitor.page.locator("noscript p")).to_be_visible()
        expect(visitor.field).to_be_hidden()
