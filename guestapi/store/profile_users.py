"""A change of a profile, brought to every instance that has it, in the transaction that changes the profile.

Rules: what a user gets is the same as if `steps.write` had changed it alone. But users are looked at by the hundred,
only the keys that change are read of them, and what is to be told is made once for all users in which the same layers
hide the same keys: 10,000 users take about a second, and no more memory than a hundred.
"""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from guestapi import names
from guestapi.model import DAEMONS, Device, Profile
from guestapi.store import changes
from guestapi.store.layer_rows import check_size
from guestapi.store.layers import OPERATOR, SOURCE, Layer, Layers
from guestapi.store.rows import load_layers, load_profile
from guestapi.store.transaction import Change, Told, WrittenEvent, tell_all, write_event

#: The most users that are looked at in one statement.
_BATCH = 100
#: The most results that are kept for further users, and the most bytes of other profiles.
_KEPT, _KEPT_BYTES = 64, 32 << 20

_USERS = (
    "SELECT id, project, name, source, init_pid FROM instances JOIN instance_profiles ON instance_id = id "
    f"WHERE profile_id = :profile AND id > :after ORDER BY id LIMIT {_BATCH}"
)
_IN_BATCH = "instance_id IN (SELECT value FROM json_each(:ids))"
_LISTS = f"SELECT instance_id, profile_id FROM instance_profiles WHERE {_IN_BATCH} ORDER BY instance_id, position"
_OWN_KEYS = (
    f"SELECT DISTINCT instance_id, key FROM config WHERE {_IN_BATCH} AND key IN (SELECT value FROM json_each(:keys))"
)
# A definition with a type replaces the profile's whatever it is; of the others all is needed.
_OWN_DEVICES = (
    "SELECT instance_id, layer, name, CASE WHEN coalesce(json_extract(definition, '$.type'), '') = '' "
    f"THEN definition END FROM devices WHERE {_IN_BATCH} AND name IN (SELECT value FROM json_each(:names))"
)
# No less than `names.size_of` and `count_entries`: JSON has these bytes, and quotes beside them.
_OWN_SIZES = (
    "SELECT user.value, "
    "(SELECT coalesce(sum(size + length(CAST(key AS BLOB))), 0) FROM config WHERE instance_id = user.value), "
    "(SELECT coalesce(sum(length(CAST(definition AS BLOB)) + length(CAST(name AS BLOB))), 0) FROM devices "
    "WHERE instance_id = user.value), "
    "(SELECT count(*) FROM config WHERE instance_id = user.value) + "
    "(SELECT coalesce(sum(1 + (SELECT count(*) FROM json_each(definition))), 0) FROM devices "
    "WHERE instance_id = user.value) FROM json_each(:ids) AS user"
)
_CHANGED = "UPDATE instances SET revision = revision + 1 WHERE id = ?"
_STARTS_OVER = "UPDATE instances SET cloud_init_id = ? WHERE id = ?"


class _User(NamedTuple):
    """An instance that has the profile."""

    id: int
    project: str
    name: str
    source: str | None
    init_pid: int | None


