"""``guestapi restore``: a backup put back."""

from __future__ import annotations

from pathlib import Path

import click

from guestapi.cli.common import Operator
from guestapi.cli.grouping import Verb
from guestapi.cli.words import printable
from guestapi.store import backup


@click.command(cls=Verb)
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_obj
def restore(operator: Operator, file: Path) -> None:
    """Make the store hold what the backup FILE holds. Running instances go on, and hear of what changes."""
    done = backup.restore(operator.settings, file, audit=operator.audit)
    if done.damaged is not None:
        click.echo(printable(f"the damaged store is kept as {done.damaged}"), err=True)
    counts = f"{len(done.added)} added, {len(done.changed)} changed, {len(done.removed)} removed"
    click.echo(printable(f"restored from {file}: {counts}"))
    for word, names in (("added", done.added), ("changed", done.changed), ("removed", done.removed)):
        for name in names:
            click.echo(printable(f"{word} {name}"))
    for fingerprint in done.missing_images:
        click.echo(f"image {fingerprint[:12]}: its files are gone; 'guestapi image import' brings them back", err=True)
