"""What a host reads of the fleet's database, and says to it, by the role of the host.

Rules: row-level security decides what is this host's. Nothing that is read is larger than `_CHUNK_BYTES`, but for one
instance or profile alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import guestapi
from guestapi.fleet.engine import FleetError, Session
from guestapi.fleet.schema import VERSION
from guestapi.fleet.statements import is_device
from guestapi.model import Device
from guestapi.sources.observed import Observed
from guestapi.store.placements import Cursor

#: Bytes of configuration that are read at a time.
_CHUNK_BYTES = 4 << 20
#: How many columns of a look are the state.
_STATE_COLUMNS = 7

#: Bytes that an instance's configuration has; and a profile's.
_SIZE = "(SELECT coalesce(sum(octet_length(value)), 0) FROM guestapi.config WHERE config.uuid = instances.uuid)"
_PROFILE_SIZE = (
    "(SELECT coalesce(sum(octet_length(value)), 0) FROM guestapi.profile_config WHERE profile = profiles.id)"
)
_ROW = "uuid::text, project, name, epoch, next_host IS NOT NULL"
_MINE = f"SELECT {_ROW}, {_SIZE} FROM guestapi.instances WHERE host = %s ORDER BY uuid"
_CHANGED = (
    f"SELECT changed, first, {_ROW}, {_SIZE} FROM (SELECT log.uuid::text AS changed, min(revision) AS first "
    "FROM guestapi.log WHERE host = %(host)s AND revision > %(revision)s GROUP BY log.uuid) AS changes "
    "LEFT JOIN guestapi.instances ON uuid = changed::uuid AND host = %(host)s ORDER BY first"
)
#: What an instance has, as objects: a row for each key would take several times as long to read.
_VALUES = "(SELECT json_object_agg(key, encode(value, 'hex')) FROM guestapi.config WHERE config.uuid = {0}.uuid)"
_DEVICES = "(SELECT json_object_agg(devices.name, definition) FROM guestapi.devices WHERE devices.uuid = {0}.uuid)"
_PROFILES_OF = (
    "(SELECT array_agg(profile ORDER BY position) FROM guestapi.instance_profiles "
    "WHERE instance_profiles.uuid = {0}.uuid)"
)
_INSTANCES = (
    f"SELECT uuid::text, project, name, epoch, type, cloud_init_id::text, {_VALUES.format('instances')}, "
    f"{_DEVICES.format('instances')}, {_PROFILES_OF.format('instances')}::text[] "
    "FROM guestapi.instances WHERE uuid = ANY(%s::uuid[])"
)
_PROFILE = (
    "{0}.id::text, {0}.project, {0}.name, encode({0}.description, 'hex'), "
    "(SELECT json_object_agg(key, encode(value, 'hex')) FROM guestapi.profile_config WHERE profile = {0}.id), "
    "(SELECT json_object_agg(profile_devices.name, definition) FROM guestapi.profile_devices WHERE profile = {0}.id)"
)
#: Row-level security leaves those that instances of this host have.
_MY_PROFILES = f"SELECT id::text, {_PROFILE_SIZE} FROM guestapi.profiles ORDER BY id"
_PROFILES = f"SELECT {_PROFILE.format('profiles')} FROM guestapi.profiles WHERE id = ANY(%s::uuid[])"
#: Of what changed, the profiles, and those of the instances: a host that had none with a profile has not heard of its
#: changes.
_CHANGED_PROFILES = (
    f"SELECT id::text, {_PROFILE_SIZE} FROM guestapi.profiles WHERE id IN (SELECT unnest(%(changed)s::uuid[]) "
    "UNION SELECT profile FROM guestapi.instance_profiles WHERE uuid = ANY(%(changed)s::uuid[])) ORDER BY id"
)
#: The state, and what changed since a cursor that fits it.
_LOOK = "SELECT * FROM guestapi.look(%(fleet)s, %(timeline)s, %(revision)s, %(most)s)"
#: Where these tables are: in another cluster, or put back from a dump, they are others.
_PLACE = "SELECT system_identifier, 'guestapi.fleet'::regclass::oid::bigint FROM pg_control_system()"
_SAID = "SELECT uuid::text, epoch, seq, run, running, ready FROM guestapi.said WHERE host = %s"
_CONTACT = "SELECT guestapi.contact(%s, %s, %s)"
_REPORT = "SELECT guestapi.report(%s, %s, %s, %s, %s, %s)"
_RELEASE = "SELECT guestapi.release(%s, %s)"


class HostState(NamedTuple):
    """The database as this host sees it.

    Attributes:
        cursor: identity, timeline, and this host's revision.
        host: the name of this host.
        oldest: the log has every change of a greater revision.
    """

    cursor: Cursor
    host: str
    oldest: int


class PlacedRow(NamedTuple):
    """An instance of this host, without what it has.

    Attributes:
        uuid: of it.
        project: of it.
        name: of it.
        epoch: grows when it goes to another host.
        leaving: it is to go to another host as soon as this one has released it.
        size: bytes of its configuration.
    """

    uuid: str
    project: str
    name: str
    epoch: int
    leaving: bool
    size: int


@dataclass(frozen=True, slots=True)
class Placement:
    """An instance that the fleet has placed on this host, with all that it has.

    Attributes:
        observed: the instance.
        epoch: as of `PlacedRow`.
        profiles: the UUIDs of its profiles, the weakest first.
    """

    observed: Observed
    epoch: int
    profiles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PlacedProfile:
    """A profile that instances of this host have, with all that it has.

    Attributes:
        uuid: of it.
        project: of it.
        name: of it.
        description: what the operator says of it.
        config: its configuration.
        devices: its devices.
        problems: one sentence for each thing that is left out.
    """

    uuid: str
    project: str
    name: str
    description: str
    config: Mapping[str, str]
    devices: Mapping[str, Device]
    problems: tuple[str, ...] = ()


class Said(NamedTuple):
    """What this host has said of an instance: the last report counts, which has the greatest `epoch` and `seq`."""

    epoch: int
    seq: int
    run: int
    running: bool
    ready: bool


class HostLook(NamedTuple):
    """What a host sees at one moment.

    Attributes:
        state: of the database.
        changed: what changed after a revision: UUID, the first revision that changed it, and the instance, in that
            order; None: it is not this host's any more, or a profile.
        placements: these instances with all that they have, by UUID; None: that would be too much at once.
        profiles: profiles that have changed, and those of these instances.
    """

    state: HostState
    changed: list[tuple[str, int, PlacedRow | None]]
    placements: Mapping[str, Placement] | None
    profiles: tuple[PlacedProfile, ...] = ()


def read_state(session: Session) -> HostState:
    """Return the database as this host sees it.

    Raises:
        FleetError: this host does not belong to the fleet, or its program does not fit.
    """
    return look(session, Cursor()).state


def look(session: Session, cursor: Cursor) -> HostLook:
    """Return the database as this host sees it, and what changed since a cursor.

    Nothing has changed, as far as this says, if the log does not go back so far, or the cursor is of another history:
    the state shows that.

    Raises:
        FleetError: as `read_state`.
    """
    parameters = {**cursor._asdict(), "timeline": f"{cursor.timeline:08X}", "most": _CHUNK_BYTES}
    rows = session.ask(_LOOK, parameters, often=True)
    state = _as_state([row[:_STATE_COLUMNS] for row in rows])
    found = [row[_STATE_COLUMNS + 2 :] for row in rows if row[_STATE_COLUMNS + 2] is not None]
    changed = [(uuid, first, None if one[0] is None else PlacedRow(*one[:6])) for uuid, first, *one in found]
    if found and not rows[0][_STATE_COLUMNS]:
        return HostLook(state, changed, None)
    placements = {uuid: _placement((*one[:4], *one[6:])) for uuid, _first, *one in found if one[0] is not None}
    return HostLook(state, changed, placements, tuple(_profile(*one) for one in rows[0][_STATE_COLUMNS + 1] or ()))


def _as_state(found: list[tuple[Any, ...]]) -> HostState:
    if not found:
        raise FleetError("this role is not an active host of the fleet", "'guestapi fleet host list' shows all")
    fleet, version, oldest_version, host, revision, oldest, timeline = found[0]
    if oldest_version > VERSION or version < VERSION:
        raise FleetError(
            f"the fleet has tables of version {version} and takes followers that know version {oldest_version}; "
            f"this guestapi knows version {VERSION}",
            "upgrade guestapi on this host" if oldest_version > VERSION else "run 'guestapi fleet upgrade'",
        )
    return HostState(Cursor(fleet, int(timeline, 16), revision), host, oldest)


def listen(session: Session, host: str) -> None:
    """Have the session hear when something of this host changes.

    What a host says is said again after it was lost with a server, so no commit of these waits for a disk or a standby.
    """
    session.ask("SET synchronous_commit = off")
    # What is asked often is planned once, not five times more.
    session.ask("SET plan_cache_mode = force_generic_plan")
    name = f"guestapi_{host}".replace('"', "")
    session.ask(f'LISTEN "{name}"')


def read_place(session: Session) -> tuple[int, int]:
    """Return what tells these tables from others of the same fleet, as from those that a dump has brought back."""
    ((cluster, table),) = session.ask(_PLACE)
    return cluster, table


def list_mine(session: Session, host: str) -> list[PlacedRow]:
    """Return all instances of a host."""
    return [PlacedRow(*row) for row in session.ask(_MINE, (host,))]


def list_changed(session: Session, host: str, revision: int) -> list[tuple[str, int, PlacedRow | None]]:
    """Return what changed after a revision: UUID, the first revision that changed it, and the instance, in that order.

    None: it is not this host's any more, or a profile.
    """
    rows = session.ask(_CHANGED, {"host": host, "revision": revision})
    return [(uuid, first, None if one[0] is None else PlacedRow(*one)) for uuid, first, *one in rows]


def read_placements(session: Session, listed: Iterable[PlacedRow]) -> Iterator[Placement]:
    """Yield instances with all that they have, in order."""
    for chunk in _chunks((one.uuid, one.size) for one in listed):
        rows = {row[0]: row for row in session.ask(_INSTANCES, (chunk,))}
        yield from (_placement(rows[uuid]) for uuid in chunk if uuid in rows)


def read_my_profiles(session: Session) -> Iterator[PlacedProfile]:
    """Yield all profiles that instances of this host have."""
    yield from _read_profiles(session, session.ask(_MY_PROFILES))


def read_changed_profiles(session: Session, changed: Iterable[str]) -> Iterator[PlacedProfile]:
    """Yield this host's profiles that are among these UUIDs of instances and profiles, or that these instances have."""
    yield from _read_profiles(session, session.ask(_CHANGED_PROFILES, {"changed": list(changed)}))


