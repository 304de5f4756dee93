"""How instances are read from the fleet's database, and what differs is written to it, by the role of an operator.

Rules: the rows of all hosts concerned are locked first, in the order of their names, so that two changes never wait for
each other; a host's revision is raised once for a change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import UUID

from guestapi.errors import OperatorError
from guestapi.fleet import sharing
from guestapi.fleet.setup import FleetMisuseError
from guestapi.fleet.sharing import FleetProfile, SharedPlan
from guestapi.fleet.statements import as_devices, as_places, as_texts, is_storable, write_rows
from guestapi.model import Device, Instance, InstanceType
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import get_layers
from guestapi.store.scratch import UNCHANGED, list_revisions
from guestapi.store.steps import reload
from guestapi.store.transaction import Change

if TYPE_CHECKING:
    import psycopg

_COLUMNS = (
    "instances.uuid::text, project, name, type, cloud_init_id::text, instances.host, instances.epoch, "
    "next_host, instances.revision, running, ready"
)
#: What an instance has, as objects: a row for each key would take several times as long to read.
_CONTENT = (
    "(SELECT json_object_agg(key, encode(value, 'hex')) FROM guestapi.config WHERE config.uuid = instances.uuid), "
    "(SELECT json_object_agg(devices.name, definition) FROM guestapi.devices WHERE devices.uuid = instances.uuid), "
    "(SELECT array_agg(profile::text ORDER BY position) FROM guestapi.instance_profiles "
    "WHERE instance_profiles.uuid = instances.uuid)"
)
_FROM = (
    "FROM guestapi.instances LEFT JOIN guestapi.said ON said.uuid = instances.uuid AND said.epoch = instances.epoch "
)
_INSTANCES = f"SELECT {_COLUMNS} {_FROM}"
_WHOLE_INSTANCES = f"SELECT {_COLUMNS}, {_CONTENT} {_FROM}"
_AT_PLACES = "WHERE (project, name) IN (SELECT * FROM unnest(%(projects)s::text[], %(names)s::text[])) "
_HOSTS = f"SELECT DISTINCT host FROM guestapi.instances {_AT_PLACES}"
_OF_PLACES = f"{_AT_PLACES} ORDER BY project, name"
_ALL = (
    "WHERE (%(project)s::text IS NULL OR project = %(project)s) "
    "AND (%(host)s::text IS NULL OR instances.host = %(host)s) ORDER BY project, name"
)
_HOST = "SELECT 1 FROM guestapi.hosts WHERE name = %s"
_PROJECTS = "SELECT project, count(*) FROM guestapi.instances GROUP BY project"
# What hosts say meanwhile refers to these rows, and must not wait: a large change takes minutes.
_LOCK = "SELECT name, state FROM guestapi.hosts WHERE name = ANY(%s) ORDER BY name FOR NO KEY UPDATE"
_OP = "SELECT result FROM guestapi.ops WHERE op = %s"
_NOTE_OP = "INSERT INTO guestapi.ops (op, result) VALUES (%s, %s)"
#: Operations that nobody asks for again any more.
_TRIM_OPS = "DELETE FROM guestapi.ops WHERE at < now() - interval '7 days'"
_REMOVE = "DELETE FROM guestapi.instances WHERE uuid = ANY(%s::uuid[])"
# One statement for many rows, which come as an array for each column.
_ADD = (
    "INSERT INTO guestapi.instances (uuid, project, name, type, cloud_init_id, host, revision) "
    "SELECT * FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::uuid[], %s::text[], %s::bigint[])"
)
_UPDATE = (
    "UPDATE guestapi.instances SET type = new.type, cloud_init_id = new.cloud_init_id, revision = new.revision "
    "FROM unnest(%s::uuid[], %s::text[], %s::uuid[], %s::bigint[]) AS new (uuid, type, cloud_init_id, revision) "
    "WHERE instances.uuid = new.uuid"
)
_RENAME = "UPDATE guestapi.instances SET project = %s, name = %s WHERE uuid = %s"
_REMOVE_CONFIG = (
    "DELETE FROM guestapi.config USING unnest(%s::uuid[], %s::text[]) AS gone (uuid, key) "
    "WHERE config.uuid = gone.uuid AND config.key = gone.key"
)
_ADD_CONFIG = (
    "INSERT INTO guestapi.config (uuid, key, value) SELECT * FROM unnest(%s::uuid[], %s::text[], %s::bytea[]) "
    "ON CONFLICT (uuid, key) DO UPDATE SET value = excluded.value"
)
_REMOVE_DEVICES = (
    "DELETE FROM guestapi.devices USING unnest(%s::uuid[], %s::text[]) AS gone (uuid, name) "
    "WHERE devices.uuid = gone.uuid AND devices.name = gone.name"
)
_ADD_DEVICES = (
    "INSERT INTO guestapi.devices (uuid, name, definition) SELECT * FROM unnest(%s::uuid[], %s::text[], %s::json[]) "
    "ON CONFLICT (uuid, name) DO UPDATE SET definition = excluded.definition"
)
_REMOVE_PROFILES = "DELETE FROM guestapi.instance_profiles WHERE uuid = ANY(%s::uuid[])"
_ADD_PROFILES = (
    "INSERT INTO guestapi.instance_profiles (uuid, position, profile) "
    "SELECT * FROM unnest(%s::uuid[], %s::integer[], %s::uuid[])"
)
#: Raises the revision of each host once.
_NOTE = (
    "SELECT host, guestapi.note(host, array_agg(uuid)) FROM unnest(%s::text[], %s::uuid[]) AS changed (host, uuid) "
    "GROUP BY host ORDER BY host"
)
#: Instances that are written by the same statements.
_PART = 1_000

#: Called with how much there is to do, before it is done; what it returns is called with how much more is done.
Writing = Callable[[int], Callable[[int], None]]
_Row = TypeVar("_Row")
_BEHIND = (
    "SELECT name, extract(epoch FROM clock_timestamp() - contact)::float8 FROM guestapi.hosts "
    "LEFT JOIN guestapi.seen ON seen.host = name "
    "JOIN unnest(%s::text[], %s::bigint[]) AS wanted (wanted_name, wanted_revision) ON wanted_name = name "
    "WHERE coalesce(applied, -1) < wanted_revision ORDER BY name"
)
#: How often the hosts of instances are looked up anew because one has gone to another host meanwhile.
_TRIES = 10


@dataclass(frozen=True, slots=True)
class FleetInstance:
    """An instance as the fleet's database has it.

    Attributes:
        host: where it is.
        epoch: grows when it goes to another host.
        next_host: where it is to go.
        revision: of its host, with its last change.
        running: what its host says of it; None: nothing.
        ready: as `running`.
        config: its own configuration.
        devices: its own devices.
        profiles: the UUIDs of its profiles, the weakest first.
    """

    uuid: str
    project: str
    name: str
    type: InstanceType
    cloud_init_id: str
    host: str
    epoch: int = 0
    next_host: str | None = None
    revision: int = 0
    running: bool | None = None
    ready: bool | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, Device] = field(default_factory=dict)
    profiles: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """``running``, ``stopped``, or ``unknown`` if its host has said nothing of it."""
        return "unknown" if self.running is None else "running" if self.running else "stopped"


class Result(NamedTuple):
    """The revision of each host that a change concerns."""

    revisions: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written.

    Attributes:
        removed: instances that are no more.
        added: new ones.
        changed: before and afterwards.
        shared: what is to be written of profiles.
    """

    removed: list[FleetInstance] = field(default_factory=list)
    added: list[FleetInstance] = field(default_factory=list)
    changed: list[tuple[FleetInstance, FleetInstance]] = field(default_factory=list)
    shared: SharedPlan = field(default_factory=SharedPlan)

    @property
    def concerned(self) -> list[tuple[str, str]]:
        """Hosts, and the UUIDs of what changes there."""
        instances = (*self.removed, *self.added, *(after for _, after in self.changed))
        return [*((one.host, one.uuid) for one in instances), *self.shared.users]

    @property
    def hosts(self) -> list[str]:
        """The hosts concerned, by name."""
        return sorted({host for host, _uuid in self.concerned})


