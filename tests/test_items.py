"""The item service as a client sees it, and what its answers leave in the database."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin
from wsgiref.util import shift_path_info
from wsgiref.validate import validator

import item_service
import pytest
from item_service import Service, service_at
from sqlalchemy import insert, inspect
from support import environ, serve_once
from webtest import TestApp

from models import Item

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

SIXTEEN = "sixteen letters!"


memory_url, service, any_service = (
    item_service.memory_url,
    item_service.service,
    item_service.any_service,
)


# What works, on every database.


def test_an_item_is_created(any_service: Service) -> None:
    """POST / makes an item named after its id, and the answer is exact to the byte."""
    answer = any_service.client.post("/")
    assert answer.status == "200 OK"
    assert answer.content_type == "application/json"
    assert answer.body == b'{"id": 1, "name": "Item #1"}\n'
    assert any_service.rows() == [(1, "Item #1")]


def test_an_item_gets_the_name_that_is_given(any_service: Service) -> None:
    """POST / takes the name from the body."""
    answer = any_service.client.post_json("/", {"name": "chair"})
    assert answer.body == b'{"id": 1, "name": "chair"}\n'
    assert any_service.rows() == [(1, "chair")]


def test_items_are_listed(any_service: Service) -> None:
    """GET / lists all items in the order of their ids."""
    assert any_service.client.get("/").body == b'{"items": []}\n'
    for body in (b"", b'{"name": "chair"}'):
        any_service.post(body, 200)
    assert any_service.client.get("/").json == {
        "items": [{"id": 1, "name": "Item #1"}, {"id": 2, "name": "chair"}]
    }


def test_an_item_is_shown(any_service: Service) -> None:
    """GET /<id> shows the item, in the bytes with which it was created."""
    created = any_service.client.post("/")
    shown = any_service.client.get("/1")
    assert (shown.status, shown.body) == ("200 OK", created.body)


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_an_item_is_renamed(method: str, any_service: Service) -> None:
    """PUT and PATCH give an item another name, and answer with the item."""
    any_service.client.post("/")
    answer = any_service.send(method, "/1", b'{"name": "chair"}')
    assert (answer.status, answer.content) == ("200 OK", b'{"id": 1, "name": "chair"}\n')
    assert any_service.rows() == [(1, "chair")]


@pytest.mark.parametrize("body", [b"", b"{}"])
def test_a_change_of_nothing_changes_nothing(body: bytes, any_service: Service) -> None:
    """PATCH without a name leaves the item as it is, and answers with it."""
    any_service.client.post("/")
    answer = any_service.send("PATCH", "/1", body)
    assert (answer.status, answer.content) == ("200 OK", b'{"id": 1, "name": "Item #1"}\n')
    assert any_service.rows() == [(1, "Item #1")]


@pytest.mark.parametrize("body", [b"", b"{}"])
def test_a_replacement_needs_a_name(body: bytes, service: Service) -> None:
    """PUT without a name is a 422 that says what is missing, and changes nothing."""
    service.client.post("/")
    answer = service.send("PUT", "/1", body)
    assert answer.status is not None
    assert answer.status.startswith("422 ")
    assert json.loads(answer.content) == {
        "error": "name is required",
        "errors": [{"field": "name", "code": "required"}],
    }
    assert service.rows() == [(1, "Item #1")]


def test_an_item_is_deleted(any_service: Service) -> None:
    """DELETE removes an item and answers 204 without a body; then it is not found."""
    any_service.client.post("/")
    any_service.client.post("/")
    answer = any_service.client.delete("/1", status=204)
    assert answer.body == b""
    assert any_service.rows() == [(2, "Item #2")]
    for method in ("GET", "DELETE"):
        any_service.client.request("/1", method=method, status=404)


@pytest.mark.parametrize(
    ("method", "body"), [("PUT", b'{"name": "a"}'), ("PATCH", b"{}"), ("DELETE", b"")]
)
@pytest.mark.parametrize("id", [1, 2**31])
def test_an_unknown_item_is_not_changed(
    id: int, method: str, body: bytes, any_service: Service
) -> None:
    """A change of an item that is not there is a 404, and makes none."""
    answer = any_service.send(method, f"/{id}", body)
    assert (answer.status, answer.content) == ("404 Not Found", b'{"error": "not found"}\n')
    assert any_service.rows() == []


def test_an_unknown_item_is_not_found(any_service: Service) -> None:
    """GET of an id that no item has is a 404 that says so, exact to the byte."""
    answer = any_service.client.get("/1", status=404)
    assert answer.status == "404 Not Found"
    assert answer.content_type == "application/json"
    assert answer.body == b'{"error": "not found"}\n'


@pytest.mark.parametrize("id", [2**31 - 1, 2**31, 2**32 + 1, 2**63, 10**30])
def test_an_id_beyond_the_column_is_not_found(id: int, any_service: Service) -> None:
    """An id that is no 32-bit integer, or the largest, is a 404 on every database."""
    any_service.client.post("/")
    assert any_service.client.get(f"/{id}", status=404).json == {"error": "not found"}


@pytest.mark.parametrize("name", [SIXTEEN, "\U0001f600" * 16, "'; --\\\"", "e\u0301", "a\u202eb"])
def test_a_name_comes_back_as_it_was_sent(name: str, any_service: Service) -> None:
    """Any visible text of 1 to 16 characters is stored and shown unchanged."""
    assert any_service.client.post_json("/", {"name": name}).json["name"] == name
    assert any_service.client.get("/1").json == {"id": 1, "name": name}
    assert any_service.rows() == [(1, name)]


def test_blanks_around_a_name_are_left_out(any_service: Service) -> None:
    """A name is stored without the blanks around it, which do not count as its characters."""
    name = f" \t\u2003{SIXTEEN}\n "
    assert any_service.client.post_json("/", {"name": name}).json["name"] == SIXTEEN
    assert any_service.client.put_json("/1", {"name": "  lamp "}).json["name"] == "lamp"
    assert any_service.client.patch_json("/1", {"name": "oak lamp\n"}).json["name"] == "oak lamp"
    assert any_service.rows() == [(1, "oak lamp")]


def test_a_created_item_has_a_location(any_service: Service) -> None:
    """The answer to POST says where the new item is, and GET finds it there."""
    answer = any_service.client.post("/")
    assert answer.headers["Location"] == "./1"
    assert any_service.client.get(urljoin("/", answer.headers["Location"])).json["id"] == 1


@pytest.mark.parametrize(
    ("prefix", "path", "location"),
    [("/shop", "/", "/shop/1"), ("/shop", "", "/shop/1"), ("/a b", "", "/a%20b/1")],
)
def test_a_location_is_right_below_a_prefix(
    prefix: str, path: str, location: str, service: Service
) -> None:
    """Relative to the URL that the client knows, with or without a slash at its end."""
    reply = service.send("POST", path, SCRIPT_NAME=prefix, QUERY_STRING="x=1")
    url = f"http://items.test{quote(prefix)}{path}?x=1"
    assert urljoin(url, dict(reply.headers)["Location"]) == f"http://items.test{location}"


def test_an_id_is_not_used_again(any_service: Service) -> None:
    """After the newest item is deleted, the next one has another id, and so another tag."""
    any_service.client.post("/")
    any_service.client.post("/")
    any_service.client.delete("/2")
    assert any_service.client.post("/").body == b'{"id": 3, "name": "Item #3"}\n'


def test_a_file_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """A file whose table has neither AUTOINCREMENT nor an index is served, and gets the index."""
    with closing(sqlite3.connect(tmp_path / "items.db")) as connection, connection:
        connection.execute("CREATE TABLE items (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(16))")
        connection.execute("INSERT INTO items VALUES (7, 'old'), (8, NULL)")
    with service_at(f"sqlite:///{tmp_path}/items.db") as service:
        old = [{"id": 7, "name": "old"}, {"id": 8, "name": None}]
        assert service.client.get("/").json["items"] == old
        assert service.client.post("/").json == {"id": 9, "name": "Item #9"}
        assert [index["name"] for index in inspect(service.outside).get_indexes("items")] == [
            "ix_items_name"
        ]


def test_a_refused_request_leaves_no_trace(any_service: Service) -> None:
    """After a request that was refused the next one works, and there is one row, its own."""
    any_service.post(b'{"name": ""}', 422)
    any_service.client.get("/7", status=404)
    any_service.post(b'{"name": "chair"}', 200)
    assert [name for _, name in any_service.rows()] == ["chair"]


def test_a_second_start_finds_the_items(any_url: str) -> None:
    """The service started again on the same database serves what it had."""
    with service_at(any_url) as first:
        first.client.post("/")
        with service_at(any_url) as second:
            assert second.client.get("/1").json == {"id": 1, "name": "Item #1"}


def test_reading_does_not_wait_for_writing(service: Service) -> None:
    """While another program writes to the SQLite file, GET is answered at once."""
    service.client.post("/")
    with service.outside.begin() as connection:
        connection.execute(insert(Item).values(name="soon"))
        assert service.client.get("/").json == {"items": [{"id": 1, "name": "Item #1"}]}


# Requests that are repeated.


def test_a_repeat_with_a_key_is_done_once(any_service: Service) -> None:
    """POST once more with its Idempotency-Key gets the same response, and makes no item."""
    first, again = (
        any_service.send("POST", "/", b'{"name": "lamp"}', HTTP_IDEMPOTENCY_KEY="one")
        for _ in range(2)
    )
    assert first.content == again.content == b'{"id": 1, "name": "lamp"}\n'
    assert dict(again.headers)["Location"] == "./1"
    assert dict(again.headers)["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in dict(first.headers)
    assert any_service.rows() == [(1, "lamp")]
    any_service.send("POST", "/", b'{"name": "lamp"}', HTTP_IDEMPOTENCY_KEY="two")
    assert any_service.rows() == [(1, "lamp"), (2, "lamp")]


def test_a_key_belongs_to_one_request(service: Service) -> None:
    """Another body with the same key is refused as a problem (RFC 9457), and nothing is done."""
    service.send("POST", "/", b'{"name": "lamp"}', HTTP_IDEMPOTENCY_KEY="one")
    reply = service.send("POST", "/", b'{"name": "chair"}', HTTP_IDEMPOTENCY_KEY="one")
    assert dict(reply.headers)["Content-Type"] == "application/problem+json"
    assert json.loads(reply.content)["status"] == 422
    assert service.rows() == [(1, "lamp")]


def test_a_refused_request_may_use_its_key_again(service: Service) -> None:
    """A request that was refused has left nothing, so its key is free for a better one."""
    service.send("POST", "/", b'{"name": ""}', HTTP_IDEMPOTENCY_KEY="one")
    reply = service.send("POST", "/", b'{"name": "lamp"}', HTTP_IDEMPOTENCY_KEY="one")
    assert reply.content == b'{"id": 1, "name": "lamp"}\n'


# Bodies.

DEEP = b"[" * 30_000 + b"]" * 30_000


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"{", id="cut"),
        pytest.param(b'{"name": "a"} x', id="trailing"),
        pytest.param(b" ", id="blank"),
        pytest.param(b"{'name': 'a'}", id="quotes"),
        pytest.param(b"[1,", id="malformed-and-no-object"),
        pytest.param(b'{"name": "\xff"}', id="no-utf8"),
        pytest.param(b'{"other": "\xff"}', id="no-utf8-elsewhere"),
        pytest.param('{"name": "a"}'.encode("utf-16"), id="utf16"),
        pytest.param(b'{"name": "\\ud800"}', id="lone-surrogate"),
        pytest.param(b'{"name": "\xed\xa0\x80"}', id="surrogate-bytes"),
        pytest.param(DEEP, id="deep"),
        pytest.param(b'{"name": ' + DEEP + b"}", id="deep-name"),
    ],
)
def test_what_is_no_json_is_refused(body: bytes, service: Service) -> None:
    """A body that cannot be decoded is a 400 that says so in words, and no row stays."""
    answer = service.post(body, 400)
    assert answer.content_type == "application/json"
    assert list(answer.json) == ["error"]
    assert answer.json["error"].startswith("the body is not JSON: ")
    assert service.rows() == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[]", "the body must be an object"),
        (b'"chair"', "the body must be an object"),
        (b"null", "the body must be an object"),
        (b'{"name": 1e999}', "the body is out of range"),
    ],
)
def test_a_body_of_another_kind_is_refused(body: bytes, words: str, service: Service) -> None:
    """JSON that has no member to blame is a 422 that says what it should be; no row stays."""
    assert service.post(body, 422).json == {"error": words}
    assert service.rows() == []


LONG = {"field": "name", "code": "too_long", "limit": 16}
CONTROL = {"field": "name", "code": "control_character"}
BLANK = {"field": "name", "code": "blank"}
WRONG = {"field": "name", "code": "wrong_type"}


@pytest.mark.parametrize(
    ("body", "words", "error"),
    [
        ('{"name": 1}', "name must be text", WRONG),
        ('{"name": ["a"]}', "name must be text", WRONG),
        ('{"name": null}', "name must be text", WRONG),
        ('{"name": "12345678901234567"}', "name must have at most 16 characters", LONG),
        ('{"name": "a\\u0000b"}', "name must have no control characters", CONTROL),
        ('{"name": "a\\nb"}', "name must have no control characters", CONTROL),
        ('{"name": "\\u0000\\n"}', "name must have no control characters", CONTROL),
        ('{"name": "a\\u0085b"}', "name must have no control characters", CONTROL),
        ('{"name": ""}', "name must have a visible character", BLANK),
        ('{"name": "   "}', "name must have a visible character", BLANK),
        ('{"name": "\\t\\r\\n"}', "name must have a visible character", BLANK),
        ('{"name": "\\u200b\\u3164\\ufeff"}', "name must have a visible character", BLANK),
        ('{"name": "a", "id": 7}', "'id' is unknown", {"field": "id", "code": "unknown"}),
        ('{"Name": "a"}', "'Name' is unknown", {"field": "Name", "code": "unknown"}),
        ('{"a - at `$.b`": 1}', "'a - at `$.b`' is unknown", {"code": "unknown"}),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("PUT", "/1"), ("PATCH", "/1")])
def test_a_wrong_member_is_named(
    method: str, path: str, body: str, words: str, error: dict[str, Any], service: Service
) -> None:
    """A member that breaks a rule is a 422 that names it, in words and for programs."""
    service.client.post("/")
    reply = service.send(method, path, body.encode())
    assert reply.status is not None
    assert reply.status.startswith("422 ")
    refusal = json.loads(reply.content)
    assert refusal["error"] == words
    (told,) = refusal["errors"]
    assert error.items() <= told.items()
    assert service.rows() == [(1, "Item #1")]


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/vnd.api+json", "json", ""],
)
def test_another_content_type_is_refused(content_type: str, service: Service) -> None:
    """A body that does not say that it is JSON is a 415, and no row stays."""
    answer = service.post(b'{"name": "a"}', 415, content_type=content_type)
    assert answer.json == {"error": "the body must be application/json"}
    assert service.rows() == []


def test_an_encoded_body_is_refused(service: Service) -> None:
    """A body that is compressed, or says so, is a 415; one that says it is not is taken."""
    body = b'{"name": "a"}'
    reply = service.send("POST", "/", body, HTTP_CONTENT_ENCODING="gzip")
    assert reply.content == b'{"error": "the body must not be encoded"}\n'
    assert service.rows() == []
    assert service.send("POST", "/", body, HTTP_CONTENT_ENCODING="identity").status == "200 OK"


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"]
)
def test_json_may_be_spelled_in_many_ways(content_type: str, service: Service) -> None:
    """Neither the case nor a parameter of the content type matters."""
    assert service.post(b'{"name": "a"}', 200, content_type=content_type).json["name"] == "a"


def test_a_merge_patch_is_taken(service: Service) -> None:
    """PATCH takes a merge patch (RFC 7396) under its own type; nothing else does."""
    service.client.post("/")
    kind: dict[str, Any] = {"CONTENT_TYPE": "application/merge-patch+json"}
    assert service.send("PATCH", "/1", b'{"name": "lamp"}', **kind).status == "200 OK"
    assert service.rows() == [(1, "lamp")]
    assert (
        service.send("PUT", "/1", b'{"name": "x"}', **kind).status == "415 Unsupported Media Type"
    )
    reply = service.send("PATCH", "/1", b"<name/>", CONTENT_TYPE="text/xml")
    accepted = "application/merge-patch+json, application/json"
    assert dict(reply.headers)["Accept-Patch"] == accepted


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain"])
def test_no_body_needs_no_content_type(content_type: str, service: Service) -> None:
    """A request without a body makes an item, whatever it says of the body's type."""
    assert service.post(b"", 200, content_type=content_type).json["name"] == "Item #1"


