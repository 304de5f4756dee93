"""``guestapi metrics``: what a monitoring system asks."""

from __future__ import annotations

from pathlib import Path

import click

from guestapi import journal
from guestapi.cli.common import Operator
from guestapi.cli.grouping import Verb


@click.command(cls=Verb)
@click.option("--socket", "sockets", multiple=True, metavar="PATH", type=click.Path(path_type=Path), help="Bind this.")
@click.pass_obj
def metrics(operator: Operator, sockets: tuple[Path, ...]) -> None:
    """Answer /metrics, /healthz and /readyz. Sockets handed over by systemd win over --socket."""
    # gevent and prometheus_client are loaded for this command alone.
    from guestapi.metrics.endpoint import serve

    journal.set_up(operator.settings.log.level)
    serve(operator.settings, sockets)
