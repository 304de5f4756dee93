"""``guestapi device``: what an instance has been given."""

from __future__ import annotations

from typing import NoReturn

import click

from guestapi.cli.common import (
    Operator,
    fail,
    has_format,
    has_origin,
    origin_name,
    print_devices,
    print_json,
    takes_instance,
)
from guestapi.cli.words import pairs
from guestapi.model import Device, Instance
from guestapi.store import steps
from guestapi.store.layers import Layers
from guestapi.store.lookup import get_instance, get_layers
from guestapi.store.transaction import Change


@click.group()
def device() -> None:
    """Add, change and remove an instance's devices."""


@device.command()
@takes_instance
@click.argument("device_name", metavar="DEVICE")
@click.argument("kind", metavar="TYPE")
@click.argument("option", nargs=-1, metavar="[KEY=VALUE]...")
@click.pass_obj
def add(operator: Operator, name: str, project: str, device_name: str, kind: str, option: tuple[str, ...]) -> None:
    """Add a device of a TYPE like nic or disk."""
    definition = pairs(option)
    if "type" in definition:
        raise click.UsageError("the type is given by itself, before the options")
    with operator.writer.change() as change:
        instance = steps.get_editable(change, project, name)
        if device_name in instance.devices:
            fail(f"{name} has a device {device_name!r} already", "'guestapi device set' changes it")
        given = {key: value for key, value in definition.items() if value}
        steps.replace_devices(change, instance, {**_changeable(change, instance), device_name: {"type": kind, **given}})


@device.command(name="set")
@takes_instance
@click.argument("device_name", metavar="DEVICE")
@click.argument("option", nargs=-1, required=True, metavar="KEY=VALUE...")
@click.pass_obj
def set_(operator: Operator, name: str, project: str, device_name: str, option: tuple[str, ...]) -> None:
    """Change a device's options, all at once; KEY= takes an option away."""
    wanted = pairs(option)
    with operator.writer.change() as change:
        instance = steps.get_editable(change, project, name)
        if device_name not in instance.devices:
            _fail_unknown(name, device_name)
        devices = _changeable(change, instance)
        # Of a device that the source provides, only what is set here is kept here.
        devices[device_name] = {**devices.get(device_name, {}), **wanted}
        steps.replace_devices(change, instance, devices)


@device.command()
@takes_instance
@click.argument("device_name", metavar="DEVICE")
@click.pass_obj
def remove(operator: Operator, name: str, project: str, device_name: str) -> None:
    """Remove a device; one that the operator has changed becomes again what the instance's source provides."""
    with operator.writer.change() as change:
        instance = steps.get_editable(change, project, name)
        if device_name not in instance.devices:
            _fail_unknown(name, device_name)
        devices = _changeable(change, instance)
        if device_name not in devices:
            owner = origin_name(instance, get_layers(change, instance).device_origin(device_name))
            fail(f"device {device_name!r} of {name} comes from {owner}", "take it away there")
        del devices[device_name]
        steps.replace_devices(change, instance, devices)


@device.command(name="list")
@takes_instance
@has_origin
@has_format
@click.pass_obj
def list_(operator: Operator, name: str, project: str, origin: bool, as_json: bool) -> None:
    """Print all devices of an instance."""
    with operator.view() as store:
        instance = get_instance(store, project, name)
        layers = get_layers(store, instance)
    devices = dict(instance.devices)
    origins = {one: origin_name(instance, layers.device_origin(one)) for one in devices}
    if as_json:
        documents = {one: {"definition": devices[one], "origin": origins[one]} for one in devices}
        print_json(documents if origin else devices)
    else:
        print_devices(devices.items(), origins if origin else None)


def _changeable(change: Change, instance: Instance) -> dict[str, Device]:
    """The devices that can be changed by hand: those of the operator, and if it has no source, what one has left."""
    layers = get_layers(change, instance)
    if instance.source is None and layers.source.devices:
        return Layers(layers.source, layers.operator).devices
    return dict(layers.operator.devices)


def _fail_unknown(name: str, device_name: str) -> NoReturn:
    fail(f"{name} has no device {device_name!r}", f"'guestapi instance show {name}' shows all")