SIZED = {"CONTENT_LENGTH": "33"}
CHUNKED = {"wsgi.input_terminated": True}


@pytest.mark.parametrize("how", [SIZED, CHUNKED], ids=["sized", "chunked"])
def test_a_body_over_the_limit_is_refused(how: dict[str, Any], sqlite_url: str) -> None:
    """A body of one byte more than the limit is a 413, whether its length is known or not."""
    with service_at(sqlite_url, max_body=32) as service:
        reply = service.send_raw("POST", "/", b'{"name": "chair"}'.ljust(33), **how)
        assert reply.status is not None
        assert reply.status.startswith("413 ")
        assert json.loads(reply.content) == {"error": "a body may have at most 32 bytes"}
        assert service.rows() == []


@pytest.mark.parametrize("how", [{"CONTENT_LENGTH": "32"}, CHUNKED], ids=["sized", "chunked"])
def test_a_body_of_the_limit_is_taken(how: dict[str, Any], sqlite_url: str) -> None:
    """A body of just the limit makes its item, whether its length is known or not."""
    with service_at(sqlite_url, max_body=32) as service:
        reply = service.send_raw("POST", "/", b'{"name": "chair"}'.ljust(32), **how)
        assert reply.content == b'{"id": 1, "name": "chair"}\n'


