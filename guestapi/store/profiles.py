"""Profiles: named sets of configuration and devices that instances share; looking at them, and the steps of a change.

Rules: a profile belongs to a project, and so do the instances that have it. Its change reaches all of them in the same
transaction (`profile_users`). Instances that followers add get the profile ``default`` of their project, which is made
when it is needed and cannot be removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from guestapi import names
from guestapi.audit import AuditRecord
from guestapi.model import Device, Instance, Profile
from guestapi.store.errors import ConflictError, UnknownProfileError
from guestapi.store.lookup import Moment
from guestapi.store.profile_users import spread
from guestapi.store.rows import load_profile
from guestapi.store.transaction import Change

#: The profile of instances that followers add.
DEFAULT = "default"

_BY_NAME = "SELECT id FROM profiles WHERE project = ? AND name = ? AND uuid IS NULL"
_OF_FLEET = "SELECT 1 FROM profiles WHERE project = ? AND name = ? AND uuid IS NOT NULL"
_ALL = (
    "SELECT id, (SELECT count(*) FROM instance_profiles WHERE profile_id = id) FROM profiles "
    "WHERE uuid IS NULL AND (:project IS NULL OR project = :project) ORDER BY project, name"
)
_USERS = (
    "SELECT project, name FROM instances JOIN instance_profiles ON instance_id = id WHERE profile_id = ? "
    "ORDER BY project, name LIMIT ?"
)
_APPLIED = "SELECT profile_id FROM instance_profiles WHERE instance_id = ? ORDER BY position"
_ADD_KEY = "INSERT INTO profile_config (profile_id, key, size, value) VALUES (?, ?, ?, ?)"
_ADD_DEVICE = "INSERT INTO profile_devices (profile_id, name, definition) VALUES (?, ?, ?)"


def find_profile(store: Moment, project: str, name: str) -> Profile | None:
    """This host's own profile of that name, or None. ``default`` is empty until something is written to it."""
    if not (names.is_text(project) and names.is_text(name)):
        return None
    row = store.connection.execute(_BY_NAME, (project, name)).fetchone()
    if row is None:
        return Profile(0, project, name) if name == DEFAULT else None
    return load_profile(store.connection, row[0])


def get_profile(store: Moment, project: str, name: str) -> Profile:
    """The profile of that name, as `find_profile`.

    Raises:
        UnknownProfileError: there is none.
    """
    found = find_profile(store, project, name)
    if found is None:
        if _is_fleets(store, project, name):
            raise UnknownProfileError(
                f"profile {name!r}{_where(project)} is the fleet's",
                "'guestapi --fleet profile ...' shows and changes it",
            )
        raise _unknown(project, name)
    return found


def _where(project: str) -> str:
    return "" if project == "default" else f" in project {project!r}"


def _unknown(project: str, name: str) -> UnknownProfileError:
    return UnknownProfileError(f"no profile {name[:80]!r}{_where(project[:80])}", "'guestapi profile list' shows all")


def _is_fleets(store: Moment, project: str, name: str) -> bool:
    if not (names.is_text(project) and names.is_text(name)):
        return False
    return store.connection.execute(_OF_FLEET, (project, name)).fetchone() is not None


def list_profiles(store: Moment, project: str | None = None) -> list[tuple[Profile, int]]:
    """This host's own profiles by project and name, with the number of instances that have each.

    Args:
        store: where to look.
        project: of this one; None: of all.
    """
    if project is not None and not names.is_text(project):
        return []
    rows = store.connection.execute(_ALL, {"project": project}).fetchall()
    found = [(load_profile(store.connection, number), count) for number, count in rows]
    return [(profile, count) for profile, count in found if profile is not None]


def list_users(store: Moment, profile: Profile, limit: int) -> list[tuple[str, str]]:
    """Project and name of the first instances that have a profile, by project and name.

    Args:
        store: where to look.
        profile: the profile.
        limit: so many at the most.
    """
    return store.connection.execute(_USERS, (profile.id, limit)).fetchall()


def get_profiles(change: Change, instance: Instance) -> tuple[Profile, ...]:
    """The profiles of an instance, the weakest first."""
    rows = change.connection.execute(_APPLIED, (instance.id,)).fetchall()
    found = [load_profile(change.connection, number) for (number,) in rows]
    return tuple(profile for profile in found if profile is not None)


