"""``guestapi relay``: virtual machines' connections over vsock, brought to the service."""

from __future__ import annotations

import click

from guestapi import journal
from guestapi.cli.common import Operator
from guestapi.cli.grouping import Verb


@click.command(cls=Verb)
@click.pass_obj
def relay(operator: Operator) -> None:
    """Hand connections of virtual machines over to the service. Stays in the foreground.

    Sockets handed over by systemd win over the usual ports. docs/virtual-machines.md says what it needs.
    """
    from guestapi.relay.service import serve

    journal.set_up(operator.settings.log.level)
    serve(operator.settings.handover)
