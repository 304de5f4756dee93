"""``guestapi relay``: virtual machines' connections over vsock, brought to the service.

`look_at_relay` tells `guestapi check` whether it is in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click

from guestapi import journal
from guestapi.callers.machines import is_alive
from guestapi.cli.common import Operator
from guestapi.cli.grouping import Verb
from guestapi.model import DAEMONS, Instance
from guestapi.systemd import is_active

#: The unit that listens on vsock, the one to which the relay hands over, and those of hybrid vsock.
_VSOCK, _HANDOVER, _HYBRID = "guestapi-vsock.socket", "guestapi-handover.socket", "guestapi-hybrid@*.socket"
#: What a VMM needs to give its machine a CID.
_DEVICE = Path("/dev/vhost-vsock")


@click.command(cls=Verb)
@click.pass_obj
def relay(operator: Operator) -> None:
    """Hand connections of virtual machines over to the service. Stays in the foreground.

    Sockets handed over by systemd win over the usual ports. docs/virtual-machines.md says what it needs.
    """
    from guestapi.relay.service import serve

    journal.set_up(operator.settings.log.level)
    serve(operator.settings.handover)


def look_at_relay(known: Iterable[Instance], handover: str) -> tuple[bool, str] | None:
    """Tell whether virtual machines can ask.

    Args:
        known: the instances in the store. Virtual machines of Incus and LXD ask their daemon.
        handover: path of the handover socket.

    Returns:
        Whether all is well, and what was found or what to do; None if this host has no virtual machines.
    """
    machines = [one for one in known if one.type == "virtual-machine" and one.source not in DAEMONS]
    running = [one.init for one in machines if one.init is not None and is_alive(one.init)]
    counts = f"{len(machines)} virtual machines known, {len(running)} running"
    vsock, hybrid = is_active(_VSOCK), is_active(_HYBRID)
    if not (machines or vsock or hybrid or _DEVICE.exists()):
        return None
    if any(one.cid is None for one in running) and not hybrid:
        text = "no guestapi-hybrid@.socket is active, so those with hybrid vsock cannot ask"
        return False, f"{counts}; {text}; docs/virtual-machines.md says how to start one"
    needed = any(one.cid is not None for one in running)
    if not vsock and (needed or not hybrid):
        text = f"{_VSOCK} is not active, so virtual machines cannot ask over vsock"
        return not needed, f"{counts}; {text}; 'systemctl enable --now {_VSOCK}' lets them"
    if not os.path.exists(handover):
        text = f"{handover} is missing, so nothing can be handed over to guestapi.service"
        return False, f"{counts}; {text}; 'systemctl restart {_HANDOVER}'"
    return True, f"{counts}; {_VSOCK if vsock else 'guestapi-hybrid@.socket'} is active"
