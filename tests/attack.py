"""Ten thousand malformed requests: a seeded generator, and clients that send them over sockets.

`attacks` makes requests that must be refused, some that only look hostile, and a few that
are cut off.  Each says which statuses may answer it, so that a wrong answer is found as well
as a failing service.  Nothing but a `Creation` may make a row, and nothing may change one.

RFC 9112 (https://www.rfc-editor.org/rfc/rfc9112) is HTTP/1.1.
"""

from __future__ import annotations

import gzip
import json
import socket
import string
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import quote

from support import PATIENCE

CUT = 0
"""In place of a status: the connection was closed without an answer."""

ITEM = "/1"
"""An item that exists."""

ABSENT = f"/{2**31 - 1}"
"""An item that does not."""

CREATED = b'{"name": "chair"}'
"""A body that would make an item if nothing else were wrong."""

BOMB = gzip.compress(b" " * 2_000_000 + CREATED)
"""A small body that would be a large one."""

TOKEN = string.ascii_uppercase + string.digits + "!#$%&'*+-.^_|~"

STRANGE = ["%00", "%0d%0a", "%ff", "%c0%af", "%2e%2e/", "%25", "..;", "'", '"', "--", "<", "{id}"]


@dataclass(frozen=True)
class Attack:
    """A request, and what may come of it.

    :ivar kind: what is wrong with it.
    :ivar statuses: those that may answer it; `CUT` where none need come.
    :ivar ours: that the service answers, not the server before it, and the connection stays.
    :ivar read: bytes of the response to read before the client hangs up; None to read it all.
    """

    kind: str
    data: bytes
    statuses: frozenset[int]
    ours: bool = False
    read: int | None = None


@dataclass(frozen=True)
class Creation(Attack):
    """A request that makes an item, for its name is only odd."""

    name: str = ""


