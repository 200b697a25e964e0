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
from sessionscope import CommitOutcomeUnknown
from sqlalchemy import Engine, delete, insert, select, update
from sqlalchemy.exc import TimeoutError as PoolTimeout
from support import PATIENCE, names

from models import Item
from serve import create_app
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

UNKNOWN = "It is not known whether the change was made."
NO_ANSWER = "The service does not answer."

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
    service = create_app(sqlite_url)

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


def failing_after(method: str, error: Exception) -> Wrap:
    """Have the service do what such a request asks for, and then fail with *error*."""

    def wrap(app: WSGIApplication) -> WSGIApplication:
        def failing(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            if environ["REQUEST_METHOD"] != method:
                return app(environ, start_response)
            list(app(environ, lambda *head: bool))
            raise error

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
        visitor.is_told("Changed by somebody else meanwhile: now “\u2068chair\u2069”.")
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
    """45 items are shown in three pages, forward and back again."""
    items = store_many(outside, 45)
    with visit() as visitor:
        visitor.sees(*items[:20])
        expect(visitor.button("Previous")).to_be_disabled()
        visitor.button("Next").click()
        visitor.sees(*items[20:40])
        expect(visitor.news).to_have_text("Items 21 to 40.")
        visitor.button("Next").click()
        visitor.sees(*items[40:])
        expect(visitor.button("Next")).to_be_disabled()
        visitor.button("Previous").click()
        visitor.sees(*items[20:40])
        visitor.button("Previous").click()
        visitor.sees(*items[:20])


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
        visitor.add("lamp")
        visitor.button("Show it").click()
        visitor.sees("lamp")
        expect(visitor.button("Show it")).to_be_hidden()
        expect(visitor.page.get_by_role("heading", name="All items")).to_be_focused()
        visitor.button("Previous").click()
        visitor.sees(*items[:20])


def test_old_news_go(visit: Visit, outside: Engine) -> None:
    """What was said of the last change, and the way to it, goes when the next one fails."""
    store_many(outside, 20)
    with visit() as visitor:
        visitor.add("lamp")
        expect(visitor.button("Show it")).to_be_visible()
        visitor.add("a name that is too long")
        visitor.is_told("A name has 1 to 16 characters, this one has 23.")
        expect(visitor.news).to_be_empty()
        expect(visitor.button("Show it")).to_be_hidden()


# Changes


def test_an_item_is_added(visit: Visit, outside: Engine) -> None:
    """A name and Add make an item; then the field is empty and ready for the next."""
    with visit() as visitor:
        visitor.field.fill("lamp")
        visitor.field.press("Enter")
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
    """A name that is too long is told beside the form, which keeps what was typed."""
    with visit() as visitor:
        visitor.add("a name that is too long")
        visitor.is_told("A name has 1 to 16 characters, this one has 23.")
        expect(visitor.page.locator("#add").get_by_role("alert")).to_have_text(
            "A name has 1 to 16 characters, this one has 23."
        )
        expect(visitor.field).to_have_value("a name that is too long")
        expect(visitor.field).to_be_focused()
        expect(visitor.field).to_have_attribute("aria-invalid", "true")
        visitor.add("a shorter name")
        visitor.sees("a shorter name")
        visitor.is_told()
    assert names(outside) == ["a shorter name"]


def test_the_words_of_the_service_are_shown(visit: Visit, outside: Engine) -> None:
    """What the service refuses is told in its own words, beside the form."""
    with visit(allowed=["422"]) as visitor:
        visitor.field.evaluate("(field) => { field.value = 'a\\0b'; }")
        visitor.button("Add").click()
        expect(visitor.page.locator("#add").get_by_role("alert")).to_contain_text(
            "no control characters"
        )
    assert names(outside) == []


def test_an_item_is_renamed(visit: Visit, outside: Engine) -> None:
    """Rename opens an editor in the row; Save stores the new name and returns to the button."""
    store(outside, "lamp", "chair")
    with visit() as visitor:
        visitor.button("Rename lamp").click()
        expect(visitor.editor("lamp")).to_be_focused()
        expect(visitor.editor("lamp")).to_have_value("lamp")
        visitor.editor("lamp").fill("torch")
        visitor.editor("lamp").press("Enter")
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
    """A rename that waits for another request stores what the editor had when it was saved."""
    store(outside, "lamp")
    with visit(wrap=held(released)) as visitor:
        visitor.add("chair")
        visitor.rename("lamp", "torch")
        visitor.editor("lamp").fill("candle")
        released.set()
        visitor.sees("torch", "chair")
    assert names(outside) == ["torch", "chair"]


def test_the_focus_is_not_taken_away(
    visit: Visit, outside: Engine, released: threading.Event
) -> None:
    """Who goes on to something else while a rename is being made is not called back."""
    store(outside, "lamp")
    with visit(wrap=held(released, "PUT")) as visitor:
        visitor.rename("lamp", "torch")
        visitor.field.fill("chair")
        released.set()
        visitor.sees("torch")
        expect(visitor.field).to_be_focused()


def test_an_empty_name_is_told_in_the_row(visit: Visit, outside: Engine) -> None:
    """A rename to nothing is told in the row, and the editor stays open."""
    store(outside, "lamp")
    with visit() as visitor:
        visitor.rename("lamp", "")
        expect(visitor.rows.get_by_role("alert")).to_have_text(
            "A name has 1 to 16 characters, this one has 0."
        )
        expect(visitor.editor("lamp")).to_be_focused()
    assert names(outside) == ["lamp"]


def test_an_item_is_deleted(visit: Visit, outside: Engine) -> None:
    """Delete asks once more, deletes, and moves on to the item above."""
    store(outside, "lamp", "chair", "desk")
    with visit() as visitor:
        visitor.button("Delete chair").click()
        expect(visitor.page.get_by_role("group", name="Delete chair for good?")).to_be_visible()
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
        expect(visitor.page.get_by_role("heading", name="All items")).to_be_focused()
        expect(visitor.list.get_by_text("There is nothing here yet.")).to_be_visible()
    assert names(outside) == []


def test_nothing_is_deleted_by_accident(visit: Visit, outside: Engine) -> None:
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
        visitor.is_told("Changed by somebody else meanwhile: now “\u2068chair\u2069”.")
        assert names(outside) == ["chair"]
        expect(visitor.editor("chair")).to_have_value("torch")
        visitor.button("Save").click()
        visitor.sees("torch")
        visitor.is_told()
    assert names(outside) == ["torch"]


def test_a_change_in_the_last_moment_is_told(visit: Visit, outside: Engine) -> None:
    """An item that changes when the new name is already on its way keeps the other's name."""
    store(outside, "lamp")
    rival = before("PUT", lambda: rename_behind(outside, "lamp", "chair"))
    with visit(wrap=rival, allowed=["412"]) as visitor:
        visitor.rename("lamp", "torch")
        visitor.is_told("Changed by somebody else meanwhile: now “\u2068chair\u2069”.")
    assert names(outside) == ["chair"]


def test_what_has_changed_is_not_deleted(visit: Visit, outside: Engine) -> None:
    """Who deletes an item that changed since they saw it is told so and asked about that."""
    store(outside, "lamp")
    with visit() as visitor:
        visitor.button("Delete lamp").click()
        rename_behind(outside, "lamp", "chair")
        visitor.button("Delete").click()
        visitor.is_told("Changed by somebody else meanwhile: now “\u2068chair\u2069”.")
        expect(visitor.page.get_by_role("group", name="Delete chair for good?")).to_be_visible()
    assert names(outside) == ["chair"]


def test_a_deletion_by_somebody_else_is_told(visit: Visit, outside: Engine) -> None:
    """Who renames an item that is gone is told so above the list, where it is no more."""
    store(outside, "lamp", "chair")
    with visit(allowed=["404"]) as visitor:
        visitor.sees("lamp", "chair")
        delete_behind(outside, "lamp")
        visitor.rename("lamp", "torch")
        visitor.is_told("“\u2068lamp\u2069” was deleted by somebody else meanwhile.")
        visitor.sees("chair")
        expect(visitor.page.get_by_role("heading", name="All items")).to_be_focused()


# Failures


def test_a_lost_answer_is_told(visit: Visit, outside: Engine) -> None:
    """Where nobody knows what became of a change the page says so, and shows what there is."""
    lost = failing_after("POST", CommitOutcomeUnknown("the connection died"))
    with visit(wrap=lost, allowed=["503"]) as visitor:
        visitor.add("lamp")
        visitor.is_told(f"The service could not finish. {UNKNOWN}")
        visitor.sees("lamp")
        expect(visitor.field).to_have_value("lamp")
    assert names(outside) == ["lamp"]


def test_a_rename_whose_answer_is_lost_is_told(visit: Visit, outside: Engine) -> None:
    """The editor of a rename that may have been made stays open, and names what there is."""
    store(outside, "lamp")
    lost = failing_after("PUT", CommitOutcomeUnknown("the connection died"))
    with visit(wrap=lost, allowed=["503"]) as visitor:
        visitor.rename("lamp", "torch")
        visitor.is_told(f"The service could not finish. {UNKNOWN}")
        expect(visitor.editor("torch")).to_have_value("torch")


def test_a_busy_database_says_when_to_try_again(visit: Visit) -> None:
    """Where the database is not available the page says after how long to try again."""
    busy = failing_after("DELETE", PoolTimeout("no connection"))
    with visit(wrap=busy, allowed=["503"]) as visitor:
        visitor.add("lamp")
        visitor.button("Delete lamp").click()
        visitor.button("Delete").click()
        expect(visitor.alerts).to_have_text(re.compile(r"^The database .*\. Try again in 1 s\.$"))


def test_a_failure_has_an_id(visit: Visit) -> None:
    """A failure of the service itself is told with the id that its log has."""
    broken = failing_after("POST", RuntimeError("a bug"))
    with visit(wrap=broken, allowed=["500"]) as visitor:
        visitor.add("lamp")
        expect(visitor.alerts).to_contain_text("Internal server error. The log has more under ")


def test_a_service_that_is_down_is_told(browser: Browser, sqlite_url: str) -> None:
    """With the service down each form says so and keeps what was typed."""
    with (
        processes.serve("--database-url", sqlite_url) as server,
        visiting(
            browser, f"http://127.0.0.1:{server.port}/", allowed=["ERR_CONNECTION"]
        ) as visitor,
    ):
        visitor.add("lamp")
        visitor.button("Rename lamp").click()
        visitor.editor("lamp").fill("torch")
        server.process.kill()
        server.process.wait(PATIENCE)
        visitor.button("Save").click()
        visitor.is_told(NO_ANSWER)
        visitor.add("chair")
        visitor.is_told(f"{NO_ANSWER} {UNKNOWN}", NO_ANSWER)
        visitor.button("Refresh").click()
        visitor.is_told(f"{NO_ANSWER} {UNKNOWN}", NO_ANSWER, NO_ANSWER)
        expect(visitor.editor("lamp")).to_have_value("torch")
        expect(visitor.field).to_have_value("chair")


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
        for name in ("Add", "Show it", "Next"):
            keyboard.press("Tab")
            expect(visitor.button(name)).to_be_focused()
        keyboard.press("Enter")
        visitor.sees("lamp")
        expect(visitor.button("Previous")).to_be_focused()
        for name in ("Refresh", "Rename lamp"):
            keyboard.press("Tab")
            expect(visitor.button(name)).to_be_focused()
        keyboard.press("Enter")
        keyboard.press("Control+A")
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
@pytest.mark.parametrize("width", [1280, 320])
def test_axe_finds_nothing(visit: Visit, outside: Engine, scheme: str, width: int) -> None:
    """Empty, filled, editing and in error, in light and dark, wide and narrow: axe is content."""
    with visit(color_scheme=scheme, viewport={"width": width, "height": 800}) as visitor:
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


def test_without_javascript_the_page_says_so(visit: Visit) -> None:
    """A browser without JavaScript is told where the items are, and shown no dead form."""
    with visit(java_script_enabled=False) as visitor:
        expect(visitor.page.locator("noscript p")).to_be_visible()
        expect(visitor.field).to_be_hidden()
