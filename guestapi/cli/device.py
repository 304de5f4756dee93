"""``guestapi device``: what an instance has been given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import click

from guestapi.cli.common import (
    Operator,
    fail,
    has_format,
    has_origin,
    has_truncate,
    origin_name,
    print_devices,
    print_json,
    print_value,
    takes_instance,
    warn,
)
from guestapi.cli.fleet_options import changes_instances
from guestapi.cli.grouping import FleetNoun, takes_project
from guestapi.cli.printing import print_yaml
from guestapi.cli.words import MisuseError, pairs, settings
from guestapi.errors import OperatorError
from guestapi.known import check_device
from guestapi.model import Device, Instance
from guestapi.store import steps
from guestapi.store.layers import Layers
from guestapi.store.lookup import get_instance, get_layers
from guestapi.store.transaction import Change


@click.group(cls=FleetNoun)
@takes_project("The project of the instances.")
def device() -> None:
    """Add, change, show and remove an instance's devices."""


@device.command()
@takes_instance
@changes_instances
@click.argument("device_name", metavar="DEVICE")
@click.argument("kind", metavar="TYPE")
@click.argument("option", nargs=-1, metavar="[KEY=VALUE]...")
@click.pass_obj
def add(operator: Operator, name: str, project: str, device_name: str, kind: str, option: tuple[str, ...]) -> None:
    """Add a device of a TYPE like nic or disk."""
    if "=" in kind:
        raise MisuseError(
            f"{kind!r} is not a type", f"the type is given by itself: {device_name} {kind.partition('=')[2]}"
        )
    definition = pairs(option)
    if "type" in definition:
        raise MisuseError("the type is given by itself, before the options")
    given = {key: value for key, value in definition.items() if value}
    with operator.change_instances((project, name)) as change:
        instance = steps.get_editable(change, project, name)
        if device_name in instance.devices:
            fail(f"{name} has a device {device_name!r} already", "'guestapi device set' changes it")
        steps.replace_devices(change, instance, {**_changeable(change, instance), device_name: {"type": kind, **given}})
    warn(check_device(device_name, {"type": kind, **given}))


@device.command(name="set")
@takes_instance
@changes_instances
@click.argument("device_name", metavar="DEVICE")
@click.argument("option", nargs=-1, required=True, metavar="KEY=VALUE... | KEY VALUE")
@click.pass_obj
def set_(operator: Operator, name: str, project: str, device_name: str, option: tuple[str, ...]) -> None:
    """Change a device's options, all at once; KEY= takes an option away."""
    _set(operator, project, name, device_name, settings(option, files=False))


@device.command()
@takes_instance
@changes_instances
@click.argument("device_name", metavar="DEVICE")
@click.argument("option", nargs=-1, required=True, metavar="KEY...")
@click.pass_obj
def unset(operator: Operator, name: str, project: str, device_name: str, option: tuple[str, ...]) -> None:
    """Take options of a device away, all at once. One that it does not have changes nothing."""
    _set(operator, project, name, device_name, dict.fromkeys(option, ""))


@device.command()
@takes_instance
@click.argument("device_name", metavar="DEVICE")
@click.argument("option", metavar="KEY")
@has_format
@click.pass_obj
def get(operator: Operator, name: str, project: str, device_name: str, option: str, as_json: bool) -> None:
    """Print the value of a device's option as it is, and a line break."""
    with operator.view_instances((project, name)) as store:
        found = get_instance(store, project, name).devices
    if device_name not in found:
        _fail_unknown(name, device_name)
    value = found[device_name].get(option)
    if value is None:
        raise OperatorError(
            f"{option} of device {device_name!r} is not set",
            f"'guestapi device show {name} {device_name}' shows what is",
        )
    if as_json:
        print_json(value)
    else:
        print_value(value)


@device.command()
@takes_instance
@click.argument("device_name", metavar="[DEVICE]", required=False)
@click.option("-f", "--format", "form", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@click.pass_obj
def show(operator: Operator, name: str, project: str, device_name: str | None, form: str) -> None:
    """Print the options of a device, or all devices with theirs."""
    with operator.view_instances((project, name)) as store:
        found = dict(get_instance(store, project, name).devices)
    if device_name is not None and device_name not in found:
        _fail_unknown(name, device_name)
    document = found if device_name is None else found[device_name]
    if form == "json":
        print_json(document)
    else:
        print_yaml(document)


@device.command()
@takes_instance
@changes_instances
@click.argument("device_name", metavar="DEVICE")
@click.pass_obj
def remove(operator: Operator, name: str, project: str, device_name: str) -> None:
    """Remove a device; one that the operator has changed becomes again what the instance's source provides."""
    with operator.change_instances((project, name)) as change:
        instance = steps.get_editable(change, project, name)
        if device_name not in instance.devices:
            _fail_unknown(name, device_name)
        devices = _changeable(change, instance)
        if device_name not in devices:
            origin = origin_name(instance, get_layers(change, instance).device_origin(device_name))
            fail(f"device {device_name!r} of {name} comes from {origin}", "take it away there")
        del devices[device_name]
        steps.replace_devices(change, instance, devices)


@device.command(name="list")
@takes_instance
@has_origin
@has_format
@has_truncate
@click.pass_obj
def list_(operator: Operator, name: str, project: str, origin: bool, as_json: bool, truncate: bool) -> None:
    """Print all devices of an instance."""
    with operator.view_instances((project, name)) as store:
        instance = get_instance(store, project, name)
        layers = get_layers(store, instance)
    devices = dict(instance.devices)
    origins = {one: origin_name(instance, layers.device_origin(one)) for one in devices}
    if as_json:
        documents = {one: {"definition": devices[one], "origin": origins[one]} for one in devices}
        print_json(documents if origin else devices)
    else:
        print_devices(devices.items(), origins if origin else None, truncate=truncate)


def _set(operator: Operator, project: str, name: str, device_name: str, wanted: Mapping[str, str]) -> None:
    with operator.change_instances((project, name)) as change:
        instance = steps.get_editable(change, project, name)
        if device_name not in instance.devices:
            _fail_unknown(name, device_name)
        devices = _changeable(change, instance)
        # Of a device that the source or a profile provides, only what is set here is kept here.
        devices[device_name] = {**devices.get(device_name, {}), **wanted}
        steps.replace_devices(change, instance, devices)
    warn(check_device(device_name, dict(wanted), instance.devices[device_name].get("type")))


def _changeable(change: Change, instance: Instance) -> dict[str, Device]:
    """The devices that can be changed by hand: those of the operator, and if it has no source, what one has left."""
    layers = get_layers(change, instance)
    if instance.source is None and layers.source.devices:
        return Layers(layers.source, layers.operator).devices
    return dict(layers.operator.devices)


def _fail_unknown(name: str, device_name: str) -> NoReturn:
    fail(f"{name} has no device {device_name!r}", f"'guestapi instance show {name}' shows all")