@dataclass(frozen=True)
class Reply:
    """What a client got."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""


def request(
    method: str = "GET",
    target: str = "/",
    *fields: str,
    body: bytes | None = None,
    version: str = " HTTP/1.1",
) -> bytes:
    """Write a request; a *body* gets a length and is said to be JSON."""
    lines = [f"{method} {target}{version}", "Host: items.test", *fields]
    if body is not None:
        named = {line.partition(":")[0].lower() for line in fields}
        if "content-type" not in named:
            lines.append("Content-Type: application/json")
        if named.isdisjoint({"content-length", "transfer-encoding"}):
            lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


Make = Callable[[Random], Attack]

KINDS: list[Make] = []


def kind(make: Make) -> Make:
    KINDS.append(make)
    return make


def refused(what: str, data: bytes, *statuses: int) -> Attack:
    """An attack that the service refuses itself."""
    return Attack(what, data, frozenset(statuses), ours=True)


def stopped(what: str, data: bytes, *statuses: int) -> Attack:
    """An attack that the server before the service refuses, and then closes the connection."""
    return Attack(what, data, frozenset(statuses))


def write(random: Random, body: bytes, *fields: str) -> bytes:
    """Write a request that would store *body*."""
    method, target = random.choice([("POST", "/"), ("PUT", ITEM), ("PATCH", ITEM)])
    return request(method, target, *fields, body=body)


def garbage(random: Random, most: int) -> bytes:
    return random.randbytes(random.randint(1, most))


@kind
def unknown_method(random: Random) -> Attack:
    made = "X" + "".join(random.choices(TOKEN, k=random.choice([1, 5, 20, 3000])))
    method = random.choice(["TRACE", "CONNECT", "PROPFIND", "PRI", "BREW", made])
    target = random.choice(["/", ITEM, ABSENT, "/healthz", "/openapi.json", "/page.js"])
    return refused("unknown method", request(method, target), 405)


@kind
def broken_request_line(random: Random) -> Attack:
    line = random.choice(
        [
            b"get / HTTP/1.1",
            b"G\x00T / HTTP/1.1",
            b"GET  / HTTP/1.1",
            b"GET / HTTP/1.1 ?",
            b"GET /\xe9 HTTP/1.1",
            b"GET\t/\tHTTP/1.1",
            b"GET / http/1.1",
            b"GET / HTTP/11",
            b"GET",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS handshake
            b"\xff" + garbage(random, 40).replace(b"\r", b"").replace(b"\n", b""),
        ]
    )
    return stopped("broken request line", line + b"\r\nHost: items.test\r\n\r\n", 400)


@kind
def unknown_version(random: Random) -> Attack:
    version = random.choice(["", " HTTP/0.9", " HTTP/1.0", " HTTP/2.0", " HTTP/9.9"])
    data = request("GET", random.choice([ITEM, ABSENT]), version=version)
    return stopped("unknown version", data, 200, 404)


@kind
def strange_path(random: Random) -> Attack:
    numbers = ["0", "-1", "+1", "01", "1.0", "1e0", "0x1", "1%00", "%201", "1%20", "1%0a", "1/"]
    numbers += ["%D9%A1", "1,2", "9" * random.randint(10, 20_000), str(2**31), str(2**63)]
    odd = "".join(random.choices(STRANGE, k=random.randint(1, 9)))
    path = random.choice([random.choice(numbers), odd, "../" * 500, "a" * 100_000, "1;x", ":80"])
    method = random.choice(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    # HEAD has no body to look into, so its answer is all in the status.
    return refused("strange path", request(method, f"/{path}", body=CREATED), 400, 404)


@kind
def strange_target(random: Random) -> Attack:
    target = random.choice(
        ["*", "items.test:80", "//items.test/x", "http://items.test/x", "a:b@c/d", "?x", "\\", "#"]
    )
    fragment = "#" + quote(garbage(random, 9))
    return refused("strange target", request("PUT", target + fragment), 404, 405)


@kind
def broken_json(random: Random) -> Attack:
    depth = random.choice([1001, 5000, 30_000])
    whole = b'{"name": "chair", "more": [1, 2.5, null, true]}'
    body = random.choice(
        [
            whole[: random.randrange(1, len(whole))],
            whole + b"]",
            b"[" * depth,
            b"[" * depth + b"]" * depth,
            b'{"name":' * (depth // 5) + b"1" + b"}" * (depth // 6),
            b"\xef\xbb\xbf" + CREATED,
            CREATED.decode().encode(random.choice(["utf-16", "utf-32"])),
            b'{"name": "\xff\xfe"}',
            b'{"name": "\xed\xa0\x80"}',
            b'{"name": "\\ud800"}',
            b'{"name": "a\x00b"}',
            b"{'name': 'chair'}",
            b'{"name": NaN}',
            b'{"name": -Infinity}',
            b'{"name": 00}',
            b'{"name": "chair",}',
            b"\x00" * random.randint(1, 3000),
            b"\xfe" + garbage(random, 300),
        ]
    )
    return refused("broken JSON", write(random, body), 400)


@kind
def huge_number(random: Random) -> Attack:
    digits = "9" * random.choice([19, 400, 4301, 60_000])
    number = random.choice([digits, f"-{digits}", f"0.{digits}", f"1e{digits[:9]}", "1e-400"])
    return refused("huge number", write(random, b'{"name": %b}' % number.encode()), 400, 422)


@kind
def wrong_value(random: Random) -> Attack:
    letters = "".join(random.choices("aé€😀'\"\\", k=random.choice([17, 100, 5000])))
    names: list[Any] = ["", " \t", "\u200b", "\x00", "a\x00b", "a\nb", letters]
    names += [1, -1.5, None, True, [], {}, ["chair"]]
    keys = ["name ", "Name", "id", "__proto__", "__class__", "", "na\u0000me", "é" * 500]
    value: Any = random.choice(
        [
            {"name": random.choice(names)},
            {random.choice(keys): "chair", "name": "chair"},
            {f"{number}": number for number in range(random.randint(1, 3000))},
            random.choice([[], [{}], "chair", 1, None, False, [[0] * 9] * 900]),
        ]
    )
    ascii_only = random.random() < 0.5
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    return refused("wrong value", write(random, body), 422)


@kind
def wrong_content_type(random: Random) -> Attack:
    declared = random.choice(
        [
            "Content-Type: text/plain",
            "Content-Type: application/x-www-form-urlencoded",
            "Content-Type: multipart/form-data; boundary=" + "-" * 300,
            "Content-Type: application/jsonx",
            "Content-Type: application/json, text/plain",
            "Content-Type:",
            "Content-Type: ;charset=utf-8",
            "Content-Type: \xe9/\xff",
            "Content-Type: " + "a/b;" * 2000,
        ]
    )
    return refused("wrong Content-Type", write(random, CREATED, declared), 415)


@kind
def encoded_body(random: Random) -> Attack:
    coding = random.choice(["gzip", "deflate", "br", "identity, gzip", "x" * 900, "\xff"])
    return refused("encoded body", write(random, BOMB, f"Content-Encoding: {coding}"), 415)


@kind
def long_body(random: Random) -> Attack:
    body = CREATED + b" " * random.choice([65_536, 100_000, 200_000])
    if random.random() < 0.5:
        return refused("long body", write(random, body), 413)
    data = write(random, chunked(body[:9], body[9:]), "Transfer-Encoding: chunked")
    return refused("long body", data, 413)


@kind
def endless_body(random: Random) -> Attack:
    digits = random.choice(["1200000", "9" * 10, "9" * 19, "9" * 4000])
    data = request("POST", "/", f"Content-Length: {digits}", body=b"{")
    return stopped("endless body", data, 413)


@kind
def wrong_length(random: Random) -> Attack:
    length = random.choice(["-1", "+17", "0x11", "1e1", "17.0", "17, 17", "17 17", "\xb2", "a"])
    fields = [f"Content-Length: {length}"]
    if random.random() < 0.3:
        fields = ["Content-Length: 17", "Content-Length: " + random.choice(["17", "18", "0"])]
    return stopped("wrong Content-Length", write(random, CREATED, *fields), 400)


@kind
def two_lengths(random: Random) -> Attack:
    """Transfer-Encoding goes before Content-Length (RFC 9112, 6.3): it is all one body."""
    hidden = request("DELETE", ITEM)
    length = f"Content-Length: {random.choice([0, 1, 5, 10_000])}"
    fields = [length, "Transfer-Encoding: " + random.choice(["chunked", "Chunked", "chunked, "])]
    random.shuffle(fields)
    return refused("two lengths", write(random, chunked(hidden), *fields), 400)


@kind
def unknown_coding(random: Random) -> Attack:
    coding = random.choice(
        [
            "gzip",
            "identity",
            "xchunked",
            "chunked, gzip",
            "gzip, chunked",
            "\xffchunked",
            "chunked;",
        ]
    )
    data = write(random, chunked(CREATED), f"Transfer-Encoding: {coding}")
    return stopped("unknown transfer coding", data, 501)


@kind
def coding_of_another_version(random: Random) -> Attack:
    version = random.choice(["", " HTTP/1.0", " HTTP/2.0"])
    fields = ["Transfer-Encoding: " + random.choice(["chunked", "gzip", ""])]
    body = chunked(CREATED)
    if random.random() < 0.5:
        fields.append(f"Content-Length: {len(body)}")
    data = request("POST", "/", *fields, body=body, version=version)
    return stopped("Transfer-Encoding of another version", data, 400)


@kind
def no_url(random: Random) -> Attack:
    target = random.choice(["http://[", "//[::1", "a://]/", "http://[v1.x]y/x", "http://[::1/x"])
    return stopped("no URL", request("GET", target), 400, 404)


@kind
def length_of_many_digits(random: Random) -> Attack:
    digits = "9" * random.choice([4301, 7000])
    return stopped("wrong Content-Length", write(random, b"", f"Content-Length: {digits}"), 400)


@kind
def vain_expectation(random: Random) -> Attack:
    """A body is promised where there is none, or where it is refused unseen."""
    length = random.choice(["0", "00", "x", "-1", "9" * 4000])
    fields = ["Expect: 100-continue", f"Content-Length: {length}"]
    data = request("PUT", ITEM, *fields, body=b"")
    return stopped("vain expectation", data, 422 if length.strip("0") == "" else 400, 413)


@kind
def wrong_chunk(random: Random) -> Attack:
    body = random.choice(
        [
            b"zz\r\n{}\r\n0\r\n\r\n",
            b"-2\r\n{}\r\n0\r\n\r\n",
            b"0x2\r\n{}\r\n0\r\n\r\n",
            b" 2\r\n{}\r\n0\r\n\r\n",
            b"2;\x00\r\n{}\r\n0\r\n\r\n",
            b'2;a="\r\n{}\r\n0\r\n\r\n',
            b"1\r\n{}\r\n0\r\n\r\n",
            b"2\n{}\n0\n\n\r\n",
            b"\xff\r\n\r\n",
        ]
    )
    return stopped("wrong chunk", write(random, body, "Transfer-Encoding: chunked"), 400)


@kind
def broken_header(random: Random) -> Attack:
    line = random.choice(
        [
            " folded: first",
            "no colon",
            ": no name",
            "space : before",
            "nul: a\x00b",
            "n\x00l: ab",
            "cr: a\rb",
            "lf: a\nb",
            "(): x",
            "\xe9: x",
            "tab\t: x",
            "escape: \x1b[2J",
        ]
    )
    data = f"{random.choice(['GET', 'DELETE'])} {ITEM} HTTP/1.1\r\n{line}\r\nHost: x\r\n\r\n"
    return stopped("broken header", data.encode("latin-1"), 400)


@kind
def strange_header(random: Random) -> Attack:
    fields = random.choice(
        [
            ["Folded: a", "\tb", " c"],
            ["Host: a", "Host: b", "Host:"],
            ["Expect: 200-maybe"],
            ["Connection: upgrade, keep-alive", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"],
            ["X-Forwarded-For: ' OR 1=1 --", "X-Forwarded-Host: evil.test", "X-Forwarded-Proto: x"],
            ["Content_Length: 5", "REMOTE_USER: root", "wsgi.input: x", "SCRIPT-NAME: /x"],
            [f"X-{number}: {number}" for number in range(random.choice([100, 3000]))],
            ["X-Long: " + "x" * random.choice([9000, 100_000])],
            ["Cookie: " + quote(garbage(random, 900)), "Authorization: Basic ===="],
            ["Range: bytes=0-0,-1," + "1-2," * 900],
            ["Proxy: http://evil.test", "Trailer: x", "TE: trailers, chunked;q=0.5"],
        ]
    )
    target = random.choice([ABSENT, "/no/such/path"])
    return refused("strange header", request("GET", target, *fields), 404)


@kind
def oversized_head(random: Random) -> Attack:
    fields = random.choice(
        [["X-Long: " + "x" * 300_000], [f"X-{number}: {'x' * 90}" for number in range(3000)]]
    )
    # It hangs up before it has read all, and then its answer may be lost (RFC 9112, 9.6).
    return stopped("oversized head", request("GET", ITEM, *fields), 431, CUT)


@kind
def failed_precondition(random: Random) -> Attack:
    tag = quote(garbage(random, 20))
    value = random.choice(
        [
            "",
            tag,
            f'"{tag}"',
            f'W/"{tag}"',
            '"' * random.randint(1, 2000),
            '"a", ' * random.randint(1, 5000),
            "**",
            '*, "a"',
            '"*"',
            "W/*",
            'w/""',
            '"\xff\xe9"',
        ]
    )
    method = random.choice(["PUT", "PATCH", "DELETE"])
    fields = [f"If-Match: {value}"]
    if random.random() < 0.3:
        fields += ["If-Match:", "If-None-Match: *"]
    return refused("failed precondition", request(method, ITEM, *fields, body=CREATED), 412)


@kind
def unacceptable(random: Random) -> Attack:
    liked = random.choice(
        [
            "text/html",
            "image/*",
            "application/json;q=0",
            "*/*;q=0",
            "application/xml;q=0.001, text/*",
            ", ".join(f"a/b{number}" for number in range(random.randint(1, 2000))),
            "application/json;q=0.0, a/b" + ";x=y" * random.randint(1, 500),
        ]
    )
    return refused("unacceptable", write(random, CREATED, f"Accept: {liked}"), 406)


@kind
def strange_accept(random: Random) -> Attack:
    value = random.choice(
        [
            "/",
            "a",
            "*/*;q=nan",
            "*/*;q=-1",
            "application/json;q=1.0000001",
            ";;;" * 500,
            "," * 5000,
            'a/b;c="' + '\\"' * 3000,
            "a/b" + " ;" * 3000,
            "\xff\xe9",
            "*/*" + ";charset" * 900,
            quote(garbage(random, 300)),
        ]
    )
    data = request("GET", ITEM, f"Accept: {value}", f"If-Modified-Since: {value}")
    return refused("strange Accept", data, 200, 406)


@kind
def wrong_query(random: Random) -> Attack:
    query = random.choice(
        [
            "limit=",
            "limit=0",
            "limit=-1",
            "limit=1001",
            "limit=1.0",
            "limit=1e2",
            "limit=01",
            "limit=1&limit=1",
            "limit=%00",
            "limit=%31%ff",
            "limit=%D9%A1",
            "limit[]=1",
            "limit=1;after=1",
            "after=" + "9" * random.randint(10, 10_000),
            "after=-0",
            "after=1'%20OR%20'1'='1",
            "after=1%20UNION%20SELECT%201,2",
            "=",
            "x",
            "%",
            "%zz=1",
            "__class__=1",
            "&".join(f"a{number}={number}" for number in range(random.randint(1, 3000))),
            f"{quote(garbage(random, 30))}=1",
        ]
    )
    return refused("wrong query", request("GET", f"/?{query}"), 400, 422)


@kind
def from_another_site(random: Random) -> Attack:
    site = random.choice(["cross-site", "same-site", "", "x", "\xff", "none, same-origin"])
    fields = [f"Sec-Fetch-Site: {site}", "Origin: http://evil.test"]
    return refused("from another site", write(random, CREATED, *fields), 403)


@kind
def expectation(random: Random) -> Attack:
    data = write(
        random, b'{"name": 1}', "Expect: " + random.choice(["100-continue", "100-Continue"])
    )
    return refused("expectation", data, 422)


@kind
def mutant(random: Random) -> Attack:
    """Bytes replaced or inserted in the head; the length of the body is left alone."""
    head = bytearray(
        b"PUT "
        + ABSENT.encode()
        + b"?a=1&b=%20 HTTP/1.1\r\nAccept: application/json;q=0.9, */*\r\n"
        b'If-Match: "a", W/"b"\r\nX-Header: some value'
    )
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(head))
        head[place : place + random.randint(0, 1)] = random.randbytes(1)
    # The body is refused whatever becomes of the head.
    data = bytes(head) + b'\r\nContent-Length: 11\r\nConnection: close\r\n\r\n{"name": 1}'
    return stopped("mutant", data, *range(400, 500), 200, 204, 304, CUT)


@kind
def creation(random: Random) -> Attack:
    names = [
        "'); DROP TABLE",
        "' OR 1=1; --",
        "%s%(x)s:name",
        "${7*7}{{7*7}}",
        "<script>",
        "\u202egnp.exe",
    ]
    other = "".join(chr(random.choice([0x20, 0xE9, 0x202E, 0xFFFF, 0x1F600])) for _ in range(16))
    name = random.choice([*names, f"{other[:15].strip()}."])
    data = request("POST", "/", body=json.dumps({"name": name}).encode())
    return Creation("creation", data, frozenset({200}), ours=True, name=name)


@kind
def cut_request(random: Random) -> Attack:
    whole = random.choice(
        [
            request("POST", "/", body=CREATED),
            write(random, chunked(CREATED), "Transfer-Encoding: chunked"),
            request("DELETE", ITEM),
            write(random, CREATED, "Expect: 100-continue"),
            request("GET", ITEM, "Expect: 100-continue", "X-Cut: yes"),
        ]
    )
    cut = whole[: random.randrange(1, len(whole) - 1)]
    return Attack("cut request", cut, frozenset({CUT}), read=0)


@kind
def cut_response(random: Random) -> Attack:
    target = random.choice(["/", "/", "/openapi.json", "/page.js", "/?limit=1000"])
    data = request("GET", target, "Connection: close")
    return Attack("cut response", data, frozenset({CUT}), read=random.choice([0, 1, 500, 20_000]))


def attacks(seed: str, count: int) -> list[Attack]:
    """Make *count* requests, as many of each kind; the same ones for the same *seed*."""
    random = Random(seed)
    made = [KINDS[number % len(KINDS)](random) for number in range(count)]
    random.shuffle(made)
    return made


class Connection:
    """A client's connection, which sends what it is told to and reads what comes.

    :param narrow: take little at a time, so that the server must wait with the rest.
    """

    def __init__(self, port: int, *, narrow: bool = False) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE)
        if narrow:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(("127.0.0.1", port))
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def reset(self) -> None:
        """Have the connection end with a reset instead of a goodbye; see socket(7), SO_LINGER."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def send(self, data: bytes) -> None:
        """Send *data*; a server that has hung up meanwhile may have answered."""
        try:
            self.socket.sendall(data)
        except ConnectionError:
            return

    def read(self, *, head_only: bool = False) -> Reply:
        """Read one response.

        :raises EOFError: where the connection ends before it does.
        """
        status, headers = self.read_head()
        while status == 100:
            status, headers = self.read_head()
        if head_only or status in (204, 304):
            return Reply(status, headers)
        if "transfer-encoding" in headers:
            return Reply(status, headers, b"".join(self.read_chunks()))
        return Reply(status, headers, self.exactly(int(headers["content-length"])))

    def read_head(self) -> tuple[int, dict[str, str]]:
        status = int(self.line().split()[1])
        headers = {}
        while line := self.line():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        return status, headers

    def read_chunks(self) -> Iterator[bytes]:
        while size := int(self.line(), 16):
            yield self.exactly(size)
            self.line()
        self.line()

    def line(self) -> str:
        try:
            line = self.file.readline()
        except ConnectionError:
            line = b""
        if not line.endswith(b"\r\n"):
            raise EOFError
        return line[:-2].decode("latin-1")

    def exactly(self, size: int) -> bytes:
        content = self.file.read(size)
        if len(content) < size:
            raise EOFError
        return content


