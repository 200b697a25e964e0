"""Lists of any size: pages by key, and streams that cannot be cut unnoticed."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from typing import Any
from urllib.parse import urljoin

import item_service
import pytest
from item_service import Service
from sqlalchemy import delete, event, insert
from support import Server, environ, fetch, serving

from models import Item

memory_url, service, any_service = (
    item_service.memory_url,
    item_service.service,
    item_service.any_service,
)

LONG = 2600
"""Items that are listed as a stream, in several chunks."""


def fill(service: Service, ids: Iterable[int]) -> list[dict[str, Any]]:
    """Store an item for each of *ids*; the items as a list shows them."""
    items = [{"id": id, "name": f"Item #{id}"} for id in ids]
    with service.outside.begin() as connection:
        connection.execute(insert(Item), items)
    return items


def listed(service: Service, query: str = "") -> Any:
    return service.client.get(f"/{query}").json["items"]


def statements(service: Service, *, fail_after: float = float("inf")) -> list[tuple[str, Any]]:
    """Note each statement that the service sends; after some, have them fail."""
    noted: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        noted.append((statement, parameters))
        if len(noted) > fail_after:
            raise ConnectionError("the connection is cut")

    for engine in service.app.engines:  # type: ignore[attr-defined]
        event.listen(engine, "before_cursor_execute", note)
    return noted


def begun(service: Service, query: str = "") -> tuple[Server, Any]:
    """Ask for the list; the server, and the stream of what it gets."""
    server = Server(service.app)
    return server, server.begin(environ(QUERY_STRING=query))


# Pages.


def test_a_page_leads_to_the_next(any_service: Service) -> None:
    """Following the links from a first page shows each item once, and ends."""
    items = fill(any_service, [1, 2, 3, 5, 8, 13, 21])
    url, pages = "http://localhost/?limit=3", []
    while url:
        answer = any_service.client.get(url)
        pages.append(answer.json["items"])
        link = answer.headers.get("Link", "")
        url = urljoin(url, link[1 : link.index(">")]) if link else ""
    assert pages == [items[:3], items[3:6], items[6:]]


def test_only_a_page_with_a_next_one_has_a_link(service: Service) -> None:
    """A page that is full, but the last one, has no Link."""
    fill(service, range(1, 5))
    assert "Link" not in service.client.get("/?after=2&limit=2").headers
    assert "Link" not in service.client.get("/?limit=4").headers
    assert "Link" not in service.client.get("/").headers
    expected = '<?limit=1&after=3>; rel="next"'
    assert service.client.get("/?after=2&limit=1").headers["Link"] == expected


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/",
        "http://localhost/shop",
        "http://localhost/shop/",
        "https://example.org/behind/a/proxy/",
    ],
)
def test_a_link_is_right_wherever_the_client_is(url: str, service: Service) -> None:
    """Under any prefix, scheme and host a link leads to the same place, with another query."""
    fill(service, range(1, 3))
    link = service.client.get("/?limit=1").headers["Link"]
    target = urljoin(f"{url}?limit=1", link[1 : link.index(">")])
    assert target == f"{url}?limit=1&after=1"


def test_a_key_need_not_exist(any_service: Service) -> None:
    """``after`` alone gives all items with a larger id, whether or not there is one with it."""
    items = fill(any_service, [2, 4, 6])
    assert listed(any_service, "?after=0") == items
    assert listed(any_service, "?after=3") == items[1:]
    assert listed(any_service, "?after=6") == []
    assert listed(any_service, "?after=2147483647") == []


def test_a_page_costs_the_same_anywhere(service: Service) -> None:
    """A page asks one question, by key and with a limit, wherever it is in the list."""
    fill(service, range(1, 30))
    asked = statements(service)
    listed(service, "?limit=5&after=20")
    ((statement, parameters),) = asked
    assert "items.id > ?" in statement
    assert list(parameters) == [20, 6, 0]  # SQLAlchemy writes LIMIT with an OFFSET


@pytest.mark.parametrize("limit", [1, 1000])
def test_the_bounds_of_limit_are_in_it(limit: int, service: Service) -> None:
    """A page may have 1 to 1,000 items."""
    items = fill(service, range(1, 1003))
    assert listed(service, f"?limit={limit}") == items[:limit]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("limit=0", ">= 1 - at `$.limit`"),
        ("limit=1001", "<= 1000 - at `$.limit`"),
        ("limit=-1", "at `$.limit`"),
        ("limit=", "at `$.limit`"),
        ("limit", "at `$.limit`"),
        ("limit=01", "at `$.limit`"),
        ("limit=+1", "at `$.limit`"),
        ("limit=%201", "at `$.limit`"),
        ("limit=1.0", "at `$.limit`"),
        ("limit=1e2", "at `$.limit`"),
        ("limit=1_0", "at `$.limit`"),
        ("limit=%D9%A1", "at `$.limit`"),
        ("limit=0x10", "at `$.limit`"),
        ("limit=null", "at `$.limit`"),
        ("limit=" + "9" * 5000, "at `$.limit`"),
        ("after=-1", "at `$.after`"),
        ("after=2147483648", "<= 2147483647 - at `$.after`"),
        ("after=9223372036854775808", "at `$.after`"),
        ("limit=1&limit=1", "`limit` more than once"),
        ("after=1&limit=1&after=2", "`after` more than once"),
        ("offset=1", "unknown field `offset`"),
        ("Limit=1", "unknown field `Limit`"),
        ("limit=1&x=%00", "unknown field `x`"),
        ("=", "unknown field ``"),
    ],
)
def test_a_wrong_query_is_refused(query: str, words: str, service: Service) -> None:
    """A parameter that is unknown, repeated or wrong is a 422 that names it."""
    answer = service.client.get(f"/?{query}", status=422)
    assert words in answer.json["error"]
    assert list(answer.json) == ["error"]


@pytest.mark.parametrize("query", ["after=%FF", "%C3=1", "limit=1&x=%ED%A0%80", "x=\xff"])
def test_a_query_is_utf8(query: str, service: Service) -> None:
    """A query that is not percent-encoded UTF-8 is a 400 that says so."""
    reply = service.send("GET", "/", QUERY_STRING=query)
    assert reply.status == "400 Bad Request"
    assert reply.content == b'{"error": "the query is not percent-encoded UTF-8"}'


@pytest.mark.parametrize("query", ["", "&", "limit=2&", "&&limit=%32", "%6Cimit=2"])
def test_a_query_may_be_spelled_in_many_ways(query: str, service: Service) -> None:
    """Empty parts of a query, and what is percent-encoded without need, are no matter."""
    items = fill(service, range(1, 3))
    assert listed(service, f"?{query}") == items


# Streams.


@pytest.mark.parametrize("count", [1000, 1001, 1501, LONG])
def test_a_list_is_complete_at_any_length(count: int, any_service: Service) -> None:
    """A list has all items, whether it is sent at once or in chunks that are just full."""
    items = fill(any_service, range(1, count + 1))
    reply = any_service.send("GET", "/")
    assert json.loads(reply.content) == {"items": items}
    assert ("Content-Length" in dict(reply.headers)) == (count <= 1000)


def test_a_stream_reads_as_a_short_list_does(service: Service) -> None:
    """A streamed list has the very bytes that it would have in one piece."""
    items = fill(service, range(1, LONG + 1))
    assert service.client.get("/").body == json.dumps({"items": items}).encode()


def test_a_list_after_a_key_streams_too(any_service: Service) -> None:
    """``after`` alone streams what is long."""
    items = fill(any_service, range(1, LONG + 1))
    reply = any_service.send("GET", "/", QUERY_STRING="after=7")
    assert json.loads(reply.content) == {"items": items[7:]}
    assert "Content-Length" not in dict(reply.headers)


def test_head_of_a_long_list_reads_little_of_it(service: Service) -> None:
    """HEAD of a list that would stream has its headers and no body, after one statement."""
    fill(service, range(1, LONG + 1))
    got, asked = service.send("GET", "/"), statements(service)
    head = service.send("HEAD", "/")
    assert (head.status, head.headers, head.content) == (got.status, got.headers, b"")
    assert len(asked) == 1


def test_a_stream_comes_in_chunks(any_service: Service) -> None:
    """A chunk of a long list leaves before the next is asked for."""
    items = fill(any_service, range(1, LONG + 1))
    asked = statements(any_service)
    server, chunks = begun(any_service)
    received, counts = [], []
    for chunk in chunks:
        received.append(chunk)
        counts.append(len(asked))
    server.finish()
    assert json.loads(b"".join(received)) == {"items": items}
    assert counts == [1, 2, 3, 4, 5, 6]


def test_a_list_in_sqlite_is_of_one_moment(service: Service) -> None:
    """On a SQLite file a streamed list is as it was when it began, whatever is stored meanwhile."""
    items = fill(service, range(1, LONG + 1))
    server, chunks = begun(service)
    received = [next(chunks)]
    with service.outside.begin() as connection:
        connection.execute(delete(Item))
    received.extend(chunks)
    server.finish()
    assert json.loads(b"".join(received)) == {"items": items}


@pytest.mark.parametrize("any_service", ["postgresql", "mariadb"], indirect=True)
def test_an_item_that_comes_meanwhile_may_be_listed(any_service: Service) -> None:
    """What is stored beyond the key while a list streams is in it; nothing is in it twice."""
    fill(any_service, range(1, LONG + 1))
    server, chunks = begun(any_service)
    first = next(chunks)
    fill(any_service, [LONG + 1])
    with any_service.outside.begin() as connection:
        connection.execute(delete(Item).where(Item.id.in_([1, 2, LONG - 1])))
    whole = json.loads(first + b"".join(chunks))["items"]
    server.finish()
    ids = [item["id"] for item in whole]
    assert ids == [id for id in range(1, LONG + 2) if id != LONG - 1]


@pytest.mark.parametrize("statement", [2, 3, 4, 5])
def test_a_stream_that_fails_is_no_json(statement: int, any_service: Service) -> None:
    """Where the database fails in mid-stream the server sees the error, the client no JSON."""
    fill(any_service, range(1, LONG + 1))
    statements(any_service, fail_after=statement - 1)
    server = Server(any_service.app)
    with pytest.raises(ConnectionError, match="the connection is cut"):
        server.run(environ())
    assert server.reply.status == "200 OK"
    with pytest.raises(json.JSONDecodeError):
        json.loads(server.reply.content)


def test_a_cut_stream_is_seen_on_the_wire(service: Service) -> None:
    """Over a real socket a list that fails in mid-stream ends without its last chunk."""
    fill(service, range(1, LONG + 1))
    with serving(service.app) as port:
        whole = fetch(port)
        statements(service, fail_after=3)
        torn = fetch(port)
    assert (whole.status, whole.complete) == (200, True)
    assert (torn.status, torn.complete) == (200, False)
    assert whole.content.startswith(torn.content)


def test_a_client_that_hangs_up_leaves_nothing(any_service: Service) -> None:
    """A stream that is given up returns its connection, and the next request is served."""
    fill(any_service, range(1, LONG + 1))
    for _ in range(20):  # more than there are connections
        server, chunks = begun(any_service)
        next(chunks)
        server.finish()
    assert any_service.client.get("/1").json["id"] == 1


def test_a_stream_takes_constant_memory(service: Service) -> None:
    """A list of 100,000 items takes no more memory than one of 10,000."""
    peaks = []
    have = 0
    for count in (10_000, 100_000):
        fill(service, range(have + 1, count + 1))
        have = count
        server, chunks = begun(service)
        tracemalloc.start()
        length = sum(len(chunk) for chunk in chunks)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        server.finish()
        assert length > 30 * count
    assert peaks[1] < peaks[0] + 2**20
