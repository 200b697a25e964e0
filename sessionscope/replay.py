"""The environ and the body of a request, recorded for a retry."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterator
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

RECORD_IN_MEMORY = 1024 * 1024
"""Bytes of a body that are kept in memory for a retry; more go to a temporary file."""


class Replay:
    """The environ and the body of a request, as the server passed them.

    A body that cannot be rewound is recorded while the application reads it, so nothing is
    read that the application does not read.

    :param environ: its ``wsgi.input`` is replaced if the body must be recorded.
    """

    def __init__(self, environ: WSGIEnvironment) -> None:
        self.environ = environ
        self.position = 0
        stream: Any = environ.get("wsgi.input")
        try:
            rewindable = stream.seekable()
            if rewindable:
                self.position = stream.tell()
        except (AttributeError, OSError):
            rewindable = False
        if stream is not None and not rewindable:
            environ["wsgi.input"] = Recorder(stream)
        self.at_entry = environ.copy()

    def is_possible(self) -> bool:
        """Return whether the body can be read again.

        The application may have closed it, or read it in a way that was not recorded.
        """
        stream: Any = self.at_entry.get("wsgi.input")
        if isinstance(stream, Recorder) and stream.bypassed:
            return False
        return not getattr(stream, "closed", False)

    def rewind(self) -> None:
        """Restore the environ and rewind the body for a retry."""
        self.environ.clear()
        self.environ.update(self.at_entry)
        stream: Any = self.environ.get("wsgi.input")
        if stream is not None:
            stream.seek(self.position)


HARMLESS = frozenset({"close", "flush", "isatty", "readable", "seekable", "tell", "writable"})
"""Methods of a body through which nothing can be read."""


class Recorder:
    """``wsgi.input`` (PEP 3333, "Input and Error Streams") that records and replays.

    It also has the methods that ``io`` reads with.  Other attributes are those of the server's
    object, which may read past the recording.
    """

    bypassed = False
    """Something may have been read that was not recorded."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.record: Any = io.BytesIO()
        self.recorded = 0
        self.left = 0
        """Recorded bytes that this attempt has not read yet."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.source, name)
        harmless = name in HARMLESS or isinstance(found, (str, int, type(None)))
        self.bypassed = self.bypassed or not harmless
        return found

    def seek(self, position: int) -> None:
        self.record.seek(position)
        self.left = self.recorded - position

    def read(self, size: int | None = -1) -> bytes:
        return self._take(self.record.read, self.source.read, size)

    def readline(self, size: int | None = -1) -> bytes:
        return self._take(self.record.readline, self.source.readline, size, until=b"\n")

    def read1(self, size: int | None = -1) -> bytes:
        if self.left:  # more would wait for the client
            size = self.left if size is None or size < 0 else min(size, self.left)
        return self._take(self.record.read, getattr(self.source, "read1", self.source.read), size)

    def readinto(self, buffer: Any) -> int:
        return _fill(buffer, self.read)

    def readinto1(self, buffer: Any) -> int:
        return _fill(buffer, self.read1)

    def readlines(self, hint: int | None = -1) -> list[bytes]:
        lines, size = [], 0
        for line in iter(self.readline, b""):
            lines.append(line)
            size += len(line)
            if hint is not None and 0 < hint <= size:
                break
        return lines

    def __iter__(self) -> Iterator[bytes]:
        while self.left:
            yield self.readline()
        yield from map(self._keep, self.source)

    def _take(
        self,
        replay: Callable[[int], bytes],
        receive: Callable[..., bytes],
        size: int | None,
        until: bytes | None = None,
    ) -> bytes:
        """Return bytes of the recording, and when that ends, of the server."""
        size = -1 if size is None else size
        if not self.left:
            return self._keep(receive(size) if size >= 0 else receive())
        known = replay(size)
        self.left -= len(known)
        missing = size - len(known)
        if self.left or missing == 0 or (until and known.endswith(until)):
            return known
        return known + self._keep(receive(missing) if size >= 0 else receive())

    def _keep(self, data: bytes) -> bytes:
        self.recorded += len(data)
        if self.recorded > RECORD_IN_MEMORY and isinstance(self.record, io.BytesIO):
            self._move_to_disk()
        self.record.write(data)
        return data

    def _move_to_disk(self) -> None:
        recorded, self.record = self.record.getvalue(), TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self.record.close)
        self.record.write(recorded)


def _fill(buffer: Any, read: Callable[[int], bytes]) -> int:
    """Read into *buffer* and return the number of bytes."""
    view = memoryview(buffer).cast("B")
    data = read(len(view))
    view[: len(data)] = data
    return len(data)
