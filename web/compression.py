"""gzip for what is long: the page's files and long lists."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from webob.acceptparse import create_accept_encoding_header

from web.responses import Response

if TYPE_CHECKING:
    from web.requests import JSONRequest

SHORT = 1400
"""Bytes that fit in one packet, compressed or not."""


def accepts_gzip(request: JSONRequest) -> bool:
    accepted = request.environ.get("HTTP_ACCEPT_ENCODING", "")
    if "gzip" not in accepted:  # or ``*``, which nobody sends alone
        return False
    return bool(create_accept_encoding_header(accepted).acceptable_offers(["gzip"]))


def compress(request: JSONRequest, response: Response) -> Response:
    """Compress *response* if it is a stream or long, and the client accepts that.

    What has an entity tag is left alone: a tag belongs to one encoding.
    """
    length = response.headers["Content-Length"]
    if response.status != 200 or response.headers["ETag"] or (length and int(length) <= SHORT):
        return response
    response.headers.add_header("Vary", "Accept-Encoding")
    if accepts_gzip(request):
        response.headers["Content-Encoding"] = "gzip"
        if length:
            content = gzip.compress(b"".join(response.body), 1)
            response.body = [content]
            response.headers["Content-Length"] = str(len(content))
        else:
            response.body = compress_stream(response.body)
    return response


def compress_stream(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Compress *chunks*, each of which can be read when it arrives."""
    compressor = zlib.compressobj(1, wbits=31)
    for chunk in chunks:
        yield compressor.compress(chunk) + compressor.flush(zlib.Z_SYNC_FLUSH)
    yield compressor.flush()
