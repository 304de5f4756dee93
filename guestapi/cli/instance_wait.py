"""``guestapi instance wait``: until instances run, are ready, or do not run any more."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from guestapi.cli.common import Operator, complete_instance, in_project, status
from guestapi.cli.grouping import Verb
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

_STATES: dict[str, Callable[[Instance], bool]] = {
    "ready": lambda one: one.ready and status(one) == "running",
    "running": lambda one: status(one) == "running",
    "stopped": lambda one: status(one) != "running",
}


@click.command(cls=Verb)
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
    """Wait until all of NAME... are ready, running or stopped."""
    if len(set(states)) != 1:
        raise MisuseError("exactly one of --ready, --running and --stopped is needed")
    met = _STATES[states[0]]
    until = None if timeout is None else time.monotonic() + timeout
    file = database_file(operator.settings.store.url)
    with operator.view() as store:
        left = [one for one in dict.fromkeys(name) if not met(get_instance(store, project, one))]
    try:
        doorbell = Doorbell(file)
    except OSError as error:
        raise StoreError(f"the store's directory cannot be watched: {error.strerror}") from None
    while True:
        # After the bell is heard, or a commit between would be missed.
        with operator.view() as store:
            left = [one for one in left if not met(get_instance(store, project, one))]
        if not left:
            return
        rest = _LOOK_SECONDS if until is None else min(_LOOK_SECONDS, until - time.monotonic())
        if rest <= 0:
            raise OperatorError(
                f"{', '.join(left)}: not {states[0]} within {timeout:g} s", "'guestapi instance list' shows what is"
            )
        doorbell.wait(rest)
