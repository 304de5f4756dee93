"""``guestapi mirror``: beside a running Incus or LXD."""

from __future__ import annotations

import click

from guestapi import journal
from guestapi.cli.common import Operator
from guestapi.cli.grouping import Verb
from guestapi.store import images, statuses
from guestapi.store.lookup import list_images
from guestapi.systemd import notify

#: Where the REST API of each daemon listens.
SOCKETS = {"incus": "/var/lib/incus/unix.socket", "lxd": "/var/lib/lxd/unix.socket"}
#: Where that of the snap of LXD listens, which has a mount namespace of its own: the host sees this directory too.
SNAP_SOCKET = "/var/snap/lxd/common/lxd/unix.socket"


@click.command(cls=Verb)
@click.argument("daemon", type=click.Choice(sorted(SOCKETS)))
@click.option("--socket", metavar="PATH", help="Where the daemon listens, if not at its usual place.")
@click.option("--snap", is_flag=True, help="The LXD of the snap, below /var/snap/lxd.")
@click.option("--forget", is_flag=True, help="Remove everything that was mirrored, and exit.")
@click.pass_obj
def mirror(operator: Operator, daemon: str, socket: str | None, snap: bool, forget: bool) -> None:
    """Copy instances and images of a running Incus or LXD to the store. Stays in the foreground.

    While the daemon is away, the command waits for it.
    """
    if snap and (daemon != "lxd" or socket is not None):
        raise click.UsageError("--snap is for lxd, and takes the place of --socket")
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
    Mirror(operator.settings, daemon, socket or (SNAP_SOCKET if snap else SOCKETS[daemon]), _say).run()


def _say(status: str) -> None:
    notify("READY=1", "WATCHDOG=1", f"STATUS={status}")
