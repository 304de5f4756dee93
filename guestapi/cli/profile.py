"""``guestapi profile``: named sets of configuration and devices that instances share."""

from __future__ import annotations

import click

from guestapi.cli.common import (
    Operator,
    fail,
    has_format,
    print_devices,
    print_json,
    print_pairs,
    print_table,
    takes_instance,
    warn,
)
from guestapi.cli.editing import edit_document, is_by_hand
from guestapi.cli.fleet_options import changes_instances, changes_profiles
from guestapi.cli.grouping import FleetNoun
from guestapi.cli.printing import print_yaml
from guestapi.cli.profile_definition import as_document, parse
from guestapi.cli.profile_device import device
from guestapi.cli.profile_name import find_named, in_project, takes_profile
from guestapi.cli.words import pairs
from guestapi.known import check_settings
from guestapi.store import profiles, steps
from guestapi.store.lookup import get_instance

#: The most instances that are named of those that have a profile.
_MOST_USERS = 1000


class ProfileNoun(FleetNoun):
    """The verbs of profiles: to remove one from an instance is another thing than to delete it."""

    aliases = {"ls": "list", "rm": "delete", "info": "show"}  # noqa: RUF012 - of the base


@click.group(cls=ProfileNoun)
def profile() -> None:
    """Share configuration and devices among instances.

    What an instance's source provides, and what is set on the instance itself, takes precedence. Of several profiles of
    an instance, the last one does.
    """


profile.add_command(device)


@profile.command()
@takes_profile
@changes_profiles
@click.option("--description", default="", help="What it is for.")
@click.argument("setting", nargs=-1, metavar="[KEY=VALUE]...")
@click.pass_obj
def create(operator: Operator, name: str, project: str, description: str, setting: tuple[str, ...]) -> None:
    """Make a profile. KEY=@FILE takes the value from a file, KEY=@- from standard input."""
    wanted = pairs(setting, files=True)
    warnings = check_settings(wanted)
    with operator.change_profiles((project, name)) as change:
        profiles.create(change, project, name, description=description, config=wanted)
    warn(warnings)


@profile.command(name="set")
@takes_profile
@changes_profiles
@click.argument("setting", nargs=-1, required=True, metavar="KEY=VALUE...")
@click.pass_obj
def set_(operator: Operator, name: str, project: str, setting: tuple[str, ...]) -> None:
    """Set keys, all at once; KEY= unsets one. All instances that have the profile get them in the same transaction."""
    wanted = pairs(setting, files=True)
    warnings = check_settings(wanted)
    with operator.change_profiles((project, name)) as change:
        found = find_named(operator, change, project, name)
        profiles.edit(change, found, config={**found.config, **wanted})
    warn(warnings)


@profile.command()
@takes_profile
@changes_profiles
@click.argument("key", nargs=-1, required=True)
@click.pass_obj
def unset(operator: Operator, name: str, project: str, key: tuple[str, ...]) -> None:
    """Unset keys, all at once. Unsetting one that is not set changes nothing."""
    with operator.change_profiles((project, name)) as change:
        found = find_named(operator, change, project, name)
        profiles.edit(change, found, config={**found.config, **dict.fromkeys(key, "")})


@profile.command()
@takes_profile
@click.argument("key")
@has_format
@click.pass_obj
def get(operator: Operator, name: str, project: str, key: str, as_json: bool) -> None:
    """Print a key's value."""
    with operator.view_profiles((project, name)) as store:
        value = find_named(operator, store, project, name).config.get(key)
    if value is None:
        fail(f"{key} is not set", f"'guestapi profile show {name}' shows what is")
    if as_json:
        print_json(value)
    else:
        click.echo(value)


@profile.command()
@takes_profile
@click.option(
    "-f",
    "--format",
    "form",
    type=click.Choice(["yaml", "table", "json"]),
    default="yaml",
    show_default=True,
    help="How to print: the definition, a table, or the definition as JSON.",
)
@click.pass_obj
def show(operator: Operator, name: str, project: str, form: str) -> None:
    """Print the definition of a profile, which edit takes back, and which instances have the profile."""
    with operator.view_profiles((project, name)) as store:
        found = find_named(operator, store, project, name)
        # Of a fleet, only the profile itself is in this store.
        users = (
            operator.fleet.list_users(found, _MOST_USERS)
            if operator.is_fleet
            else profiles.list_users(store, found, _MOST_USERS)
        )
    if form != "table":
        used_by = [{"project": one, "name": instance} for one, instance in users]
        (print_json if form == "json" else print_yaml)({**as_document(found), "used_by": used_by})
        return
    names = ", ".join(instance for _project, instance in users[:20])
    more = f" and {len(users) - 20}{' or' if len(users) == _MOST_USERS else ''} more" if len(users) > 20 else ""
    rows = [("name", found.name), ("project", found.project), ("description", found.description)]
    print_table(["PROPERTY", "VALUE"], [*rows, ("used by", f"{names}{more}")])
    print_pairs(found.config.items())
    print_devices(found.devices.items())


