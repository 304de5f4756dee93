"""Notices: what the operator has announced to an instance, and whether the instance has acknowledged it.

1. A notice is due by the clock that counts seconds since boot (CLOCK_BOOTTIME, clock_gettime(2)), which nobody can set.
   The time of day of `Notice.not_before` is computed from it whenever it is told.
2. A notice is for one run of its instance. The transaction that ends the run or removes the instance takes it away.
3. A notice that is due is past: it is not listed and cannot be acknowledged.
"""

from __future__ import annotations

import secrets
import time
from typing import NamedTuple

from guestapi.audit import AuditRecord
from guestapi.callers.namespaces import boot_id
from guestapi.model import Init, Instance
from guestapi.store import changes
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import Moment
from guestapi.store.rows import load
from guestapi.store.transaction import Change, tell

#: What can be announced besides a text of the operator's.
KINDS = ("stop", "restart", "migrate", "freeze")
#: The type of a notice that is a text.
TEXT = "text"
#: The most notices of an instance that are not past.
MOST_NOTICES = 16
#: The most bytes of a text.
TEXT_BYTES = 1024
#: The longest time ahead for which something is announced, in seconds: a week.
MOST_SECONDS = 7 * 86400

PENDING, ACKNOWLEDGED, CANCELLED = "pending", "acknowledged", "cancelled"

#: How long a notice that is past is kept, so that whoever waits for it learns how it ended.
_KEPT_SECONDS = 60.0
#: Seconds by which the recorded time of day may differ from the computed one before the computed one is used.
_TOLERANCE = 1.0

