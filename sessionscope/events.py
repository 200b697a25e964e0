"""All listeners to SQLAlchemy's events; each notifies the tracker of the session.

They are registered once, for every Session and Engine of the process.  They keep nothing alive,
and for a session that is not tracked they cost one look-up of an attribute per event.  Listeners
of a class would run twice if one class inherits from another.

``insert=True`` puts them before the listeners of the user.  Only the check before COMMIT must
come last: see `_before_commit`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sessionscope.databases import is_of_dialects_commit, leaves_commit_unknown
from sessionscope.participants import participants_of, watch
from sessionscope.stage import entries
from sessionscope.trackers import tracker_of
from sqlalchemy import Connection, Engine, PoolResetState, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import Session, SessionTransaction


@event.listens_for(Engine, "handle_error", insert=True)
def _handle_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    participants = [
        participant
        for participant in participants_of(connection.info)
        if participant.connection is connection
    ]
    for participant in participants:
        participant.on_error(context)
    if not participants:
        _handle_error_of_others(context, connection)


def _handle_error_of_others(context: ExceptionContext, connection: Connection) -> None:
    """Handle a BEGIN that failed, or a COMMIT of a connection that belongs to no unit of work."""
    error = context.sqlalchemy_exception or context.original_exception
    if connection.get_transaction() is None:
        for entry in entries():
            entry.on_begin_refused(error)
    elif is_of_dialects_commit(context) and leaves_commit_unknown(error):
        for entry in entries():
            entry.on_commit_of(None)


@event.listens_for(Session, "after_transaction_create", insert=True)
def _after_transaction_create(session: Session, transaction: SessionTransaction) -> None:
    tracker = tracker_of(session)
    if tracker is not None:
        if transaction.parent is None:
            tracker.on_create()
            if len(session.dispatch.before_commit) > 1:
                _come_last(session)
        elif transaction.nested:
            tracker.on_savepoint(transaction)


@event.listens_for(Session, "after_begin", insert=True)
def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    tracker = tracker_of(session)
    if tracker is not None and not transaction.nested:
        _listen_to_pool(connection.engine)
        tracker.on_join(connection)


def prepare(binds: Iterable[object], watched: bool) -> None:
    """Listen to engines and their pools before requests run in other threads.

    Adding a listener disturbs a thread in which the engine or the pool is just calling another.

    :param binds: engines; what else sessions are bound to is ignored.
    :param watched: listen to each statement, too.
    """
    for bind in binds:
        if isinstance(bind, Engine):
            _listen_to_pool(bind)
            if watched:
                watch(bind)


def _listen_to_pool(engine: Engine) -> None:
    if _reset not in engine.pool.dispatch.reset:
        event.listen(engine.pool, "reset", _reset)


def _reset(dbapi_connection: Any, record: Any, state: PoolResetState) -> None:
    """Handle a connection that returns to its pool; only pools of tracked sessions listen."""
    for participant in participants_of(record.info):
        participant.on_return(dbapi_connection, state.transaction_was_reset)


@event.listens_for(Session, "before_commit", insert=True)
def _before_commit(session: Session) -> None:
    """Run the check after all other hooks, also those that were added late or to the session."""
    tracker = tracker_of(session)
    if tracker is None or session.in_nested_transaction():
        return
    if len(session.dispatch.before_commit) == 1 or not _come_last(session):
        tracker.on_before_commit()


def _come_last(session: Session) -> bool:
    """Put the check after all present hooks; return False if the running dispatch misses it.

    Listeners of an instance run after those of its class and its sessionmaker.  The first
    listener of an instance creates a new collection, which a running dispatch does not see.
    This is therefore called when a transaction begins, and once more when it is committed.
    """
    collection = session.dispatch.before_commit
    if event.contains(session, "before_commit", _last_before_commit):
        event.remove(session, "before_commit", _last_before_commit)
    event.listen(session, "before_commit", _last_before_commit)
    return session.dispatch.before_commit is collection


def _last_before_commit(session: Session) -> None:
    tracker = tracker_of(session)
    if tracker is not None and not session.in_nested_transaction():
        tracker.on_before_commit()


@event.listens_for(Session, "after_commit", insert=True)
def _after_commit(session: Session) -> None:
    tracker, savepoint = tracker_of(session), session.get_nested_transaction()
    if savepoint is not None:
        if tracker is not None:
            tracker.on_savepoint_released(savepoint)
        return
    for entry in entries():
        entry.on_commit_of(None if tracker is None else tracker.transaction)
    if tracker is not None:
        tracker.on_commit()


@event.listens_for(Session, "after_rollback", insert=True)
def _after_rollback(session: Session) -> None:
    tracker = tracker_of(session)
    if tracker is not None and not session.in_nested_transaction():
        tracker.on_undone()


@event.listens_for(Session, "after_transaction_end", insert=True)
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    tracker = tracker_of(session)
    if tracker is not None:
        if transaction.parent is None:
            tracker.on_end()
        elif transaction.nested:
            tracker.on_savepoint_ended(transaction)
        else:
            tracker.on_flush_ended(failed=not transaction.parent.is_active)


@event.listens_for(Session, "after_soft_rollback", insert=True)
def _after_soft_rollback(session: Session, previous_transaction: SessionTransaction) -> None:
    # Comes after the end of the transaction; close() has no such event.
    tracker = tracker_of(session)
    if tracker is None:
        return
    if previous_transaction.parent is None:
        tracker.on_rollback()


@event.listens_for(Session, "after_flush", insert=True)
def _after_flush(session: Session, flush_context: object) -> None:
    tracker = tracker_of(session)
    if tracker is not None:
        tracker.on_flush()


@event.listens_for(Session, "transient_to_pending", insert=True)
def _transient_to_pending(session: Session, instance: object) -> None:
    tracker = tracker_of(session)
    if tracker is not None:
        tracker.on_pending()
