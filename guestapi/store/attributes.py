"""Attributes: what an instance says of itself. The host keeps it and believes nothing of it.

1. An attribute belongs to its instance, whatever run it is in, and is gone with it. Nothing copies it to another one.
2. Bounds are checked in the transaction that writes, so that they hold whatever else is written at the same time.
3. Values are in no event, no log and no record: those name the attribute alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple

from guestapi.audit import AuditRecord
from guestapi.model import Instance
from guestapi.store import changes
from guestapi.store.lookup import Moment
from guestapi.store.rows import load
from guestapi.store.transaction import Change, tell
from guestapi.switches import ATTRIBUTES

#: The most attributes of an instance, the most bytes of all its values, and of one.
MOST_ATTRIBUTES, MOST_BYTES, VALUE_BYTES = 128, 256 * 1024, 16 * 1024
#: What a namespace and a key are called. A path with "." or ".." in the place of a name would be another path.
_NAME = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]{1,64}"
_PATH = re.compile(f"{_NAME}/{_NAME}")

_PATHS = "SELECT path FROM attributes JOIN instances ON id = instance_id WHERE id = ? AND uuid = ? ORDER BY path"
_VALUE = "SELECT value FROM attributes JOIN instances ON id = instance_id WHERE id = ? AND uuid = ? AND path = ?"
_ALL = "SELECT path, value, written FROM attributes WHERE instance_id = ? ORDER BY path"
_SAVED = "SELECT instance_id, path, value, written FROM attributes ORDER BY instance_id, path"
_FOUND = "SELECT size, value FROM attributes WHERE instance_id = ? AND path = ?"
_USED = "SELECT count(*), coalesce(sum(size), 0) FROM attributes WHERE instance_id = ?"
_PUT = "INSERT OR REPLACE INTO attributes (instance_id, path, size, written, value) VALUES (?, ?, ?, ?, ?)"
_REMOVE = "DELETE FROM attributes WHERE instance_id = ? AND path = ?"


class Attribute(NamedTuple):
    """One thing that an instance says of itself.

    Attributes:
        path: NAMESPACE/KEY.
        value: any bytes, as the instance has sent them.
        written: when, in seconds of Unix time.
    """

    path: str
    value: bytes
    written: float


class Outcome(Enum):
    """What became of a write."""

    #: The attribute is new.
    CREATED = "created"
    #: It is there, or not there, as it was wanted.
    DONE = "done"
    #: The caller's condition does not hold.
    CONDITION = "condition"
    #: The instance would have more than `MOST_ATTRIBUTES`.
    TOO_MANY = "too many"
    #: It would have more than `MOST_BYTES`.
    TOO_LARGE = "too large"
    #: It may not have attributes any more.
    NOT_ALLOWED = "not allowed"
    #: The run in which it was identified is over.
    GONE = "gone"


def is_path(text: str) -> bool:
    """Whether an attribute can have this path."""
    return _PATH.fullmatch(text) is not None


def list_paths(store: Moment, instance: Instance) -> list[str]:
    """The paths of an instance's attributes, sorted; none if its id belongs to another instance by now."""
    return [path for (path,) in store.connection.execute(_PATHS, (instance.id, instance.uuid))]


def get_value(store: Moment, instance: Instance, path: str) -> bytes | None:
    """The value of an attribute; None if there is none."""
    found = store.connection.execute(_VALUE, (instance.id, instance.uuid, path)).fetchone()
    return None if found is None else bytes(found[0])


def list_attributes(store: Moment, instance: Instance) -> list[Attribute]:
    """The attributes of an instance, by path."""
    return [Attribute(*row) for row in store.connection.execute(_ALL, (instance.id,))]


def write(
    change: Change,
    owner: Instance,
    path: str,
    value: bytes | None,
    holds: Callable[[bytes | None], bool] | None = None,
) -> Outcome:
    """Set or remove an attribute, as its instance has asked for.

    Args:
        change: the transaction.
        owner: the instance, in the run and as the init as which it was identified: the store may be another by now.
        path: for which `is_path` holds.
        value: at most `VALUE_BYTES`; None: remove it.
        holds: the instance's condition on the present value, which is None if there is none; None: no condition.

    Returns:
        What became of it.
    """
    instance = load(change.connection, owner.id, value_bytes=0)
    if instance is None or (instance.uuid, instance.run, instance.init) != (owner.uuid, owner.run, owner.init):
        return Outcome.GONE
    if ATTRIBUTES not in instance.allowed:
        return Outcome.NOT_ALLOWED
    size, present = change.connection.execute(_FOUND, (instance.id, path)).fetchone() or (0, None)
    if holds is not None and not holds(present):
        return Outcome.CONDITION
    if present == value:
        # No event for the same value: a guest could fill the log with it.
        return Outcome.DONE
    if value is None:
        change.connection.execute(_REMOVE, (instance.id, path))
        _tell(change, instance, "removed", path)
        _record(change, "attribute.remove", instance, path)
        return Outcome.DONE
    number, used = change.connection.execute(_USED, (instance.id,)).fetchone()
    if present is None and number >= MOST_ATTRIBUTES:
        return Outcome.TOO_MANY
    if used - size + len(value) > MOST_BYTES:
        return Outcome.TOO_LARGE
    change.connection.execute(_PUT, (instance.id, path, len(value), time.time(), value))
    _tell(change, instance, "set", path)
    _record(change, "attribute.set", instance, path)
    return Outcome.CREATED if present is None else Outcome.DONE


class AttributeReport(NamedTuple):
    """What an instance wants to say of itself, a `writing.WorkloadReport`; attributes as the arguments of `write`."""

    owner: Instance
    path: str
    value: bytes | None
    holds: Callable[[bytes | None], bool] | None = None

    def record(self, change: Change) -> Outcome:
        """As `write`."""
        return write(change, *self)


def read_saved(store: Moment) -> dict[int, list[Attribute]]:
    """All attributes of a backup, by the id of their instance."""
    found: dict[int, list[Attribute]] = {}
    for number, *row in store.connection.execute(_SAVED):
        found.setdefault(number, []).append(Attribute(*row))
    return found


def put_back(change: Change, instance: Instance, saved: Iterable[Attribute]) -> None:
    """Give an instance the attributes that it had, unless it says something of itself now: that is newer."""
    if change.connection.execute(_USED, (instance.id,)).fetchone()[0]:
        return
    for one in saved:
        change.connection.execute(_PUT, (instance.id, one.path, len(one.value), one.written, one.value))
        event = changes.ChangeEvent("attribute", {"action": "set", "path": one.path}, guest=True)
        tell(change, instance, [event], running=instance.running)


def _tell(change: Change, instance: Instance, action: str, path: str) -> None:
    event = changes.ChangeEvent("attribute", {"action": action, "path": path}, guest=True)
    tell(change, instance, [event], running=True, by_guest=True)


def _record(change: Change, action: str, instance: Instance, path: str) -> None:
    change.record(AuditRecord(action, instance.project, instance.name, keys=(path,), instance_id=instance.id))
