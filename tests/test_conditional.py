"""Entity tags, and requests that ask for something only if (RFC 9110, 8.8.3 and 13)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import item_service
import pytest
from item_service import Service
from support import PATIENCE, Reply

memory_url, service, any_service = (
    item_service.memory_url,
    item_service.service,
    item_service.any_service,
)

OTHER = '"0123456789abcdef"'
"""A tag that no item has."""

CHANGES = [("PUT", b'{"name": "chair"}'), ("PATCH", b'{"name": "chair"}'), ("DELETE", b"")]
ANY_CHANGE = pytest.mark.parametrize(("method", "body"), CHANGES, ids=["PUT", "PATCH", "DELETE"])


def tag_of(service: Service, path: str = "/1") -> str:
    return dict(service.send("GET", path).headers)["ETag"]


def status_of(reply: Reply) -> int:
    assert reply.status is not None
    return int(reply.status[:3])


# Tags.


def test_an_item_has_a_strong_tag(any_service: Service) -> None:
    """GET, HEAD and PATCH of an item give the same strong tag, as long as it is the same."""
    any_service.client.post("/")
    replies = [any_service.send(method, "/1") for method in ("GET", "HEAD", "PATCH", "GET")]
    tags = {dict(reply.headers)["ETag"] for reply in replies}
    assert len(tags) == 1
    (tag,) = tags
    assert tag.startswith('"')
    assert tag.endswith('"')


def test_the_tag_changes_with_the_item(any_service: Service) -> None:
    """An item of another name, or of another id, has another tag; with its old name the old."""
    for _ in range(2):
        any_service.client.post_json("/", {"name": "chair"})
    first, second = tag_of(any_service, "/1"), tag_of(any_service, "/2")
    any_service.client.put_json("/1", {"name": "lamp"})
    third = tag_of(any_service, "/1")
    any_service.client.put_json("/1", {"name": "chair"})
    assert len({first, second, third}) == 3
    assert tag_of(any_service, "/1") == first


def test_a_change_answers_with_the_new_tag(service: Service) -> None:
    """The tag in the answer to PATCH is that of the item as it is now."""
    service.client.post("/")
    old = tag_of(service)
    new = service.client.patch_json("/1", {"name": "chair"}).headers["ETag"]
    assert new == tag_of(service) != old


def test_put_answers_without_a_tag(service: Service) -> None:
    """With PUT a tag would say that the item is the very body that was sent (9.3.4)."""
    service.client.post("/")
    assert "ETag" not in service.client.put_json("/1", {"name": "chair"}).headers


# If-None-Match.


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "condition",
    [
        "{}",
        "W/{}",
        "*",
        " * ",
        "{}, " + OTHER,
        OTHER + ",{}",
        OTHER + " , W/{}",
        '"", {}',
        '"a,b", {}',
    ],
)
def test_what_the_client_has_is_not_sent_again(
    condition: str, method: str, service: Service
) -> None:
    """GET and HEAD if none of these tags matches is a 304 with the tag, where one does."""
    service.client.post("/")
    tag = tag_of(service)
    given: dict[str, Any] = {"HTTP_IF_NONE_MATCH": condition.format(tag), "HTTP_X_REQUEST_ID": "x"}
    reply = service.send(method, "/1", **given)
    assert (reply.status, reply.content) == ("304 Not Modified", b"")
    assert dict(reply.headers) == {
        "ETag": tag,
        "Cache-Control": "no-cache",
        "X-Request-Id": "x",
    }


@pytest.mark.parametrize("condition", [OTHER, "W/" + OTHER, "", "{bare}", "**", '"*"', "w/{tag}x"])
def test_what_the_client_has_not_is_sent(condition: str, service: Service) -> None:
    """Where no tag matches, or what is sent is none, GET is answered as always."""
    service.client.post("/")
    tag = tag_of(service)
    condition = condition.format(bare=tag.strip('"'), tag=tag[:-1])
    reply = service.send("GET", "/1", HTTP_IF_NONE_MATCH=condition)
    assert reply.status == "200 OK"


@ANY_CHANGE
@pytest.mark.parametrize("condition", ["{}", "W/{}", "*"])
def test_a_change_if_none_matches_is_refused_where_one_does(
    condition: str, method: str, body: bytes, service: Service
) -> None:
    """PUT, PATCH and DELETE if none of these tags matches is a 412 where one does."""
    service.client.post("/")
    condition = condition.format(tag_of(service))
    reply = service.send(method, "/1", body, HTTP_IF_NONE_MATCH=condition)
    assert reply.status == "412 Precondition Failed"
    assert service.rows() == [(1, "Item #1")]


# If-Match.


@ANY_CHANGE
@pytest.mark.parametrize("condition", ["{}", "*", OTHER + ",{}", "W/" + OTHER + ", {}"])
def test_a_change_is_made_to_what_the_client_has_seen(
    condition: str, method: str, body: bytes, service: Service
) -> None:
    """PUT, PATCH and DELETE if one of these tags matches is done where one does."""
    service.client.post("/")
    condition = condition.format(tag_of(service))
    reply = service.send(method, "/1", body, HTTP_IF_MATCH=condition)
    assert status_of(reply) in (200, 204)
    assert service.rows() == ([] if method == "DELETE" else [(1, "chair")])


@ANY_CHANGE
@pytest.mark.parametrize("condition", [OTHER, "W/{}", "", "nonsense"])
def test_a_change_of_something_else_is_refused(
    condition: str, method: str, body: bytes, service: Service
) -> None:
    """PUT, PATCH and DELETE if one of these tags matches is a 412 where none does, strongly."""
    service.client.post("/")
    condition = condition.format(tag_of(service))
    reply = service.send(method, "/1", body, HTTP_IF_MATCH=condition)
    assert reply.status == "412 Precondition Failed"
    assert reply.content == b'{"error": "a precondition of the request does not hold"}\n'
    assert service.rows() == [(1, "Item #1")]


@ANY_CHANGE
def test_any_database_keeps_conditions(method: str, body: bytes, any_service: Service) -> None:
    """On each database a change is refused to who has seen something else, and made to others."""
    any_service.client.post("/")
    assert status_of(any_service.send(method, "/1", body, HTTP_IF_MATCH=OTHER)) == 412
    assert any_service.rows() == [(1, "Item #1")]
    tag = tag_of(any_service)
    assert status_of(any_service.send(method, "/1", body, HTTP_IF_MATCH=tag)) in (200, 204)
    assert any_service.rows() == ([] if method == "DELETE" else [(1, "chair")])


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_reading_may_depend_on_a_tag(method: str, service: Service) -> None:
    """GET and HEAD obey If-Match, too."""
    service.client.post("/")
    tag = tag_of(service)
    assert service.send(method, "/1", HTTP_IF_MATCH=tag).status == "200 OK"
    assert status_of(service.send(method, "/1", HTTP_IF_MATCH=OTHER)) == 412


# Which goes first (13.2).


def test_if_match_goes_first(service: Service) -> None:
    """If-Match that fails is a 412, even where If-None-Match would give a 304."""
    service.client.post("/")
    both: dict[str, Any] = {"HTTP_IF_MATCH": OTHER, "HTTP_IF_NONE_MATCH": tag_of(service)}
    assert status_of(service.send("GET", "/1", **both)) == 412


def test_both_conditions_must_hold(service: Service) -> None:
    """Where If-Match holds, If-None-Match is looked at."""
    service.client.post("/")
    tag = tag_of(service)
    reply = service.send("GET", "/1", HTTP_IF_MATCH=tag, HTTP_IF_NONE_MATCH=tag)
    assert status_of(reply) == 304


@pytest.mark.parametrize("name", ["HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"])
@pytest.mark.parametrize("condition", ["*", OTHER])
def test_what_is_wrong_anyway_goes_before_conditions(
    condition: str, name: str, service: Service
) -> None:
    """A request that would be refused without its condition is refused for that reason."""
    given: dict[str, Any] = {name: condition}
    assert status_of(service.send("PUT", "/1", b'{"name": "a"}', **given)) == 404
    service.client.post("/")
    assert status_of(service.send("PUT", "/1", b'{"name": ""}', **given)) == 422
    assert status_of(service.send("PUT", "/1", b"{", **given)) == 400
    assert status_of(service.send("PUT", "/1", b"{}", CONTENT_TYPE="text/plain", **given)) == 415
    assert status_of(service.send("DELETE", "/2", **given)) == 404
    assert status_of(service.send("GET", "/2", **given)) == 404
    assert status_of(service.send("POST", "/1", **given)) == 405
    assert service.rows() == [(1, "Item #1")]


@pytest.mark.parametrize(("method", "path"), [("OPTIONS", "/1"), ("POST", "/"), ("GET", "/")])
def test_conditions_mean_nothing_elsewhere(method: str, path: str, service: Service) -> None:
    """What has no tag, and OPTIONS, ignore conditions."""
    service.client.post("/")
    reply = service.send(method, path, HTTP_IF_MATCH=OTHER, HTTP_IF_NONE_MATCH="*")
    assert status_of(reply) in (200, 204)


# Rivals.


def at_once(service: Service, path: str, requests: list[tuple[str, bytes]]) -> list[int]:
    """Send *requests* from as many threads, each if the item is as it is now; their statuses."""
    tag = tag_of(service, path)
    together = threading.Barrier(len(requests))

    def send(request: tuple[str, bytes]) -> int:
        together.wait(PATIENCE)
        return status_of(service.send(request[0], path, request[1], HTTP_IF_MATCH=tag))

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(send, requests))


def test_of_rivals_one_wins(any_service: Service) -> None:
    """Of many who rename what they have seen just one does, and the others learn that."""
    any_service.client.post("/")
    for turn in range(10):
        names = [f"{turn} by {rival}" for rival in range(6)]
        requests = [("PUT", f'{{"name": "{name}"}}'.encode()) for name in names]
        statuses = at_once(any_service, "/1", requests)
        assert sorted(statuses) == [200] + [412] * 5
        assert any_service.rows() == [(1, names[statuses.index(200)])]


def test_renaming_and_deleting_are_rivals(any_service: Service) -> None:
    """Of one who renames and one who deletes what both have seen just one does."""
    for _ in range(10):
        id = any_service.client.post("/").json["id"]
        requests = [("PATCH", b'{"name": "chair"}'), ("DELETE", b"")]
        renamed, deleted = at_once(any_service, f"/{id}", requests)
        assert (renamed, deleted) in {(200, 412), (404, 204)}
        assert ((id, "chair") in any_service.rows()) == (renamed == 200)
