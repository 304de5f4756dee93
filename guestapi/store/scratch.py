"""A store in memory, for the time of one command: what changes instances of this host changes those in it, too."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

from guestapi.store.tables import INDEXES, TABLES
from guestapi.store.transaction import Change


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
        yield Change(connection, configuration_bytes)
