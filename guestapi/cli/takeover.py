"""``guestapi takeover``: in the place of the guest socket of a running Incus or LXD."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from guestapi import journal
from guestapi.cli.common import Operator
from guestapi.cli.grouping import Verb
from guestapi.dialects import DIALECTS
from guestapi.systemd import notify, reopen

#: What our socket is called beside the daemon's own, which is called ``sock``.
OURS = "guestapi.sock"


@click.command(cls=Verb)
@click.argument("daemon", type=click.Choice(["incus", "lxd"]))
@click.pass_obj
def takeover(operator: Operator, daemon: str) -> None:
    """Keep our socket in the place of the daemon's own. Stays in the foreground; docs/incus.md says what it needs."""
    from guestapi.mirror.takeover import Takeover

    journal.set_up(operator.settings.log.level)
    path = Path(DIALECTS[daemon].socket)
    ours = path.with_name(OURS)
    notify("READY=1")
    Takeover(ours, path, partial(reopen, DIALECTS[daemon].unit, ours)).run()
