"""``guestapi notices``: what was announced to instances, and whether they have acknowledged it."""

from __future__ import annotations

import click

from guestapi.cli.common import Operator, complete_instance, has_format, print_json, print_table, takes_instance
from guestapi.cli.grouping import Noun, project_of, takes_project
from guestapi.store import notices as kept
from guestapi.store.lookup import get_instance


@click.group(cls=Noun)
def notices() -> None:
    """List what 'guestapi notice' has announced to instances, and take it back."""


@notices.command(name="list")
@takes_project("Of this project alone; with NAME: default.")
@click.argument("name", required=False, shell_complete=complete_instance)
@has_format
@click.pass_context
def list_(ctx: click.Context, name: str | None, as_json: bool) -> None:
    """List the notices of NAME, or of all instances, that are not past."""
    operator: Operator = ctx.obj
    project = project_of(ctx)
    with operator.view() as store:
        instance = None if name is None else get_instance(store, project or "default", name)
        found = [one for one in kept.list_all(store, instance) if project in (None, one.project)]
    if as_json:
        print_json([{"project": one.project, "instance": one.instance, **one.notice.document} for one in found])
        return
    rows = ([one.project, one.instance, *one.notice.document.values()] for one in found)
    print_table(["PROJECT", "INSTANCE", "ID", "TYPE", "TEXT", "NOT BEFORE", "STATUS"], rows)


@notices.command()
@takes_instance
@click.argument("notice_id", metavar="[ID]", required=False)
@click.pass_obj
def cancel(operator: Operator, name: str, project: str, notice_id: str | None) -> None:
    """Take back the notice ID of instance NAME, or all of its notices. The instance hears of it."""
    with operator.writer.change() as change:
        kept.cancel(change, get_instance(change, project, name), notice_id)
