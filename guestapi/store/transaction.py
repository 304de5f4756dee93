"""One transaction that changes the store, and the change log that each one writes with the new state."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from guestapi.audit import MOST_RECORDS, AuditRecord
from guestapi.encoding import text_to_json
from guestapi.model import Instance, KeyPolicy
from guestapi.store import changes
from guestapi.store.rows import load_policies
from guestapi.store.tables import BEGINNING_BYTES, PART_BYTES

_TELL = (
    "INSERT INTO notifications "
    "(instance_id, project, instance, type, timestamp, written, metadata, for_guest, by_guest, parts_size) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_PART = "INSERT INTO notification_parts (notification_id, start, part) VALUES (?, ?, ?)"
_LATEST = "SELECT id FROM notifications ORDER BY id DESC LIMIT 1"
_BEFORE = "SELECT written FROM notifications ORDER BY id DESC LIMIT 1 OFFSET :told"
_NOT_LATER = "UPDATE notifications SET written = :now WHERE written > :now"
# The log is in the order of time, so this scan ends at the first entry that is young enough.
_TRIM_OLD = (
    "DELETE FROM notifications WHERE id < (SELECT id FROM notifications WHERE written >= :since ORDER BY id LIMIT 1)"
)
# Up to the newest entry that is too many, of those that no guest caused; and of those that one guest caused.
_TRIM_EXCESS = (
    "DELETE FROM notifications WHERE id <= "
    "(SELECT id FROM notifications WHERE by_guest = 0 ORDER BY id DESC LIMIT 1 OFFSET :keep)"
)
_TRIM_OWN = (
    "DELETE FROM notifications WHERE by_guest = 1 AND instance_id = :instance AND id <= "
    "(SELECT id FROM notifications WHERE by_guest = 1 AND instance_id = :instance "
    "ORDER BY id DESC LIMIT 1 OFFSET :keep)"
)

_CONCEALED = "SELECT EXISTS (SELECT 1 FROM policies), EXISTS (SELECT 1 FROM spends WHERE spent)"
_SPENT = "SELECT key FROM spends WHERE instance_id = ? AND spent"
_RENEW = "UPDATE spends SET spent = 0 WHERE instance_id = ? AND key = ?"

#: The instance of an entry of the change log that is about a whole project. No instance has this id.
NO_INSTANCE = 0
#: How many entries that an instance itself caused are kept of it. What it was last is what matters of them.
KEEP_OWN_ENTRIES = 16
#: The log may have this part more entries than are kept, so that not each change has to count them.
_SLACK = 100


class Change:
    """One transaction that changes the store. Made by `Writer.change`.

    Attributes:
        connection: for the modules of this room alone.
        told: how many notifications it has written.
        spread: how many of these told many instances of the same change.
        configuration_bytes: how much the configuration and devices of an instance may have in all.
        records: what is recorded of it for the operator.
        silent: it writes no notifications, since nobody follows this store.
    """

    __slots__ = ("configuration_bytes", "connection", "records", "silent", "spread", "told", "unrecorded")

    def __init__(self, connection: sqlite3.Connection, configuration_bytes: int, *, silent: bool = False) -> None:
        self.connection = connection
        self.configuration_bytes = configuration_bytes
        self.silent = silent
        self.told = 0
        self.spread = 0
        self.records: list[AuditRecord] = []
        self.unrecorded = 0

    def record(self, record: AuditRecord) -> None:
        """Record a change of something."""
        if len(self.records) < MOST_RECORDS:
            self.records.append(record)
        else:
            self.unrecorded += 1

    def take_records(self) -> list[AuditRecord]:
        """What was recorded, with the number of what was not."""
        more = [AuditRecord("more", noticed=self.unrecorded)] if self.unrecorded else []
        return [*self.records, *more]


class Told(NamedTuple):
    """The instance that an entry of the change log is about; attributes as the arguments of `tell`."""

    instance_id: int
    project: str
    name: str
    running: bool


class WrittenEvent(NamedTuple):
    """A `changes.ChangeEvent` with its metadata as JSON, made once for all instances that it is told of.

    Attributes:
        type: of the event.
        metadata: JSON; only the beginning of it if it is in parts.
        guest: whether the instance itself may hear of it.
        parts: of metadata that is large, `tables.PART_BYTES` each but for the last.
        parts_size: bytes of all parts.
    """

    type: str
    metadata: str
    guest: bool
    parts: tuple[bytes, ...] = ()
    parts_size: int = 0


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
    if change.silent:
        return
    written = [write_event(event) for event in events]
    if written:
        tell_all(change, [(Told(instance.id, instance.project, instance.name, running), written)], by_guest=by_guest)
        if by_guest:
            change.connection.execute(_TRIM_OWN, {"instance": instance.id, "keep": KEEP_OWN_ENTRIES})


def write_event(event: changes.ChangeEvent) -> WrittenEvent:
    """An event as it stands in the change log."""
    content = text_to_json(event.metadata, html=True)
    size = len(content)
    if size <= PART_BYTES:
        return WrittenEvent(event.type, content.decode(), event.guest)
    parts = tuple(content[start : start + PART_BYTES] for start in range(0, size, PART_BYTES))
    return WrittenEvent(event.type, content[:BEGINNING_BYTES].decode(errors="ignore"), event.guest, parts, size)


def tell_all(change: Change, told: Iterable[tuple[Told, Sequence[WrittenEvent]]], *, by_guest: bool = False) -> None:
    """Write to the change log what happened to several instances; for the rest as `tell`.

    Args:
        change: the transaction.
        told: instances, each with what happened to it, in order.
        by_guest: the instances themselves caused it.
    """
    now = time.time_ns()
    moment = changes.timestamp(now)
    conceal = _Concealment(change.connection)
    rows = [
        (
            one.instance_id,
            one.project,
            one.name,
            event.type,
            moment,
            now / 1e9,
            event.metadata,
            event.guest and one.running,
            by_guest,
            event.parts_size,
            event.parts,
        )
        for one, events in told
        for event in conceal.view(one, events)
    ]
    if not any(parts for *_row, parts in rows):
        change.connection.executemany(_TELL, [row[:-1] for row in rows])
    else:
        # One by one, because the ids are needed.
        for *row, parts in rows:
            number = change.connection.execute(_TELL, row).lastrowid
            found = [(number, PART_BYTES * place, part) for place, part in enumerate(parts)]
            change.connection.executemany(_PART, found)
    change.told += len(rows)


class _Concealment:
    """What key policies leave out of the change log; and that a key that changes was set anew."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._needed = any(connection.execute(_CONCEALED).fetchone())

    def view(self, one: Told, events: Sequence[WrittenEvent]) -> Sequence[WrittenEvent]:
        """The events of an instance as they may stand in the change log."""
        # PERF: hardly any host has policies.
        if not self._needed:
            return events
        policies = load_policies(self._connection, one.project, one.instance_id)
        spent = {key for (key,) in self._connection.execute(_SPENT, (one.instance_id,))}
        return [self._view(one, event, policies, spent) for event in events]

    def _view(self, one: Told, event: WrittenEvent, policies: Sequence[KeyPolicy], spent: set[str]) -> WrittenEvent:
        key = changes.key_of(event.type, event.metadata) if event.type == "config" else None
        if key is None:
            return event
        if key in spent:
            self._connection.execute(_RENEW, (one.instance_id, key))
        # PERF: loaded where there is a policy.
        from guestapi.key_policy import rule_of

        rule = rule_of(policies, key)
        if rule.blank or key in spent:
            event = WrittenEvent(event.type, blank_metadata(key), event.guest)
        return event._replace(guest=event.guest and not rule.hidden)


