"""``guestapi mirror``: beside a running Incus or LXD."""

from __future__ import annotations

import click

from guestapi import journal
from guestapi.cli.common import Operator
from guestapi.store import images, statuses
from guestapi.store.lookup import list_images
from guestapi.systemd import notify

#: Where the REST API of each daemon listens.
SOCKETS = {"incus": "/var/lib/incus/unix.socket", "lxd": "/var/lib/lxd/unix.socket"}


@click.command()
@click.argument("daemon", type=click.Choice(sorted(SOCKETS)))
@click.option("--socket", metavar="PATH", help="Where the daemon listens, if not at its usual place.")
@click.option("--forget", is_flag=True, help="Remove everything that was mirrored, and exit.")
@click.pass_obj
def mirror(operator: Operator, daemon: str, socket: str | None, forget: bool) -> None:
    """Copy instances and images of a running Incus or LXD to the store. Stays in the foreground.

    While the daemon is away, the command waits for it.
    """
    if forget:
        with operator.writer.change() as change:
            count = statuses.forget_source(change, daemon)
            mirrored = [image.fingerprint for image in list_images(change) if image.source == daemon]
        for fingerprint in mirrored:
            images.remove_image(operator.writer, images.directory(operator.settings), fingerprint)
        click.echo(f"forgotten: the mirror {daemon}, its {count} instances and {len(mirrored)} images")
        return
    # An HTTP client and all that: for this command alone.
    from guestapi.mirror.mirror import Mirror

    journal.set_up(operator.settings.log.level)
    Mirror(operator.settings, daemon, socket or SOCKETS[daemon], _say).run()


def _say(status: str) -> None:
    notify("READY=1", "WATCHDOG=1", f"STATUS={status}")