class Attacker:
    """A client that keeps its connection while it can, and at times does not wait for answers."""

    def __init__(self, port: int, random: Random) -> None:
        self.port = port
        self.random = random
        self.kept: Connection | None = None
        self.answered: list[tuple[Attack, Reply]] = []

    def run(self, todo: Sequence[Attack]) -> list[tuple[Attack, Reply]]:
        """Send all of *todo*; each with its answer."""
        rest = [*todo]
        try:
            while rest:
                burst = [rest.pop()]
                while burst[-1].ours and rest and rest[-1].ours and self.random.random() < 0.5:
                    burst.append(rest.pop())
                self.exchange(burst) if burst[0].read is None else self.cut(burst[0])
        finally:
            self.drop()
        return self.answered

    def exchange(self, burst: list[Attack]) -> None:
        """Send all of *burst* at once, and read the answers."""
        self.kept = self.kept or Connection(self.port)
        self.kept.send(b"".join(attack.data for attack in burst))
        for attack in burst:
            reply = self.answer_to(attack)
            self.answered.append((attack, reply))
            closed = reply.headers.get("connection", "").lower() == "close"
            if reply.status == CUT or closed or not attack.ours:
                self.drop()

    def answer_to(self, attack: Attack) -> Reply:
        if self.kept is None:
            return Reply(CUT)
        try:
            return self.kept.read(head_only=attack.data.startswith(b"HEAD "))
        except EOFError:
            return Reply(CUT)
        except TimeoutError:
            raise TimeoutError(f"no answer to {attack.kind}: {attack.data[:500]!r}") from None

    def cut(self, attack: Attack) -> None:
        """Hang up in the middle of the request, or of the response."""
        with Connection(self.port, narrow=True) as connection:
            connection.send(attack.data)
            connection.file.read(attack.read)
            if self.random.random() < 0.5:
                connection.reset()
        self.answered.append((attack, Reply(CUT)))

    def drop(self) -> None:
        if self.kept is not None:
            self.kept.close()
        self.kept = None


