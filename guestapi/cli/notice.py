"""``guestapi notice``: announce to an instance what will be done to it, and wait until it has prepared for that."""

from __future__ import annotations

import sys

import click

from guestapi.cli.common import Operator, takes_instance
from guestapi.cli.grouping import Verb
from guestapi.cli.times import Duration
from guestapi.errors import OperatorError
from guestapi.store import notices
from guestapi.store.doorbell import Doorbell
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.lookup import get_instance

#: The exit status of ``--wait`` if the time came and nobody had acknowledged.
_DUE = 3
#: Seconds after which to look although nothing was committed.
_LOOK_SECONDS = 1.0


@click.command(cls=Verb)
@takes_instance
@click.argument("what", metavar="stop|restart|migrate|freeze|TEXT")
@click.option(
    "--in",
    "seconds",
    type=Duration(notices.MOST_SECONDS),
    required=True,
    metavar="TIME",
    help="When: 60s, 5m, 2h, up to 7d.",
)
@click.option("--wait", "waits", is_flag=True, help="Until it acknowledges (exit 0), or the time has come (exit 3).")
@click.pass_obj
def notice(operator: Operator, name: str, project: str, what: str, seconds: float, waits: bool) -> None:
    """Announce to instance NAME that it will be stopped, restarted, migrated or frozen, or announce a TEXT.

    The instance can prepare for it and acknowledge. It cannot delay anything: the command only announces, and what
    follows is done by whoever has called it. A restart or the removal of the instance cancels the notice.
    """
    try:
        doorbell = Doorbell(database_file(operator.settings.store.url)) if waits else None
    except OSError as error:
        raise StoreError(f"the store's directory cannot be watched: {error.strerror}") from None
    with operator.writer.change() as change:
        instance = get_instance(change, project, name)
        sent = notices.send(change, instance, what, seconds)
    click.echo(sent.id)
    if doorbell is not None:
        _wait(operator, doorbell, instance.name, sent)


def _wait(operator: Operator, doorbell: Doorbell, name: str, sent: notices.Notice) -> None:
    while True:
        with operator.view() as store:
            left = sent.due - notices.now()
            found = notices.find(store, sent.id)
        if found is not None and found.status == notices.ACKNOWLEDGED:
            return
        if found is None:
            raise OperatorError(
                f"{name}: the notice was cancelled", "it is, when the instance stops, restarts or is removed"
            )
        if left <= 0:
            sys.exit(_DUE)
        doorbell.wait(min(_LOOK_SECONDS, left))