def read_said(session: Session, host: str) -> dict[str, Said]:
    """Return what this host has said of its instances, by UUID."""
    return {uuid: Said(*said) for uuid, *said in session.ask(_SAID, (host,))}


def say_contact(session: Session, applied: int, fault: str) -> None:
    """Say that this host follows, and up to which revision its store is as the database."""
    words = (applied, guestapi.__version__[:100], fault.encode()[:1000].decode(errors="ignore"))
    session.ask(_CONTACT, words, often=True)


def report(session: Session, uuid: str, said: Said) -> bool:
    """Say something of an instance; False: it is not this host's any more, or something newer was said."""
    return bool(session.ask(_REPORT, (uuid, *said), often=True)[0][0])


def release(session: Session, uuid: str, epoch: int) -> bool:
    """Give an instance to the host that is to have it; False: it is not to leave this one any more."""
    session.ask("BEGIN")
    session.wait_for_standbys()
    done = bool(session.ask(_RELEASE, (uuid, epoch))[0][0])
    session.ask("COMMIT")
    return done


def _read_profiles(session: Session, listed: Iterable[tuple[Any, ...]]) -> Iterator[PlacedProfile]:
    for chunk in _chunks((uuid, int(size)) for uuid, size in listed):
        yield from (_profile(*row) for row in session.ask(_PROFILES, (chunk,)))


