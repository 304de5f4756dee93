"""One transaction that changes the store, and the change log that each one writes with the new state."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import BindParameter, Connection, bindparam, delete, insert, select, update

from guestapi.encoding import to_json
from guestapi.model import Instance
from guestapi.store import changes
from guestapi.store.tables import BY_GUEST, NOT_BY_GUEST, notifications

# PERF: made once. Every change needs them, and to make them takes as long as all else that it writes.
_log = notifications.c
_NOW: BindParameter[float] = bindparam("now")
_BEFORE = select(_log.written).order_by(_log.id.desc()).offset(bindparam("told")).limit(1)
_NOT_LATER = update(notifications).where(_log.written > _NOW).values(written=_NOW)
_LATEST = select(_log.id).order_by(_log.id.desc()).limit(1)
# The newest entry that is too many, of those that no guest caused; and of those that one guest caused.
_EXCESS = (
    select(_log.id).where(NOT_BY_GUEST).order_by(_log.id.desc()).offset(bindparam("keep")).limit(1).scalar_subquery()
)
_OWN_EXCESS = (
    select(_log.id)
    .where(BY_GUEST, _log.instance_id == bindparam("instance"))
    .order_by(_log.id.desc())
    .offset(bindparam("keep"))
    .limit(1)
    .scalar_subquery()
)
# The log is in the order of time, so this scan ends at the first entry that is young enough.
_YOUNG = select(_log.id).where(_log.written >= bindparam("since")).order_by(_log.id).limit(1).scalar_subquery()
_TRIM_OLD = delete(notifications).where(_log.id < _YOUNG)
_TRIM_EXCESS = delete(notifications).where(_log.id <= _EXCESS)
_TRIM_OWN = delete(notifications).where(BY_GUEST, _log.instance_id == bindparam("instance"), _log.id <= _OWN_EXCESS)

#: How many entries that an instance itself caused are kept of it. What it was last is what matters of them.
KEEP_OWN_ENTRIES = 16
#: The log may have this part more entries than are kept, so that not each change has to count them.
_SLACK = 100


@dataclass(slots=True)
class Change:
    """One transaction that changes the store. Made by `Writer.change`.

    Attributes:
        connection: for the modules of this room alone.
        told: how many notifications it has written.
        rings: a mirror may be waiting for this change, although it makes no entry of the change log.
        configuration_bytes: how much the configuration and devices of an instance may have in all.
    """

    connection: Connection
    configuration_bytes: int
    told: int = 0
    rings: bool = False


def tell(
    change: Change,
    instance: Instance,
    events: Iterable[changes.ChangeEvent],
    *,
    running: bool,
    by_guest: bool = False,
) -> None:
    """Write to the change log what happened to an instance.

    Args:
        change: the transaction.
        instance: the instance, with the name that it has afterwards.
        events: what happened, in order.
        running: the instance ran all the time. Otherwise no guest is listening: a workload that starts later reads
            the new state.
        by_guest: the instance itself caused it.
    """
    now = time.time_ns()
    rows = [
        {
            "instance_id": instance.id,
            "project": instance.project,
            "instance": instance.name,
            "type": event.type,
            "timestamp": changes.timestamp(now),
            "written": now / 1e9,
            "metadata": to_json(event.metadata, html=True).decode(),
            "for_guest": event.guest and running,
            "by_guest": by_guest,
        }
        for event in events
    ]
    if rows:
        change.connection.execute(insert(notifications), rows)
        change.told += len(rows)
        if by_guest:
            change.connection.execute(_TRIM_OWN, {"instance": instance.id, "keep": KEEP_OWN_ENTRIES})


def trim(change: Change, keep_entries: int, keep_seconds: int) -> None:
    """Cut the change log to its latest `keep_entries` entries, none older than `keep_seconds`.

    Entries that instances caused are not counted, since there are at most `KEEP_OWN_ENTRIES` of each instance: a
    hundred instances that change their state all the time keep no other instance's event from being resumed.
    """
    now = time.time()
    if (change.connection.execute(_BEFORE, {"told": change.told}).scalar() or 0) > now:
        # The clock was set back. The age of entries that are dated later than now is unknown; without a date
        # that comes to pass, an entry from a wrong year would keep all that are older.
        change.connection.execute(_NOT_LATER, {_NOW.key: now})
    change.connection.execute(_TRIM_OLD, {"since": now - keep_seconds})
    latest = change.connection.execute(_LATEST).scalar() or 0
    if latest % (keep_entries // _SLACK + 1) < change.told:
        change.connection.execute(_TRIM_EXCESS, {"keep": keep_entries})
