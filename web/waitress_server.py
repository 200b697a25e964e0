"""waitress, with JSON for the requests that it refuses, and with a graceful shutdown.

Everything that relies on private parts of waitress is in this file.  ``setup.py`` pins the major
version, and a test fails if one of those parts changes.
"""

import logging
import signal
from argparse import Namespace
from contextlib import suppress
from socket import SHUT_WR
from time import monotonic, time
from typing import Any
from wsgiref.types import WSGIApplication, WSGIEnvironment

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import BaseWSGIServer, create_server
from waitress.task import WSGITask
from waitress.utilities import BadRequest

from web.options import StartError
from web.responses import HTTPError

log = logging.getLogger("items")

DISCARDED = 64 * 2**20
"""Bytes of a refused request that are read, so that its client gets to the response."""

DISCARDING = 10.0
"""Seconds that this may take."""

STALLED = 5.0
"""Seconds between two looks for clients that do not read their response."""

REFUSALS = {
    413: "the body is too long",
    431: "the head of the request is too long",
    501: "this transfer coding is not known",
}


class RequestParser(HTTPRequestParser):
    """A parser that refuses requests on which waitress's own raises, or waits for ever."""

    # For a request whose head could not be read.
    command: Any = "-"
    path: Any = "/"
    query: Any = ""
    request_uri = "/"
    url_scheme = "http"

    def received(self, data: bytes) -> int:
        try:
            consumed: int = super().received(data)
        except ValueError:  # a target that is not a URL, or a length of thousands of digits
            self.error = BadRequest("The head cannot be read")
            self.completed, consumed = True, len(data)
        if self.completed:
            self.expect_continue = False  # or it would wait for a body that never comes
        return consumed


class Task(WSGITask):
    """A response from the application, even to a request that the parser has refused."""

    channel: Any
    request: Any

    def get_environment(self) -> WSGIEnvironment:
        environ: WSGIEnvironment = super().get_environment()
        error = self.request.error
        if error:
            message = REFUSALS.get(error.code, error.body)
            environ["items.refusal"] = HTTPError(error.code, message)
            self.channel.refused = True
            self.set_close_on_finish()
        return environ

    def set_close_on_finish(self) -> None:
        # waitress would close the connection after a 204 or 304, which have no Content-Length.
        if self.has_body or self.version != "1.1" or self.request.connection_close:
            super().set_close_on_finish()


class Channel(HTTPChannel):
    """A client's connection.

    Many clients read nothing until they have sent everything, so a client that is refused while it
    sends may finish.  Closing with unread bytes would reset the connection, and the response with
    it (RFC 9112, 9.6).
    """

    parser_class = RequestParser
    task_class = Task
    error_task_class: Any = Task
    socket: Any
    refused = False
    discarded = 0
    deadline: float | None = None

    def handle_close(self) -> None:
        if not self.refused or self.deadline is not None or not self.connected:
            super().handle_close()
            return
        self.deadline = monotonic() + DISCARDING
        self.will_close = False
        with suppress(OSError):
            self.socket.shutdown(SHUT_WR)

    def received(self, data: bytes) -> bool:
        if self.deadline is None:
            return bool(super().received(data))
        self.discarded += len(data)
        if self.discarded > DISCARDED or monotonic() > self.deadline:
            self.handle_close()
        return True


class Server:
    """The server of an application, listening.

    :raises StartError: if it cannot listen.
    """

    def __init__(self, app: WSGIApplication, options: Namespace) -> None:
        path = options.listen.removeprefix("unix:")
        address: dict[str, Any] = {"listen": options.listen}
        if path != options.listen:
            address = {"unix_socket": path, "unix_socket_perms": "660"}
        if options.trusted_proxy:
            headers = {"x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"}
            address |= {"trusted_proxy": options.trusted_proxy, "trusted_proxy_headers": headers}
        self.stopping = False
        self.idle_timeout = options.idle_timeout
        self.sockets: dict[int, Any] = {}
        try:
            self.server: Any = create_server(
                app,
                self.sockets,
                threads=options.threads,
                channel_timeout=options.idle_timeout,
                # A body that is far too long is refused before all of it is stored.
                max_request_body_size=options.max_body + 2**20,
                # A stream pauses when a slow client has not yet read this many bytes.
                outbuf_high_watermark=2**19,
                **address,
            )
        except (ValueError, OSError) as error:
            message = f"cannot listen on {options.listen}: {error}; choose another with --listen"
            raise StartError(message) from None
        # waitress counts its own sockets, too.
        self.server.adj.connection_limit = options.connections + len(self.sockets)
        sockets = self.sockets.values()
        self.listeners = [each for each in sockets if isinstance(each, BaseWSGIServer)]
        for listener in self.listeners:
            listener.channel_class = Channel
        form = "unix:{1}" if "unix_socket" in address else "http://{}:{}"
        self.server.print_listen(f"serving on {form}")

    def run(self, patience: float) -> None:
        """Serve until SIGTERM, SIGINT or SIGHUP, then finish the requests that have begun.

        :param patience: seconds after which unfinished requests are dropped.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.stop)
        looked = monotonic()
        while not self.stopping:
            wasyncore.loop(timeout=STALLED, map=self.sockets, count=1)
            if monotonic() - looked >= STALLED:
                self.close_stalled()
                looked = monotonic()
        log.info("stopping: waiting up to %g s for running requests", patience)
        deadline = monotonic() + patience
        for listener in self.listeners:
            wasyncore.dispatcher.close(listener)  # its own close() would cut off the worker threads
        while self.close_idle() and monotonic() < deadline:
            wasyncore.loop(timeout=0.1, map=self.sockets, count=1)
        self.server.task_dispatcher.shutdown()

    def stop(self, number: int, _frame: object) -> None:
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process
        self.listeners[0].pull_trigger()

    def channels(self) -> list[Any]:
        return [each for each in self.sockets.values() if isinstance(each, HTTPChannel)]

    def close_stalled(self) -> None:
        """Disconnect clients that do not read their response, and so hold up a thread."""
        cutoff = time() - self.idle_timeout
        for channel in self.channels():
            if channel.total_outbufs_len and channel.last_activity < cutoff:
                channel.handle_close()

    def close_idle(self) -> bool:
        """Close idle connections; return whether others are left."""
        is_busy = False
        for channel in self.channels():
            if channel.requests or channel.request or channel.total_outbufs_len:
                is_busy = True
            else:
                channel.handle_close()
        return is_busy