def test_a_long_body_is_not_read(service: Service) -> None:
    """A Content-Length over the limit is refused before anything is read."""
    stream = io.BytesIO(b"{}")
    service.send_raw("POST", "/", b"", **{"CONTENT_LENGTH": str(2**40), "wsgi.input": stream})
    assert stream.tell() == 0


def test_http_1_0_has_no_transfer_coding(service: Service) -> None:
    """What claims to be chunked in HTTP/1.0 is a 400: no server knows where such a body ends."""
    chunked = {"SERVER_PROTOCOL": "HTTP/1.0", "HTTP_TRANSFER_ENCODING": "chunked"}
    reply = service.send("POST", "/", b"{}", **chunked)
    assert reply.status == "400 Bad Request"
    assert json.loads(reply.content) == {"error": "HTTP/1.0 has no Transfer-Encoding"}
    assert service.rows() == []


def test_an_incomplete_body_is_refused(service: Service) -> None:
    """A body that ends before its Content-Length is a 400, even if it is JSON so far."""
    reply = service.send_raw("POST", "/", b'{"name": "chair"}', CONTENT_LENGTH="18")
    assert reply.status == "400 Bad Request"
    assert json.loads(reply.content) == {"error": "the body is incomplete"}
    assert service.rows() == []


def test_a_body_that_breaks_off_is_refused(service: Service) -> None:
    """A body whose reading fails, as servers report a lost client, is a 400."""

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise ConnectionResetError("the client is gone")

    reply = service.send_raw("POST", "/", b"", **{"wsgi.input": Broken(), **CHUNKED})
    assert reply.status == "400 Bad Request"
    assert service.rows() == []