def create(
    change: Change,
    project: str,
    name: str,
    *,
    description: str = "",
    config: Mapping[str, str] | None = None,
    devices: Mapping[str, Device] | None = None,
    entries: int = names.MOST_ENTRIES,
) -> Profile:
    """Make a profile.

    Args:
        change: the transaction.
        project: of the instances that may have it.
        name: its name.
        description: what the operator says of it.
        config: its configuration.
        devices: its devices.
        entries: how many keys, devices and options it may have.

    Raises:
        InvalidNameError: a name or value cannot be taken.
        ConflictError: there is one of that name, or this would be too much.
    """
    names.check_project(project)
    names.check_profile(name)
    found = find_profile(change, project, name)
    if found is not None and found.id:
        raise ConflictError(
            f"profile {name!r} exists already in project {project!r}", "'guestapi profile set' changes it"
        )
    made = _insert(change, project, name)
    wanted = _with_content(change, made, description, config or {}, devices or {}, entries)
    write_content(change, made, wanted)
    _record(change, "profile.create", wanted, tuple(wanted.config), tuple(wanted.devices))
    return wanted


def ensure_default(change: Change, project: str) -> Profile:
    """The profile ``default`` of a project, made if it is missing."""
    found = get_profile(change, project, DEFAULT)
    return found if found.id else _insert(change, names.check_project(project), DEFAULT)


def edit(
    change: Change,
    profile: Profile,
    *,
    description: str | None = None,
    config: Mapping[str, str] | None = None,
    devices: Mapping[str, Device] | None = None,
) -> Profile:
    """Give a profile exactly this content; None: as it is. All instances that have it get it, too.

    Args:
        change: the transaction.
        profile: the profile as it is in this transaction.
        description: what the operator says of it.
        config: its configuration; an empty value is none.
        devices: its devices.

    Returns:
        The profile afterwards.

    Raises:
        InvalidNameError: a name or value cannot be taken.
        ConflictError: the profile, or an instance that has it, would have too much configuration.
    """
    if not profile.id:
        profile = ensure_default(change, profile.project)
    entries = max(names.MOST_ENTRIES, names.count_entries(profile.config, profile.devices))
    wanted = _with_content(change, profile, description, config, devices, entries)
    if wanted != profile:
        noticed = spread(change, profile, wanted)
        write_content(change, profile, wanted)
        touched = (_different(profile.config, wanted.config), _different(profile.devices, wanted.devices))
        _record(change, "profile.edit", wanted, *touched, noticed=noticed)
    return wanted


def _with_content(
    change: Change,
    profile: Profile,
    description: str | None,
    config: Mapping[str, str] | None,
    devices: Mapping[str, Device] | None,
    entries: int,
) -> Profile:
    """A profile with other content, checked; None: as it is."""
    wanted = profile
    if description is not None:
        wanted = replace(wanted, description=names.check_value(description, "the description"))
    if config is not None:
        wanted = replace(wanted, config={key: value for key, value in names.check_config(config).items() if value})
    if devices is not None:
        wanted = replace(wanted, devices=names.check_devices(devices))
    size = names.size_of(wanted.config, wanted.devices) + len(wanted.description.encode())
    if size > change.configuration_bytes:
        raise ConflictError(
            f"a profile may have {change.configuration_bytes} bytes, not {size} as {profile.name!r} would have",
            "store.configuration_bytes in guestapi.toml is that bound",
        )
    count = names.count_entries(wanted.config, wanted.devices)
    if count > entries:
        raise ConflictError(
            f"a profile may have {entries} keys, devices and options together, not {count} as "
            f"{profile.name!r} would have",
            "put what belongs together into one value",
        )
    return wanted