_COLUMNS = "notices.id, notices.type, text, not_before, due, acknowledged"
_CURRENT = (
    f"SELECT {_COLUMNS} FROM notices JOIN instances ON instances.id = instance_id "
    "WHERE instance_id = ? AND notices.run = instances.run AND boot_id = ? AND due > ? ORDER BY due, notices.id"
)
_BY_ID = (
    f"SELECT {_COLUMNS} FROM notices JOIN instances ON instances.id = instance_id "
    "WHERE notices.id = ? AND notices.run = instances.run"
)
_ALL = (
    f"SELECT project, name, {_COLUMNS} FROM notices JOIN instances ON instances.id = instance_id "
    "WHERE notices.run = instances.run AND boot_id = ? AND due > ? AND (? IS NULL OR instance_id = ?) "
    "ORDER BY due, notices.id"
)
_PUT = (
    "INSERT OR IGNORE INTO notices (id, instance_id, run, type, text, not_before, boot_id, due, acknowledged) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_PAST = "DELETE FROM notices WHERE boot_id <> ? OR due <= ?"
_ACKNOWLEDGE = "UPDATE notices SET acknowledged = 1 WHERE id = ?"
_REMOVE = "DELETE FROM notices WHERE id = ?"
_SAVED = (
    "SELECT instance_id, id, type, text, not_before, boot_id, due, acknowledged FROM notices ORDER BY instance_id, id"
)


class Notice(NamedTuple):
    """What was announced to an instance.

    Attributes:
        id: names it; nobody can guess it.
        type: one of `KINDS`, or `TEXT`.
        text: of the operator's; empty for one of `KINDS`.
        not_before: when it happens, in seconds of Unix time by today's clock.
        due: the same, in seconds since boot.
        status: `PENDING`, `ACKNOWLEDGED` or `CANCELLED`.
    """

    id: str
    type: str
    text: str
    not_before: float
    due: float
    status: str = PENDING

    @property
    def document(self) -> dict[str, str]:
        """What guests and operators are told of it."""
        moment = changes.timestamp(int(self.not_before) * 10**9)
        return {"id": self.id, "type": self.type, "text": self.text, "not_before": moment, "status": self.status}


class NamedNotice(NamedTuple):
    """A notice, and project and name of its instance."""

    project: str
    instance: str
    notice: Notice


class SavedNotice(NamedTuple):
    """A notice in a backup; attributes as the columns of its table."""

    instance_id: int
    id: str
    type: str
    text: str
    not_before: float
    boot_id: str
    due: float
    acknowledged: bool


def now() -> float:
    """Seconds since boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def send(change: Change, instance: Instance, what: str, seconds: float) -> Notice:
    """Announce something to an instance.

    Args:
        change: the transaction.
        instance: a running instance.
        what: one of `KINDS`, or a text.
        seconds: after which it happens.

    Raises:
        ConflictError: the instance does not run, has too many notices, or the text cannot be one.
    """
    if instance.init is None:
        raise ConflictError(f"instance {instance.name!r} does not run", "a notice is for an instance that runs")
    if not what.strip() or len(what.encode(errors="replace")) > TEXT_BYTES or "\0" in what:
        raise ConflictError(f"a text has 1 to {TEXT_BYTES} bytes", f"give a text or one of {', '.join(KINDS)}")
    if any("\ud800" <= letter <= "\udfff" for letter in what):
        raise ConflictError("the text is not UTF-8", "give it in UTF-8")
    boot, moment = boot_id(), now()
    change.connection.execute(_PAST, (boot, moment - _KEPT_SECONDS))
    if len(change.connection.execute(_CURRENT, (instance.id, boot, moment)).fetchall()) >= MOST_NOTICES:
        raise ConflictError(
            f"instance {instance.name!r} has {MOST_NOTICES} notices", "cancel some with 'guestapi notices cancel'"
        )
    kind, text = (what, "") if what in KINDS else (TEXT, what)
    notice = Notice(secrets.token_hex(8), kind, text, time.time() + seconds, moment + seconds)
    row = (notice.id, instance.id, instance.run, kind, text, notice.not_before, boot, notice.due, False)
    change.connection.execute(_PUT, row)
    _tell(change, instance, notice)
    _record(change, "notice.send", instance)
    return notice


def list_current(store: Moment, instance_id: int) -> list[Notice]:
    """The notices of an instance that are not past, the next first."""
    rows = store.connection.execute(_CURRENT, (instance_id, boot_id(), now()))
    return [_notice(row) for row in rows]


def find(store: Moment, notice_id: str) -> Notice | None:
    """A notice, past or not; None if it was cancelled."""
    row = store.connection.execute(_BY_ID, (notice_id,)).fetchone()
    return None if row is None else _notice(row)


def list_all(store: Moment, instance: Instance | None = None) -> list[NamedNotice]:
    """The notices of an instance, or of all, that are not past; the next first."""
    number = None if instance is None else instance.id
    rows = store.connection.execute(_ALL, (boot_id(), now(), number, number))
    return [NamedNotice(project, name, _notice(row)) for project, name, *row in rows]


def acknowledge(change: Change, instance_id: int, run: int, init: Init | None, notice_id: str) -> bool:
    """Record that an instance has acknowledged a notice. Said again, nothing changes.

    Args:
        change: the transaction.
        instance_id: the instance that says so.
        run: the run in which it was identified.
        init: the init as which it was identified. Both are compared, because the store may have been replaced since.
        notice_id: which notice.

    Returns:
        Whether it is acknowledged; False if the notice is past, or not one of this run of the instance.
    """
    instance = load(change.connection, instance_id)
    if instance is None or (instance.run, instance.init) != (run, init):
        return False
    found = next((one for one in list_current(change, instance_id) if one.id == notice_id), None)
    if found is None:
        return False
    if found.status == PENDING:
        change.connection.execute(_ACKNOWLEDGE, (notice_id,))
        _tell(change, instance, found._replace(status=ACKNOWLEDGED), by_guest=True)
        _record(change, "notice.acknowledge", instance)
    return True


class AcknowledgementReport(NamedTuple):
    """An acknowledgement, a `writing.WorkloadReport`; attributes as the arguments of `acknowledge`."""

    instance_id: int
    run: int
    init: Init | None
    notice_id: str

    def record(self, change: Change) -> bool:
        """As `acknowledge`."""
        return acknowledge(change, *self)


def cancel(change: Change, instance: Instance, notice_id: str | None) -> list[Notice]:
    """Cancel a notice of an instance, or all of them.

    Raises:
        ConflictError: there is none with this id.
    """
    found = [one for one in list_current(change, instance.id) if notice_id in (None, one.id)]
    if notice_id is not None and not found:
        raise ConflictError(
            f"instance {instance.name!r} has no notice {notice_id!r}", "'guestapi notices list' shows all"
        )
    for one in found:
        change.connection.execute(_REMOVE, (one.id,))
        _tell(change, instance, one._replace(status=CANCELLED))
        _record(change, "notice.cancel", instance)
    return found


def read_saved(store: Moment) -> list[SavedNotice]:
    """All notices of a backup."""
    return [SavedNotice(*row) for row in store.connection.execute(_SAVED)]


def put_back(change: Change, instance: Instance, saved: SavedNotice) -> None:
    """Announce again what a backup has of an instance that is in the same run as it was then, unless it is known."""
    if saved.boot_id != boot_id() or saved.due <= now():
        return
    row = (saved.id, instance.id, instance.run, *saved[2:5], saved.boot_id, saved.due, saved.acknowledged)
    if change.connection.execute(_PUT, row).rowcount:
        _tell(change, instance, _notice((saved.id, *saved[2:5], saved.due, saved.acknowledged)))


def _notice(row: tuple[object, ...] | list[object]) -> Notice:
    number, kind, text, not_before, due, acknowledged = row
    assert isinstance(not_before, float), "a column of this type"
    assert isinstance(due, float), "a column of this type"
    computed = time.time() + due - now()
    # If the clock was set meanwhile, the time is computed anew. Otherwise it is exactly the one that was told before.
    moment = not_before if abs(computed - not_before) < _TOLERANCE else computed
    return Notice(str(number), str(kind), str(text), moment, due, ACKNOWLEDGED if acknowledged else PENDING)


def _tell(change: Change, instance: Instance, notice: Notice, *, by_guest: bool = False) -> None:
    event = changes.ChangeEvent("notice", dict(notice.document), guest=True)
    tell(change, instance, [event], running=True, by_guest=by_guest)


def _record(change: Change, action: str, instance: Instance) -> None:
    change.record(AuditRecord(action, instance.project, instance.name, instance_id=instance.id))