def blank_metadata(key: str) -> str:
    """The metadata of an entry about a key whose values guests do not see."""
    return text_to_json({"key": key, "old_value": "", "value": ""}, html=True).decode()


def trim(change: Change, keep_entries: int, keep_seconds: int) -> None:
    """Cut the change log to its latest `keep_entries` entries, none older than `keep_seconds`.

    Entries that instances caused are not counted, since there are at most `KEEP_OWN_ENTRIES` of each instance: a
    hundred instances that change their state all the time keep no other instance's event from being resumed. What
    told many instances of one change is kept whole until the next change: workers have yet to deliver it.
    """
    now = time.time()
    before = change.connection.execute(_BEFORE, {"told": change.told}).fetchone()
    if before is not None and before[0] > now:
        # The clock was set back. The age of entries that are dated later than now is unknown; without a date
        # that comes to pass, an entry from a wrong year would keep all that are older.
        change.connection.execute(_NOT_LATER, {"now": now})
    change.connection.execute(_TRIM_OLD, {"since": now - keep_seconds})
    (latest,) = change.connection.execute(_LATEST).fetchone() or (0,)
    if latest % (keep_entries // _SLACK + 1) < change.told:
        change.connection.execute(_TRIM_EXCESS, {"keep": max(keep_entries, change.spread)})


@contextmanager
def savepoint(change: Change) -> Iterator[None]:
    """A part of a transaction that is undone by itself if it raises; the rest of the transaction stays.

    Raises:
        sqlite3.Error: the store cannot be written.
    """
    told, records, unrecorded = change.told, len(change.records), change.unrecorded
    change.connection.execute("SAVEPOINT part")
    try:
        yield
    except BaseException:
        # SQLite may have ended the whole transaction, after an error that matters more than this.
        if change.connection.in_transaction:
            change.connection.execute("ROLLBACK TO part")
            change.connection.execute("RELEASE part")
        change.told, change.unrecorded = told, unrecorded
        del change.records[records:]
        raise
    change.connection.execute("RELEASE part")
