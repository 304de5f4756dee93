"""``guestapi backup``: the store as one file."""

from __future__ import annotations

from pathlib import Path

import click

from guestapi.cli.common import Operator
from guestapi.cli.grouping import Verb
from guestapi.cli.words import printable
from guestapi.store.backup import back_up


@click.command(cls=Verb)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@click.pass_obj
def backup(operator: Operator, file: Path, force: bool) -> None:
    """Write what the store holds to FILE, while everybody goes on writing. Image files are not in it."""
    saved = back_up(operator.settings.store.url, file, replace=force)
    click.echo(printable(f"{file}: {saved.instances} instances, {saved.images} images, {saved.size} bytes"))