def _different(before: Mapping[str, object], after: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def _record(
    change: Change,
    action: str,
    profile: Profile,
    keys: tuple[str, ...] = (),
    devices: tuple[str, ...] = (),
    noticed: int = 0,
) -> None:
    record = AuditRecord(action, profile.project, "", keys, devices, (profile.name,), noticed=noticed)
    change.record(record)


def rename(change: Change, profile: Profile, name: str, *, is_fleets: bool = False) -> None:
    """Call a profile `name` from now on. Its instances keep it.

    Args:
        change: the transaction.
        profile: the profile as it is in this transaction.
        name: the new name.
        is_fleets: it is a fleet's, where no instance gets ``default`` by itself.

    Raises:
        InvalidNameError: the name cannot be taken.
        ConflictError: another profile has it, or this one is ``default``.
        UnknownProfileError: nothing was written to ``default`` yet.
    """
    names.check_profile(name)
    _refuse_default(profile, "renamed", is_fleets)
    found = find_profile(change, profile.project, name)
    if found is not None and (found.id or not is_fleets):
        raise ConflictError(f"profile {name!r} exists already in project {profile.project!r}", "choose another name")
    park(change, profile, name)
    change.record(AuditRecord("profile.rename", profile.project, profiles=(profile.name, name)))


def remove(change: Change, profile: Profile, *, is_fleets: bool = False) -> None:
    """Remove a profile that no instance has.

    Args:
        change: the transaction.
        profile: the profile as it is in this transaction.
        is_fleets: as of `rename`.

    Raises:
        ConflictError: an instance has it, or it is ``default``.
        UnknownProfileError: as of `rename`.
    """
    _refuse_default(profile, "removed", is_fleets)
    users = list_users(change, profile, 1)
    if users:
        raise ConflictError(
            f"profile {profile.name!r} cannot be removed: instance {users[0][1]!r} has it",
            f"'guestapi profile show {profile.name}' counts them, 'guestapi profile remove' takes it from one",
        )
    discard(change, profile)


def park(change: Change, profile: Profile, name: str) -> None:
    """Give a profile another name, whatever it is."""
    change.connection.execute("UPDATE profiles SET name = ? WHERE id = ?", (name, profile.id))


def discard(change: Change, profile: Profile) -> None:
    """Remove a profile of which it is known that no instance has it."""
    change.connection.execute("DELETE FROM profiles WHERE id = ?", (profile.id,))
    _record(change, "profile.remove", profile)


def has_template(store: Moment, profile: Profile) -> bool:
    """Whether ``hooks.template`` was taken over into a profile."""
    row = store.connection.execute("SELECT has_template FROM profiles WHERE id = ?", (profile.id,)).fetchone()
    return row is not None and bool(row[0])


def mark_template(change: Change, profile: Profile) -> None:
    """Record that ``hooks.template`` was taken over into a profile."""
    change.connection.execute("UPDATE profiles SET has_template = 1 WHERE id = ?", (profile.id,))


def take_template(change: Change, project: str, template: Mapping[str, str]) -> list[str]:
    """Take ``hooks.template`` of guestapi.toml over into the profile ``default``, unless that was done before.

    Args:
        change: the transaction.
        project: ``hooks.project``.
        template: keys and values; what the profile has already stays.

    Returns:
        A sentence for each key that cannot be taken.
    """
    if not template or has_template(change, get_profile(change, project, DEFAULT)):
        return []
    profile = ensure_default(change, project)
    config, left_out = dict(profile.config), []
    for key, value in template.items():
        try:
            config = {**names.check_config({key: value}), **config}
            if names.size_of(config, profile.devices) > change.configuration_bytes:
                del config[key]
                left_out.append(f"hooks.template: {key[:40]!r} is left out: its value is too large")
            elif names.count_entries(config, profile.devices) > names.MOST_ENTRIES:
                del config[key]
                left_out.append(f"hooks.template: {key[:40]!r} is left out: there are {names.MOST_ENTRIES} others")
        except names.InvalidNameError as error:
            left_out.append(f"hooks.template: {error}, so it is left out")
    edit(change, profile, config=config)
    mark_template(change, profile)
    return left_out


def _refuse_default(profile: Profile, what: str, is_fleets: bool) -> None:
    if is_fleets and not profile.id:
        raise _unknown(profile.project, profile.name)
    if profile.name == DEFAULT and not is_fleets:
        raise ConflictError(
            f"profile {DEFAULT!r} cannot be {what}: instances that runtimes start get it",
            "'guestapi profile unset' takes away what it has",
        )


def _insert(change: Change, project: str, name: str) -> Profile:
    made = change.connection.execute("INSERT INTO profiles (project, name) VALUES (?, ?)", (project, name))
    assert made.lastrowid is not None, "it was inserted"
    return Profile(made.lastrowid, project, name)


def write_content(change: Change, before: Profile, after: Profile) -> None:
    """Write what a profile has, and nothing of the instances that have it.

    Args:
        change: the transaction.
        before: what is written of it.
        after: what is to be.
    """
    connection, number = change.connection, after.id
    connection.execute("UPDATE profiles SET description = ? WHERE id = ?", (after.description, number))
    keys = [
        key for key in before.config.keys() | after.config.keys() if before.config.get(key) != after.config.get(key)
    ]
    connection.executemany(
        "DELETE FROM profile_config WHERE profile_id = ? AND key = ?", [(number, key) for key in keys]
    )
    values = [(number, key, after.config[key]) for key in keys if key in after.config]
    connection.executemany(_ADD_KEY, [(number, key, len(value.encode()), value) for number, key, value in values])
    if before.devices != after.devices:
        connection.execute("DELETE FROM profile_devices WHERE profile_id = ?", (number,))
        definitions = {name: json.dumps(dict(sorted(one.items()))) for name, one in after.devices.items()}
        connection.executemany(_ADD_DEVICE, [(number, name, text) for name, text in definitions.items()])