def read(connection: psycopg.Connection[Any], places: Iterable[tuple[str, str]]) -> list[FleetInstance]:
    """Read instances by project and name; those that are not there are left out."""
    return _read_whole(connection, _OF_PLACES, as_places(places))


def read_facts(connection: psycopg.Connection[Any], places: Iterable[tuple[str, str]]) -> list[FleetInstance]:
    """Read instances as `read`, without their configuration and devices."""
    return [FleetInstance(*row) for row in connection.execute((_INSTANCES + _OF_PLACES).encode(), as_places(places))]


def list_projects(connection: psycopg.Connection[Any]) -> dict[str, int]:
    """Return the projects, and how many instances each has; ``default`` is always there."""
    found: dict[str, int] = dict(connection.execute(_PROJECTS).fetchall())
    return dict(sorted({"default": 0, **found}.items()))


def check_host(connection: psycopg.Connection[Any], name: str) -> None:
    """Make sure that there is a host of that name.

    Raises:
        FleetMisuseError: there is none.
    """
    if not is_storable(name) or connection.execute(_HOST, (name,)).fetchone() is None:
        raise _unknown_host(name)


def read_whole(connection: psycopg.Connection[Any], uuids: Sequence[str]) -> list[FleetInstance]:
    """Read instances by UUID; those that are not there are left out."""
    return _read_whole(connection, "WHERE instances.uuid = ANY(%(uuids)s::uuid[])", {"uuids": list(uuids)})


