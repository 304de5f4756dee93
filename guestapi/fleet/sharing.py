"""How profiles are read from the fleet's database, and how what differs is written to it, by the role of an operator.

Rules: a change of a profile is one entry in the log of each host that has an instance with it; each host brings it to
its instances. So the hosts must be known for certain: the rows of hosts are locked first, then the profile's. Whoever
gives the profile to an instance meanwhile waits for that lock, and reads the profile after that. cloud-init ids are
made here, not by hosts, so a change that has cloud-init start over is one of its instances, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from guestapi.fleet.schema import PROFILES_SINCE
from guestapi.fleet.statements import as_devices, as_places, as_texts, write_rows
from guestapi.model import Device, Profile
from guestapi.names import MOST_ENTRIES, count_entries
from guestapi.store import changes
from guestapi.store.errors import ConflictError
from guestapi.store.profiles import list_profiles
from guestapi.store.transaction import Change

if TYPE_CHECKING:
    import psycopg

_COLUMNS = (
    "profiles.id::text, project, profiles.name, encode(description, 'hex'), "
    "(SELECT json_object_agg(key, encode(value, 'hex')) FROM guestapi.profile_config WHERE profile = profiles.id), "
    "(SELECT json_object_agg(profile_devices.name, definition) FROM guestapi.profile_devices "
    "WHERE profile = profiles.id)"
)
_AT_PLACES = "(profiles.project, profiles.name) IN (SELECT * FROM unnest(%(projects)s::text[], %(names)s::text[]))"
_READ = f"SELECT {_COLUMNS} FROM guestapi.profiles WHERE {_AT_PLACES} OR id = ANY(%(uuids)s::uuid[]) ORDER BY id"
_ALL = (
    f"SELECT {_COLUMNS}, (SELECT count(*) FROM guestapi.instance_profiles WHERE profile = profiles.id) "
    "FROM guestapi.profiles WHERE %s::text IS NULL OR project = %s ORDER BY project, name"
)
_USERS = (
    "SELECT project, name FROM guestapi.instances JOIN guestapi.instance_profiles USING (uuid) "
    "WHERE profile = %s ORDER BY project, name LIMIT %s"
)
_HOSTS = (
    "SELECT DISTINCT host FROM guestapi.instances JOIN guestapi.instance_profiles USING (uuid) "
    f"JOIN guestapi.profiles ON profile = profiles.id WHERE {_AT_PLACES}"
)
_IDS = f"SELECT id FROM guestapi.profiles WHERE {_AT_PLACES}"
_LOCK = f"SELECT id FROM guestapi.profiles WHERE {_AT_PLACES} ORDER BY id FOR UPDATE"
_SHARE = f"SELECT id FROM guestapi.profiles WHERE {_AT_PLACES} ORDER BY id FOR KEY SHARE"
_LOCK_ALL = "SELECT id FROM guestapi.profiles WHERE id = ANY(%s::uuid[]) ORDER BY id FOR UPDATE"
_HOSTS_OF = (
    "SELECT DISTINCT host, profile::text FROM guestapi.instances JOIN guestapi.instance_profiles USING (uuid) "
    "WHERE profile = ANY(%s::uuid[]) ORDER BY host, profile::text"
)
_INSTANCES_OF = "SELECT uuid::text FROM guestapi.instance_profiles WHERE profile = %s ORDER BY uuid"
#: Where an instance, `users.uuid`, has keys and devices.
_HAS = (
    "guestapi.config WHERE uuid = users.uuid",
    "guestapi.devices WHERE uuid = users.uuid",
    "guestapi.profile_config JOIN guestapi.instance_profiles AS others USING (profile) WHERE others.uuid = users.uuid",
    "guestapi.profile_devices JOIN guestapi.instance_profiles AS others USING (profile) WHERE others.uuid = users.uuid",
)
_KEY_SIZE = "octet_length(key) + octet_length(value)"
_DEVICE_SIZE = "octet_length(name) + octet_length(definition::text)"
# What is no object has no options: somebody may have written it by hand, and it is left out on hosts.
_OPTIONS = (
    "1 + CASE WHEN json_typeof(definition) = 'object' "
    "THEN (SELECT count(*) FROM json_object_keys(definition)) ELSE 0 END"
)


def _total(of_key: str, of_device: str) -> str:
    """A sum over all keys and devices of an instance: what a profile hides is not left out."""
    measures = (of_key, of_device, of_key, of_device)
    return " + ".join(
        f"(SELECT coalesce(sum({measure}), 0) FROM {where})" for measure, where in zip(measures, _HAS, strict=True)
    )


#: Instances that may have too much.
_LARGE = (
    "SELECT uuid::text FROM guestapi.instance_profiles AS users WHERE profile = %(profile)s AND "
    f"({_total(_KEY_SIZE, _DEVICE_SIZE)} + %(longer)s > %(most)s OR "
    f"{_total('1', _OPTIONS)} + %(further)s > {MOST_ENTRIES}) ORDER BY uuid"
)
_ADD = "INSERT INTO guestapi.profiles (id, project, name, description) VALUES (%s, %s, %s, %s)"
_UPDATE = "UPDATE guestapi.profiles SET name = %s, description = %s WHERE id = %s"
_REMOVE = "DELETE FROM guestapi.profiles WHERE id = %s"
_REMOVE_KEYS = (
    "DELETE FROM guestapi.profile_config USING unnest(%s::uuid[], %s::text[]) AS gone (profile, key) "
    "WHERE profile_config.profile = gone.profile AND profile_config.key = gone.key"
)
_ADD_KEYS = (
    "INSERT INTO guestapi.profile_config (profile, key, value) "
    "SELECT * FROM unnest(%s::uuid[], %s::text[], %s::bytea[]) "
    "ON CONFLICT (profile, key) DO UPDATE SET value = excluded.value"
)
_REMOVE_DEVICES = "DELETE FROM guestapi.profile_devices WHERE profile = %s"
_ADD_DEVICES = (
    "INSERT INTO guestapi.profile_devices (profile, name, definition) "
    "SELECT * FROM unnest(%s::uuid[], %s::text[], %s::json[])"
)


@dataclass(frozen=True, slots=True)
class FleetProfile:
    """A profile as the fleet's database has it; attributes as of `Profile`."""

    uuid: str
    project: str
    name: str
    description: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, Device] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes that it has at the most, as the database counts them."""
        keys = sum(len(key.encode()) + len(value.encode()) for key, value in self.config.items())
        return keys + sum(len(name.encode()) + len(json.dumps(device)) for name, device in self.devices.items())


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """What is to be written of profiles.

    Attributes:
        removed: profiles that are no more.
        added: new ones.
        changed: before and afterwards.
        users: hosts with instances that have one that is changed, each with the UUID of that profile.
    """

    removed: list[FleetProfile] = field(default_factory=list)
    added: list[FleetProfile] = field(default_factory=list)
    changed: list[tuple[FleetProfile, FleetProfile]] = field(default_factory=list)
    users: list[tuple[str, str]] = field(default_factory=list)


def read(
    connection: psycopg.Connection[Any], places: Iterable[tuple[str, str]], uuids: Iterable[str] = ()
) -> list[FleetProfile]:
    """Read profiles by project and name, and others by UUID; those that are not there are left out."""
    parameters = {**as_places(places), "uuids": sorted(uuids)}
    return [_profile(*row) for row in connection.execute(_READ.encode(), parameters)]


def read_all(connection: psycopg.Connection[Any], project: str | None) -> list[tuple[FleetProfile, int]]:
    """Read the profiles of a project, or of all (None), each with the number of instances that have it."""
    found = connection.execute(_ALL.encode(), (project, project))
    return [(_profile(*row), users) for *row, users in found]


def list_users(connection: psycopg.Connection[Any], uuid: str, limit: int) -> list[tuple[str, str]]:
    """Project and name of the first instances that have a profile, by project and name."""
    return connection.execute(_USERS, (uuid, limit)).fetchall()


def list_instances_of(connection: psycopg.Connection[Any], uuid: str) -> list[str]:
    """The UUIDs of all instances that have a profile."""
    return [one for (one,) in connection.execute(_INSTANCES_OF, (uuid,))]


def find_large(connection: psycopg.Connection[Any], before: FleetProfile, after: FleetProfile, most: int) -> list[str]:
    """The UUIDs of instances that may have more than `most` bytes, or `MOST_ENTRIES`, after the change of a profile."""
    longer = after.size - before.size
    further = count_entries(after.config, after.devices) - count_entries(before.config, before.devices)
    if longer <= 0 and further <= 0:
        return []
    values = {"profile": before.uuid, "longer": longer, "most": most, "further": further}
    found = connection.execute(_LARGE.encode(), values)
    return [one for (one,) in found]


def find_hosts(connection: psycopg.Connection[Any], places: Sequence[tuple[str, str]]) -> list[str]:
    """The hosts of all instances that have one of these profiles."""
    if not places:
        return []
    return [host for (host,) in connection.execute(_HOSTS.encode(), as_places(places))]


def lock(
    connection: psycopg.Connection[Any], edited: Sequence[tuple[str, str]], given: Sequence[tuple[str, str]]
) -> bool:
    """Lock profiles by project and name; False: not the ones that have these names now.

    Args:
        connection: in a transaction that has locked all hosts.
        edited: no instance can get one of these meanwhile.
        given: these are not changed meanwhile.
    """
    for statement, places in ((_LOCK, edited), (_SHARE, given)):
        if places:
            # A statement that has waited for a row has not seen another one that has got the name meanwhile.
            locked = set(connection.execute(statement.encode(), as_places(places)).fetchall())
            if locked != set(connection.execute(_IDS.encode(), as_places(places)).fetchall()):
                return False
    return True


def as_profile(number: int, one: FleetProfile) -> Profile:
    """The noun of this host's store that says the same."""
    return Profile(number, one.project, one.name, one.description, one.config, one.devices)


