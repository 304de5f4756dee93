"""How the layers of an instance are written, and how much they may have in all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from guestapi import names
from guestapi.model import Device, Instance
from guestapi.store.errors import ConflictError
from guestapi.store.layers import OPERATOR, SOURCE, Layers
from guestapi.store.transaction import Change

_REMOVE_KEY = "DELETE FROM config WHERE instance_id = ? AND layer = ? AND key = ?"
_REMOVE_DEVICE = "DELETE FROM devices WHERE instance_id = ? AND layer = ? AND name = ?"
_ADD_KEY = "INSERT INTO config (instance_id, key, layer, size, value) VALUES (?, ?, ?, ?, ?)"
_ADD_DEVICE = "INSERT INTO devices (instance_id, name, layer, definition) VALUES (?, ?, ?, ?)"
_REMOVE_PROFILES = "DELETE FROM instance_profiles WHERE instance_id = ?"
_ADD_PROFILE = "INSERT INTO instance_profiles (instance_id, position, profile_id) VALUES (?, ?, ?)"


def check_size(change: Change, project: str, name: str, layers: Layers, before: Layers | None = None) -> None:
    """Make sure that an instance can have these layers: merged, they are within the bounds.

    Args:
        change: the transaction.
        project: of the instance.
        name: of the instance.
        layers: what it is to have.
        before: what it has. What makes that no larger is possible in any case.

    Raises:
        ConflictError: it cannot have them.
    """
    where = "" if project == "default" else f" in project {project!r}"
    size, most = names.size_of(layers.config, layers.devices), change.configuration_bytes
    if size > most and (before is None or size > names.size_of(before.config, before.devices)):
        raise ConflictError(
            f"configuration and devices of an instance may have {most} bytes, not {size} as {name!r}{where} would have",
            "store.configuration_bytes in guestapi.toml is that bound",
        )
    count, most = names.count_entries(layers.config, layers.devices), names.MOST_ENTRIES
    if count > most and (before is None or count > names.count_entries(before.config, before.devices)):
        raise ConflictError(
            f"an instance may have {most} keys, devices and options together, not {count} as {name!r}{where} would "
            "have",
            "those of its profiles count, too; put what belongs together into one value",
        )


def find_names(before: Layers, after: Layers) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The keys and devices of an instance's own layers that differ, and the profiles that it got or lost."""
    pairs = ((before.source, after.source), (before.operator, after.operator))
    keys = {key for old, new in pairs for key in _changed(old.config, new.config)}
    devices = {name for old, new in pairs for name in _changed(old.devices, new.devices)}
    old_profiles, new_profiles = ([one.name for one in layers.profiles] for layers in (before, after))
    profiles = {*old_profiles, *new_profiles} if old_profiles != new_profiles else set()
    return tuple(sorted(keys)), tuple(sorted(devices)), tuple(sorted(profiles))


def write_layers(change: Change, number: int, before: Layers, after: Layers) -> None:
    """Write the layers of an instance, and which profiles it has.

    Args:
        change: the transaction.
        number: id of the instance.
        before: what is written of it.
        after: what is to be.
    """
    ids = [profile.id for profile in after.profiles]
    if ids != [profile.id for profile in before.profiles]:
        change.connection.execute(_REMOVE_PROFILES, (number,))
        change.connection.executemany(_ADD_PROFILE, [(number, position, one) for position, one in enumerate(ids)])
    for layer, old, new in ((SOURCE, before.source, after.source), (OPERATOR, before.operator, after.operator)):
        if keys := _changed(old.config, new.config):
            change.connection.executemany(_REMOVE_KEY, [(number, layer, key) for key in keys])
            values = [
                (number, key, layer, len(value.encode()), value) for key in keys if (value := new.config.get(key))
            ]
            change.connection.executemany(_ADD_KEY, values)
        if named := _changed(old.devices, new.devices):
            change.connection.executemany(_REMOVE_DEVICE, [(number, layer, name) for name in named])
            rows = [
                (number, name, layer, _definition(definition))
                for name in named
                if (definition := new.devices.get(name)) is not None
            ]
            change.connection.executemany(_ADD_DEVICE, rows)


def add_operators_layers(change: Change, instances: Iterable[Instance]) -> None:
    """Write what new instances have, which is all the operator's."""
    found = list(instances)
    change.connection.executemany(
        _ADD_KEY,
        (
            (one.id, key, OPERATOR, len(value.encode()), value)
            for one in found
            for key, value in one.config.items()
            if value
        ),
    )
    change.connection.executemany(
        _ADD_DEVICE,
        ((one.id, name, OPERATOR, _definition(device)) for one in found for name, device in one.devices.items()),
    )


def _definition(device: Device) -> str:
    return json.dumps(dict(sorted(device.items())))


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
