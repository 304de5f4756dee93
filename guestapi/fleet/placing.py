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
from guestapi.fleet.inventory import PlacedProfile, Placement
from guestapi.model import DAEMONS, Instance, Problem, Profile
from guestapi.names import MOST_ENTRIES, check_uuid, count_entries, size_of
from guestapi.sources.observed import Observed
from guestapi.sources.sanitize import FLEET, sanitize
from guestapi.store import placed_profiles, profiles, statuses, steps
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
#: What a store raises for what it cannot take.
_NOT_TAKEN = (OperatorError, sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError)


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
        tuple(profile.uuid for profile in layers.profiles),
    ) == (
        observed.project,
        observed.name,
        observed.type,
        observed.key,
        observed.cloud_init_id,
        Layer({key: value for key, value in observed.config.items() if value}, observed.devices or {}),
        one.profiles,
    )


def is_same_profile(store: Moment, one: PlacedProfile) -> bool:
    """Whether the store has a profile as it is, so that `write_profile` would change nothing."""
    found = placed_profiles.find(store, one.uuid)
    return (
        found is not None
        and not one.problems
        and (found.project, found.name, found.description, found.config, found.devices)
        == (
            one.project,
            one.name,
            one.description,
            {key: value for key, value in one.config.items() if value},
            one.devices,
        )
    )


def write_profile(change: Change, one: PlacedProfile) -> None:
    """Write a profile as it is in the fleet's database; of one that cannot be taken, nothing is given to instances."""
    observed = Observed(one.uuid, one.project, one.name, config=one.config, devices=one.devices, problems=one.problems)
    try:
        with savepoint(change):
            acceptable = sanitize(FLEET, observed, change.configuration_bytes - len(one.description.encode()))
            placed_profiles.put(
                change,
                one.uuid,
                one.project,
                one.name,
                description=one.description,
                config=acceptable.config,
                devices=acceptable.devices or {},
            )
            problems = [_problem(observed, f"profile: {reason}") for reason in acceptable.left_out]
    except _NOT_TAKEN as error:
        problems = [_refusal(observed, error, "the profile is empty here")]
        if (found := placed_profiles.find(change, one.uuid)) is not None:
            profiles.edit(change, found, description="", config={}, devices={})
    _record(change, one.uuid, problems)


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
            _record(change, one.observed.key, problems)


def _settle(change: Change, one: Placement, placed: Placed | None) -> list[Problem]:
    """Write one placement as a whole or not at all."""
    observed = one.observed
    try:
        with savepoint(change):
            left_out = _write(change, one, placed)
            return [_problem(observed, reason) for reason in left_out]
    except _NOT_TAKEN as error:
        if placed is not None:
            own = steps.reload(change, placed.id)
            if own.name.startswith(_PARKED):
                steps.park(change, own, f"{placed.name[:200]}.{own.id}")
            steps.remove(change, steps.reload(change, own.id))
        return [_refusal(observed, error, "it is not here")]


def _write(change: Change, one: Placement, placed: Placed | None) -> tuple[str, ...]:
    observed = one.observed
    own = steps.reload(change, placed.id) if placed is not None else _find_unplaced(change, observed)
    own = _take_name(change, observed, own)
    before = load_layers(change.connection, own.id) if own is not None else Layers()
    applied, missing = _find_profiles(change, one.profiles)
    others = Layers(before.source, profiles=applied)
    room = change.configuration_bytes - size_of(others.config, others.devices)
    places = MOST_ENTRIES - count_entries(others.config, others.devices)
    acceptable = sanitize(FLEET, observed, max(room, 0), entries=max(places, 0), amending=others.devices)
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
            profiles=applied,
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
        after = Layers(before.source, layer, applied)
        own = steps.write(change, own, steps.Wanted(before, after, own.init, columns))
    place(change, own, one.epoch)
    return (*acceptable.left_out, *missing)


def _find_profiles(change: Change, uuids: Iterable[str]) -> tuple[tuple[Profile, ...], list[str]]:
    """The profiles of a placement, and a sentence for each that is not here."""
    found = [(uuid, placed_profiles.find(change, uuid)) for uuid in uuids]
    missing = [f"its profile {uuid} is not here" for uuid, profile in found if profile is None]
    return tuple(profile for _uuid, profile in found if profile is not None), missing


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


def _record(change: Change, key: str, problems: list[Problem]) -> None:
    for problem in statuses.record_problems(change, FLEET, key, problems):
        log.warning("%s in project %s: %s", problem.name, problem.project, problem.reason)


def _refusal(observed: Observed, error: Exception, what: str) -> Problem:
    reason = error.message if isinstance(error, OperatorError) else f"the store refuses it ({error})"
    hint = error.hint if isinstance(error, OperatorError) else None
    return replace(_problem(observed, f"{what}: {reason}"), hint=hint, refused=True)


def _problem(observed: Observed, reason: str) -> Problem:
    return Problem(FLEET, observed.key, observed.project, observed.name, reason[:_REASON])