@profile.command(name="list")
@click.option("--project", help="Of this project alone.")
@has_format
@click.pass_obj
def list_(operator: Operator, project: str | None, as_json: bool) -> None:
    """List profiles, and how many instances have each."""
    found = operator.list_profiles(project)
    if not found and project not in (None, "default") and project not in operator.list_projects():
        fail(f"no project {project!r}", "'guestapi project list' shows all")
    if as_json:
        print_json([{**as_document(one), "users": users} for one, users in found])
    else:
        columns = ["PROJECT", "NAME", "USED BY", "DESCRIPTION"]
        print_table(columns, ([one.project, one.name, str(users), one.description] for one, users in found))


@profile.command()
@takes_profile
@changes_profiles
@click.pass_obj
def edit(operator: Operator, name: str, project: str) -> None:
    """Edit the definition of a profile in $EDITOR; or take it from standard input, if that is not a terminal.

    All instances that have the profile get the differences in one transaction; nothing is written if the profile was
    changed meanwhile.
    """
    with operator.view_profiles((project, name)) as store:
        before = find_named(operator, store, project, name)
    text = edit_document(as_document(before))
    if text is None:
        return
    wanted = parse(text)
    warnings = wanted.check()
    if (wanted.name or name, wanted.project or project) != (name, project):
        warnings.append(f"profile {name!r} keeps its name and project; 'guestapi profile rename' gives it another name")
    with operator.change_profiles((project, name)) as change:
        current = find_named(operator, change, project, name)
        if is_by_hand() and current != before:
            fail(f"profile {name!r} was changed meanwhile", "edit it again")
        profiles.edit(change, current, description=wanted.description, config=wanted.config, devices=wanted.devices)
    warn(warnings)


@profile.command()
@takes_profile
@changes_profiles
@click.argument("new")
@click.pass_obj
def rename(operator: Operator, name: str, project: str, new: str) -> None:
    """Give a profile another name. Its instances keep it."""
    with operator.change_profiles((project, name), (project, new)) as change:
        profiles.rename(change, find_named(operator, change, project, name), new, is_fleets=operator.is_fleet)


@profile.command()
@takes_profile
@changes_profiles
@click.pass_obj
def delete(operator: Operator, name: str, project: str) -> None:
    """Delete a profile that no instance has."""
    with operator.change_profiles((project, name)) as change:
        profiles.remove(change, find_named(operator, change, project, name), is_fleets=operator.is_fleet)


@profile.command()
@takes_instance
@changes_instances
@click.argument("profiles_", metavar="[PROFILE,...]", default="")
@click.pass_obj
def assign(operator: Operator, name: str, project: str, profiles_: str) -> None:
    """Give the instance NAME exactly these profiles, the weakest first; none, if none is named."""
    wanted = [word for word in profiles_.split(",") if word]
    named = [(project, one) for one in wanted]
    with operator.change_instances((project, name), profiles=named) as change:
        instance = get_instance(change, project, name)
        steps.assign(change, instance, tuple(in_project(change, instance.project, one) for one in wanted))


@profile.command()
@takes_instance
@changes_instances
@click.argument("profile_", metavar="PROFILE")
@click.pass_obj
def add(operator: Operator, name: str, project: str, profile_: str) -> None:
    """Give the instance NAME another profile, the strongest of those that it has."""
    with operator.change_instances((project, name), profiles=[(project, profile_)]) as change:
        instance = get_instance(change, project, name)
        new = in_project(change, instance.project, profile_)
        steps.assign(change, instance, (*profiles.get_profiles(change, instance), new))


@profile.command()
@takes_instance
@changes_instances
@click.argument("profile_", metavar="PROFILE")
@click.pass_obj
def remove(operator: Operator, name: str, project: str, profile_: str) -> None:
    """Take a profile from the instance NAME."""
    with operator.change_instances((project, name)) as change:
        instance = get_instance(change, project, name)
        having = profiles.get_profiles(change, instance)
        left = tuple(one for one in having if one.name != profile_)
        if left == having:
            named = ", ".join(one.name for one in having)
            fail(f"{name} does not have profile {profile_}", f"it has: {named or 'none'}")
        steps.assign(change, instance, left)
