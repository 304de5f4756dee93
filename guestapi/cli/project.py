"""``guestapi project``: the name spaces of instances."""

from __future__ import annotations

import click

from guestapi.cli.common import Operator, has_format, print_json, print_table
from guestapi.cli.grouping import FleetNoun


@click.group(cls=FleetNoun)
def project() -> None:
    """List projects. A project is there as long as it has an instance."""


@project.command(name="list")
@has_format
@click.pass_obj
def list_(operator: Operator, as_json: bool) -> None:
    """List projects, and how many instances each has."""
    found = operator.list_projects()
    if as_json:
        print_json([{"name": name, "instances": count} for name, count in found.items()])
    else:
        print_table(["PROJECT", "INSTANCES"], ([name, str(count)] for name, count in found.items()))
