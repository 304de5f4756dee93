"""A store in memory, for the time of one command: what changes instances of this host changes those in it, too."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import MappingProxyType

from guestapi.model import Instance
from guestapi.records import Profile
from guestapi.store.layer_rows import add_operators_layers
from guestapi.store.profiles import write_content
from guestapi.store.tables import INDEXES, TABLES
from guestapi.store.transaction import Change

#: The revision of an instance that was loaded, until it is changed.
UNCHANGED = 1
_ADD = (
    "INSERT INTO instances (id, revision, run, ready, project, name, type, uuid, cloud_init_id, location, kept) "
    f"VALUES (?, {UNCHANGED}, 0, FALSE, ?, ?, ?, ?, ?, ?, TRUE)"
)
_ADD_PROFILE = "INSERT INTO profiles (id, project, name) VALUES (?, ?, ?)"
_APPLY = "INSERT INTO instance_profiles (instance_id, position, profile_id) VALUES (?, ?, ?)"


@contextmanager
def scratch(configuration_bytes: int) -> Iterator[Change]:
    """An empty store in memory, which is gone after the block.

    Args:
        configuration_bytes: how much the configuration and devices of an instance may have in all.
    """
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        for statement in (*TABLES.values(), *INDEXES.values()):
            connection.execute(statement)
        connection.execute("BEGIN")
        yield Change(connection, configuration_bytes, silent=True)


def load_profiles(change: Change, found: Iterable[Profile]) -> None:
    """Have profiles in the store, with the ids that they have.

    Args:
        change: of an empty store.
        found: they are taken as they are.
    """
    for one in found:
        change.connection.execute(_ADD_PROFILE, (one.id, one.project, one.name))
        write_content(change, Profile(one.id, one.project, one.name), one)


def load_instances(
    change: Change, instances: Iterable[Instance], applied: Mapping[int, Sequence[int]] = MappingProxyType({})
) -> None:
    """Have instances in the store, with the ids that they have, all of them the operator's. None runs.

    Args:
        change: of a store that has none yet.
        instances: they are taken as they are, but for the names of their profiles.
        applied: ids of the profiles of each, the weakest first.
    """
    found = list(instances)
    change.connection.executemany(
        _ADD,
        [(one.id, one.project, one.name, one.type, one.uuid, one.cloud_init_id, one.location) for one in found],
    )
    add_operators_layers(change, found)
    change.connection.executemany(
        _APPLY,
        (
            (number, position, profile)
            for number, profiles in applied.items()
            for position, profile in enumerate(profiles)
        ),
    )


def list_revisions(change: Change) -> list[tuple[int, int]]:
    """Return the id and the revision of each instance, by project and name."""
    return change.connection.execute("SELECT id, revision FROM instances ORDER BY project, name").fetchall()
