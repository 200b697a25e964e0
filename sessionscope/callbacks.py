"""`on_commit`: functions that run once, after the COMMIT that makes a session's work durable."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sessionscope.errors import require
from sessionscope.guests import run_aside
from sessionscope.stage import StagedRegistry, entries, log, staged
from sessionscope.trackers import SessionTracker, tracker_of
from sqlalchemy import event
from sqlalchemy.orm import Session, scoped_session

if TYPE_CHECKING:
    from sessionscope.stage import Registry
    from sqlalchemy import Connection
    from sqlalchemy.orm import SessionTransaction

Callback = Callable[[], object]

_SAVEPOINT = re.compile(
    r"\s*(SAVEPOINT|RELEASE|ROLLBACK\s+TO)\s+(?:SAVEPOINT\s+)?(\S+)", re.IGNORECASE
)


def on_commit(session: Session | Registry, callback: Callback) -> None:
    """Run *callback* once, after the COMMIT that makes the session's work durable.

    Callbacks run in the order in which they were registered, after the next COMMIT of
    *session* and before the response is complete.  A rollback drops them; a rollback to a
    savepoint drops those registered since the savepoint was taken.  They run in the
    application's context, but without its session: a session that a callback gets from the
    registry is a new one, closed when all callbacks have run, so a callback commits what it
    writes.  If a callback raises, the exception is logged; neither the response nor the other
    callbacks are affected.

    :param session: a Session, or the registry that holds it.
    :param callback: called without arguments.
    :raises TypeError: if *callback* cannot be called.
    :raises RuntimeError: if neither a SessionMiddleware nor a session_scope manages *session*.
    """
    require(callable(callback), "callback", callback, "callable")
    add = None
    if isinstance(session, scoped_session):
        # In a callback the registry has another session, but the COMMIT meant is the request's.
        stage = staged(session)
        units = (getattr(one, "add_callback", None) for one in entries() if stage.shows(one))
        add = next(filter(None, units), None)
    else:
        add = getattr(tracker_of(session), "add_callback", None)
    if add is None:
        raise RuntimeError(
            f"on_commit: {session!r} has no session that a SessionMiddleware or a session_scope "
            "manages, so nothing would ever call the callback; open a session_scope around this"
        )
    add(callback)


class Waiting:
    """A registered callback, and the savepoints that its registration depends on."""

    def __init__(self, callback: Callback, savepoint: SessionTransaction | None) -> None:
        self.callback = callback
        self.savepoint = savepoint
        self.dropped = False
        self.added_by_callback = False
        self.newer: set[str] = set()
        self.connections: list[Connection] = []

    def watch(self, connection: Connection) -> None:
        """Notice savepoints of the Connection, which have no event of the Session.

        A rollback to one that is older than the registration drops the callback.
        """
        event.listen(connection, "after_cursor_execute", self.on_statement)
        self.connections.append(connection)

    def on_statement(self, connection: object, cursor: object, statement: str, *_: object) -> None:
        found = _SAVEPOINT.match(statement)
        if found is None:
            return
        verb, name = found[1].upper(), found[2]
        if verb == "SAVEPOINT":
            self.newer.add(name)
        elif verb == "RELEASE":
            self.newer.discard(name)
        else:
            self.dropped = self.dropped or name not in self.newer

    def release(self) -> None:
        for connection in self.connections:
            event.remove(connection, "after_cursor_execute", self.on_statement)
        self.connections.clear()


class Callbacks:
    """The callbacks that wait for the COMMIT of one session."""

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []
        self.running = False

    def add(self, callback: Callback, tracker: SessionTracker) -> None:
        waiting = Waiting(callback, tracker.session.get_nested_transaction())
        waiting.added_by_callback = self.running
        self.waiting.append(waiting)
        for participant in tracker.transaction.participants:
            if participant.connection.in_nested_transaction():
                waiting.watch(participant.connection)

    def on_savepoint_released(self, savepoint: SessionTransaction) -> None:
        """Assign the callbacks of a released savepoint to the transaction around it."""
        for waiting in self.waiting:
            if waiting.savepoint is savepoint:
                waiting.savepoint = savepoint.parent

    def on_savepoint_ended(self, savepoint: SessionTransaction) -> None:
        """Drop the callbacks registered since *savepoint*, unless it was released before."""
        self._drop(lambda waiting: _within(waiting.savepoint, savepoint))

    def clear(self) -> None:
        """Drop all callbacks, because of a rollback."""
        self._drop(lambda waiting: True)

    def close(self) -> None:
        """Drop the callbacks that are still waiting, with a warning for each."""
        for waiting in self.waiting:
            log.warning(
                "on_commit callback %r was dropped: no COMMIT followed its registration",
                waiting.callback,
            )
        self.clear()

    def _drop(self, condition: Callable[[Waiting], bool]) -> None:
        gone = [waiting for waiting in self.waiting if condition(waiting)]
        self.waiting = [waiting for waiting in self.waiting if waiting not in gone]
        for waiting in gone:
            waiting.release()

    def due(self, committed: bool) -> list[Waiting]:
        """Return the callbacks to run.

        :param committed: whether there was a COMMIT.  Callbacks that were registered by
            callbacks wait for one.
        """
        return [waiting for waiting in self.waiting if committed or not waiting.added_by_callback]

    def run(self, due: list[Waiting], stage: StagedRegistry, factory: Callable[[], Any]) -> None:
        """Call the callbacks in *due* that no rollback has dropped."""
        self.waiting = [waiting for waiting in self.waiting if waiting not in due]
        self.running = True
        try:
            run_aside(stage, factory, _call_each, due)
        finally:
            self.running = False


def _call_each(due: list[Waiting]) -> None:
    for waiting in due:
        waiting.release()
        if not waiting.dropped:
            _call(waiting.callback)


def _call(callback: Callback) -> None:
    try:
        callback()
    except Exception:
        log.exception("on_commit callback %r failed", callback)


def _within(savepoint: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while savepoint is not None and savepoint is not outer:
        savepoint = savepoint.parent
    return savepoint is not None
