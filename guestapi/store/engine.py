"""How the database is opened. What is particular to SQLite stands here and in `walindex`.

The database belongs to the service's user; the operator writes to it as root. SQLite gives the ``-wal`` and ``-shm``
files that it makes to the database's owner when root makes them (os_unix.c, robustFchown), so it is enough that the
database itself is given to the owner of its directory when it is created.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from guestapi.store.errors import AS_ROOT, StoreBusyError, StoreError, explain
from guestapi.store.files import Identity
from guestapi.store.files import create as create_file
from guestapi.store.tables import VERSION

if TYPE_CHECKING:
    from pathlib import Path

#: Seconds until what was busy is tried again.
_AGAIN_SECONDS = 0.01
#: How long a reader waits at most for the process that closes the database last and removes the write-ahead log: the
#: one time that a reader can find it locked (sqlite.org/wal.html, "Sometimes Queries Return SQLITE_BUSY In WAL Mode").
_TIDYING_SECONDS = 0.1
#: How long a process waits at most until the write-ahead log is the database owner's: root makes it, and only then
#: gives it away. It takes microseconds, but a busy machine can stop root's process in between.
_GIVING_SECONDS = 2.0
#: Bytes that stand for themselves in a URI.
_PLAIN = frozenset(b"/-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
#: A URL: name of a kind of database and perhaps of its driver, host, path, options.
_URL = re.compile(r"(?P<kind>\w+)(?:\+\w+)?://(?P<host>[^/?]*)(?:/(?P<path>[^?]*))?(?:\?.*)?", re.DOTALL)


class Database(NamedTuple):
    """A database that was found to be in order.

    Attributes:
        path: where it is.
        lock_seconds: how long a connection waits for a lock.
    """

    path: str
    lock_seconds: float

    def connect(self) -> sqlite3.Connection:
        """A connection, in autocommit mode: who wants a transaction begins it.

        Raises:
            sqlite3.Error: it cannot be opened.
        """
        connection = _connect(self.path, self.lock_seconds)
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        # A change is told to guests and operator once it is durable: sync at each commit, not only at checkpoints.
        connection.execute("PRAGMA synchronous = FULL")
        return connection


class KeptConnections:
    """Connections to a database that stay open between uses, as long as the same file lies there.

    To open one and to read its tables takes 0.3 ms, a look at an instance 0.15 ms. Several threads may use it: each has
    a connection of its own meanwhile.
    """

    def __init__(self, database: Database) -> None:
        """Open nothing yet."""
        self._database = database
        self._idle: list[tuple[Identity, sqlite3.Connection]] = []

    @contextmanager
    def use(self) -> Iterator[sqlite3.Connection]:
        """A connection in autocommit mode until the end of the block. One that was used when it raised is closed.

        Raises:
            sqlite3.Error: it cannot be opened.
        """
        there = self._identity()
        connection = self._take(there) or self._database.connect()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        # It may have been opened after another file was put there.
        if there is not None and there == self._identity():
            self._idle.append((there, connection))
        else:
            connection.close()

    def _take(self, there: Identity | None) -> sqlite3.Connection | None:
        while self._idle:
            try:
                opened, connection = self._idle.pop()
            except IndexError:
                break  # Another thread took it.
            # As long as it is open, no other file gets its identity.
            if opened == there:
                return connection
            connection.close()
        return None

    def _identity(self) -> Identity | None:
        try:
            status = os.stat(self._database.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino


def database_path(url: str) -> str:
    """The path of the file that a ``store.url`` names.

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
    return path


def database_file(url: str) -> Path:
    """As `database_path`, with what a `Path` can do."""
    # PERF: loaded here. Commands that scripts call in loops have no use for it.
    from pathlib import Path

    return Path(database_path(url))


def open_writer(url: str, *, lock_seconds: float, create: bool = False) -> Database:
    """Open the database for transactions that change it.

    Args:
        url: ``store.url``.
        lock_seconds: how long to wait for another writer's transaction.
        create: make database and tables if they are missing, and give them to the owner of the directory.

    Raises:
        StoreError: it is missing, unreadable, no database, or of a newer version.
    """
    path = database_path(url)
    if create:
        _create_file(path)
    _check_tables(path, lock_seconds=lock_seconds, create=create)
    return Database(path, lock_seconds)


def open_reader(url: str) -> Database:
    """Open the database for reading: each statement sees what was committed last, and none waits for writers.

    Raises:
        StoreError: as `open_writer` does.
    """
    path = database_path(url)
    _check_tables(path, lock_seconds=_TIDYING_SECONDS, create=False)
    return Database(path, _TIDYING_SECONDS)


def _connect(path: str, lock_seconds: float) -> sqlite3.Connection:
    # What means something in a URI is escaped (sqlite.org/uri.html). mode=rw: SQLite would make an empty database where
    # there is none.
    escaped = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in os.fsencode(path))
    return sqlite3.connect(f"file://{escaped}?mode=rw", uri=True, timeout=lock_seconds, check_same_thread=False)


def _create_file(path: str) -> None:
    try:
        create_file(path)
    except FileExistsError:
        return
    except OSError as error:
        denied = isinstance(error, PermissionError) and os.geteuid() != 0
        raise StoreError(f"{path}: cannot be created: {error.strerror}", AS_ROOT if denied else None) from None


def _check_tables(path: str, *, lock_seconds: float, create: bool) -> None:
    began = time.monotonic()
    while True:
        try:
            with closing(_connect(path, lock_seconds)) as connection:
                connection.isolation_level = None
                if connection.execute("PRAGMA user_version").fetchone() != (VERSION,):
                    # PERF: loaded where there is something to do.
                    from guestapi.store.migrations import check_version

                    check_version(connection, path, create=create)
            return
        except sqlite3.Error as error:
            explained = explain(error, path)
            if isinstance(explained, StoreBusyError):
                # A change of the journal mode does not wait for locks by itself.
                seconds = lock_seconds
            elif getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CANTOPEN and os.access(
                path, os.R_OK | os.W_OK
            ):
                seconds = _GIVING_SECONDS
            else:
                raise explained from None
            if time.monotonic() > began + seconds:
                raise explained from None
            time.sleep(_AGAIN_SECONDS)
