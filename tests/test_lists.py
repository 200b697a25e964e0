"""Lists of any size: pages by key, and streams that cannot be cut unnoticed."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlencode, urljoin

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

    for engine in service.app.engines.values():  # type: ignore[attr-defined]
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
    expected = '<?after=3&limit=1>; rel="next"'
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
    assert target == f"{url}?after=1&limit=1"


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


def pages(service: Service, query: str) -> list[Any]:
    """The items of all pages, in order, as one who follows the links gets them."""
    url, found = f"http://localhost/?{query}", []
    while url:
        answer = service.client.get(url)
        found += answer.json["items"]
        link = answer.headers.get("Link", "")
        url = urljoin(url, link[1 : link.index(">")]) if link else ""
    return found


def test_the_newest_may_come_first(any_service: Service) -> None:
    """``order=newest`` lists by descending id: as a whole, in pages, and before a key."""
    items = fill(any_service, [1, 2, 3, 5, 8])
    assert listed(any_service, "?order=newest") == items[::-1]
    assert pages(any_service, "order=newest&limit=2") == items[::-1]
    assert listed(any_service, "?order=newest&before=5&limit=2") == [items[2], items[1]]
    assert listed(any_service, "?order=newest&after=2") == items[:1:-1]


def test_before_and_after_are_exclusive(any_service: Service) -> None:
    """``before`` lists items with a smaller id, in any order, and goes with ``after``."""
    items = fill(any_service, [1, 2, 3, 5, 8])
    assert listed(any_service, "?before=3") == items[:2]
    assert listed(any_service, "?before=0") == []
    assert listed(any_service, "?before=8&after=1") == items[1:4]
    assert pages(any_service, "before=8&limit=1") == items[:4]


NAMES = ["lamp", "Lamp", "lamp post", "lam", "lamb", "100%", "100 p", "l_mp", "läm", "\U0001f4a1 x"]


FOUND = {
    "lamp": ["lamp", "lamp post"],
    "Lamp": ["Lamp"],
    "lam": ["lamp", "lamp post", "lam", "lamb"],
    " lamp ": ["lamp", "lamp post"],
    "lamp p": ["lamp post"],
    "l": ["lamp", "lamp post", "lam", "lamb", "l_mp", "läm"],
    "l_": ["l_mp"],
    "100%": ["100%"],
    "lä": ["läm"],
    "\U0001f4a1": ["\U0001f4a1 x"],
    "\U0010ffff": [],
    "'": [],
    "": NAMES,
}


def test_items_are_found_by_the_beginning_of_their_names(any_service: Service) -> None:
    """``name`` finds by prefix, to the letter: case matters, and no character is a wildcard."""
    with any_service.outside.begin() as connection:
        connection.execute(insert(Item), [{"name": name} for name in NAMES])
    for prefix, names in FOUND.items():
        query = urlencode({"name": prefix})
        assert [item["name"] for item in listed(any_service, f"?{query}")] == names, prefix
        counted = any_service.client.get(f"/count?{query}").json
        assert counted == {"count": len(names), "exact": True}


def test_a_search_goes_on_from_page_to_page(any_service: Service) -> None:
    """A link keeps the search and the order."""
    items = fill(any_service, range(1, 20))
    found = [item for item in items if item["name"].startswith("Item #1")]
    assert pages(any_service, "name=Item+%231&limit=3") == found
    assert pages(any_service, "name=Item+%231&limit=3&order=newest") == found[::-1]


EXPLAIN = {"sqlite": "EXPLAIN QUERY PLAN"}
ANALYZE = {"mariadb": "ANALYZE TABLE items", "sqlite": "ANALYZE"}


@pytest.mark.parametrize("any_service", ["sqlite", "postgresql", "mariadb"], indirect=True)
def test_a_search_uses_the_index(any_service: Service) -> None:
    """Each engine plans to look the prefix up in the index of names, for a page and for a count."""
    fill(any_service, range(1, 3000))
    asked = statements(any_service)
    listed(any_service, "?name=Item+%23299&limit=5&after=7")
    any_service.client.get("/count?name=Item+%23299")
    assert len(asked) == 2
    name = any_service.outside.dialect.name
    with any_service.outside.begin() as connection:
        connection.exec_driver_sql(ANALYZE.get(name, "ANALYZE items"))
        for statement, parameters in asked:
            explain = f"{EXPLAIN.get(name, 'EXPLAIN')} {statement}"
            plan = str(connection.exec_driver_sql(explain, parameters).all())
            assert "ix_items_name" in plan


# Counts.


def test_items_are_counted(any_service: Service) -> None:
    """/count tells how many items a list with the same filters would have."""
    assert any_service.client.get("/count").body == b'{"count": 0, "exact": true}\n'
    fill(any_service, range(1, 31))
    for query, count in [
        ("", 30),
        ("after=10", 20),
        ("before=5&after=1", 3),
        ("name=Item+%233", 2),
    ]:
        assert any_service.client.get(f"/count?{query}").json == {"count": count, "exact": True}
    any_service.client.get("/count?limit=1", status=422)


def test_a_count_is_cheap(any_service: Service) -> None:
    """No more than 10,000 rows are counted; where there are more, the count is not exact."""
    items = [{"id": id, "name": "x"} for id in range(1, 10_002)]
    with any_service.outside.begin() as connection:
        connection.execute(insert(Item), items)
    assert any_service.client.get("/count").json == {"count": 10_000, "exact": False}
    assert any_service.client.get("/count?after=1").json == {"count": 10_000, "exact": True}


# Compression.

GZIP: dict[str, Any] = {"HTTP_ACCEPT_ENCODING": "gzip, br"}


@pytest.mark.parametrize("count", [1000, LONG])
def test_a_long_list_is_compressed(count: int, service: Service) -> None:
    """A long list or a stream is sent in gzip to who accepts it, and as it is to others."""
    fill(service, range(1, count + 1))
    plain, packed = service.send("GET", "/"), service.send("GET", "/", **GZIP)
    assert dict(packed.headers)["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.content) == plain.content
    assert len(packed.content) < len(plain.content) / 4
    for reply in (plain, packed):
        vary = [value for name, value in reply.headers if name == "Vary"]
        assert vary == ["Accept-Encoding", "Accept"]
    assert "Content-Encoding" not in dict(plain.headers)


@pytest.mark.parametrize("accepted", ["", "identity", "br", "gzip;q=0", "deflate, gzip;q=0.0"])
def test_nobody_gets_what_they_do_not_accept(accepted: str, service: Service) -> None:
    """Who does not accept gzip gets the list as it is."""
    fill(service, range(1, 1001))
    reply = service.send("GET", "/", HTTP_ACCEPT_ENCODING=accepted)
    assert "Content-Encoding" not in dict(reply.headers)


def test_what_is_short_is_not_compressed(service: Service) -> None:
    """A list that fits in a packet, and an item with its tag, are sent as they are."""
    fill(service, [1])
    for path in ("/", "/1"):
        assert "Content-Encoding" not in dict(service.send("GET", path, **GZIP).headers)


def test_a_compressed_stream_can_be_read_as_it_comes(service: Service) -> None:
    """Each chunk of a compressed stream can be decompressed when it arrives."""
    fill(service, range(1, LONG + 1))
    server = Server(service.app)
    chunks = server.begin(environ(**GZIP))
    unpack = zlib.decompressobj(wbits=31)
    assert unpack.decompress(next(chunks)).startswith(b'{"items": [{"id": 1, ')
    assert unpack.decompress(b"".join(chunks)).endswith(b"]}\n")
    assert unpack.eof
    server.finish()


@pytest.mark.parametrize("limit", [1, 1000])
def test_the_bounds_of_limit_are_in_it(limit: int, service: Service) -> None:
    """A page may have 1 to 1,000 items."""
    items = fill(service, range(1, 1003))
    assert listed(service, f"?limit={limit}") == items[:limit]


NO_NUMBERS = ["", "-0", "01", "+1", "%201", "1.0", "1e2", "1_0", "%D9%A1", "0x10", "null"]


@pytest.mark.parametrize(
    ("query", "field", "code"),
    [
        ("limit=0", "limit", "too_small"),
        ("limit=1001", "limit", "too_large"),
        *((f"limit={text}", "limit", "wrong_type") for text in NO_NUMBERS),
        ("limit", "limit", "wrong_type"),
        ("limit=" + "9" * 5000, "limit", "wrong_type"),
        ("after=-1", "after", "too_small"),
        ("after=2147483648", "after", "too_large"),
        ("before=2147483649", "before", "too_large"),
        ("after=9223372036854775808", "after", "wrong_type"),
        ("limit=1&limit=1", "limit", "repeated"),
        ("after=1&limit=1&after=2", "after", "repeated"),
        ("offset=1", "offset", "unknown"),
        ("Limit=1", "Limit", "unknown"),
        ("limit=1&x=%00", "x", "unknown"),
        ("=", "", "unknown"),
        ("order=name", "order", "not_a_choice"),
        ("order=", "order", "not_a_choice"),
        ("name=12345678901234567", "name", "too_long"),
        ("name=a%00", "name", "control_character"),
    ],
)
def test_a_wrong_query_is_refused(query: str, field: str, code: str, service: Service) -> None:
    """A parameter that is unknown, repeated or wrong is a 422 that names it."""
    answer = service.client.get(f"/?{query}", status=422)
    (told,) = answer.json["errors"]
    assert (told["field"], told["code"]) == (field, code)
    assert answer.json["error"].startswith(f"{field} must ") or f"{field!r}" in answer.json["error"]


@pytest.mark.parametrize(
    ("query", "words", "limit"),
    [
        ("limit=0", "limit must be 1 or more", 1),
        ("limit=-1", "limit must be 1 or more", 1),
        ("limit=1001", "limit must be 1000 or less", 1000),
        ("limit=x", "limit must be a whole number", None),
        ("order=up", "order must be oldest or newest", None),
        ("limit=1&limit=2", "'limit' is given more than once", None),
    ],
)
def test_a_wrong_parameter_is_explained(
    query: str, words: str, limit: int | None, service: Service
) -> None:
    """The sentence can be shown to people, and a program gets the limit as a number."""
    answer = service.client.get(f"/?{query}", status=422)
    assert answer.json["error"] == words
    assert answer.json["errors"][0].get("limit") == limit


@pytest.mark.parametrize("query", ["after=%FF", "%C3=1", "limit=1&x=%ED%A0%80", "x=\xff"])
def test_a_query_is_utf8(query: str, service: Service) -> None:
    """A query that is not percent-encoded UTF-8 is a 400 that says so."""
    reply = service.send("GET", "/", QUERY_STRING=query)
    assert reply.status == "400 Bad Request"
    assert reply.content == b'{"error": "the query is not percent-encoded UTF-8"}\n'


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
    assert service.client.get("/").body == json.dumps({"items": items}).encode() + b"\n"


def test_a_list_after_a_key_streams_too(any_service: Service) -> None:
    """``after`` alone streams what is long."""
    items = fill(any_service, range(1, LONG + 1))
    reply = any_service.send("GET", "/", QUERY_STRING="after=7")
    assert json.loads(reply.content) == {"items": items[7:]}
    assert "Content-Length" not in dict(reply.headers)


def test_head_of_a_long_list_reads_little_of_it(service: Service) -> None:
    """HEAD of a list that would stream has its headers and no body, after one statement."""
    fill(service, range(1, LONG + 1))
    got = service.send("GET", "/", HTTP_X_REQUEST_ID="same")
    asked = statements(service)
    head = service.send("HEAD", "/", HTTP_X_REQUEST_ID="same")
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
