"""``guestapi config``: what an instance's workload can read, and what is said about it."""

from __future__ import annotations

import click

from guestapi.cli.common import (
    Operator,
    fail,
    has_format,
    has_origin,
    has_reveal,
    has_truncate,
    origin_name,
    print_json,
    print_pairs,
    print_value,
    takes_instance,
    warn,
)
from guestapi.cli.fleet_options import changes_instances
from guestapi.cli.grouping import FleetNoun, takes_project
from guestapi.cli.values import find_value, set_values
from guestapi.cli.words import printable, settings
from guestapi.key_policy import blanked
from guestapi.store import steps
from guestapi.store.lookup import get_instance, get_layers


@click.group(cls=FleetNoun)
@takes_project("The project of the instances.")
def config() -> None:
    """Set, unset, edit and show an instance's configuration."""


@config.command(name="set")
@takes_instance
@changes_instances
@click.argument("setting", nargs=-1, required=True, metavar="KEY=VALUE... | KEY VALUE")
@click.pass_obj
def set_(operator: Operator, name: str, project: str, setting: tuple[str, ...]) -> None:
    """Set keys, all at once, as KEY=VALUE..., or one as KEY VALUE.

    The value @FILE is read from a file, and @- from standard input.
    """
    warn(set_values(operator.change_instances((project, name)), project, name, settings(setting)))


@config.command()
@takes_instance
@changes_instances
@click.argument("key", nargs=-1, required=True)
@click.pass_obj
def unset(operator: Operator, name: str, project: str, key: tuple[str, ...]) -> None:
    """Unset keys, all at once. Unsetting one that is not set changes nothing.

    What the instance's source provides under the same key counts again, else what its profiles do.
    """
    with operator.change_instances((project, name)) as change:
        instance = steps.configure(change, steps.get_editable(change, project, name), dict.fromkeys(key, ""))
        layers = get_layers(change, instance)
    if left := sorted(set(key) & instance.config.keys()):
        named = ", ".join(f"{printable(one)} from {origin_name(instance, layers.origin(one))}" for one in left)
        click.echo(f"{name} still has {named}", err=True)


@config.command()
@takes_instance
@click.argument("key")
@has_format
@click.pass_obj
def get(operator: Operator, name: str, project: str, key: str, as_json: bool) -> None:
    """Print a key's value as it is, and a line break."""
    with operator.view_instances((project, name)) as store:
        value = find_value(store, project, name, key)
    if as_json:
        print_json(value)
    else:
        print_value(value)


@config.command()
@takes_instance
@has_origin
@has_reveal
@has_format
@has_truncate
@click.pass_obj
def show(
    operator: Operator, name: str, project: str, origin: bool, reveal: bool, as_json: bool, truncate: bool
) -> None:
    """Print all keys and values."""
    with operator.view_instances((project, name)) as store:
        instance = get_instance(store, project, name)
        layers = get_layers(store, instance)
    found = dict(instance.config) if reveal else blanked(instance, instance.config)
    origins = {key: origin_name(instance, layers.origin(key)) for key in found}
    if as_json:
        print_json({key: {"value": found[key], "origin": origins[key]} for key in found} if origin else found)
    else:
        print_pairs(found.items(), origins if origin else None, truncate=truncate)


@config.command()
@takes_instance
@changes_instances
@click.pass_obj
def edit(operator: Operator, name: str, project: str) -> None:
    """Edit the definition of an instance in $EDITOR; or take it from standard input, if that is not a terminal.

    What differs is written in one transaction; nothing is, if the instance was changed meanwhile.
    """
    # YAML is loaded for this command alone.
    from guestapi.cli.definitions import as_document, parse
    from guestapi.cli.definitions import check as check_definition
    from guestapi.cli.editing import edit_document, is_by_hand
    from guestapi.store.definitions import define, read_definition

    with operator.view_instances((project, name)) as store:
        before = read_definition(store, get_instance(store, project, name))
    text = edit_document(as_document(before))
    if text is None:
        return
    found = parse(text, "the definition", name=name, project=project)
    if not found:
        fail("the definition is empty", "'guestapi instance show' prints one")
    if len(found) > 1:
        fail(f"the definition: there are {len(found)}, not one", "'guestapi apply -f FILE' takes several")
    if (found[0].name, found[0].project) != (name, project):
        fail(
            f"the definition is one of {found[0].name} in project {found[0].project}",
            "'guestapi instance rename' gives an instance another name",
        )
    warnings = check_definition(found[0])
    named = [(project, one) for one in found[0].profiles]
    with operator.change_instances((project, name), profiles=named) as change:
        if is_by_hand() and read_definition(change, get_instance(change, project, name)) != before:
            fail(f"instance {name!r} was changed meanwhile", "edit it again")
        define(change, *(operator.fleet.locate(found) if operator.is_fleet else found))
    warn(warnings)
