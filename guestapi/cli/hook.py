"""``guestapi hook``: what container runtimes call. Quick, and never in the container's way by surprise."""

from __future__ import annotations

import os

import click

from guestapi.cli.grouping import Noun
from guestapi.sources import hook as ringing


@click.group(cls=Noun)
def hook() -> None:
    """For container runtimes: have a container that starts registered by its follower."""


@hook.command(name="lxc")
@click.argument("arguments", nargs=-1)
@click.pass_context
def lxc_(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """LXC: lxc.hook.start-host (conf/lxc-guestapi.conf sets it). 'guestapi-hook lxc' does the same."""
    _ring(ctx, "lxc", *arguments)


@hook.command(name="oci")
@click.pass_context
def oci_(ctx: click.Context) -> None:
    """crun, runc: createRuntime, with the state on standard input. 'guestapi-hook oci' does the same."""
    _ring(ctx, "oci")


@hook.command(name="podman")
@click.pass_context
def podman_(ctx: click.Context) -> None:
    """podman: createRuntime (conf/oci-guestapi.json sets it). 'guestapi-hook podman' does the same."""
    _ring(ctx, "podman")


@hook.command(name="nspawn")
@click.argument("action", type=click.Choice(["start", "stop"]))
@click.argument("name")
@click.pass_context
def nspawn_(ctx: click.Context, action: str, name: str) -> None:
    """systemd-nspawn: ExecStartPost= of systemd-nspawn@.service. 'guestapi-hook nspawn' does the same."""
    _ring(ctx, "nspawn", action, name)


def _ring(ctx: click.Context, *words: str) -> None:
    file = ctx.find_root().params.get("config")
    all_words = [*(["--config", file] if file else []), *words]
    ctx.exit(ringing.run([os.fsencode(word) for word in all_words], dict(os.environb)))