# Paths and methods.


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/0", id="zero"),
        pytest.param("/01", id="leading-zero"),
        pytest.param("/+1", id="plus"),
        pytest.param("/-1", id="minus"),
        pytest.param("/1.0", id="fraction"),
        pytest.param("/1_0", id="underscore"),
        pytest.param("/1/", id="trailing-slash"),
        pytest.param("/1%0A", id="newline"),
        pytest.param("/%D9%A1", id="arabic-digit"),
        pytest.param("/%EF%BC%91", id="wide-digit"),
        pytest.param("/%C2%B2", id="superscript"),
        pytest.param("/%00", id="nul"),
        pytest.param("/items", id="word"),
    ],
)
def test_another_path_is_not_found(path: str, service: Service) -> None:
    """A path that is not / or a plain decimal number is a 404."""
    service.client.post("/")
    assert service.client.get(path, status=404).body == b'{"error": "not found"}\n'


@pytest.mark.parametrize("path", ["//1", "///1"])
def test_slashes_at_the_beginning_are_one(path: str, service: Service) -> None:
    """What some servers do before they call us is done on every server."""
    service.client.post("/")
    assert service.send("GET", path).content == b'{"id": 1, "name": "Item #1"}\n'


@pytest.mark.parametrize("path", ["1", "80", "openapi.json"])
def test_a_path_begins_with_a_slash(path: str, service: Service) -> None:
    """What waitress makes of a malformed target such as ``items.test:80`` is a 404."""
    service.client.post("/")
    assert serve_once(service.app, environ("GET", path)).status == "404 Not Found"