@dataclass(slots=True)
class _Own:
    """What a user's own layers have under the names that change."""

    keys: set[str] = field(default_factory=set)
    devices: dict[tuple[int, str], str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Result:
    """What a change means for all users with the same layers under the names that change."""

    events: Sequence[WrittenEvent]
    starts_over: bool


class _Spreading:
    """One change of one profile."""

    def __init__(self, change: Change, profile: Profile, after: Profile) -> None:
        self._change = change
        self._before, self._after = profile, after
        self._keys = _different(profile.config, after.config)
        self._names = _different(profile.devices, after.devices)
        #: Other profiles of users, cut down to what changes, and the size of each.
        self._others: dict[int, tuple[Profile, int, int]] = {}
        self._others_bytes = 0
        self._results: dict[object, _Result] = {}

    def run(self) -> int:
        """Bring the change to all users; how many notice it."""
        noticed, after = 0, 0
        while rows := self._change.connection.execute(_USERS, {"profile": self._before.id, "after": after}).fetchall():
            batch = [_User(*row) for row in rows]
            noticed += self._take(batch)
            after = batch[-1].id
        return noticed

    def _take(self, batch: Sequence[_User]) -> int:
        connection = self._change.connection
        ids = json.dumps([user.id for user in batch])
        lists: defaultdict[int, list[int]] = defaultdict(list)
        for number, profile in connection.execute(_LISTS, {"ids": ids}):
            lists[number].append(profile)
        self._check_sizes(batch, ids, lists)
        own: defaultdict[int, _Own] = defaultdict(_Own)
        for number, key in connection.execute(_OWN_KEYS, {"ids": ids, "keys": json.dumps(sorted(self._keys))}):
            own[number].keys.add(key)
        rows = connection.execute(_OWN_DEVICES, {"ids": ids, "names": json.dumps(sorted(self._names))})
        for number, layer, name, definition in rows:
            own[number].devices[layer, name] = definition
        told: list[tuple[Told, Sequence[WrittenEvent]]] = []
        started_over = []
        for user in batch:
            result = self._result(lists[user.id], own[user.id], by_daemon=user.source in DAEMONS)
            if not result.events:
                continue
            told.append((Told(user.id, user.project, user.name, user.init_pid is not None), result.events))
            if result.starts_over:
                started_over.append((str(uuid.uuid4()), user.id))
        connection.executemany(_CHANGED, [(one.instance_id,) for one, _events in told])
        connection.executemany(_STARTS_OVER, started_over)
        entries = self._change.told
        tell_all(self._change, told)
        self._change.spread += self._change.told - entries
        return len(told)

    def _result(self, profiles: list[int], own: _Own, *, by_daemon: bool) -> _Result:
        pattern = (tuple(profiles), frozenset(own.keys), frozenset(own.devices.items()), by_daemon)
        if (known := self._results.get(pattern)) is not None:
            return known
        if len(self._results) >= _KEPT:
            self._results.clear()
        # What hides a key of the profile's is the same before and after, whatever it is.
        layers = Layers(Layer(dict.fromkeys(own.keys, ""), _devices(own, SOURCE)), Layer({}, _devices(own, OPERATOR)))
        before, after = (
            replace(layers, profiles=tuple(changed if one == changed.id else self._other(one)[0] for one in profiles))
            for changed in (self._cut(self._before), self._cut(self._after))
        )
        live = changes.LIVE_OPTIONS if by_daemon else None
        states = (before.config, after.config, before.devices, after.devices)
        events = [write_event(event) for event in changes.find_differences(*states, live)]
        # The cloud-init id of a daemon's instance is the daemon's; of one that a fleet has placed here, the fleet's.
        is_own = not by_daemon and self._after.uuid is None
        result = _Result(events, is_own and changes.cloud_init_starts_over(*states))
        self._results[pattern] = result
        return result

    def _check_sizes(self, batch: Sequence[_User], ids: str, lists: Mapping[int, list[int]]) -> None:
        """Refuse the change if a user cannot have so much; only of one that might not is everything read."""
        users = {user.id: user for user in batch}
        changed = (
            names.size_of(self._after.config, self._after.devices),
            names.count_entries(self._after.config, self._after.devices),
        )
        for number, config, devices, own in self._change.connection.execute(_OWN_SIZES, {"ids": ids}):
            shared = [changed if one == self._after.id else self._other(one)[1:] for one in lists[number]]
            size, count = (sum(column) for column in zip((config + devices, own), *shared, strict=True))
            if size > self._change.configuration_bytes or count > names.MOST_ENTRIES:
                layers = load_layers(self._change.connection, number)
                wanted = replace(
                    layers, profiles=tuple(self._after if one.id == self._after.id else one for one in layers.profiles)
                )
                check_size(self._change, users[number].project, users[number].name, wanted, layers)

    def _other(self, number: int) -> tuple[Profile, int, int]:
        found = self._others.get(number)
        if found is None:
            whole = load_profile(self._change.connection, number)
            assert whole is not None, "an instance has it"
            found = (
                self._cut(whole),
                names.size_of(whole.config, whole.devices),
                names.count_entries(whole.config, whole.devices),
            )
            kept = names.size_of(found[0].config, found[0].devices)
            if self._others_bytes + kept > _KEPT_BYTES:
                self._others.clear()
                self._others_bytes = 0
            self._others[number] = found
            self._others_bytes += kept
        return found

    def _cut(self, profile: Profile) -> Profile:
        config = {key: value for key, value in profile.config.items() if key in self._keys}
        devices = {name: definition for name, definition in profile.devices.items() if name in self._names}
        return replace(profile, config=config, devices=devices)


def spread(change: Change, before: Profile, after: Profile) -> int:
    """Tell all users of a profile what its change means for them. Called before the profile itself is written.

    Args:
        change: the transaction.
        before: the profile as it is.
        after: the same profile as it is to be.

    Returns:
        How many instances notice the change.

    Raises:
        ConflictError: an instance would have too much configuration.
    """
    if before.config == after.config and before.devices == after.devices:
        return 0
    return _Spreading(change, before, after).run()


def _devices(own: _Own, layer: int) -> dict[str, Device]:
    return {
        # Of a device that stands for itself, it matters only that it is there.
        name: {"type": "own"} if definition is None else json.loads(definition)
        for (of, name), definition in own.devices.items()
        if of == layer
    }


def _different(before: Mapping[str, object], after: Mapping[str, object]) -> frozenset[str]:
    return frozenset(_differences(before, after))


def _differences(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[str]:
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name):
            yield name
