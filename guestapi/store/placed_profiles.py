"""Profiles of a fleet, as far as instances that it has placed on this host have them.

Rules: the fleet's key identifies one, so it may have the name of a profile of this host's own. What it gives to
instances is told as that of any other profile (`profile_users`); their cloud-init ids are the fleet's. One that no
instance has is removed, but while a placement cannot be taken, only by the next look at everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from guestapi import names
from guestapi.audit import AuditRecord
from guestapi.model import Device, Profile
from guestapi.store import profiles
from guestapi.store.lookup import Moment
from guestapi.store.rows import load_profile
from guestapi.store.transaction import Change

_BY_UUID = "SELECT id FROM profiles WHERE uuid = ?"
_ADD = "INSERT INTO profiles (project, name, uuid) VALUES (?, ?, ?)"
_RENAME = "UPDATE profiles SET project = ?, name = ? WHERE id = ?"
_UNUSED = "SELECT uuid FROM profiles WHERE uuid IS NOT NULL AND id NOT IN (SELECT profile_id FROM instance_profiles)"
_REMOVE_UUID = "DELETE FROM profiles WHERE uuid = ?"
_ALL = "SELECT id, project, name FROM profiles WHERE uuid IS NOT NULL ORDER BY id"
_KEEP = "UPDATE profiles SET uuid = NULL, name = ? WHERE id = ?"
_EXCHANGE = "UPDATE instance_profiles SET profile_id = ? WHERE profile_id = ?"
_REMOVE = "DELETE FROM profiles WHERE id = ?"


def find(store: Moment, uuid: str) -> Profile | None:
    """Return the profile that a fleet has under a key; None: it is not here."""
    row = store.connection.execute(_BY_UUID, (uuid,)).fetchone()
    return None if row is None else load_profile(store.connection, row[0])


def put(
    change: Change,
    uuid: str,
    project: str,
    name: str,
    *,
    description: str,
    config: Mapping[str, str],
    devices: Mapping[str, Device],
) -> Profile:
    """Have a profile of the fleet's, and exactly this in it. All instances that have it get it, too.

    Args:
        change: the transaction.
        uuid: the fleet's key of it.
        project: of the instances that have it.
        name: its name.
        description: what the operator says of it.
        config: its configuration.
        devices: its devices.

    Returns:
        The profile.

    Raises:
        InvalidNameError: a name or value cannot be taken.
        ConflictError: the profile, or an instance that has it, would have too much configuration.
    """
    names.check_project(project)
    names.check_profile(name)
    found = find(change, names.check_uuid(uuid))
    if found is None:
        number = change.connection.execute(_ADD, (project, name, uuid)).lastrowid
        assert number is not None, "it was inserted"
        found = Profile(number, project, name, uuid=uuid)
    elif (found.project, found.name) != (project, name):
        change.connection.execute(_RENAME, (project, name, found.id))
        change.record(AuditRecord("profile.rename", project, profiles=(found.name, name)))
        found = replace(found, project=project, name=name)
    return profiles.edit(change, found, description=description, config=config, devices=devices)


def list_unused(store: Moment) -> list[str]:
    """The keys of the fleet's profiles that no instance here has."""
    return [uuid for (uuid,) in store.connection.execute(_UNUSED)]


def remove_unused(change: Change, uuids: Iterable[str]) -> None:
    """Remove profiles of the fleet's, which no instance here has."""
    change.connection.executemany(_REMOVE_UUID, [(uuid,) for uuid in uuids])


def keep_all(change: Change) -> None:
    """Make the fleet's profiles this host's own. Where a name is taken, one gets another: ``web`` becomes ``web.1``.

    ``default`` is taken always, since instances of this host get it by themselves. A profile that was kept before, by a
    call that was interrupted after that, is not kept twice: it is this host's own that says the same.
    """
    for number, project, name in change.connection.execute(_ALL).fetchall():
        wanted = load_profile(change.connection, number)
        assert wanted is not None, "it was listed"
        free, tries = name, 0
        while (found := profiles.find_profile(change, project, free)) is not None:
            if free != profiles.DEFAULT and replace(found, id=number, name=name, uuid=wanted.uuid) == wanted:
                break
            tries += 1
            free = f"{name[:50]}.{tries}"
        if found is None:
            change.connection.execute(_KEEP, (free, number))
        else:
            change.connection.execute(_EXCHANGE, (found.id, number))
            change.connection.execute(_REMOVE, (number,))
