"""What a fleet has placed on this host, and up to where the store is as the fleet's database.

Rules: a placed instance is one without a source until a runtime has a container of its name; its configuration is the
operator's layer. The cursor is written in the transaction with the last change that it stands for, so a follower that
is killed anywhere resumes.
"""

from __future__ import annotations

from typing import NamedTuple

from guestapi.model import Instance
from guestapi.store.lookup import Moment
from guestapi.store.transaction import Change

_LIST = "SELECT uuid, id, epoch, project, name FROM placements JOIN instances ON id = instance_id"
_PLACE = "INSERT INTO placements (instance_id, epoch) VALUES (?, ?) ON CONFLICT DO UPDATE SET epoch = excluded.epoch"
_CURSOR = "SELECT id, timeline, revision FROM fleet"
_WRITE_CURSOR = (
    "INSERT INTO fleet (number, id, timeline, revision) VALUES (1, ?, ?, ?) ON CONFLICT DO UPDATE "
    "SET id = excluded.id, timeline = excluded.timeline, revision = excluded.revision"
)
_STATUS = "SELECT id, timeline, revision, connected, contact, lag, fault FROM fleet"
_WRITE_STATUS = (
    "INSERT INTO fleet (number, id, timeline, revision, connected, contact, lag, fault) "
    "VALUES (1, '', 0, 0, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET connected = excluded.connected, "
    "contact = excluded.contact, lag = excluded.lag, fault = excluded.fault"
)
_REPORTS = (
    "SELECT uuid, epoch, run, init_pid IS NOT NULL, ready FROM placements JOIN instances ON instances.id = instance_id"
)


class Cursor(NamedTuple):
    """Up to where the store is as a fleet's database.

    Attributes:
        fleet: identity of the fleet; empty: nothing was seen of it yet.
        timeline: of the database's history.
        revision: of this host there.
    """

    fleet: str = ""
    timeline: int = 0
    revision: int = 0


class Placed(NamedTuple):
    """A placed instance, as the store has it.

    Attributes:
        id: the store's number of it.
        epoch: grows when it goes to another host.
        project: of the instance.
        name: of the instance.
    """

    id: int
    epoch: int
    project: str
    name: str


class PlacedState(NamedTuple):
    """What this host says of a placed instance; attributes as of `Instance`."""

    uuid: str
    epoch: int
    run: int
    running: bool
    ready: bool


class FleetStatus(NamedTuple):
    """How the follower of the fleet is; attributes as of `SourceStatus`.

    Attributes:
        cursor: up to where the store is as the fleet's database.
        connected: it is followed now.
        contact: when it last answered, in seconds of Unix time.
        lag: seconds from the look to the commit.
        fault: what is wrong, in one sentence.
    """

    cursor: Cursor = Cursor()
    connected: bool = False
    contact: float = 0.0
    lag: float = 0.0
    fault: str = ""


def list_placed(store: Moment) -> dict[str, Placed]:
    """Return all placed instances by UUID."""
    return {uuid: Placed(*row) for uuid, *row in store.connection.execute(_LIST)}


def list_placed_states(store: Moment) -> list[PlacedState]:
    """Return what is to be said of each placed instance."""
    return [
        PlacedState(uuid, epoch, run, bool(running), bool(ready))
        for uuid, epoch, run, running, ready in store.connection.execute(_REPORTS)
    ]


def place(change: Change, instance: Instance, epoch: int) -> None:
    """Record that the fleet has placed an instance here."""
    change.connection.execute(_PLACE, (instance.id, epoch))


def read_cursor(store: Moment) -> Cursor:
    """Return up to where the store is as the fleet's database."""
    row = store.connection.execute(_CURSOR).fetchone()
    return Cursor(*row) if row is not None else Cursor()


def write_cursor(change: Change, cursor: Cursor) -> None:
    """Record up to where the store is as the fleet's database."""
    change.connection.execute(_WRITE_CURSOR, cursor)


def read_status(store: Moment) -> FleetStatus | None:
    """Return how the follower is; None: this host has never followed a fleet."""
    row = store.connection.execute(_STATUS).fetchone()
    if row is None:
        return None
    *cursor, connected, contact, lag, fault = row
    return FleetStatus(Cursor(*cursor), bool(connected), contact, lag, fault)


def record_fleet_status(change: Change, status: FleetStatus) -> None:
    """Record how the follower is; the cursor stays."""
    change.connection.execute(_WRITE_STATUS, (status.connected, status.contact, status.lag, status.fault))


def forget_fleet(change: Change) -> None:
    """Record that this host follows no fleet. Its placed instances become its own, and so do their profiles."""
    # PERF: loaded for this alone.
    from guestapi.store import placed_profiles

    placed_profiles.remove_unused(change, placed_profiles.list_unused(change))
    placed_profiles.keep_all(change)
    change.connection.execute("DELETE FROM placements")
    change.connection.execute("DELETE FROM fleet")
    change.connection.execute("DELETE FROM source_problems WHERE source = 'fleet'")
