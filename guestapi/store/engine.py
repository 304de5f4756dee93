"""How the database is opened. What is particular to SQLite stands here and in `walindex`.

The database belongs to the service's user; the operator writes to it as root. SQLite gives the ``-wal`` and ``-shm``
files that it makes to the database's owner when root makes them (os_unix.c, robustFchown), so it is enough that the
database itself is given to the owner of its directory when it is created.
"""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from guestapi.store.errors import StoreBusyError, StoreError, explain
from guestapi.store.files import create as create_file
from guestapi.store.migrations import check_version

#: Seconds until what was busy is tried again.
_AGAIN_SECONDS = 0.01
#: How long a reader waits at most for the process that closes the database last and removes the write-ahead log: the
#: one time that a reader can find it locked (sqlite.org/wal.html, "Sometimes Queries Return SQLITE_BUSY In WAL Mode").
_TIDYING_SECONDS = 0.1
#: A URL: name of a kind of database and perhaps of its driver, host, path, options.
_URL = re.compile(r"(?P<kind>\w+)(?:\+\w+)?://(?P<host>[^/?]*)(?:/(?P<path>[^?]*))?(?:\?.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Database:
    """A database that was found to be in order.

    Attributes:
        file: where it is.
        lock_seconds: how long a connection waits for a lock.
    """

    file: Path
    lock_seconds: float

    def connect(self) -> sqlite3.Connection:
        """A connection, in autocommit mode: who wants a transaction begins it.

        Raises:
            sqlite3.Error: it cannot be opened.
        """
        connection = _connect(self.file, self.lock_seconds)
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        # A change is told to guests and operator once it is durable: sync at each commit, not only at checkpoints.
        connection.execute("PRAGMA synchronous = FULL")
        return connection


def database_file(url: str) -> Path:
    """The file that a ``store.url`` names.

    Raises:
        StoreError: it is no URL, not of SQLite, or not of a file.
    """
    parsed = _URL.fullmatch(url)
    if parsed is None:
        raise StoreError(f"store.url: {url!r} is no URL like sqlite:////var/lib/guestapi/store.db")
    if parsed["kind"] != "sqlite":
        raise StoreError(f"store.url: only sqlite:// is supported, not {parsed['kind']}://")
    path = parsed["path"] or ""
    if parsed["host"] or not path.startswith("/") or "\0" in path:
        raise StoreError("store.url: an absolute path is needed: sqlite:/// and then /var/lib/guestapi/store.db")
    return Path(path)


def open_writer(url: str, *, lock_seconds: float, create: bool = False) -> Database:
    """Open the database for transactions that change it.

    Args:
        url: ``store.url``.
        lock_seconds: how long to wait for another writer's transaction.
        create: make database and tables if they are missing, and give them to the owner of the directory.

    Raises:
        StoreError: it is missing, unreadable, no database, or of a newer version.
    """
    file = database_file(url)
    if create:
        _create_file(file)
    _check_tables(file, lock_seconds=lock_seconds, create=create)
    return Database(file, lock_seconds)


def open_reader(url: str) -> Database:
    """Open the database for reading: each statement sees what was committed last, and none waits for writers.

    Raises:
        StoreError: as `open_writer` does.
    """
    file = database_file(url)
    _check_tables(file, lock_seconds=_TIDYING_SECONDS, create=False)
    return Database(file, _TIDYING_SECONDS)


def _connect(file: Path, lock_seconds: float) -> sqlite3.Connection:
    # mode=rw: SQLite would make an empty database where there is none.
    return sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=lock_seconds, check_same_thread=False)


def _create_file(file: Path) -> None:
    try:
        create_file(file)
    except FileExistsError:
        return
    except OSError as error:
        raise StoreError(f"{file}: cannot be created: {error.strerror}") from None


def _check_tables(file: Path, *, lock_seconds: float, create: bool) -> None:
    until = time.monotonic() + lock_seconds
    while True:
        try:
            with closing(_connect(file, lock_seconds)) as connection:
                connection.isolation_level = None
                check_version(connection, file, create=create)
            return
        except sqlite3.Error as error:
            explained = explain(error, file)
            # A change of the journal mode does not wait for locks by itself.
            if not isinstance(explained, StoreBusyError) or time.monotonic() > until:
                raise explained from None
            time.sleep(_AGAIN_SECONDS)
