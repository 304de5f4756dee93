"""``guestapi fleet``: the database of a fleet, and the hosts that belong to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from guestapi import journal
from guestapi.cli.common import Operator, has_format, print_json, print_table
from guestapi.cli.fleet_options import fleet_url
from guestapi.cli.grouping import Noun
from guestapi.cli.printing import mark
from guestapi.cli.words import printable
from guestapi.settings import Settings
from guestapi.store.placements import Cursor, forget_fleet, list_placed, read_cursor, write_cursor
from guestapi.systemd import notify

if TYPE_CHECKING:
    import psycopg


@click.group(cls=Noun)
def fleet() -> None:
    """Set up the database of a fleet, and say which hosts belong to it.

    fleet.url of guestapi.toml names the database. Who you are there is as in psql: PGUSER, PGSSLCERT, ~/.postgresql.
    """


@fleet.command()
@click.pass_obj
def init(operator: Operator) -> None:
    """Make roles and tables in an empty database, as a superuser of PostgreSQL."""
    from guestapi.fleet import setup

    with _session(operator.settings) as connection:
        identity = setup.init(connection)
    click.echo(f"made fleet {identity}")


@fleet.command()
@click.pass_obj
def upgrade(operator: Operator) -> None:
    """Bring tables, functions and policies up to date, as a superuser, before any host is upgraded."""
    from guestapi.fleet import setup

    with _session(operator.settings) as connection:
        before, after = setup.upgrade(connection)
    click.echo(f"version {after}" if before == after else f"version {before} -> {after}")


@fleet.command()
@click.option("--anew", is_flag=True, help="Forget which history of the database this host has seen, and exit.")
@click.pass_obj
def follow(operator: Operator, anew: bool) -> None:
    """Keep the store as the fleet has this host. Stays in the foreground; the unit guestapi-fleet runs it.

    While the database cannot be reached, instances get the last known answers.
    """
    if anew:
        with operator.writer.change() as change:
            write_cursor(change, Cursor(read_cursor(change).fleet))
        click.echo("the follower will look at everything, whatever timeline the database has")
        return
    from guestapi.fleet.follower import FleetFollower
    from guestapi.fleet.joining import connect_host

    settings = operator.settings
    journal.set_up(settings.log.level)
    url = fleet_url(settings)
    FleetFollower(settings, partial(connect_host, url, settings.fleet), _say).run()


@fleet.command()
@click.option("--import", "imports", is_flag=True, help="Add this host's own instances to the fleet, as an operator.")
@click.pass_obj
def join(operator: Operator, imports: bool) -> None:
    """Check that this host can follow the fleet, and bring its own instances into it.

    They keep UUIDs and runs, and their guests notice nothing. Instances of Incus and LXD stay theirs.
    """
    from guestapi.fleet import inventory, membership
    from guestapi.fleet.joining import connect_host, host_name

    settings = operator.settings
    with connect_host(fleet_url(settings), settings.fleet) as own:
        state = inventory.read_state(own)
    if imports:
        with operator.view() as store, _session(settings) as connection:
            count = membership.import_instances(connection, store, host_name(settings.fleet))
        click.echo(f"{count} instances added to the fleet")
    click.echo(f"host {state.host} can follow fleet {state.cursor.fleet}; 'systemctl enable --now guestapi-fleet' does")


@fleet.command()
@click.option("--forget", is_flag=True, help="The database is gone for good: do not ask it.")
@click.pass_obj
def leave(operator: Operator, forget: bool) -> None:
    """Take this host out of the fleet, as an operator: its instances become its own, and are removed there."""
    from guestapi.fleet import membership
    from guestapi.fleet.joining import host_name

    if forget:
        with operator.writer.change() as change:
            count = len(list_placed(change))
            forget_fleet(change)
    else:
        with _session(operator.settings) as connection:
            count = membership.leave(connection, operator.writer, host_name(operator.settings.fleet))
    click.echo(f"{count} instances are this host's own; 'systemctl disable --now guestapi-fleet' ends the follower")


@fleet.command()
@has_format
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Check the database of the fleet, as a superuser or a member of pg_monitor. Exits 1 if a check fails.

    Replication without a synchronous standby fails: a change that was acknowledged would be lost with the primary.
    """
    from guestapi.fleet import checks

    operator: Operator = ctx.obj
    with _session(operator.settings) as connection:
        findings = list(checks.check(connection))
    if as_json:
        print_json([one._asdict() for one in findings])
    else:
        for one in findings:
            click.echo(f"{mark(one.ok)} {one.check}: {printable(one.text)}")
    if not all(one.ok for one in findings):
        ctx.exit(1)


@fleet.group(cls=Noun)
def host() -> None:
    """Add, list and fence the hosts of the fleet."""


@host.command()
@click.argument("name", metavar="HOST")
@click.pass_obj
def add(operator: Operator, name: str) -> None:
    """Add a host, as a superuser. Prints the role for which its certificate is."""
    from guestapi.fleet import setup

    with _session(operator.settings) as connection:
        role = setup.add_host(connection, name)
    click.echo(role)


@host.command()
@click.argument("name", metavar="HOST")
@click.pass_obj
def fence(operator: Operator, name: str) -> None:
    """Refuse a host from now on, and end its sessions, as a superuser. It serves what it knows until it is off.

    'guestapi fleet host add' lets it in again.
    """
    from guestapi.fleet import setup

    with _session(operator.settings) as connection:
        ended = setup.fence_host(connection, name)
    click.echo(f"fenced {name}; {ended} sessions ended")


@host.command(name="list")
@has_format
@click.pass_obj
def list_(operator: Operator, as_json: bool) -> None:
    """Print all hosts: how far each is behind, and when it was last in contact."""
    from guestapi.fleet import setup

    with _session(operator.settings) as connection:
        found = setup.list_hosts(connection)
    if as_json:
        print_json(
            [
                {
                    "name": one.name,
                    "role": one.role,
                    "state": one.state,
                    "instances": one.instances,
                    "behind": one.behind,
                    "contact": one.contact and one.contact.isoformat(),
                    "fault": one.fault,
                }
                for one in found
            ]
        )
        return
    print_table(
        ("NAME", "STATE", "INSTANCES", "BEHIND", "LAST CONTACT", "FAULT"),
        [
            (
                one.name,
                one.state,
                str(one.instances),
                str(one.behind),
                "never" if one.age is None else f"{max(0.0, one.age):.0f} s ago",
                printable(one.fault),
            )
            for one in found
        ],
    )


@contextmanager
def _session(settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    from guestapi.fleet.engine import session

    with session(fleet_url(settings)) as connection:
        yield connection


def _say(status: str) -> None:
    notify("READY=1", "WATCHDOG=1", f"STATUS={status}")
