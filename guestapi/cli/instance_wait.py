"""``guestapi instance wait``: until instances run, are ready, or do not run any more."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from guestapi.cli.common import Operator, complete_instance, in_project, status
from guestapi.cli.grouping import FleetVerb
from guestapi.cli.seconds import Seconds
from guestapi.cli.words import MisuseError
from guestapi.errors import OperatorError
from guestapi.model import Instance
from guestapi.store.doorbell import Doorbell
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.lookup import get_instance

#: Seconds after which to look although nothing was committed: an init may have ended without notice.
_LOOK_SECONDS = 1.0

#: Whether an instance with a status, and a workload that has said that it is ready or not, is as it should be. The
#: status of a fleet's instance can be unknown.
_STATES: dict[str, Callable[[str, bool | None], bool]] = {
    "ready": lambda status, ready: status == "running" and bool(ready),
    "running": lambda status, _ready: status == "running",
    "stopped": lambda status, _ready: status in ("stopped", "dead"),
}


@click.command(cls=FleetVerb)
@in_project
@click.argument("name", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_instance)
@click.option(
    "--ready", "states", flag_value="ready", multiple=True, help="Until the workloads say that they are ready."
)
@click.option("--running", "states", flag_value="running", multiple=True, help="Until they run.")
@click.option("--stopped", "states", flag_value="stopped", multiple=True, help="Until they do not run any more.")
@click.option("--timeout", type=Seconds(min=0), metavar="SECONDS", help="Give up then, with exit 1.")
@click.pass_obj
def wait(
    operator: Operator, name: tuple[str, ...], project: str, states: tuple[str, ...], timeout: float | None
) -> None:
    """Wait until all of NAME... are ready, running or stopped; with --fleet, as their hosts say."""
    if len(set(states)) != 1:
        raise MisuseError("exactly one of --ready, --running and --stopped is needed")
    met = _STATES[states[0]]
    until = None if timeout is None else time.monotonic() + timeout
    if operator.is_fleet:
        left = operator.fleet.wait_until(
            [(project, one) for one in name], lambda one: met(one.status, one.ready), until
        )
    else:
        left = _wait_here(operator, project, name, lambda one: met(status(one), one.ready), until)
    if left:
        raise OperatorError(
            f"{', '.join(left)}: not {states[0]} within {timeout:g} s", "'guestapi instance list' shows what is"
        )


def _wait_here(
    operator: Operator, project: str, names: tuple[str, ...], is_met: Callable[[Instance], bool], until: float | None
) -> list[str]:
    """Wait for instances of this host until a moment of the monotonic clock; those that are not as they should be."""
    file = database_file(operator.settings.store.url)
    with operator.view() as store:
        left = [one for one in dict.fromkeys(names) if not is_met(get_instance(store, project, one))]
    try:
        doorbell = Doorbell(file)
    except OSError as error:
        raise StoreError(f"the store's directory cannot be watched: {error.strerror}") from None
    while True:
        # After the bell is heard, or a commit between would be missed.
        with operator.view() as store:
            left = [one for one in left if not is_met(get_instance(store, project, one))]
        rest = _LOOK_SECONDS if until is None else min(_LOOK_SECONDS, until - time.monotonic())
        if not left or rest <= 0:
            return left
        doorbell.wait(rest)
