"""Key policies: what the operator has decided about configuration keys, and to whom values were given once.

1. A policy holds from its transaction on. That transaction takes out of the change log, too, what the policy leaves out
   of it, so that no client that resumes hears of it.
2. Each instance that a policy concerns gets another revision, so no worker answers by what it has in memory.
3. A value that is given once is given by a transaction of its own. It counts as unset from then on, and is set anew by
   any change of it (`transaction`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from guestapi import names
from guestapi.audit import AuditRecord
from guestapi.key_policy import rule_of
from guestapi.model import Instance, KeyPolicy
from guestapi.store import changes
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import Moment
from guestapi.store.rows import load, load_policies
from guestapi.store.transaction import NO_INSTANCE, Change, Told, blank_metadata, tell, tell_all, write_event

_LIST = (
    "SELECT coalesce(policies.project, instances.project), name, pattern, hidden, secret, once, uids FROM policies "
    "LEFT JOIN instances ON instances.id = instance_id ORDER BY 1, name, pattern"
)
_PUT = (
    "INSERT OR REPLACE INTO policies (project, instance_id, pattern, hidden, secret, once, uids) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_REMOVE = "DELETE FROM policies WHERE project IS ? AND instance_id IS ? AND pattern = ?"
_CONCERNED = "UPDATE instances SET revision = revision + 1 WHERE id = ? OR project = ?"
_KEYS_TOLD = (
    "SELECT id, instance_id, metadata, for_guest FROM notifications "
    "WHERE type = 'config' AND instance_id IN (SELECT id FROM instances WHERE id = ? OR project = ?)"
)
_REWRITE = "UPDATE notifications SET metadata = ?, for_guest = ? WHERE id = ?"
_BLANK = "UPDATE notifications SET parts_size = 0 WHERE id = ?"
_BLANK_PARTS = "DELETE FROM notification_parts WHERE notification_id = ?"
_SPEND = "INSERT OR REPLACE INTO spends (instance_id, key, spent, pid, uid, written) VALUES (?, ?, ?, ?, ?, ?)"
_SPENDS = (
    "SELECT instance_id, project, name, key, spent, pid, uid, written FROM spends "
    "JOIN instances ON instances.id = instance_id ORDER BY project, name, key"
)
_RENEW = "UPDATE spends SET spent = 0 WHERE instance_id = ? AND key = ? AND spent"
_CHANGED = "UPDATE instances SET revision = revision + 1 WHERE id = ?"


class ScopedPolicy(NamedTuple):
    """A policy, and where it holds.

    Attributes:
        project: of whose instances.
        instance: name of the one instance; None: of all.
        policy: the policy.
    """

    project: str
    instance: str | None
    policy: KeyPolicy


class Spend(NamedTuple):
    """That the value of a key was given once.

    Attributes:
        instance_id, project, instance: of which instance.
        key: which key.
        spent: it counts as unset since; False: it was set anew.
        pid, uid: of the process that it was given to, as the host sees them.
        written: when, in seconds of Unix time.
    """

    instance_id: int
    project: str
    instance: str
    key: str
    spent: bool
    pid: int
    uid: int
    written: float


def list_policies(store: Moment) -> list[ScopedPolicy]:
    """All policies, by project, instance and pattern; those of a project before those of its instances."""
    return [
        ScopedPolicy(
            project, name, KeyPolicy(pattern, bool(hidden), bool(secret), bool(once), frozenset(json.loads(uids)))
        )
        for project, name, pattern, hidden, secret, once, uids in store.connection.execute(_LIST)
    ]


def put(change: Change, project: str, instance: Instance | None, policy: KeyPolicy) -> None:
    """Have a policy hold, in the place of one with the same pattern.

    Args:
        change: the transaction.
        project: of whose instances.
        instance: the one instance; None: of all.
        policy: the policy.

    Raises:
        InvalidNameError: the pattern cannot be one.
        ConflictError: it says nothing, or names a user that cannot be.
    """
    names.check_project(project)
    names.check_key(policy.pattern, "pattern")
    if not (policy.hidden or policy.secret or policy.once or policy.uids):
        raise ConflictError("a policy says at least one of hidden, secret, once and uid")
    if any(not 0 <= uid < 1 << 32 for uid in policy.uids):
        raise ConflictError("a user ID is a number from 0 to 4294967295")
    scope = _scope(project, instance)
    flags = (policy.hidden, policy.secret, policy.once)
    change.connection.execute(_PUT, (*scope, policy.pattern, *flags, json.dumps(sorted(policy.uids))))
    conceal(change, project, instance)
    note_changed(change, project, instance)
    _record(change, "policy.put", project, instance, policy.pattern)


def remove(change: Change, project: str, instance: Instance | None, pattern: str) -> None:
    """Have a policy hold no more.

    Raises:
        ConflictError: there is none with this pattern.
    """
    removed = change.connection.execute(_REMOVE, (*_scope(project, instance), pattern)).rowcount
    if not removed:
        raise ConflictError(f"no policy has the pattern {pattern!r} there", "'guestapi policy list' shows all")
    note_changed(change, project, instance)
    _record(change, "policy.remove", project, instance, pattern)


def _record(change: Change, action: str, project: str, instance: Instance | None, pattern: str) -> None:
    name, number = ("", 0) if instance is None else (instance.name, instance.id)
    change.record(AuditRecord(action, project, name, pattern=pattern, instance_id=number))


def conceal(change: Change, project: str, instance: Instance | None) -> None:
    """Take out of the change log what policies leave out of it.

    Args:
        change: the transaction.
        project: of which instances.
        instance: of this one alone; None: of all of the project.
    """
    rows = change.connection.execute(_KEYS_TOLD, _concerned(project, instance)).fetchall()
    known: dict[int, Sequence[KeyPolicy]] = {}
    rewritten = []
    for number, instance_id, metadata, for_guest in rows:
        if instance_id not in known:
            known[instance_id] = load_policies(change.connection, project, instance_id)
        key = changes.key_of("config", metadata)
        rule = rule_of(known[instance_id], key or "")
        if key is not None and (rule.blank or rule.hidden):
            if rule.blank:
                change.connection.execute(_BLANK, (number,))
                change.connection.execute(_BLANK_PARTS, (number,))
            told = blank_metadata(key) if rule.blank else metadata
            rewritten.append((told, for_guest and not rule.hidden, number))
    change.connection.executemany(_REWRITE, rewritten)


def spend(change: Change, instance: Instance, key: str, pid: int, uid: int) -> str | None:
    """Give the value of a key that is given once.

    Args:
        change: the transaction, which must be committed before anybody gets the value.
        instance: whose it is, as it was when it was asked for.
        key: the key.
        pid: of the process that gets it, as the host sees it.
        uid: of that process, as the host sees it.

    Returns:
        The value; None if there is none to be given.
    """
    now = load(change.connection, instance.id)
    if now is None or (now.uuid, now.run, now.init) != (instance.uuid, instance.run, instance.init):
        return None
    value = now.config.get(key)
    rule = rule_of(now.policies, key)
    if value is None or rule.hidden or not rule.once:
        return None
    change.connection.execute(_SPEND, (now.id, key, True, pid, uid, time.time()))
    change.connection.execute(_CHANGED, (now.id,))
    event = changes.lifecycle("key-spent", now.project, now.name)
    metadata = {"action": "key-spent", "key": key, **event.metadata, "pid": str(pid), "uid": str(uid)}
    tell(change, now, [event._replace(metadata=metadata)], running=True)
    change.record(AuditRecord("key.spend", now.project, now.name, keys=(key,), instance_id=now.id))
    return value


def renew(change: Change, instance: Instance, keys: Iterable[str]) -> None:
    """Have keys count as set again whose values were given, because they are set to the same values once more."""
    renewed = [key for key in keys if change.connection.execute(_RENEW, (instance.id, key)).rowcount]
    if renewed:
        change.connection.execute(_CHANGED, (instance.id,))
        events = [
            changes.ChangeEvent("config", {"key": key, "old_value": "", "value": ""}, guest=key.startswith("user."))
            for key in renewed
        ]
        tell(change, instance, events, running=instance.running)


def list_spends(store: Moment) -> list[Spend]:
    """To whom values were given, by project, instance and key."""
    return [
        Spend(number, project, name, key, bool(spent), pid, uid, written)
        for number, project, name, key, spent, pid, uid, written in store.connection.execute(_SPENDS)
    ]


def mark_spent(change: Change, instance_id: int, found: Spend) -> None:
    """Record of an instance what a backup has recorded of it."""
    values = (instance_id, found.key, found.spent, found.pid, found.uid, found.written)
    change.connection.execute(_SPEND, values)
    change.connection.execute(_CHANGED, (instance_id,))


def _scope(project: str, instance: Instance | None) -> tuple[str | None, int | None]:
    """The columns of a policy's row."""
    return (project, None) if instance is None else (None, instance.id)


def _concerned(project: str, instance: Instance | None) -> tuple[int | None, str | None]:
    """The parameters that select the instances."""
    return (None, project) if instance is None else (instance.id, None)


def note_changed(change: Change, project: str, instance: Instance | None) -> None:
    """Have all workers know that something was decided about an instance, or about all of a project."""
    change.connection.execute(_CONCERNED, _concerned(project, instance))
    event = changes.lifecycle("policy-changed", project, "" if instance is None else instance.name)
    if instance is None:
        tell_all(change, [(Told(NO_INSTANCE, project, "", running=False), [write_event(event)])])
    else:
        tell(change, instance, [event], running=instance.running)
