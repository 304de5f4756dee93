"""``guestapi export``: definitions of instances, to be kept in files and applied again."""

from __future__ import annotations

from typing import Any

import click

from guestapi.cli.common import Operator, complete_instance, given_project
from guestapi.cli.definitions import as_document
from guestapi.cli.fleet_options import given_options, takes_host
from guestapi.cli.grouping import FleetVerb, project_of, takes_project
from guestapi.cli.printing import print_yaml
from guestapi.cli.words import MisuseError
from guestapi.model import Instance
from guestapi.store.attributes import list_attributes
from guestapi.store.definitions import read_definition
from guestapi.store.lookup import Moment, get_instance, list_instances


@click.command(cls=FleetVerb)
@takes_project("Of this project; with --all: of this project alone.")
@click.argument("name", nargs=-1, metavar="[NAME]...", shell_complete=complete_instance)
@click.option("--all", "everything", is_flag=True, help="All instances that belong to no source.")
@click.option("--sources", is_flag=True, help="Those of sources, too: what is set of them by hand.")
@click.option("--attributes", "said", is_flag=True, help="Show what they say of themselves; it is not taken back.")
@takes_host("With --fleet and --all: of this host alone.")
@click.pass_context
def export(ctx: click.Context, name: tuple[str, ...], everything: bool, sources: bool, said: bool) -> None:
    """Print the definitions of instances as YAML documents, which 'guestapi apply' takes back."""
    if bool(name) == everything:
        raise MisuseError("either names of instances or --all is needed")
    if name and "host" in given_options(ctx):
        raise MisuseError("--host says nothing without --all")
    operator: Operator = ctx.obj
    places: list[tuple[str, str]] = [(given_project(ctx), one) for one in name]
    if everything and operator.is_fleet:
        places = [(one.project, one.name) for one in operator.fleet.list_instances(project_of(ctx), whole=False)]
    with operator.view_instances(*places) as store:
        if everything:
            known = list_instances(store, project_of(ctx))
            found = [one for one in known if sources or one.source is None]
        else:
            found = [get_instance(store, given_project(ctx), one) for one in dict.fromkeys(name)]
        documents = [_document(store, one, said=said) for one in found]
    if everything and (left := len(known) - len(found)):
        click.echo(f"{left} instances of sources are left out; --sources has them, too", err=True)
    if documents:
        print_yaml(*documents)


def _document(store: Moment, instance: Instance, *, said: bool) -> dict[str, Any]:
    document = as_document(read_definition(store, instance))
    if said and (found := list_attributes(store, instance)):
        document["attributes"] = {one.path: one.value.decode(errors="backslashreplace") for one in found}
    return document
