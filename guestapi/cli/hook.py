"""``guestapi hook``: what container runtimes call. Quick, and never in the container's way by surprise."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import click
import systemd.journal

from guestapi.cli.common import Operator
from guestapi.errors import GuestapiError
from guestapi.settings import SettingsError
from guestapi.sources import hook as ringing
from guestapi.sources import nspawn_hooked as nspawn
from guestapi.sources import oci_hooked as oci
from guestapi.sources.register import Report, register

#: Seconds until the runtime, and the container, go on in any case.
_LIMIT_SECONDS = 2.0


class _HookTimeoutError(Exception):
    """The time is up."""


@click.group()
def hook() -> None:
    """For container runtimes: register a container that starts, note that it has ended."""


@hook.command(name="lxc")
@click.argument("arguments", nargs=-1)
@click.pass_context
def lxc_(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """LXC: lxc.hook.start-host (conf/lxc-guestapi.conf sets it). 'guestapi-hook lxc' does the same."""
    file = ctx.find_root().params.get("config")
    words = [*(["--config", file] if file else []), "lxc", *arguments]
    ctx.exit(ringing.run([os.fsencode(word) for word in words], dict(os.environb)))


@hook.command(name="oci")
@click.pass_obj
def oci_(operator: Operator) -> None:
    """podman, crun, runc: createRuntime and poststop, with the state on standard input."""
    _run(operator, "oci", lambda: oci.report(sys.stdin.buffer.read(oci.STATE_BYTES)))


@hook.command(name="nspawn")
@click.argument("action", type=click.Choice(["start", "stop"]))
@click.argument("name")
@click.pass_obj
def nspawn_(operator: Operator, action: str, name: str) -> None:
    """systemd-nspawn: ExecStartPost= and ExecStopPost= of systemd-nspawn@.service (a drop-in sets them)."""
    _run(operator, "nspawn", lambda: nspawn.report(action, name, os.environ))


def _run(operator: Operator, runtime: str, look: Callable[[], Report]) -> None:
    """Register what `look` finds; a failure is logged, and is the container's only if the operator wants so."""
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.setitimer(signal.ITIMER_REAL, _LIMIT_SECONDS)
    try:
        register(operator.settings, look())
    except _HookTimeoutError:
        _failed(operator, runtime, f"not done within {_LIMIT_SECONDS:.0f} s")
    except GuestapiError as error:
        _failed(operator, runtime, str(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _on_alarm(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise _HookTimeoutError


def _failed(operator: Operator, runtime: str, why: str) -> None:
    text = f"{runtime} hook: {why}"
    systemd.journal.send(text, PRIORITY="3", SYSLOG_IDENTIFIER="guestapi")
    try:
        refuse = operator.settings.hooks.on_failure == "refuse"
    except SettingsError:
        refuse = False
    if refuse:
        raise click.ClickException(text)
    click.echo(f"{text}; the container goes on without", err=True)
