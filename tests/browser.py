"""A real browser: headless Chromium, and visitors to the page of a service."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright
from support import PATIENCE, serving

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

FLAGS = [
    "--no-sandbox",  # Chromium does not run as root with one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

AXE_OPTIONS = {"resultTypes": ["violations"], "rules": {"target-size": {"enabled": True}}}
"""All rules of axe, and the one for the size of targets, which it leaves out by default."""

expect.set_options(timeout=PATIENCE * 1000)


class Missing(Exception):
    """There is no browser here."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run Chromium, without a window.

    :raises Missing: where there is none on the PATH.
    """
    path = shutil.which("chromium")
    if path is None:
        raise Missing("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """Somebody at the page, and what their browser complained of meanwhile."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", self.hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.field = page.get_by_label("Name of a new item")
        self.list = page.get_by_role("region", name="Items")
        self.heading = page.locator("#heading")
        self.rows = self.list.get_by_role("listitem")
        self.names = self.list.locator(".name")
        self.news = page.locator("#news")
        self.trouble = page.locator("#trouble")
        self.search_field = page.get_by_label("Name begins with")
        self.order = page.get_by_label("Order")
        self.alerts = page.get_by_role("alert").filter(visible=True, has_text=re.compile("."))

    def hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def add(self, name: str = "") -> None:
        self.field.fill(name)
        self.button("Add").click()

    def rename(self, old: str, new: str) -> None:
        self.button(f"Rename {old}").click()
        self.editor(old).fill(new)
        self.button("Save").click()

    def search(self, prefix: str) -> None:
        self.search_field.fill(prefix)
        self.search_field.press("Enter")

    def editor(self, name: str) -> Locator:
        return self.page.get_by_label(f"New name for {name}", exact=True)

    def sees(self, *names: str) -> None:
        """Wait until the list has these names."""
        expect(self.names).to_have_text([*names])

    def is_told(self, *messages: str) -> None:
        """Wait until these errors are shown, each in the form, the row or the list it is about."""
        expect(self.alerts).to_have_text([*messages])

    def violations(self) -> list[tuple[str, list[str]]]:
        """The rules of accessibility that the page breaks, and where."""
        # Chromium evaluates what a debugger says whatever the page's policy is.
        axe = files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
        self.page.evaluate(axe)
        found: dict[str, Any] = self.page.evaluate(f"axe.run({json.dumps(AXE_OPTIONS)})")
        return [
            (violation["id"], [node["html"] for node in violation["nodes"]])
            for violation in found["violations"]
        ]


@contextmanager
def visiting(
    browser: Browser, url: str, allowed: Collection[str] = (), **options: Any
) -> Iterator[Visitor]:
    """Visit the page at *url*; at the end the browser must not have complained of anything.

    :param allowed: words of which one has to be in each complaint.
    :param options: those of Playwright's ``Browser.new_context``.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE * 1000)
    try:
        visitor = Visitor(context.new_page())
        visitor.page.goto(url)
        yield visitor
    finally:
        context.close()
    left = [text for text in visitor.complaints if not any(word in text for word in allowed)]
    assert not left


@contextmanager
def visiting_app(
    browser: Browser, app: WSGIApplication, path: str = "/", **options: Any
) -> Iterator[Visitor]:
    """Serve *app* with waitress and visit its page."""
    with (
        serving(app) as port,
        visiting(browser, f"http://127.0.0.1:{port}{path}", **options) as visitor,
    ):
        yield visitor
