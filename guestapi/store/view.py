"""The store at one moment, opened for reading. What can be asked of it stands in `lookup`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from guestapi.store.engine import KeptConnections, open_reader
from guestapi.store.errors import explained
from guestapi.store.rows import snapshot


class View(NamedTuple):
    """The store at one moment.

    Attributes:
        connection: for the modules of this room alone.
    """

    connection: sqlite3.Connection


class Views:
    """Looks at the store again and again: it is checked once, and stays open. Several threads may use it."""

    def __init__(self, url: str) -> None:
        """Open the store.

        Args:
            url: ``store.url``.

        Raises:
            StoreError: the store is missing or cannot be used.
        """
        database = open_reader(url)
        self._path = database.path
        self._connections = KeptConnections(database)

    @contextmanager
    def view(self) -> Iterator[View]:
        """Look at the store as it is now, and stays until the end of the block.

        Raises:
            StoreError: it cannot be used any more.
        """
        with explained(self._path), self._connections.use() as connection, snapshot(connection):
            yield View(connection)


@contextmanager
def view(url: str) -> Iterator[View]:
    """Look once at the store at the URL `url`; as `Views` does.

    Raises:
        StoreError: it is missing or cannot be used.
    """
    database = open_reader(url)
    with explained(database.path), closing(database.connect()) as connection, snapshot(connection):
        yield View(connection)
