"""``guestapi config``: what an instance's workload can read, and what is said about it."""

from __future__ import annotations

import click

from guestapi.cli.common import (
    Operator,
    has_format,
    has_origin,
    origin_name,
    print_json,
    print_pairs,
    print_value,
    takes_instance,
    warn,
)
from guestapi.cli.values import get_value, set_values
from guestapi.cli.words import printable, settings
from guestapi.store import steps
from guestapi.store.lookup import get_instance, get_layers


@click.group()
def config() -> None:
    """Set, unset and show an instance's configuration."""


@config.command(name="set")
@takes_instance
@click.argument("setting", nargs=-1, required=True, metavar="KEY=VALUE... | KEY VALUE")
@click.pass_obj
def set_(operator: Operator, name: str, project: str, setting: tuple[str, ...]) -> None:
    """Set keys, all at once, as KEY=VALUE..., or one as KEY VALUE.

    The value @FILE is read from a file, and @- from standard input.
    """
    warn(set_values(operator.writer, project, name, settings(setting)))


@config.command()
@takes_instance
@click.argument("key", nargs=-1, required=True)
@click.pass_obj
def unset(operator: Operator, name: str, project: str, key: tuple[str, ...]) -> None:
    """Unset keys, all at once. Unsetting one that is not set changes nothing.

    What the instance's source provides under the same key counts again.
    """
    with operator.writer.change() as change:
        instance = steps.configure(change, steps.get_editable(change, project, name), dict.fromkeys(key, ""))
        layers = get_layers(change, instance)
    for left in sorted(set(key) & instance.config.keys()):
        owner = origin_name(instance, layers.origin(left))
        click.echo(f"{name} still has {printable(left)} from {printable(owner)}", err=True)


@config.command()
@takes_instance
@click.argument("key")
@has_format
@click.pass_obj
def get(operator: Operator, name: str, project: str, key: str, as_json: bool) -> None:
    """Print a key's value as it is, and a line break."""
    value = get_value(operator.settings.store.url, project, name, key)
    if as_json:
        print_json(value)
    else:
        print_value(value)


@config.command()
@takes_instance
@has_origin
@has_format
@click.pass_obj
def show(operator: Operator, name: str, project: str, origin: bool, as_json: bool) -> None:
    """Print all keys and values."""
    with operator.view() as store:
        instance = get_instance(store, project, name)
        layers = get_layers(store, instance)
    found = dict(instance.config)
    origins = {key: origin_name(instance, layers.origin(key)) for key in found}
    if as_json:
        print_json({key: {"value": found[key], "origin": origins[key]} for key in found} if origin else found)
    else:
        print_pairs(found.items(), origins if origin else None)