@pytest.mark.parametrize("path", ["/%FF", "/%C3", "/%ED%A0%80"])
def test_a_path_is_utf8(path: str, service: Service) -> None:
    """A path that is not percent-encoded UTF-8 is a 400 that says so."""
    error = service.client.get(path, status=400).json["error"]
    assert error == "the path is not percent-encoded UTF-8"


def test_a_path_may_be_percent_encoded(service: Service) -> None:
    """A digit that is percent-encoded is that digit."""
    service.client.post("/")
    assert service.client.get("/%31").json["id"] == 1


def test_a_query_of_an_item_is_ignored(service: Service) -> None:
    """What follows a question mark changes nothing, but in a list."""
    service.client.post("/?x=%FF")
    assert service.client.get("/1?id=2").json["id"] == 1


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/1", 200), ("/2", 404)])
def test_head_is_get_without_a_body(path: str, status: int, service: Service) -> None:
    """HEAD has the status and headers of GET, and no body."""
    service.client.post("/")
    same = {"X-Request-Id": "same"}
    got = service.client.get(path, headers=same, status=status)
    head = service.client.head(path, headers=same, status=status)
    assert head.headers == got.headers
    assert head.body == b""


METHODS = {
    "/": "GET, HEAD, OPTIONS, POST",
    "/count": "GET, HEAD, OPTIONS",
    "/1": "DELETE, GET, HEAD, OPTIONS, PATCH, PUT",
    "/healthz": "GET, HEAD, OPTIONS",
    "/openapi.json": "GET, HEAD, OPTIONS",
    "/page.js": "GET, HEAD, OPTIONS",
}


