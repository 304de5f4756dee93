"""Makes the store equal to what a fleet has placed on this host: writes differences, with the rules of `reconcile`.

Rules: the fleet's configuration takes the place of the operator's layer; a runtime provides the init and its own layer,
and is bound by the name. An instance of a daemon is the daemon's. A placement that cannot be taken is a `Problem`, and
what the store had of it is removed: old data is not served.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Collection, Iterable
from dataclasses import replace

from guestapi.errors import OperatorError
from guestapi.fleet.inventory import Placement
from guestapi.model import DAEMONS, Instance, Problem
from guestapi.names import check_uuid, size_of
from guestapi.sources.observed import Observed
from guestapi.sources.sanitize import FLEET, sanitize
from guestapi.store import profiles, statuses, steps
from guestapi.store.layers import Layer, Layers
from guestapi.store.lookup import Moment, find_instance
from guestapi.store.placements import Placed, list_placed, place
from guestapi.store.rows import load, load_layers
from guestapi.store.transaction import Change, savepoint

log = logging.getLogger(__name__)

#: Begins the temporary name of an instance whose name another one gets in the same transaction. No name has a NUL.
_PARKED = "\0"
#: Most characters of a reason that are recorded.
_REASON = 500


class _RefusedError(OperatorError):
    """A placement cannot be taken."""


def is_same(store: Moment, one: Placement, placed: Placed | None) -> bool:
    """Whether the store has a placement as it is, so that `write_placements` would change nothing."""
    observed = one.observed
    if placed is None or placed.epoch != one.epoch or observed.problems:
        return False
    instance = load(store.connection, placed.id)
    if instance is None:
        return False
    layers = load_layers(store.connection, placed.id)
    return (
        instance.project,
        instance.name,
        instance.type,
        instance.uuid,
        instance.cloud_init_id,
        layers.operator,
        layers.profiles,
    ) == (
        observed.project,
        observed.name,
        observed.type,
        observed.key,
        observed.cloud_init_id,
        Layer({key: value for key, value in observed.config.items() if value}, observed.devices or {}),
        (),
    )


def write_placements(change: Change, placements: Iterable[Placement], gone: Collection[str]) -> None:
    """Write placements as they are in the fleet's database.

    Args:
        change: the transaction.
        placements: those that differ, or may; all whose names change must be among them.
        gone: UUIDs of instances that are not placed here any more.
    """
    placed = list_placed(change)
    troubled = statuses.list_problem_keys(change, FLEET)
    for uuid in gone:
        if (found := placed.get(uuid)) is not None:
            steps.remove(change, steps.reload(change, found.id))
        if uuid in troubled:
            statuses.record_problems(change, FLEET, uuid, [])
    wanted = list(placements)
    for one in wanted:
        own = placed.get(one.observed.key)
        if own is not None and (own.project, own.name) != (one.observed.project, one.observed.name):
            steps.park(change, steps.reload(change, own.id), f"{_PARKED}{own.id}")
    for one in wanted:
        problems = _settle(change, one, placed.get(one.observed.key))
        if problems or one.observed.key in troubled:
            for problem in statuses.record_problems(change, FLEET, one.observed.key, problems):
                log.warning("%s in project %s: %s", problem.name, problem.project, problem.reason)


def _settle(change: Change, one: Placement, placed: Placed | None) -> list[Problem]:
    """Write one placement as a whole or not at all."""
    observed = one.observed
    try:
        with savepoint(change):
            left_out = _write(change, one, placed)
            return [_problem(observed, reason) for reason in left_out]
    except (OperatorError, sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError) as error:
        if placed is not None:
            own = steps.reload(change, placed.id)
            if own.name.startswith(_PARKED):
                steps.park(change, own, f"{placed.name[:200]}.{own.id}")
            steps.remove(change, steps.reload(change, own.id))
        reason = error.message if isinstance(error, OperatorError) else f"the store refuses it ({error})"
        hint = error.hint if isinstance(error, OperatorError) else None
        return [replace(_problem(observed, f"it is not here: {reason}"), hint=hint, refused=True)]


def _write(change: Change, one: Placement, placed: Placed | None) -> tuple[str, ...]:
    observed = one.observed
    own = steps.reload(change, placed.id) if placed is not None else _find_unplaced(change, observed)
    own = _take_name(change, observed, own)
    before = load_layers(change.connection, own.id) if own is not None else Layers()
    room = change.configuration_bytes - size_of(before.source.config, before.source.devices)
    acceptable = sanitize(FLEET, observed, max(room, 0))
    layer = Layer(acceptable.config, acceptable.devices or {})
    if own is None:
        own = steps.add(
            change,
            observed.project,
            observed.name,
            type=observed.type or "container",
            instance_uuid=observed.uuid,
            cloud_init_id=observed.cloud_init_id,
            config=layer.config,
            devices=layer.devices,
            checked=True,
        )
    else:
        columns: dict[str, object] = {
            "project": observed.project,
            "name": steps.check_name(observed.project, observed.name),
            "type": observed.type,
            "uuid": check_uuid(observed.key),
            "cloud_init_id": observed.cloud_init_id,
            "kept": True,
            "location": None,
        }
        after = Layers(before.source, layer)
        own = steps.write(change, own, steps.Wanted(before, after, own.init, columns))
    place(change, own, one.epoch)
    return acceptable.left_out


def _find_unplaced(change: Change, observed: Observed) -> Instance | None:
    """This host's own instance with the UUID of a placement: it has joined the fleet."""
    number = steps.find_by_uuid(change, check_uuid(observed.key))
    found = None if number is None else load(change.connection, number)
    if found is not None and found.source in DAEMONS:
        raise _RefusedError(f"its UUID is that of instance {found.name!r} of {found.source}")
    return found


def _take_name(change: Change, observed: Observed, own: Instance | None) -> Instance | None:
    """Make sure that the placement can have its name; the instance that it is written to."""
    if own is not None and (own.project, own.name) == (observed.project, observed.name):
        return own
    if own is not None and own.source is not None:
        # A container is bound by its name. It is registered anew, as another instance.
        own = steps.unbind(change, own)
    holder = find_instance(change, observed.project, observed.name)
    if holder is None or (own is not None and holder.id == own.id):
        return own
    if holder.source is None or holder.source in DAEMONS or not _is_empty(change, holder):
        owner = f"of {holder.source}" if holder.source is not None else "of this host"
        raise _RefusedError(
            f"its name belongs to instance {holder.name!r}, {owner}",
            f"'guestapi instance remove {holder.name}' makes room for it",
        )
    # The container of that name was there before the placement.
    if own is not None:
        steps.remove(change, own)
    return holder


def _is_empty(change: Change, instance: Instance) -> bool:
    """Whether an instance has no settings of this host's operator."""
    if instance.kept or instance.profiles not in ((), (profiles.DEFAULT,)):
        return False
    return not load_layers(change.connection, instance.id).operator


def _problem(observed: Observed, reason: str) -> Problem:
    return Problem(FLEET, observed.key, observed.project, observed.name, reason[:_REASON])
