"""``guestapi profile device``: the devices of a profile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import click

from guestapi.cli.common import Operator, fail, has_format, print_devices, print_json, warn
from guestapi.cli.fleet_options import changes_profiles
from guestapi.cli.grouping import FleetNoun
from guestapi.cli.profile_name import find_named, takes_profile
from guestapi.cli.words import MisuseError, pairs
from guestapi.known import check_device
from guestapi.model import Device, Profile
from guestapi.store import profiles


@click.group(cls=FleetNoun)
def device() -> None:
    """Add, change and remove a profile's devices."""


@device.command()
@takes_profile
@changes_profiles
@click.argument("device_name", metavar="DEVICE")
@click.argument("kind", metavar="TYPE")
@click.argument("option", nargs=-1, metavar="[KEY=VALUE]...")
@click.pass_obj
def add(operator: Operator, name: str, project: str, device_name: str, kind: str, option: tuple[str, ...]) -> None:
    """Add a device of a TYPE like nic or disk."""
    definition = pairs(option)
    if "type" in definition:
        raise MisuseError("the type is given by itself, before the options")
    if "=" in kind:
        raise MisuseError(
            f"{kind!r} is not a type", f"the type is given by itself: {device_name} {kind.partition('=')[2]}"
        )
    with operator.change_profiles((project, name)) as change:
        found = find_named(operator, change, project, name)
        if device_name in found.devices:
            fail(f"profile {name} has a device {device_name!r} already", "'guestapi profile device set' changes it")
        profiles.edit(change, found, devices={**found.devices, device_name: {"type": kind, **definition}})
    warn(check_device(device_name, {"type": kind, **definition}))


@device.command(name="set")
@takes_profile
@changes_profiles
@click.argument("device_name", metavar="DEVICE")
@click.argument("option", nargs=-1, required=True, metavar="KEY=VALUE...")
@click.pass_obj
def set_(operator: Operator, name: str, project: str, device_name: str, option: tuple[str, ...]) -> None:
    """Change a device's options, all at once; KEY= takes an option away."""
    _change(operator, project, name, device_name, pairs(option))


@device.command()
@takes_profile
@changes_profiles
@click.argument("device_name", metavar="DEVICE")
@click.argument("option", nargs=-1, required=True, metavar="KEY...")
@click.pass_obj
def unset(operator: Operator, name: str, project: str, device_name: str, option: tuple[str, ...]) -> None:
    """Take options of a device away, all at once."""
    _change(operator, project, name, device_name, dict.fromkeys(option, ""))


@device.command()
@takes_profile
@click.argument("device_name", metavar="DEVICE")
@click.argument("option", metavar="KEY")
@has_format
@click.pass_obj
def get(operator: Operator, name: str, project: str, device_name: str, option: str, as_json: bool) -> None:
    """Print the value of a device's option."""
    with operator.view_profiles((project, name)) as store:
        value = _get_device(find_named(operator, store, project, name), device_name).get(option)
    if value is None:
        fail(f"{option} is not set", f"'guestapi profile show {name}' shows what is")
    if as_json:
        print_json(value)
    else:
        click.echo(value)


@device.command()
@takes_profile
@changes_profiles
@click.argument("device_name", metavar="DEVICE")
@click.pass_obj
def remove(operator: Operator, name: str, project: str, device_name: str) -> None:
    """Remove a device."""
    with operator.change_profiles((project, name)) as change:
        found = find_named(operator, change, project, name)
        _get_device(found, device_name)
        left = {one: definition for one, definition in found.devices.items() if one != device_name}
        profiles.edit(change, found, devices=left)


@device.command(name="list")
@takes_profile
@has_format
@click.pass_obj
def list_(operator: Operator, name: str, project: str, as_json: bool) -> None:
    """Print all devices of a profile."""
    with operator.view_profiles((project, name)) as store:
        devices = dict(find_named(operator, store, project, name).devices)
    if as_json:
        print_json(devices)
    else:
        print_devices(devices.items())


def _change(operator: Operator, project: str, name: str, device_name: str, options: Mapping[str, str]) -> None:
    with operator.change_profiles((project, name)) as change:
        found = find_named(operator, change, project, name)
        definition = {**_get_device(found, device_name), **options}
        profiles.edit(change, found, devices={**found.devices, device_name: definition})
    warn(check_device(device_name, dict(options), definition.get("type")))


def _get_device(found: Profile, device_name: str) -> Device:
    if device_name not in found.devices:
        _fail_unknown(found.name, device_name)
    return found.devices[device_name]


def _fail_unknown(name: str, device_name: str) -> NoReturn:
    fail(f"profile {name} has no device {device_name!r}", f"'guestapi profile show {name}' shows all")