def read_one(connection: psycopg.Connection[Any], uuid: str) -> FleetInstance | None:
    """Read an instance without its configuration and devices; None: there is none."""
    row = connection.execute((_INSTANCES + "WHERE instances.uuid = %s").encode(), (uuid,)).fetchone()
    return None if row is None else FleetInstance(*row)


def read_all(
    connection: psycopg.Connection[Any], project: str | None, host: str | None, *, whole: bool
) -> list[FleetInstance]:
    """Read all instances of a project and of a host; None: of all. Not `whole`: without configuration and devices."""
    parameters = {"project": project, "host": host}
    if whole:
        return _read_whole(connection, _ALL, parameters)
    return [FleetInstance(*row) for row in connection.execute((_INSTANCES + _ALL).encode(), parameters)]


def as_instance(number: int, one: FleetInstance) -> Instance:
    """The noun of this host's store that says the same, as far as it can."""
    return Instance(
        id=number,
        revision=one.revision,
        run=0,
        project=one.project,
        name=one.name,
        type=one.type,
        uuid=one.uuid,
        cloud_init_id=one.cloud_init_id,
        location=one.host,
        ready=bool(one.ready),
        init=None,
        config=one.config,
        devices=one.devices,
    )


def lock(
    connection: psycopg.Connection[Any],
    places: Sequence[tuple[str, str]],
    hosts: Collection[str],
    profiles: Sequence[tuple[str, str]] = (),
    given: Sequence[tuple[str, str]] = (),
) -> tuple[list[FleetInstance], dict[str, str]]:
    """Lock the hosts of instances, and others, and read the instances.

    Args:
        connection: in a transaction that has done nothing yet.
        places: projects and names of the instances.
        hosts: the others.
        profiles: projects and names of profiles that are to be changed. They are locked, and the hosts of all instances
            that have one.
        given: projects and names of profiles that instances are to get. They are locked against changes.

    Returns:
        The instances, and the states of all these hosts.

    Raises:
        FleetMisuseError: there is no such host.
    """
    states: dict[str, str] = {}
    for _try in range(_TRIES):
        wanted = {*hosts, *_find_hosts(connection, places), *sharing.find_hosts(connection, profiles)}
        if wanted:
            states = lock_hosts(connection, wanted)
        # After all hosts. Then all is looked up once more: an instance may have gone to another host or have got a
        # profile meanwhile, and a profile another name.
        is_held = sharing.lock(connection, profiles, given)
        if is_held and wanted.issuperset((*_find_hosts(connection, places), *sharing.find_hosts(connection, profiles))):
            return read(connection, places), states
        # In the order of names, so all anew.
        connection.execute("ROLLBACK")
        connection.execute("BEGIN")
    raise ConflictError("others change these all the time; nothing was changed", "call this again")


def _find_hosts(connection: psycopg.Connection[Any], places: Sequence[tuple[str, str]]) -> list[str]:
    if not places:
        return []
    return [host for (host,) in connection.execute(_HOSTS.encode(), as_places(places))]


def lock_hosts(connection: psycopg.Connection[Any], hosts: Iterable[str]) -> dict[str, str]:
    """Lock the rows of hosts, in the order of their names; their states.

    Raises:
        FleetMisuseError: one is not there.
    """
    wanted = sorted(set(hosts))
    states: dict[str, str] = dict(connection.execute(_LOCK, (list(filter(is_storable, wanted)),)).fetchall())
    for name in wanted:
        if name not in states:
            raise _unknown_host(name)
    return states


