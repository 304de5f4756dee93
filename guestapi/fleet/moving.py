"""How an instance goes to another host, so that no two hosts have it at any moment.

    next_host is set ----> the old host removes it from its store, and commits ----> it calls release:
    host = next_host, epoch + 1, in one transaction ----> the new host sees it

A host that cannot be reached does not release anything, and goes on serving. With `fenced`, the operator says that it
is off; then the instance goes at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from guestapi.fleet import plan
from guestapi.fleet.engine import FleetError, UncertainError, commit
from guestapi.fleet.operating import AlreadyDoneError, Place, Wishes, check_revision, unknown_instance
from guestapi.fleet.plan import FleetInstance
from guestapi.store.errors import ConflictError

if TYPE_CHECKING:
    import psycopg

_LEAVE = "UPDATE guestapi.instances SET next_host = %s, revision = %s WHERE uuid = %s"
_GO = "UPDATE guestapi.instances SET host = %s, epoch = epoch + 1, next_host = NULL, revision = %s WHERE uuid = %s"
_CONTACT = (
    "SELECT state, extract(epoch FROM clock_timestamp() - contact)::float8 FROM guestapi.hosts "
    "LEFT JOIN guestapi.seen ON seen.host = name WHERE name = %s"
)
_APPLIED = "SELECT coalesce(applied, -1) FROM guestapi.seen WHERE host = %s"
#: Seconds between two looks whether an instance is there; for which a move is ordered again after its server was lost;
#: and between two such orders.
_WAIT_SECONDS, _ASK_AGAIN_SECONDS, _ASK_AGAIN_PAUSE = 0.05, 60.0, 0.5

Connect = Callable[[], "AbstractContextManager[psycopg.Connection[Any]]"]


class Move(NamedTuple):
    """A move that was ordered.

    Attributes:
        instance: as it was before; of a move that was ordered before, as it is now.
        to: the host that is to have it.
        done: it is that host's already.
        state: of the old host, ``active`` or ``fenced``.
        age: seconds since the last contact of the old host; None: there was none.
    """

    instance: FleetInstance
    to: str
    done: bool
    state: str
    age: float | None


def move(connect: Connect, place: Place, to: str, *, fenced: bool, wishes: Wishes) -> Move:
    """Order that an instance goes to another host. To its own host: call the move off.

    Args:
        connect: opens a session by the role of an operator.
        place: project and name of the instance.
        to: the host that is to have it.
        fenced: the operator says that the old host is off, so it need not release the instance.
        wishes: what the operator wants.

    Raises:
        UnknownInstanceError: there is no such instance.
        ConflictError: it has another revision, or its host is not fenced.
        AlreadyDoneError: the operation was carried out before, whatever became of the instance since.
        UncertainError: it is not certain that the move was ordered.
    """
    until = time.monotonic() + _ASK_AGAIN_SECONDS
    lost: UncertainError | None = None
    while True:
        try:
            with connect() as connection:
                return _order(connection, place, to, fenced, wishes)
        except AlreadyDoneError:
            if lost is None:
                raise
            return find_move(connect, place)
        except UncertainError as error:
            if not error.lost:
                raise
            # The same order again: it changes nothing if it was carried out.
            lost = error
        except FleetError:
            if lost is None:
                raise
        if time.monotonic() > until:
            raise lost
        time.sleep(_ASK_AGAIN_PAUSE)


def find_move(connect: Connect, place: Place) -> Move:
    """Return where an instance goes now, or is.

    Args:
        connect: as of `move`.
        place: project and name of the instance.

    Raises:
        UnknownInstanceError: there is no such instance.
    """
    with connect() as connection:
        found = plan.read_facts(connection, [place])
        if not found:
            raise unknown_instance(place)
        (one,) = found
        return Move(one, one.next_host or one.host, one.next_host is None, *_contact(connection, one.host))


def wait_until_there(connect: Connect, ordered: Move, until: float | None) -> Move | None:
    """Wait until the new host has an instance in its store.

    Args:
        connect: as of `move`.
        ordered: the move.
        until: when to give up, by the monotonic clock; None: never.

    Returns:
        How the move is; None: the instance is there.

    Raises:
        ConflictError: the instance was removed, or its move was called off, or it was sent elsewhere.
    """
    with connect() as connection:
        while True:
            found = plan.read_one(connection, ordered.instance.uuid)
            if found is None or ordered.to not in (found.host, found.next_host):
                raise ConflictError(
                    f"instance {ordered.instance.name!r} was removed, or does not go to {ordered.to} any more"
                )
            if found.host == ordered.to:
                row = connection.execute(_APPLIED, (ordered.to,)).fetchone()
                if row is not None and row[0] >= found.revision:
                    return None
            if until is not None and time.monotonic() > until:
                state, age = _contact(connection, found.host)
                return Move(found, ordered.to, found.host == ordered.to, state, age)
            time.sleep(_WAIT_SECONDS)


def _order(connection: psycopg.Connection[Any], place: Place, to: str, fenced: bool, wishes: Wishes) -> Move:
    connection.execute("BEGIN")
    found, states = plan.lock(connection, [place], {to})
    if plan.find_operation(connection, wishes.operation) is not None:
        raise AlreadyDoneError
    plan.refuse_fenced(states, [to])
    if not found:
        raise unknown_instance(place)
    (instance,) = found
    state, age = _contact(connection, instance.host)
    check_revision(found, wishes.if_revision)
    if fenced and state != "fenced" and instance.host != to:
        raise ConflictError(
            f"host {instance.host} is not fenced, so it may still serve {instance.name!r}",
            f"make sure that it is off, then 'guestapi fleet host fence {instance.host}'",
        )
    revisions = {}
    if instance.host == to:
        if instance.next_host is not None:
            revisions = _write(connection, _LEAVE, None, instance, [to])
    elif fenced:
        revisions = _write(connection, _GO, to, instance, [instance.host, to])
    elif instance.next_host != to:
        revisions = _write(connection, _LEAVE, to, instance, [instance.host])
    plan.note_operation(connection, wishes.operation, revisions)
    commit(connection)
    return Move(instance, to, fenced or instance.host == to, state, age)


def _write(
    connection: psycopg.Connection[Any], statement: str, to: str | None, instance: FleetInstance, hosts: list[str]
) -> dict[str, int]:
    revisions = {host: plan.note(connection, host, [instance.uuid]) for host in sorted(hosts)}
    number = revisions[to] if to in revisions else revisions[instance.host]
    connection.execute(statement.encode(), (to, number, instance.uuid))
    return revisions


def _contact(connection: psycopg.Connection[Any], host: str) -> tuple[str, float | None]:
    row = connection.execute(_CONTACT, (host,)).fetchone()
    assert row is not None, "an instance's host is there"
    return row[0], row[1]