def compare(change: Change, known: Mapping[int, FleetProfile]) -> tuple[SharedPlan, dict[int, str]]:
    """Find out what a command has changed in memory.

    Args:
        change: the store in memory.
        known: the profiles that it was made of, by id.

    Returns:
        What is to be written, without users, and the UUIDs of all profiles in memory, by id.
    """
    found = SharedPlan()
    uuids: dict[int, str] = {}
    for one, _users in list_profiles(change):
        before = known.get(one.id)
        uuid = before.uuid if before is not None else str(uuid4())
        uuids[one.id] = uuid
        after = FleetProfile(uuid, one.project, one.name, one.description, dict(one.config), dict(one.devices))
        if before is None:
            found.added.append(after)
        elif before != after:
            found.changed.append((before, after))
    found.removed.extend(one for number, one in known.items() if number not in uuids)
    return found, uuids


def check(connection: psycopg.Connection[Any], plan: SharedPlan) -> None:
    """Find the hosts that a plan concerns, and make sure that no instance has a profile that is to be removed.

    Raises:
        ConflictError: one has.
    """
    for one in plan.removed:
        if users := list_users(connection, one.uuid, 1):
            raise ConflictError(
                f"profile {one.name!r} cannot be removed: instance {users[0][1]!r} has it",
                f"'guestapi profile show {one.name}' counts them, 'guestapi profile remove' takes it from one",
            )
    if plan.changed:
        uuids = [before.uuid for before, _after in plan.changed]
        plan.users.extend(connection.execute(_HOSTS_OF, (uuids,)).fetchall())


