"""``guestapi device``: what an instance has been given."""

from __future__ import annotations

import click

from guestapi.cli.common import Operator, fail, has_format, pairs, print_devices, print_json, takes_instance
from guestapi.store import steps
from guestapi.store.lookup import get_instance


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
            fail(f"{name} has a device {device_name!r} already; 'guestapi device set' changes it")
        given = {key: value for key, value in definition.items() if value}
        steps.replace_devices(change, instance, {**instance.devices, device_name: {"type": kind, **given}})


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
            fail(f"{name} has no device {device_name!r}; 'guestapi instance show {name}' shows all")
        merged = {**instance.devices[device_name], **wanted}
        definition = {key: value for key, value in merged.items() if value}
        steps.replace_devices(change, instance, {**instance.devices, device_name: definition})


@device.command()
@takes_instance
@click.argument("device_name", metavar="DEVICE")
@click.pass_obj
def remove(operator: Operator, name: str, project: str, device_name: str) -> None:
    """Take a device away."""
    with operator.writer.change() as change:
        instance = steps.get_editable(change, project, name)
        if device_name not in instance.devices:
            fail(f"{name} has no device {device_name!r}; 'guestapi instance show {name}' shows all")
        steps.replace_devices(
            change, instance, {key: one for key, one in instance.devices.items() if key != device_name}
        )


@device.command(name="list")
@takes_instance
@has_format
@click.pass_obj
def list_(operator: Operator, name: str, project: str, as_json: bool) -> None:
    """Print all devices of an instance."""
    with operator.view() as store:
        devices = dict(get_instance(store, project, name).devices)
    if as_json:
        print_json(devices)
    else:
        print_devices(devices.items())
