"""``guestapi follow``: keep the store as a container runtime of this host is."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import click

from guestapi import journal
from guestapi.cli.common import Operator
from guestapi.cli.grouping import Verb
from guestapi.settings import Settings
from guestapi.sources.source import Source
from guestapi.store import statuses


def _lxc(settings: Settings) -> Source:
    from guestapi.sources.lxc.source import LxcSource

    return LxcSource(settings)


def _podman(settings: Settings) -> Source:
    from guestapi.sources.podman import PODMAN, EngineSource

    return EngineSource(PODMAN, settings)


def _docker(settings: Settings) -> Source:
    from guestapi.sources.podman import DOCKER, EngineSource

    return EngineSource(DOCKER, settings)


def _oci(settings: Settings) -> Source:
    from guestapi.sources.oci import OciSource

    return OciSource(settings)


def _libvirt(settings: Settings) -> Source:
    from guestapi.sources.libvirt import LibvirtSource

    return LibvirtSource(settings)


def _nspawn(settings: Settings) -> Source:
    from guestapi.sources.nspawn import NspawnSource

    return NspawnSource(settings)


#: Each loads what it needs: not all of them are used on a host.
SOURCES: dict[str, Callable[[Settings], Source]] = {
    "docker": _docker,
    "libvirt": _libvirt,
    "lxc": _lxc,
    "nspawn": _nspawn,
    "oci": _oci,
    "podman": _podman,
}


@click.command(cls=Verb)
@click.argument("source", type=click.Choice(sorted(SOURCES)))
@click.option("--forget", is_flag=True, help="Remove all instances of SOURCE, and exit.")
@click.pass_obj
def follow(operator: Operator, source: str, forget: bool) -> None:
    """Register containers of SOURCE when they start, and note their ends. Stays in the foreground."""
    if forget:
        with operator.writer.change() as change:
            count = statuses.forget_source(change, source)
        click.echo(f"forgotten: the follower {source} and its {count} instances")
        return
    from guestapi.sources.follower import Follower
    from guestapi.sources.ledger import StoreLedger

    settings = operator.settings
    journal.set_up(settings.log.level)
    doorbell = Path(settings.sources.doorbells) / f"{source}.sock"
    follower = Follower(SOURCES[source](settings), StoreLedger(settings, source, doorbell), doorbell)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: follower.stop())
    follower.run()