def starts_over(before: FleetProfile, after: FleetProfile) -> bool:
    """Whether cloud-init may have to start over in instances that have a profile."""
    return changes.cloud_init_starts_over(before.config, after.config, before.devices, after.devices)


def check_unchanged(connection: psycopg.Connection[Any], plan: SharedPlan) -> None:
    """Make sure that profiles are as they were when a plan was made.

    Raises:
        ConflictError: somebody else has changed one, or given it to an instance of another host.
    """
    before = [*plan.removed, *(one for one, _ in plan.changed)]
    if before:
        connection.execute(_LOCK_ALL, ([one.uuid for one in before],))
    now = {one.uuid: one for one in read(connection, (), [one.uuid for one in before])}
    for one in before:
        if now.get(one.uuid) != one:
            raise ConflictError(f"profile {one.name!r} was changed meanwhile; nothing was changed", "call this again")
    users = SharedPlan(removed=plan.removed, changed=plan.changed)
    check(connection, users)
    if users.users != plan.users:
        raise ConflictError("another host has a profile now; nothing was changed", "call this again")


def write(connection: psycopg.Connection[Any], plan: SharedPlan) -> None:
    """Write what differs; the hosts are told elsewhere."""
    if plan.added:
        connection.execute("SELECT guestapi.require(%s)", (PROFILES_SINCE,))
    for one in plan.removed:
        connection.execute(_REMOVE, (one.uuid,))
    for before, after in plan.changed:
        connection.execute(_UPDATE, (after.name, after.description.encode(), after.uuid))
        gone = ((after.uuid, key) for key in sorted(before.config.keys() - after.config.keys()))
        write_rows(connection, _REMOVE_KEYS, gone)
        _write_content(connection, before, after)
    for one in plan.added:
        connection.execute(_ADD, (one.uuid, one.project, one.name, one.description.encode()))
        _write_content(connection, FleetProfile(one.uuid, one.project, one.name), one)


def _write_content(connection: psycopg.Connection[Any], before: FleetProfile, after: FleetProfile) -> None:
    config = (
        (after.uuid, key, value.encode()) for key, value in after.config.items() if before.config.get(key) != value
    )
    write_rows(connection, _ADD_KEYS, config)
    if before.devices != after.devices:
        connection.execute(_REMOVE_DEVICES, (after.uuid,))
        devices = ((after.uuid, name, json.dumps(device)) for name, device in after.devices.items())
        write_rows(connection, _ADD_DEVICES, devices)


def _profile(uuid: str, project: str, name: str, description: str, values: Any, devices: Any) -> FleetProfile:
    said = bytes.fromhex(description).decode(errors="replace")
    return FleetProfile(uuid, project, name, said, as_texts(values), as_devices(devices))
