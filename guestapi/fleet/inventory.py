"""What a host reads of the fleet's database, and says to it, by the role of the host.

Rules: row-level security decides what is this host's. Nothing that is read is larger than `_CHUNK_BYTES`, but for one
instance alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import guestapi
from guestapi.fleet.engine import FleetError, Session
from guestapi.fleet.schema import VERSION
from guestapi.sources.observed import Observed
from guestapi.store.placements import Cursor

#: Bytes of configuration that are read at a time.
_CHUNK_BYTES = 4 << 20
#: How many columns `_STATE` has.
_STATE_COLUMNS = 7

_STATE = (
    "SELECT fleet.id::text, version, oldest_version, name AS host, revision, oldest, "
    # pg_walfile_name begins with the timeline, in hexadecimal digits.
    "left(pg_walfile_name(pg_current_wal_lsn()), 8) AS timeline "
    "FROM guestapi.fleet JOIN guestapi.hosts ON name = guestapi.me()"
)
_SIZE = "(SELECT coalesce(sum(octet_length(value)), 0) FROM guestapi.config WHERE config.uuid = instances.uuid)"
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
_INSTANCES = (
    f"SELECT uuid::text, project, name, epoch, type, cloud_init_id::text, {_VALUES.format('instances')}, "
    f"{_DEVICES.format('instances')} FROM guestapi.instances WHERE uuid = ANY(%s::uuid[])"
)
#: The state, and what changed since a cursor that fits it. All of it is of one moment, since it is one statement.
_LOOK = (
    f"WITH state AS MATERIALIZED ({_STATE}), changes AS MATERIALIZED (SELECT log.uuid AS changed, "
    "min(log.revision) AS first FROM state JOIN guestapi.log ON log.host = state.host "
    "AND log.revision > %(revision)s WHERE (id, timeline) = (%(fleet)s, %(timeline)s) AND oldest <= %(revision)s "
    f"GROUP BY log.uuid), found AS MATERIALIZED (SELECT changes.*, instances.*, {_SIZE} AS size FROM changes "
    "LEFT JOIN guestapi.instances ON instances.uuid = changed AND instances.host = (SELECT state.host FROM state)), "
    "size AS (SELECT sum(size) <= %(most)s AS readable FROM found) "
    f"SELECT state.*, (SELECT readable FROM size), changed::text, first, {_ROW}, size, type, cloud_init_id::text, "
    f"CASE WHEN (SELECT readable FROM size) THEN {_VALUES.format('found')} END, {_DEVICES.format('found')} "
    "FROM state LEFT JOIN found ON true ORDER BY first"
)
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
    """An instance that the fleet has placed on this host, with all that it has."""

    observed: Observed
    epoch: int


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
            order; None: it is not this host's any more.
        placements: these instances with all that they have, by UUID; None: that would be too much at once.
    """

    state: HostState
    changed: list[tuple[str, int, PlacedRow | None]]
    placements: Mapping[str, Placement] | None


def read_state(session: Session) -> HostState:
    """Return the database as this host sees it.

    Raises:
        FleetError: this host does not belong to the fleet, or its program does not fit.
    """
    return _as_state(session.ask(_STATE, often=True))


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
    found = [row[_STATE_COLUMNS + 1 :] for row in rows if row[_STATE_COLUMNS] is not None]
    changed = [(uuid, first, None if one[0] is None else PlacedRow(*one[:6])) for uuid, first, *one in found]
    if found and not rows[0][_STATE_COLUMNS]:
        return HostLook(state, changed, None)
    placements = {uuid: _placement((*one[:4], *one[6:])) for uuid, _first, *one in found if one[0] is not None}
    return HostLook(state, changed, placements)


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


def list_mine(session: Session, host: str) -> list[PlacedRow]:
    """Return all instances of a host."""
    return [PlacedRow(*row) for row in session.ask(_MINE, (host,))]


def list_changed(session: Session, host: str, revision: int) -> list[tuple[str, int, PlacedRow | None]]:
    """Return what changed after a revision: UUID, the first revision that changed it, and the instance, in that order.

    None: it is not this host's any more.
    """
    rows = session.ask(_CHANGED, {"host": host, "revision": revision})
    return [(uuid, first, None if one[0] is None else PlacedRow(*one)) for uuid, first, *one in rows]


def read_placements(session: Session, listed: Iterable[PlacedRow]) -> Iterator[Placement]:
    """Yield instances with all that they have, in order."""
    chunk: list[str] = []
    size = 0
    for one in listed:
        if chunk and size + one.size > _CHUNK_BYTES:
            yield from _read(session, chunk)
            chunk, size = [], 0
        chunk.append(one.uuid)
        size += one.size
    if chunk:
        yield from _read(session, chunk)


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
    session.ask("SET LOCAL synchronous_commit TO DEFAULT")
    done = bool(session.ask(_RELEASE, (uuid, epoch))[0][0])
    session.ask("COMMIT")
    return done


def _read(session: Session, uuids: list[str]) -> Iterator[Placement]:
    rows = {row[0]: row for row in session.ask(_INSTANCES, (uuids,))}
    for uuid in uuids:
        if uuid in rows:
            yield _placement(rows[uuid])


def _placement(row: tuple[Any, ...]) -> Placement:
    """A placement from its UUID, project, name, epoch, type, cloud-init id, configuration and devices."""
    uuid, project, name, epoch, kind, cloud_init_id, values, definitions = row
    config: dict[str, str] = {}
    devices: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for key, value in (values or {}).items():
        try:
            config[key] = bytes.fromhex(value).decode()
        except UnicodeDecodeError:
            problems.append(f"the value of {key[:40]!r} is not valid UTF-8, so it is left out")
    for device, definition in (definitions or {}).items():
        if _is_device(definition):
            devices[device] = definition
        else:
            problems.append(f"device {device[:40]!r} is not an object of texts, so it is left out")
    observed = Observed(
        uuid,
        project,
        name,
        kind,
        config=config,
        devices=devices,
        uuid=uuid,
        cloud_init_id=cloud_init_id,
        problems=tuple(problems),
    )
    return Placement(observed, epoch)


def _is_device(definition: Any) -> bool:
    return isinstance(definition, dict) and all(isinstance(value, str) for value in definition.values())
