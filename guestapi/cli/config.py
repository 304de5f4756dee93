"""``guestapi config``: what an instance's workload can read, and what is said about it."""

from __future__ import annotations

import click

from guestapi.cli.common import Operator, fail, has_format, pairs, print_json, print_pairs, takes_instance
from guestapi.store import steps
from guestapi.store.lookup import get_instance


@click.group()
def config() -> None:
    """Set and look at an instance's configuration."""


@config.command(name="set")
@takes_instance
@click.argument("setting", nargs=-1, required=True, metavar="KEY=VALUE...")
@click.pass_obj
def set_(operator: Operator, name: str, project: str, setting: tuple[str, ...]) -> None:
    """Set keys, all at once. KEY=@FILE takes the value from a file, KEY=@- from standard input."""
    wanted = pairs(setting, files=True)
    with operator.writer.change() as change:
        steps.configure(change, steps.get_editable(change, project, name), wanted)


@config.command()
@takes_instance
@click.argument("key", nargs=-1, required=True)
@click.pass_obj
def unset(operator: Operator, name: str, project: str, key: tuple[str, ...]) -> None:
    """Unset keys, all at once. Unsetting one that is not set changes nothing."""
    with operator.writer.change() as change:
        steps.configure(change, steps.get_editable(change, project, name), dict.fromkeys(key, ""))


@config.command()
@takes_instance
@click.argument("key")
@has_format
@click.pass_obj
def get(operator: Operator, name: str, project: str, key: str, as_json: bool) -> None:
    """Print a key's value."""
    with operator.view() as store:
        value = get_instance(store, project, name).config.get(key)
    if value is None:
        fail(f"{key} is not set")
    if as_json:
        print_json(value)
    else:
        click.echo(value)


@config.command()
@takes_instance
@has_format
@click.pass_obj
def show(operator: Operator, name: str, project: str, as_json: bool) -> None:
    """Print all keys and values."""
    with operator.view() as store:
        found = dict(get_instance(store, project, name).config)
    if as_json:
        print_json(found)
    else:
        print_pairs(found.items())