@pytest.mark.parametrize("path", METHODS)
def test_options_tells_the_methods(path: str, service: Service) -> None:
    """OPTIONS answers 204 without a body, with the methods in Allow."""
    answer = service.client.options(path, status=204)
    assert answer.headers["Allow"] == METHODS[path]
    assert answer.body == b""


def test_options_tells_what_a_patch_is(service: Service) -> None:
    """OPTIONS of an item says which patches it takes (RFC 5789, 3.1)."""
    kinds = "application/merge-patch+json, application/json"
    assert service.client.options("/1").headers["Accept-Patch"] == kinds
    assert "Accept-Patch" not in service.client.options("/").headers


@pytest.mark.parametrize("id", [0, 2**31])
def test_what_cannot_be_has_no_methods(id: int, service: Service) -> None:
    """A path that no item can have is a 404 for every method."""
    for method in ("OPTIONS", "POST", "DELETE"):
        assert service.send(method, f"/{id}").status == "404 Not Found"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/"),
        ("DELETE", "/"),
        ("POST", "/1"),
        ("BREW", "/1"),
        ("get", "/"),
        ("POST", "/healthz"),
        ("DELETE", "/openapi.json"),
        ("PUT", "/page.js"),
    ],
)
def test_another_method_is_not_allowed(method: str, path: str, service: Service) -> None:
    """A method that a resource has not is a 405, with those that it has in Allow."""
    app = service.app if method in ("BREW", "get") else validator(service.app)
    reply = serve_once(app, environ(method, path))
    assert reply.status == "405 Method Not Allowed"
    assert reply.content == b'{"error": "method not allowed"}\n'
    assert dict(reply.headers)["Allow"] == METHODS[path]
    assert dict(reply.headers)["Content-Type"] == "application/json"


