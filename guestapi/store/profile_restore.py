"""Profiles out of a backup: those of the store become those of the backup, with all instances that have them.

A profile that differs is not changed, but put in the place of the other, so that each instance changes once: from what
it had to what it is to have.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from guestapi.model import DAEMONS, Profile
from guestapi.names import MOST_ENTRIES, count_entries
from guestapi.store import profiles, steps
from guestapi.store.lookup import Moment, get_instance
from guestapi.store.rows import load_layers
from guestapi.store.transaction import Change

#: Stands before the name of a profile that is about to go: no name begins so.
_PARKED = "\0"
#: The most instances that are looked at together.
_BATCH = 100


@dataclass(frozen=True, slots=True)
class SavedProfiles:
    """The profiles of a backup.

    Attributes:
        all: with the ids of the backup.
        with_template: ids of those that ``hooks.template`` was taken over into.
    """

    all: tuple[Profile, ...]
    with_template: frozenset[int]


@dataclass(slots=True)
class ProfileExchange:
    """What a restore does with profiles.

    Attributes:
        by_saved: the profiles of the store by the ids that they have in the backup.
        replaced: those that are about to go, each with the one that takes its place.
        others: those that the backup does not have.
    """

    by_saved: dict[int, Profile] = field(default_factory=dict)
    replaced: list[tuple[Profile, Profile]] = field(default_factory=list)
    others: list[Profile] = field(default_factory=list)


def read_saved(store: Moment) -> SavedProfiles:
    """All profiles of a backup."""
    found = tuple(profile for profile, _users in profiles.list_profiles(store))
    return SavedProfiles(found, frozenset(one.id for one in found if profiles.has_template(store, one)))


def begin(change: Change, saved: SavedProfiles) -> ProfileExchange:
    """Make the profiles of a backup, beside those that differ from them.

    Args:
        change: the transaction.
        saved: the backup's.
    """
    exchange = ProfileExchange()
    present = {(one.project, one.name): one for one, _users in profiles.list_profiles(change)}
    for one in saved.all:
        found = present.pop((one.project, one.name), None)
        if found is not None and replace(found, id=one.id) == one:
            exchange.by_saved[one.id] = found
        else:
            marked = one.id in saved.with_template
            if found is not None:
                marked = marked or profiles.has_template(change, found)
                profiles.park(change, found, f"{_PARKED}{found.id}")
            made = profiles.create(
                change,
                one.project,
                one.name,
                description=one.description,
                config=one.config,
                devices=one.devices,
                # A store from a time without this bound may have had more.
                entries=max(MOST_ENTRIES, count_entries(one.config, one.devices)),
            )
            if marked:
                profiles.mark_template(change, made)
            exchange.by_saved[one.id] = made
            if found is not None:
                exchange.replaced.append((found, made))
    exchange.others = list(present.values())
    return exchange


def finish(change: Change, exchange: ProfileExchange) -> None:
    """Give the instances that the backup does not know its profiles, too, and remove those that no instance has."""
    for old, new in exchange.replaced:
        while users := profiles.list_users(change, old, _BATCH):
            for project, name in users:
                instance = get_instance(change, project, name)
                before = load_layers(change.connection, instance.id)
                after = replace(before, profiles=tuple(new if one.id == old.id else one for one in before.profiles))
                # The cloud-init id of a daemon's instance is the daemon's.
                columns = {"cloud_init_id": instance.cloud_init_id} if instance.source in DAEMONS else {}
                steps.write(change, instance, steps.Wanted(before, after, instance.init, columns))
        profiles.discard(change, old)
    for other in exchange.others:
        if not profiles.list_users(change, other, 1):
            profiles.discard(change, other)