def launch(port: int, seed: str, count: int, clients: int) -> list[tuple[Attack, Reply]]:
    """Have several clients at once send the attacks of *seed*; each of them with its answer."""
    todo = attacks(seed, count)

    def run(number: int) -> list[tuple[Attack, Reply]]:
        return Attacker(port, Random(f"{seed} {number}")).run(todo[number::clients])

    with ThreadPoolExecutor(clients) as threads:
        return [pair for pairs in threads.map(run, range(clients)) for pair in pairs]


def trickle(port: int, clients: int) -> list[tuple[Attack, Reply]]:
    """Have many clients send a body byte by byte, in step; after each byte somebody else asks.

    The last third of them never finishes.
    """
    body = b'{"name": 1234567}'
    head = request("POST", "/", f"Content-Length: {len(body)}", body=b"")
    meanwhile = Attack("while others are slow", b"", frozenset({200}), ours=True)
    finished = Attack("slow body", b"", frozenset({422}), ours=True)
    unfinished = Attack("unfinished slow body", b"", frozenset({CUT}))
    answered = []
    with ExitStack() as open_connections:
        other, *slow = (
            open_connections.enter_context(Connection(port)) for _ in range(clients + 1)
        )
        for part in [head, *(body[place : place + 1] for place in range(len(body) - 1))]:
            for client in slow:
                client.send(part)
            other.send(request("GET", ITEM))
            answered.append((meanwhile, other.read()))
        patient = slow[: clients * 2 // 3]
        for client in patient:
            client.send(body[-1:])
        answered += [(finished, client.read()) for client in patient]
    return answered + [(unfinished, Reply(CUT))] * (clients - len(patient))