def _unknown_host(name: str) -> FleetMisuseError:
    return FleetMisuseError(f"there is no host {name[:80]!r}", "'guestapi fleet host list' shows all")


def refuse_fenced(states: Mapping[str, str], hosts: Iterable[str]) -> None:
    """Make sure that instances can be placed on these hosts.

    Raises:
        FleetMisuseError: one is fenced.
    """
    for name in hosts:
        if states[name] != "active":
            raise FleetMisuseError(f"host {name!r} is {states[name]}", f"'guestapi fleet host add {name}' lets it in")


def find_operation(connection: psycopg.Connection[Any], operation: UUID) -> Result | None:
    """Return what an operation has done that was carried out before."""
    row = connection.execute(_OP, (operation,)).fetchone()
    return None if row is None else Result(row[0])


def find_behind(connection: psycopg.Connection[Any], result: Result) -> list[tuple[str, float | None]]:
    """Return the hosts that have not applied a change, each with the seconds since its last contact."""
    names, revisions = list(result.revisions), list(result.revisions.values())
    return connection.execute(_BEHIND, (names, revisions)).fetchall()


def compare(
    change: Change, known: Mapping[int, FleetInstance], shared: Mapping[int, FleetProfile], host: str | None
) -> Plan:
    """Find out what a command has changed in memory.

    Args:
        change: the store in memory.
        known: the instances that it was made of, by id.
        shared: the profiles, by id.
        host: where instances are placed that name no host.

    Raises:
        OperatorError: the fleet cannot have that.
    """
    profiles, uuids = sharing.compare(change, shared)
    found = Plan(shared=profiles)
    present = set()
    for number, revision in list_revisions(change):
        present.add(number)
        if number in known and revision == UNCHANGED:
            continue
        instance = reload(change, number)
        before = known.get(instance.id)
        if before is None:
            where = choose_host(instance.name, None, instance.location or host)
        else:
            where = choose_host(instance.name, before.host, instance.location)
        layers = get_layers(change, instance)
        after = replace(
            before or FleetInstance(instance.uuid, "", "", instance.type, "", where),
            project=instance.project,
            name=instance.name,
            type=instance.type,
            cloud_init_id=instance.cloud_init_id,
            config=dict(layers.operator.config),
            devices=dict(layers.operator.devices),
            profiles=tuple(uuids[one.id] for one in layers.profiles),
        )
        if before is None:
            found.added.append(after)
        elif before != after:
            found.changed.append((before, after))
    found.removed.extend(one for number, one in known.items() if number not in present)
    return found


def choose_host(name: str, now: str | None, wanted: str | None) -> str:
    """Return the host that an instance is to be on after a change that moves nothing.

    Args:
        name: of the instance.
        now: where it is; None: it is added.
        wanted: where the operator wants it; None: nothing was said.

    Raises:
        OperatorError: it is on another host, or is added and nothing was said.
    """
    where = wanted or now
    if where is None:
        raise OperatorError(f"it is not said on which host {name!r} is to be", "--host says it")
    if now not in (None, where):
        raise OperatorError(
            f"instance {name!r} is on host {now}, not {where}",
            f"'guestapi --fleet instance move {name} --to {where}' moves it",
        )
    return where


def check_unchanged(connection: psycopg.Connection[Any], plan: Plan) -> None:
    """Make sure that instances are as they were when a plan was made.

    Raises:
        ConflictError: somebody else has changed one.
    """
    sharing.check_unchanged(connection, plan.shared)
    before = [*plan.removed, *(one for one, _ in plan.changed)]
    now = {one.uuid: one for one in read(connection, [(one.project, one.name) for one in before])}
    for one in before:
        if one.uuid not in now or (now[one.uuid].revision, now[one.uuid].host) != (one.revision, one.host):
            raise ConflictError(f"instance {one.name!r} was changed meanwhile; nothing was changed", "call this again")


