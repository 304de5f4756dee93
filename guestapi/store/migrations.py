"""How a database gets its tables, and how older tables become those of today."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sqlalchemy.schema import CreateIndex, CreateTable

from guestapi.store.errors import StoreError
from guestapi.store.tables import VERSION, metadata, mirrors, plain

#: What makes a database of one version into one of the next. A row of the version before fits the tables after.
_UPGRADES = {
    1: (
        "ALTER TABLE instances ADD COLUMN source TEXT",
        "ALTER TABLE instances ADD COLUMN told_ready BOOLEAN",
        "ALTER TABLE images ADD COLUMN source TEXT",
        plain(CreateTable(mirrors)),
    ),
}


def check_version(connection: sqlite3.Connection, file: Path, *, create: bool) -> None:
    # Both at one moment: another process may be making the tables.
    connection.execute("BEGIN")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    connection.execute("ROLLBACK")
    if version == 0 and tables:
        raise StoreError(f"{file}: is the database of another program")
    if version == 0 and create:
        connection.execute("PRAGMA journal_mode = WAL")
        _create_tables(connection)
    elif version == 0:
        raise StoreError(f"{file}: has no tables of guestapi; 'guestapi instance add' makes them")
    elif version > VERSION:
        raise StoreError(f"{file}: has tables of version {version}, this guestapi knows version {VERSION}")
    elif version < VERSION:
        _upgrade(connection)


def _create_tables(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    # Another process may have been quicker.
    if connection.execute("PRAGMA user_version").fetchone() == (0,):
        for table in metadata.sorted_tables:
            connection.execute(plain(CreateTable(table)))
            for index in table.indexes:
                connection.execute(plain(CreateIndex(index)))
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _upgrade(connection: sqlite3.Connection) -> None:
    """Bring older tables up to date, whoever opens them first; what they hold stays."""
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for step in range(version, VERSION):
        for statement in _UPGRADES[step]:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")
