"""The tables, and how the database is opened. Everything about SQLite in particular stands here.

The database belongs to the service's user; the operator writes to it as root. SQLite gives the ``-wal`` and ``-shm``
files that it makes to the database's owner when root makes them (os_unix.c, robustFchown), so it is enough that the
database itself is given to the owner of its directory when it is created.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateIndex, CreateTable

from guestapi.store.files import create as create_file

#: Kept in SQLite's ``user_version``. Grows with every change of the tables.
VERSION = 2

#: Seconds until what was busy is tried again.
_AGAIN_SECONDS = 0.01
#: How long a reader waits at most for whoever was the last to have the database open, and now puts its log away: the
#: one time that a reader can find it locked (sqlite.org/wal.html, "Sometimes Queries Return SQLITE_BUSY In WAL Mode").
_TIDYING_SECONDS = 0.1


class StoreError(Exception):
    """The store cannot be used; the text is one sentence for the operator."""


class StoreBusyError(StoreError):
    """Another writer held the store for longer than ``store.lock_seconds``; trying again is right."""


class ConflictError(StoreError):
    """The change does not fit what the store holds; the text says why."""


class UnknownInstanceError(StoreError):
    """There is no such instance."""


class UnknownImageError(StoreError):
    """There is no such image, or more than one."""


metadata = MetaData()

instances = Table(
    "instances",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("revision", Integer, nullable=False, default=1),
    Column("run", Integer, nullable=False, default=0),
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("uuid", Text, nullable=False, unique=True),
    Column("cloud_init_id", Text, nullable=False),
    Column("location", Text),
    Column("ready", Boolean, nullable=False, default=False),
    # Which mirror it belongs to, and what that one's daemon holds of its readiness; null: it is the operator's.
    Column("source", Text),
    Column("told_ready", Boolean),
    # The identity of a running instance: model.Init. All set, or none.
    Column("init_pid", Integer),
    Column("init_start_time", Integer),
    Column("init_boot_id", Text),
    Column("init_namespace", Integer),
    UniqueConstraint("project", "name"),
    # An id is never given to another instance: a worker may still hold what it knows of the old one.
    sqlite_autoincrement=True,
)
Index("instances_by_namespace", instances.c.init_namespace)

config = Table(
    "config",
    metadata,
    Column("instance_id", ForeignKey("instances.id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

devices = Table(
    "devices",
    metadata,
    Column("instance_id", ForeignKey("instances.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("definition", JSON, nullable=False),
)

images = Table(
    "images",
    metadata,
    Column("fingerprint", Text, primary_key=True),
    Column("type", Text, nullable=False),
    Column("public", Boolean, nullable=False),
    Column("cached", Boolean, nullable=False),
    Column("created", Float, nullable=False),
    # Which mirror it belongs to; null: the operator's.
    Column("source", Text),
)

# One or two an image: model.Image.files.
image_files = Table(
    "image_files",
    metadata,
    Column("fingerprint", ForeignKey("images.fingerprint", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("extension", Text, nullable=False),
    Column("size", Integer, nullable=False),
    Column("mtime_ns", Integer, nullable=False),
)

image_aliases = Table(
    "image_aliases",
    metadata,
    Column("alias", Text, primary_key=True),
    Column("fingerprint", ForeignKey("images.fingerprint", ondelete="CASCADE"), nullable=False),
)
Index("image_aliases_by_image", image_aliases.c.fingerprint)

# How the mirrors of running daemons are: model.Mirror.
mirrors = Table(
    "mirrors",
    metadata,
    Column("name", Text, primary_key=True),
    Column("socket", Text, nullable=False),
    Column("connected", Boolean, nullable=False),
    Column("contact", Float, nullable=False),
    Column("lag", Float, nullable=False),
    Column("fault", Text, nullable=False),
)

# The change log: ids are in the order of commits, without holes.
notifications = Table(
    "notifications",
    metadata,
    Column("id", Integer, primary_key=True),
    # No foreign key: the log tells of instances that are gone.
    Column("instance_id", Integer, nullable=False),
    Column("project", Text, nullable=False),
    Column("instance", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("timestamp", Text, nullable=False),
    Column("written", Float, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("for_guest", Boolean, nullable=False),
    sqlite_autoincrement=True,
)
Index("notifications_by_instance", notifications.c.instance_id, notifications.c.id)


def plain(statement: CreateTable | CreateIndex | Select[Any]) -> str:
    """A statement as the driver takes it, with named parameters."""
    return str(statement.compile(dialect=sqlite.dialect(paramstyle="named")))


#: What makes a database of one version into one of the next. A row of the version before fits the tables after.
_UPGRADES = {
    1: (
        "ALTER TABLE instances ADD COLUMN source TEXT",
        "ALTER TABLE instances ADD COLUMN told_ready BOOLEAN",
        "ALTER TABLE images ADD COLUMN source TEXT",
        plain(CreateTable(mirrors)),
    ),
}


def database_file(url: str) -> Path:
    """The file that a ``store.url`` names.

    Raises:
        StoreError: it is no SQLAlchemy URL, not of SQLite, or not of a file.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # ValueError: its port is no number.
        raise StoreError(f"store.url: {url!r} is no SQLAlchemy URL like sqlite:////var/lib/guestapi/store.db") from None
    if parsed.get_backend_name() != "sqlite":
        raise StoreError(f"store.url: only sqlite:// is supported, not {parsed.get_backend_name()}://")
    if not parsed.database or not parsed.database.startswith("/") or "\0" in parsed.database:
        raise StoreError("store.url: an absolute path is needed: sqlite:/// and then /var/lib/guestapi/store.db")
    return Path(parsed.database)


