"""What the operator defines of an instance, as one value: to be read from the store, and written to it as a whole.

Rules: a definition has what is the operator's own. What an instance's source and its profiles provide is not part of
it, so a definition that was read and is written again changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from guestapi import names
from guestapi.model import DAEMONS, Device, Instance, InstanceType
from guestapi.records import Profile
from guestapi.store import profiles, steps
from guestapi.store.errors import ConflictError
from guestapi.store.layer_rows import check_size
from guestapi.store.layers import Layer, Layers
from guestapi.store.lookup import Moment, find_instance, get_layers
from guestapi.store.transaction import Change

#: What became of an instance.
Outcome = Literal["added", "changed", "unchanged"]


@dataclass(frozen=True, slots=True)
class Definition:
    """What the operator defines of an instance.

    Attributes:
        name: of the instance.
        project: of the instance.
        type: as of `Instance`.
        uuid: as of `Instance`; None: a new one, or the one that it has.
        cloud_init_id: as of `Instance`, for one that is added; None: the UUID.
        location: as of `Instance`.
        profiles: names of its profiles, the weakest first.
        config: the operator's configuration.
        devices: the operator's devices.
    """

    name: str
    project: str = "default"
    type: InstanceType = "container"
    uuid: str | None = None
    cloud_init_id: str | None = None
    location: str | None = None
    profiles: tuple[str, ...] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, Device] = field(default_factory=dict)


def read_definition(store: Moment, instance: Instance) -> Definition:
    """What the operator defines of an instance now."""
    own = _own(instance, get_layers(store, instance))
    return Definition(
        instance.name,
        instance.project,
        instance.type,
        instance.uuid,
        None if instance.cloud_init_id == instance.uuid else instance.cloud_init_id,
        instance.location,
        tuple(instance.profiles),
        dict(sorted(own.config.items())),
        {name: dict(sorted(device.items())) for name, device in sorted(own.devices.items())},
    )


def define(change: Change, definition: Definition) -> Outcome:
    """Make an instance what the definition says: add it, or change of it what differs.

    Args:
        change: the transaction.
        definition: what it is to be. Its `cloud_init_id` is for an instance that is added: later changes renew it.

    Returns:
        What was done.

    Raises:
        InvalidNameError: a name or value cannot be taken.
        ConflictError: it cannot become that, or its daemon configures it.
        UnknownProfileError: there is no such profile.
    """
    found = find_instance(change, definition.project, definition.name)
    if found is not None and definition.profiles == found.profiles:
        # A fleet's are not found by their names.
        applied = get_layers(change, found).profiles
    else:
        applied = tuple(_profile(change, definition.project, name) for name in definition.profiles)
    steps.refuse_twice(definition.name, applied)
    if found is None:
        steps.add(
            change,
            definition.project,
            definition.name,
            type=definition.type,
            instance_uuid=definition.uuid,
            location=definition.location,
            config={key: value for key, value in definition.config.items() if value},
            devices=definition.devices,
            cloud_init_id=definition.cloud_init_id,
            profiles=applied,
        )
        return "added"
    _refuse_other(found, definition)
    before = get_layers(change, found)
    source = Layer() if found.source is None else before.source
    config = {key: value for key, value in names.check_config(definition.config).items() if value}
    others = Layers(source, Layer(), applied)
    devices = names.check_devices(definition.devices, amending=others.devices)
    after = replace(others, operator=Layer(config, devices))
    columns: dict[str, object] = {}
    if definition.location is not None:
        columns["location"] = names.check_location(definition.location)
    elif found.source is None:
        columns["location"] = None
    if _own(found, before) == after.operator and before.profiles == applied:
        # What a hook of an earlier version left in the other layer counts as the operator's.
        after = before
    if found.source in DAEMONS and after != before:
        raise ConflictError(f"instance {found.name!r} is mirrored from {found.source}", "change it there")
    if after != before:
        steps.refuse_placed(change, found)
    check_size(change, found.project, found.name, after, before)
    written = steps.write(change, found, steps.Wanted(before, after, found.init, columns))
    return "unchanged" if written.revision == found.revision else "changed"


def _own(instance: Instance, layers: Layers) -> Layer:
    """The operator's layer; of an instance without a source, with what is left in the source's."""
    if instance.source is not None:
        return layers.operator
    own = replace(layers, profiles=())
    return Layer(own.config, own.devices)


def _refuse_other(found: Instance, definition: Definition) -> None:
    if definition.uuid is not None and names.check_uuid(definition.uuid) != found.uuid:
        raise ConflictError(
            f"instance {found.name!r} has UUID {found.uuid}, not {definition.uuid}",
            "leave the UUID out of the definition, or remove the instance first",
        )
    if definition.type != found.type:
        raise ConflictError(
            f"instance {found.name!r} is a {found.type}, not a {definition.type}", "remove it first, or name it so"
        )


def _profile(change: Change, project: str, name: str) -> Profile:
    if name == profiles.DEFAULT:
        return profiles.ensure_default(change, project)
    return profiles.get_profile(change, project, name)
