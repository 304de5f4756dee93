"""How a host's own instances come into a fleet, and back: ``guestapi fleet join`` and ``leave``.

Rules: both can be repeated at any point. An instance keeps its UUID, its cloud-init id and what its guest reads. What a
host has imported is its own until its follower takes it over by the UUID.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from guestapi.fleet import plan, sharing
from guestapi.fleet.engine import commit
from guestapi.fleet.follower import BATCH
from guestapi.fleet.inventory import PlacedProfile, Placement
from guestapi.fleet.placing import write_placements, write_profile
from guestapi.fleet.plan import FleetInstance, Plan
from guestapi.fleet.setup import FleetMisuseError
from guestapi.fleet.sharing import FleetProfile
from guestapi.model import DAEMONS, Instance
from guestapi.sources.observed import Observed
from guestapi.store import placements
from guestapi.store.errors import ConflictError
from guestapi.store.layers import Layers
from guestapi.store.lookup import Moment, get_layers, is_placed, list_instances
from guestapi.store.writing import Writer

if TYPE_CHECKING:
    import psycopg

_FENCE = "UPDATE guestapi.hosts SET state = 'fenced' WHERE name = %s"
#: The most names in an error.
_MOST_NAMES = 20


def import_instances(connection: psycopg.Connection[Any], store: Moment, host: str) -> int:
    """Add this host's own instances to the fleet, all in one transaction; return how many were not there yet.

    Args:
        connection: by the role of an operator.
        store: this host's.
        host: the name of this host.

    Raises:
        ConflictError: names or UUIDs are taken; nothing was changed.
    """
    wanted = [
        _as_placed(one, get_layers(store, one), host)
        for one in list_instances(store)
        if one.source not in DAEMONS and not is_placed(store, one)
    ]
    connection.execute("BEGIN")
    plan.refuse_fenced(plan.lock_hosts(connection, [host]), [host])
    there = {(one.project, one.name): one for one in plan.read(connection, [(one.project, one.name) for one in wanted])}
    taken = [one for one in wanted if (found := there.get((one.project, one.name))) and found.uuid != one.uuid]
    if taken:
        names = ", ".join(f"{one.name} (project {one.project})" for one in taken[:_MOST_NAMES])
        more = f" and {len(taken) - _MOST_NAMES} more" if len(taken) > _MOST_NAMES else ""
        raise ConflictError(
            f"the fleet has other instances of these names: {names}{more}; nothing was changed",
            "rename them here or there",
        )
    added = [one for one in wanted if (one.project, one.name) not in there]
    if added:
        plan.write(connection, Plan(added=added), uuid4())
    commit(connection)
    return len(added)


def leave(connection: psycopg.Connection[Any], writer: Writer, host: str) -> int:
    """Take this host out of the fleet: its instances become its own. Return how many there are.

    First the host is fenced, so that its follower changes nothing any more. Then its store gets what the database has,
    and only after that the instances are removed there.

    Args:
        connection: by the role of an operator.
        writer: this host's store.
        host: the name of this host.

    Raises:
        FleetMisuseError: instances are to go to another host.
        ConflictError: an operator has changed something meanwhile.
    """
    connection.execute("BEGIN")
    plan.lock_hosts(connection, [host])
    found = plan.read_all(connection, None, host, whole=True)
    shared = sharing.read(connection, (), {uuid for one in found for uuid in one.profiles})
    leaving = [one.name for one in found if one.next_host is not None]
    if leaving:
        raise FleetMisuseError(
            f"instances are to go to another host: {', '.join(leaving[:_MOST_NAMES])}",
            f"wait until they are there, or call it off by 'guestapi --fleet instance move {leaving[0]} --to {host}'",
        )
    connection.execute(_FENCE, (host,))
    commit(connection)
    _take_home(writer, found, shared)
    connection.execute("BEGIN")
    plan.lock_hosts(connection, [host])
    # What an operator has changed after the first look is not lost: it is taken home by the next call.
    there = {one.uuid: one.revision for one in plan.read_all(connection, None, host, whole=False)}
    now = sharing.read(connection, (), [one.uuid for one in shared])
    if there != {one.uuid: one.revision for one in found} or now != shared:
        raise ConflictError("the fleet has changed instances of this host meanwhile", "call this again")
    plan.write(connection, Plan(removed=found), uuid4())
    commit(connection)
    return len(found)


def _take_home(writer: Writer, found: list[FleetInstance], shared: list[FleetProfile]) -> None:
    """Make the store as the database is, then have its instances and profiles be this host's own."""
    for profile in shared:
        with writer.change() as change:
            write_profile(change, _as_placed_profile(profile))
    with writer.change() as change:
        placed = placements.list_placed(change)
        gone = placed.keys() - {one.uuid for one in found}
        write_placements(change, [], sorted(gone))
    # Names may have been exchanged: those that differ come together.
    renamed = [one for one in found if one.uuid in placed and placed[one.uuid][2:] != (one.project, one.name)]
    rest = [one for one in found if one not in renamed]
    batches = [renamed, *(rest[start : start + BATCH] for start in range(0, len(rest), BATCH))]
    for batch in batches:
        with writer.change() as change:
            write_placements(change, [_as_placement(one) for one in batch], ())
    with writer.change() as change:
        placements.forget_fleet(change)


def _as_placed_profile(one: FleetProfile) -> PlacedProfile:
    return PlacedProfile(one.uuid, one.project, one.name, one.description, one.config, one.devices)


def _as_placement(one: FleetInstance) -> Placement:
    observed = Observed(
        one.uuid,
        one.project,
        one.name,
        one.type,
        config=one.config,
        devices=one.devices,
        uuid=one.uuid,
        cloud_init_id=one.cloud_init_id,
    )
    return Placement(observed, one.epoch, one.profiles)


def _as_placed(instance: Instance, layers: Layers, host: str) -> FleetInstance:
    """This host's instance as one of the fleet: what its profiles gave it becomes its own."""
    if instance.source is None:
        config, devices = layers.config, layers.devices
    else:
        # What its runtime provides stays the runtime's.
        below = Layers(profiles=layers.profiles)
        config = {key: value for key, value in below.config.items() if key not in layers.source.config}
        devices = {name: one for name, one in below.devices.items() if name not in layers.source.devices}
        config, devices = {**config, **layers.operator.config}, {**devices, **layers.operator.devices}
    return FleetInstance(
        instance.uuid,
        instance.project,
        instance.name,
        instance.type,
        instance.cloud_init_id,
        host,
        config=config,
        devices=devices,
    )