def open_writer(url: str, *, lock_seconds: float, create: bool = False) -> Engine:
    """Open the database for transactions that change it; each takes the one write lock when it begins.

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
    engine = _engine(file, lock_seconds)
    event.listen(engine, "begin", _take_write_lock)
    return engine


def open_reader(url: str) -> Engine:
    """Open the database for reading: each statement sees what was committed last, and none waits for writers.

    Raises:
        StoreError: as `open_writer` does.
    """
    file = database_file(url)
    _check_tables(file, lock_seconds=_TIDYING_SECONDS, create=False)
    return _engine(file, _TIDYING_SECONDS)


def _engine(file: Path, lock_seconds: float) -> Engine:
    engine = create_engine(
        "sqlite://",
        creator=lambda: _connect(file, lock_seconds),
        # A connection for each use: the worker keeps its one reader open itself, writers are rare and short.
        poolclass=NullPool,
    )
    event.listen(engine, "connect", _on_connect)
    return engine


def _connect(file: Path, lock_seconds: float) -> sqlite3.Connection:
    # mode=rw: SQLite would make an empty database where there is none.
    return sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=lock_seconds, check_same_thread=False)


def explain(error: sqlite3.Error | DBAPIError, file: Path) -> StoreError:
    """Turn what the driver says into a sentence for the operator."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    # The primary result code is the low byte (sqlite.org/rescode.html).
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreBusyError(f"{file}: another writer holds the store; try again")
    if code == sqlite3.SQLITE_CANTOPEN:
        return missing(file)
    return StoreError(f"{file}: {cause}")


def missing(file: Path) -> StoreError:
    """What to say of a database that is not there."""
    return StoreError(f"{file}: missing or not readable; 'guestapi instance add' as root makes it")


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
                _check_version(connection, file, create=create)
            return
        except sqlite3.Error as error:
            explained = explain(error, file)
            # A change of the journal mode does not wait for locks by itself.
            if not isinstance(explained, StoreBusyError) or time.monotonic() > until:
                raise explained from None
            time.sleep(_AGAIN_SECONDS)


def _check_version(connection: sqlite3.Connection, file: Path, *, create: bool) -> None:
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


def _on_connect(connection: Any, _record: object) -> None:
    # Transactions are begun below, not by the driver's guess (docs.sqlalchemy.org, "pysqlite transactions").
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    # A change is told to guests and operator once it is durable: sync at each commit, not only at checkpoints.
    connection.execute("PRAGMA synchronous = FULL")


def _take_write_lock(connection: Connection) -> None:
    # At once: a writer must not find out at its first write that what it has read is stale.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