def write(connection: psycopg.Connection[Any], plan: Plan, operation: UUID, writing: Writing | None = None) -> Result:
    """Write what differs, and the operation; the transaction is not committed yet.

    Args:
        connection: in the transaction that has locked the hosts.
        plan: what is to be written.
        operation: of the operator.
        writing: is told how many instances are added and changed, then how many more are written.

    Raises:
        psycopg.Error: the database refuses it.
    """
    concerned = plan.concerned
    found = connection.execute(_NOTE, ([host for host, _uuid in concerned], [uuid for _host, uuid in concerned]))
    revisions = dict(found.fetchall())
    # Before the instances that have them.
    sharing.write(connection, plan.shared)
    # First what is gone, then what gets another name: names are free then.
    if plan.removed:
        connection.execute(_REMOVE, ([one.uuid for one in plan.removed],))
    for before, after in plan.changed:
        if (before.project, before.name) != (after.project, after.name):
            # In this order, since one may get the name that another one had.
            connection.execute(_RENAME, (after.project, after.name, after.uuid))
    advance = (writing or _tell_nobody)(len(plan.changed) + len(plan.added))
    for some in _parts(plan.changed):
        _write_changed(connection, some, revisions)
        _write_content(connection, some)
        advance(len(some))
    nothing = FleetInstance("", "", "", "container", "", "")
    for added in _parts(plan.added):
        _write_added(connection, added, revisions)
        _write_content(connection, [(nothing, one) for one in added])
        advance(len(added))
    return note_operation(connection, operation, revisions)


def note_operation(connection: psycopg.Connection[Any], operation: UUID, revisions: Mapping[str, int]) -> Result:
    """Record that an operation was carried out, with the revision of each host that it concerns."""
    connection.execute(_TRIM_OPS)
    connection.execute(_NOTE_OP, (operation, json.dumps(revisions)))
    return Result(revisions)


def note(connection: psycopg.Connection[Any], host: str, uuids: Sequence[str]) -> int:
    """Raise the revision of a host for a change of these instances."""
    row = connection.execute("SELECT guestapi.note(%s, %s::uuid[])", (host, list(uuids))).fetchone()
    assert row is not None, "a function has a result"
    return int(row[0])


def _write_changed(
    connection: psycopg.Connection[Any],
    changed: Sequence[tuple[FleetInstance, FleetInstance]],
    revisions: Mapping[str, int],
) -> None:
    rows = ((one.uuid, one.type, one.cloud_init_id, revisions[one.host]) for _before, one in changed)
    write_rows(connection, _UPDATE, rows)
    for statement, part in ((_REMOVE_CONFIG, "config"), (_REMOVE_DEVICES, "devices")):
        gone = (
            (after.uuid, key)
            for before, after in changed
            for key in sorted(getattr(before, part).keys() - getattr(after, part).keys())
        )
        write_rows(connection, statement, gone)


def _write_added(
    connection: psycopg.Connection[Any], added: Sequence[FleetInstance], revisions: Mapping[str, int]
) -> None:
    rows = (
        (one.uuid, one.project, one.name, one.type, one.cloud_init_id, one.host, revisions[one.host]) for one in added
    )
    write_rows(connection, _ADD, rows)


def _write_content(connection: psycopg.Connection[Any], changed: Sequence[tuple[FleetInstance, FleetInstance]]) -> None:
    """Write configuration and devices that instances have got."""
    config = (
        (after.uuid, key, value.encode())
        for before, after in changed
        for key, value in after.config.items()
        if before.config.get(key) != value
    )
    write_rows(connection, _ADD_CONFIG, config)
    devices = (
        (after.uuid, name, json.dumps(device))
        for before, after in changed
        for name, device in after.devices.items()
        if before.devices.get(name) != device
    )
    write_rows(connection, _ADD_DEVICES, devices)
    applied = [after for before, after in changed if before.profiles != after.profiles]
    if applied:
        connection.execute(_REMOVE_PROFILES, ([one.uuid for one in applied],))
        rows = ((one.uuid, position, profile) for one in applied for position, profile in enumerate(one.profiles))
        write_rows(connection, _ADD_PROFILES, rows)


def _parts(rows: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
    for start in range(0, len(rows), _PART):
        yield rows[start : start + _PART]


def _tell_nobody(_total: int) -> Callable[[int], None]:
    return lambda _count: None


def _read_whole(
    connection: psycopg.Connection[Any], condition: str, parameters: Mapping[str, Any]
) -> list[FleetInstance]:
    """Read instances with their configuration and devices."""
    found = []
    for *facts, values, devices, applied in connection.execute((_WHOLE_INSTANCES + condition).encode(), parameters):
        one = FleetInstance(*facts)
        own = replace(one, config=as_texts(values), devices=as_devices(devices), profiles=tuple(applied or ()))
        found.append(own)
    return found
