"""What a client gets by what it accepts: JSON, or at the root a page for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin
from wsgiref.util import shift_path_info
from wsgiref.validate import validator

import item_service
import pytest
from item_service import Service
from sqlalchemy import event
from support import environ, serve_once
from webtest import TestApp

import serve

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

service = item_service.service

PAGE = Path(serve.__file__).parent / "web" / "page"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


def kind_of(service: Service, path: str, accept: str) -> str:
    """The status and the media type of what *accept* is answered with."""
    headers = {"Accept": accept}
    answer = service.client.get(path, headers=headers, status="*")
    return f"{answer.status_int} {answer.content_type}"


# JSON, or the page.


@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "application/json",
        "application/*",
        "application/json, text/html",
        "text/html;q=0.9, application/json",
        "application/json;q=0.1",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8;q=0.5, text/html;q=0.4",
        "text/plain, */*;q=0.1",
        "",
        "nonsense",
        "text/html;q=nonsense",
    ],
)
def test_json_is_the_default(accept: str, service: Service) -> None:
    """Who does not like HTML better gets JSON; so does who cannot be understood."""
    assert kind_of(service, "/", accept) == "200 application/json"


def test_without_accept_it_is_json(service: Service) -> None:
    """A client that says nothing gets JSON."""
    assert service.client.get("/").content_type == "application/json"


@pytest.mark.parametrize(
    "accept", [BROWSER, "text/html", "text/*", "text/html, application/json;q=0.9"]
)
def test_a_browser_gets_the_page(accept: str, service: Service) -> None:
    """Who likes HTML better gets the page for people, byte for byte."""
    answer = service.client.get("/", headers={"Accept": accept})
    assert answer.content_type == "text/html"
    assert answer.charset == "utf-8"
    assert answer.body == (PAGE / "index.html").read_bytes()


@pytest.mark.parametrize("accept", ["image/png", "application/json;q=0", "text/plain, image/*"])
@pytest.mark.parametrize("path", ["/", "/1", "/healthz", "/openapi.json", "/page.css"])
def test_who_accepts_nothing_of_ours_is_told(accept: str, path: str, service: Service) -> None:
    """Where Accept leaves nothing over it is a 406 that says what there is, in JSON."""
    service.client.post("/")
    answer = service.client.get(path, headers={"Accept": accept}, status=406)
    assert answer.content_type == "application/json"
    assert "this is available as " in answer.json["error"]


def test_what_is_not_accepted_is_not_done(service: Service) -> None:
    """A change whose answer would not be accepted is a 406, and is not made."""
    service.client.post("/", headers={"Accept": "text/html"}, status=406)
    assert service.rows() == []


def test_errors_are_json_for_everybody(service: Service) -> None:
    """An error is JSON, whatever the client accepts."""
    assert kind_of(service, "/7", BROWSER) == "404 application/json"
    assert kind_of(service, "/nowhere", "text/html") == "404 application/json"


@pytest.mark.parametrize("accept", ["*/*", BROWSER, "image/png"])
@pytest.mark.parametrize("query", ["", "limit=0"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_root_varies_with_accept(
    method: str, query: str, accept: str, service: Service
) -> None:
    """Whatever the root answers says that it depends on Accept; nothing else does."""
    reply = service.send(method, "/", HTTP_ACCEPT=accept, QUERY_STRING=query)
    assert dict(reply.headers)["Vary"] == "Accept"
    assert "Vary" not in dict(service.send(method, "/1", HTTP_ACCEPT=accept).headers)


# The page and its files.

FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")}
FILES |= {"/page.js": ("page.js", "text/javascript"), "/icon.svg": ("icon.svg", "image/svg+xml")}


@pytest.mark.parametrize("path", FILES)
def test_a_file_is_served_as_it_is(path: str, service: Service) -> None:
    """Each file of the page has its bytes, their number and its media type."""
    name, media_type = FILES[path]
    content = (PAGE / name).read_bytes()
    reply = service.send("GET", path, HTTP_ACCEPT=BROWSER)
    assert reply.content == content
    headers = dict(reply.headers)
    assert headers["Content-Type"] == f"{media_type}; charset=utf-8"
    assert headers["Content-Length"] == str(len(content))


@pytest.mark.parametrize("path", FILES)
def test_a_browser_is_told_to_be_strict(path: str, service: Service) -> None:
    """A file of the page comes with all the headers that keep others from misusing it."""
    headers = dict(service.send("HEAD", path, HTTP_ACCEPT=BROWSER).headers)
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("path", ["/", "/1", "/7", "/healthz", "/openapi.json"])
def test_json_is_not_to_be_guessed_at(path: str, service: Service) -> None:
    """JSON, errors too, is not to be taken for anything else, nor kept without asking."""
    service.client.post("/")
    headers = dict(service.send("GET", path).headers)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("path", [*FILES, "/openapi.json"])
def test_a_file_that_a_browser_has_is_not_sent_again(path: str, service: Service) -> None:
    """A file has a tag, by which a browser need not fetch it twice."""
    options: dict[str, Any] = {"HTTP_ACCEPT": "text/html, */*;q=0.1"}
    tag = dict(service.send("GET", path, **options).headers)["ETag"]
    reply = service.send("GET", path, HTTP_IF_NONE_MATCH=tag, **options)
    assert (reply.status, reply.content) == ("304 Not Modified", b"")
    assert dict(reply.headers)["ETag"] == tag


@pytest.mark.parametrize("path", [*FILES, "/openapi.json"])
def test_a_file_touches_no_database(path: str, service: Service) -> None:
    """What belongs to the program is served without a connection to the database."""

    def fail(*_: Any) -> None:
        raise AssertionError("a connection was taken")

    for engine in service.app.engines.values():  # type: ignore[attr-defined]
        event.listen(engine, "checkout", fail)
    for method in ("GET", "HEAD"):
        assert service.send(method, path, HTTP_ACCEPT=BROWSER).status == "200 OK"


# Below a prefix.


@pytest.mark.parametrize(
    ("prefix", "query", "location"),
    [
        ("/shop", "", "http://localhost/shop/"),
        ("/a/shop", "x=1&y", "http://localhost/a/shop/?x=1&y"),
        ("/a b", "", "http://localhost/a%20b/"),
        ("/a:b", "", "http://localhost/a:b/"),
        ("/?", "", "http://localhost/%3F/"),
        ("/\xc3\xa9", "\xff", "http://localhost/%C3%A9/?%FF"),
    ],
)
def test_the_page_is_below_its_prefix(
    prefix: str, query: str, location: str, service: Service
) -> None:
    """A browser that asks for the prefix itself is sent to the same with a slash, for good."""
    request = environ("GET", "", SCRIPT_NAME=prefix, QUERY_STRING=query, HTTP_ACCEPT=BROWSER)
    reply = serve_once(service.app, request)
    assert reply.status == "308 Permanent Redirect"
    target = dict(reply.headers)["Location"]
    assert urljoin(location.rstrip("/").partition("?")[0].rstrip("/"), target) == location


def test_json_needs_no_slash(service: Service) -> None:
    """A client of the JSON is answered under the prefix itself."""
    request = environ("GET", "", SCRIPT_NAME="/shop")
    assert serve_once(service.app, request).content == b'{"items": []}\n'


def test_the_page_works_below_a_prefix(service: Service) -> None:
    """Under a prefix a browser that follows the redirect and the page's links gets all files."""

    def site(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        assert shift_path_info(environ) == "shop"
        return service.app(environ, start_response)

    client = TestApp(validator(site))
    page = client.get("/shop", headers={"Accept": BROWSER}).follow(headers={"Accept": BROWSER})
    assert page.request.path == "/shop/"
    for link in page.html.find_all(["link", "script"]):
        client.get(urljoin("/shop/", link.get("href") or link["src"]))
