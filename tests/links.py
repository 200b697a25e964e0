"""A TCP link to a database server that counts round trips, and can be cut at a COMMIT."""

from __future__ import annotations

import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from sqlalchemy import make_url
from sqlalchemy.engine import URL
from support import PATIENCE

Cut = Literal["before it arrives", "while it runs", "before its answer"]

STEPS = (b"P", b"D")
EXECUTE = b"E\0\0\0\t\0"
"""pg8000 has a statement parsed, described and executed, and waits for each answer."""


class Link:
    """Carries bytes to and from one server.

    :ivar cut: what becomes of the next COMMIT.
    :ivar trips: how often a client has spoken, and waited for an answer.
    """

    def __init__(self, url: str) -> None:
        self.target = make_url(url)
        self.url: URL = self.target
        self.cut: Cut | None = None
        self.trips = 0

    def carry(self, client: socket.socket, server: socket.socket) -> None:
        """Serve one client until it hangs up or is cut off."""
        swallowing = waiting = committing = False
        while True:
            ready, _, _ = select.select([client, server], [], [])
            if server in ready:
                answer = server.recv(65536)
                if swallowing or not answer:
                    return
                waiting = False
                client.sendall(answer)
            if client in ready:
                said = client.recv(65536)
                committing |= b"COMMIT" in said.upper()
                runs = committing and (said[:1] not in STEPS or EXECUTE in said)
                committing &= not runs
                cut = self.cut if runs else None
                if not said or cut == "before it arrives":
                    return
                self.trips += not waiting
                waiting = True
                server.sendall(said)
                if cut == "while it runs":
                    return
                swallowing = cut is not None

    def connect(self) -> socket.socket:
        return socket.create_connection((self.target.host or "", self.target.port or 0))


class Listener(socketserver.ThreadingTCPServer):
    """Accepts clients, and does not wait in the end for one that never hangs up."""

    daemon_threads = True


@contextmanager
def linked(url: str) -> Iterator[Link]:
    """Run a link to the server of *url* on loopback."""
    link = Link(url)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError), link.connect() as server:
                link.carry(self.request, server)

    with Listener(("127.0.0.1", 0), Handler) as listener:
        link.url = link.target.set(port=listener.server_address[1])
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield link
        finally:
            listener.shutdown()
            thread.join(PATIENCE)
