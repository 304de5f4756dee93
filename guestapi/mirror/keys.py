"""Keys of a daemon's instances, unique even if two instances have the same UUID. Pure.

Two instances of a daemon may have one UUID: a backup that is imported beside its original keeps it. An instance keeps
its key for as long as it exists. The key of the second instance is made of the UUID and its name, and stays even if the
other instance is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from uuid import UUID, uuid5

from guestapi.model import Instance
from guestapi.sources.observed import Observed

#: Project and name.
Place = tuple[str, str]


def choose_keys(wanted: Iterable[tuple[Place, str]], known: Mapping[str, Place]) -> dict[Place, str]:
    """Return the key of each instance of a daemon.

    Args:
        wanted: project and name of every instance, and its UUID.
        known: project and name that the store has, by key.
    """
    chosen: dict[Place, str] = {}
    sharing: dict[str, list[Place]] = {}
    for place, identity in wanted:
        if own_key(place, identity) in known:
            chosen[place] = own_key(place, identity)
        else:
            sharing.setdefault(identity, []).append(place)
    for identity, places in sharing.items():
        # The instance that has the key keeps it.
        first = known[identity] if known.get(identity) in places else min(places)
        for place in places:
            chosen[place] = identity if place == first else own_key(place, identity)
    return chosen


def choose_key(place: Place, identity: str, known: Mapping[str, Place], has: Callable[[Place, str], bool]) -> str:
    """Return the key of one instance.

    Args:
        place: its project and name.
        identity: its UUID.
        known: project and name that the store has, by key.
        has: whether the daemon has an instance of that project, name and UUID.
    """
    if own_key(place, identity) in known:
        return own_key(place, identity)
    holder = known.get(identity)
    return own_key(place, identity) if holder not in (None, place) and has(holder, identity) else identity


def own_key(place: Place, identity: str) -> str:
    """Return the key of the second instance with a UUID."""
    return str(uuid5(UUID(identity), "/".join(place)))


def with_key(observed: Observed, key: str) -> Observed:
    """Return the observation with this key, which is also its UUID."""
    if key == observed.key:
        return observed
    return replace(observed, key=key, uuid=key)


def by_key(instances: Collection[Instance]) -> dict[str, Place]:
    """Return project and name of instances by key."""
    return {one.key: (one.project, one.name) for one in instances if one.key is not None}