def test_it_can_be_mounted_anywhere(service: Service) -> None:
    """Under a prefix everything is as at the root, with or without the final slash."""

    def site(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        assert shift_path_info(environ) == "shop"
        return service.app(environ, start_response)

    client = TestApp(validator(site))
    assert client.post("/shop").body == b'{"id": 1, "name": "Item #1"}\n'
    assert client.get("/shop/").json["items"] == [{"id": 1, "name": "Item #1"}]
    assert client.get("/shop/1").json["id"] == 1
    client.get("/shop/shop", status=404)


def test_an_empty_path_may_be_left_out(service: Service) -> None:
    """A mounted service takes an environ without PATH_INFO for its root."""
    request = environ("GET", SCRIPT_NAME="/shop")
    del request["PATH_INFO"]
    assert serve_once(service.app, request).content == b'{"items": []}\n'


# Whose request it is.


@pytest.mark.parametrize("site", ["cross-site", "same-site", "new"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("DELETE", "/1")])
def test_another_site_changes_nothing(method: str, path: str, site: str, service: Service) -> None:
    """A change that a page of another site has a browser ask for is a 403."""
    service.client.post("/")
    reply = service.send(method, path, HTTP_SEC_FETCH_SITE=site)
    assert reply.status == "403 Forbidden"
    assert service.rows() == [(1, "Item #1")]


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "http://items.test:8080", ""])
def test_an_old_browser_is_asked_for_the_origin(origin: str, service: Service) -> None:
    """Without fetch metadata a change from a page of another origin is a 403, reading is not."""
    options: dict[str, Any] = {"HTTP_HOST": "items.test", "HTTP_ORIGIN": origin}
    assert service.send("POST", "/", **options).status == "403 Forbidden"
    assert service.rows() == []
    assert service.send("GET", "/", **options).status == "200 OK"


@pytest.mark.parametrize("origin", ["http://items.test", "https://Items.test"])
def test_an_old_browser_may_change_from_the_own_page(origin: str, service: Service) -> None:
    """The scheme is not compared: a proxy may have taken TLS off."""
    reply = service.send("POST", "/", HTTP_HOST="items.test", HTTP_ORIGIN=origin)
    assert reply.status == "200 OK"


@pytest.mark.parametrize(("method", "site"), [("POST", "same-origin"), ("GET", "cross-site")])
def test_an_own_page_may_change_and_any_may_read(method: str, site: str, service: Service) -> None:
    """The page of this site may change items, and a link on any page leads here."""
    assert service.send(method, "/", HTTP_SEC_FETCH_SITE=site).status == "200 OK"


# Pages of other sites that may call (CORS).

SHOP = "https://shop.example"


@pytest.fixture
def shared(sqlite_url: str) -> Iterator[Service]:
    """The service with two other sites whose pages may call."""
    with service_at(sqlite_url, cors_origins=f"{SHOP} https://b.example") as made:
        yield made


def test_another_site_may_be_let_in(shared: Service) -> None:
    """A named site may read and change, and see the headers that matter; no other may change."""
    browser: dict[str, Any] = {"HTTP_SEC_FETCH_SITE": "cross-site"}
    reply = shared.send("POST", "/", HTTP_ORIGIN=SHOP, **browser)
    headers = dict(reply.headers)
    assert reply.status == "200 OK"
    assert headers["Access-Control-Allow-Origin"] == SHOP
    assert headers["Vary"] == "Origin"
    assert {"Location", "ETag", "Link"} <= set(headers["Access-Control-Expose-Headers"].split(", "))
    other = shared.send("POST", "/", HTTP_ORIGIN="https://c.example", **browser)
    assert other.status == "403 Forbidden"
    assert len(shared.rows()) == 1


def test_a_preflight_is_answered(shared: Service) -> None:
    """OPTIONS with what a page wants to do is a 204 that allows it to a named site alone."""
    asked: dict[str, Any] = {"HTTP_ACCESS_CONTROL_REQUEST_METHOD": "PUT"}
    reply = shared.send("OPTIONS", "/1", HTTP_ORIGIN=SHOP, **asked)
    headers = dict(reply.headers)
    assert reply.status == "204 No Content"
    assert "PUT" in headers["Access-Control-Allow-Methods"]
    assert "If-Match" in headers["Access-Control-Allow-Headers"]
    assert shared.send("GET", "/", HTTP_ORIGIN=SHOP, **asked).status == "200 OK"
    other = dict(shared.send("OPTIONS", "/1", HTTP_ORIGIN="https://c.example", **asked).headers)
    assert not [name for name in other if name.startswith("Access-Control")]


def test_nobody_is_let_in_by_default(service: Service) -> None:
    """Without the option no response names an origin, and none varies with it."""
    headers = dict(service.send("GET", "/1", HTTP_ORIGIN=SHOP).headers)
    assert "Vary" not in headers
    assert "Access-Control-Allow-Origin" not in headers