def _chunks(listed: Iterable[tuple[str, int]]) -> Iterator[list[str]]:
    """Yield UUIDs by the part that can be read at a time.

    Args:
        listed: each with the bytes that it has.
    """
    chunk: list[str] = []
    total = 0
    for uuid, size in listed:
        if chunk and total + size > _CHUNK_BYTES:
            yield chunk
            chunk, total = [], 0
        chunk.append(uuid)
        total += size
    if chunk:
        yield chunk


def _profile(uuid: str, project: str, name: str, description: str, values: Any, definitions: Any) -> PlacedProfile:
    config, devices, problems = _content(values, definitions)
    # A description is for operators, who see what of it is no text.
    said = bytes.fromhex(description).decode(errors="replace")
    return PlacedProfile(uuid, project, name, said, config, devices, problems)


def _placement(row: tuple[Any, ...]) -> Placement:
    """A placement from its UUID, project, name, epoch, type, cloud-init id, configuration, devices and profiles."""
    uuid, project, name, epoch, kind, cloud_init_id, values, definitions, applied = row
    config, devices, problems = _content(values, definitions)
    observed = Observed(
        uuid,
        project,
        name,
        kind,
        config=config,
        devices=devices,
        uuid=uuid,
        cloud_init_id=cloud_init_id,
        problems=problems,
    )
    return Placement(observed, epoch, tuple(applied or ()))


def _content(values: Any, definitions: Any) -> tuple[dict[str, str], dict[str, Device], tuple[str, ...]]:
    """Configuration and devices out of what the database says, and a sentence for each thing that is left out."""
    config: dict[str, str] = {}
    devices: dict[str, Device] = {}
    problems: list[str] = []
    for key, value in (values or {}).items():
        try:
            config[key] = bytes.fromhex(value).decode()
        except UnicodeDecodeError:
            problems.append(f"the value of {key[:40]!r} is not valid UTF-8, so it is left out")
    for device, definition in (definitions or {}).items():
        if is_device(definition):
            devices[device] = definition
        else:
            problems.append(f"device {device[:40]!r} is not an object of texts, so it is left out")
    return config, devices, tuple(problems)
