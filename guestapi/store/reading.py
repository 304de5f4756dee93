"""What workers read. Nothing here waits: a reader of SQLite's write-ahead log is never blocked by a writer.

What was read is kept, and used again only while it is proven current. The proof: the header of the write-ahead log's
index changes with every commit (`store.walindex`), so unchanged bytes mean an unchanged database; after a change, an
instance's own ``revision`` tells whether the change was about it. So an operator's command that has returned is seen by
every request that comes after it. A database without such a log, put there by hand, is asked ``PRAGMA data_version``.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import wraps
from mmap import mmap
from typing import NamedTuple, TypeVar, TypeVarTuple

from guestapi.dialects import DIALECTS
from guestapi.model import Image, Init, Instance, KeyPolicy, Notification
from guestapi.store.attributes import get_value, list_paths
from guestapi.store.engine import database_file, open_reader
from guestapi.store.errors import StoreError, explain, explained, missing
from guestapi.store.files import Held, Identity, identity
from guestapi.store.notices import Notice, list_current
from guestapi.store.rows import (
    ENTRIES_BYTES,
    INIT_COLUMNS,
    LAST_ID,
    Entries,
    entries,
    entry_part,
    init_of,
    latest,
    load,
    load_image,
    load_policies,
    snapshot,
)
from guestapi.store.walindex import header, map_index

#: How much a worker keeps: instances, and bytes of their configuration and devices, whichever comes first.
KEPT_INSTANCES = 1024
KEPT_BYTES = 32 * 1024 * 1024
#: Bytes of the largest value that is kept. A larger one is read when it is asked for (`ValueReader`).
READ_BYTES = 64 * 1024
#: About how many bytes of one instance are kept, so that it drives out few others. Of one that has more, the largest
#: values are read when they are asked for, too.
INSTANCE_BYTES = 1024 * 1024
#: Of instances that take more even so, by their devices or the names of their keys, a worker keeps one beside the
#: others: the one that was read last.
OVERSIZE_BYTES = 2 * INSTANCE_BYTES
#: For how many PID namespaces the registered instances are kept. Most have none: a guest can make any number of them.
KEPT_NAMESPACES = 4096

_HAS_POLICIES = "SELECT EXISTS (SELECT 1 FROM policies)"
_PROJECT = "SELECT project FROM instances WHERE id = ?"
_REVISION = "SELECT revision FROM instances WHERE id = ?"
_IN_NAMESPACE = f"SELECT id, run, {INIT_COLUMNS} FROM instances WHERE init_namespace = ?"
_VALUE = (
    "SELECT value FROM config JOIN instances ON instances.id = instance_id "
    "WHERE instances.id = ? AND uuid = ? AND key = ? ORDER BY layer DESC LIMIT 1"
)
_PROFILE_VALUE = (
    "SELECT value FROM instance_profiles JOIN profile_config USING (profile_id) "
    "JOIN instances ON instances.id = instance_id "
    "WHERE instances.id = ? AND uuid = ? AND key = ? ORDER BY position DESC LIMIT 1"
)
_SOURCES = "SELECT count(*) FROM sources"

#: What the keys begin with that a guest can ask for in some dialect.
_READABLE = tuple({prefix for dialect in DIALECTS.values() for prefix in dialect.readable})

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

#: The state of the database, as far as it can be told whether it is still the same.
Version = bytes | int


class _OpenStore(NamedTuple):
    """The connection of a `Reader` as a `lookup.Moment`."""

    connection: sqlite3.Connection


def _explained(read: Callable[[Reader, *Arguments], T]) -> Callable[[Reader, *Arguments], T]:
    """Let a method of `Reader` raise the driver's errors as `StoreError`, and open the store anew at the next look."""

    # PERF: a context manager takes ten times as long, and some of these are called at every request.
    @wraps(read)
    def explained(reader: Reader, *arguments: *Arguments) -> T:
        try:
            return read(reader, *arguments)
        except sqlite3.Error as error:
            reader.close()
            raise explain(error, reader.file) from None

    return explained


class ValueReader:
    """Reads single values that a `Reader` leaves out. May be used by several threads: each look has its connection."""

    def __init__(self, url: str) -> None:
        """Open nothing yet.

        Args:
            url: ``store.url``.
        """
        self._url = url
        self._file = database_file(url)

    def value(self, instance: Instance, key: str) -> str | None:
        """As `value_at`, without the place in the change log."""
        return self.value_at(instance, key)[0]

    def value_at(self, instance: Instance, key: str) -> tuple[str | None, int]:
        """The value of a configuration key as it is now.

        Args:
            instance: as a `Reader` has read it.
            key: the key.

        Returns:
            The value, None if it is not set any more or the instance is gone; and the id of the change log's last entry
            at the same moment.

        Raises:
            StoreError: the store cannot be read.
        """
        with (
            explained(self._file),
            closing(open_reader(self._url).connect()) as connection,
            snapshot(connection),
        ):
            # The UUID: in a store that was put in the place of the one that was read, the id means another instance.
            asked = (instance.id, instance.uuid, key)
            found = connection.execute(_VALUE, asked).fetchone()
            if found is None:
                found = connection.execute(_PROFILE_VALUE, asked).fetchone()
            return None if found is None else str(found[0]), latest(connection)

    def whole(self, instance: Instance) -> tuple[Instance | None, int]:
        """An instance as it is now, with all of its values.

        Args:
            instance: as a `Reader` has read it.

        Returns:
            The instance, None if it is gone; and the id of the change log's last entry at the same moment.

        Raises:
            StoreError: the store cannot be read.
        """
        with (
            explained(self._file),
            closing(open_reader(self._url).connect()) as connection,
            snapshot(connection),
        ):
            found = load(connection, instance.id)
            return found if found is not None and found.uuid == instance.uuid else None, latest(connection)


class Reader:
    """One worker's view of the store. Not for use by two threads at once."""

    def __init__(self, url: str) -> None:
        """A view of the store at the URL `url`; it is opened at the first look, whenever it can be.

        Raises:
            StoreError: the URL is none of a store.
        """
        self._url = url
        self.file = database_file(url)
        # PERF: os.stat of a Path takes three times as long, and it is asked at every request.
        self._path = str(self.file)
        self._log_file = self.file.with_name(self.file.name + "-wal")
        self._connection: sqlite3.Connection | None = None
        self._index: mmap | None = None
        self._inode: Identity | None = None
        self._held: Held | None = None
        #: The write-ahead log's, of the open connection.
        self._log_inode: Identity | None = None
        #: Grows whenever another database is found in the place of the one that was open.
        self.replaced = 0
        self._kept: OrderedDict[int, tuple[Version, Instance, int]] = OrderedDict()
        self._kept_bytes = 0
        #: The id of the one that is kept beside the others; its bytes do not count.
        self._oversize: int | None = None
        self._namespaces: dict[int, list[tuple[int, int, Init]]] = {}
        self._namespaces_version: Version = -1
        #: By instance, of those that were asked for; None if there are none in the whole store, as a rule.
        self._policies: dict[int, tuple[KeyPolicy, ...]] | None = None
        self._policies_version: Version = -1

    @_explained
    def version(self) -> Version:
        """The state of the database: the same as long as nothing was committed.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._look()[1]

    def instance(self, instance_id: int) -> Instance | None:
        """What the host says now of the instance with this id, or None if it was removed.

        Raises:
            StoreError: the store cannot be read.
        """
        # PERF: without the decorator, which costs each request another call.
        try:
            connection, version = self._look()
            kept = self._kept.get(instance_id)
            if kept is not None:
                if kept[0] == version:
                    return kept[1]
                if connection.execute(_REVISION, (instance_id,)).fetchone() == (kept[1].revision,):
                    self._kept[instance_id] = (version, kept[1], kept[2])
                    self._kept.move_to_end(instance_id)
                    return kept[1]
            return self._load(connection, instance_id, version)
        except sqlite3.Error as error:
            self.close()
            raise explain(error, self.file) from None

    def policies_of(self, instance_id: int) -> tuple[KeyPolicy, ...]:
        """The key policies that hold for an instance now; none if it was removed.

        Raises:
            StoreError: the store cannot be read.
        """
        # PERF: asked for each event of each stream. The index tells of every commit to the database that is open. That
        # another one was put in its place is noticed at the next look, which ends the streams.
        if self._index is None or header(self._index) != self._policies_version:
            self._begin_policies()
        if self._policies is None:
            return ()
        found = self._policies.get(instance_id)
        return self._load_policies(instance_id) if found is None else found

    @_explained
    def _begin_policies(self) -> None:
        connection, version = self._look()
        self._forget_policies(version, connection.execute(_HAS_POLICIES).fetchone()[0])

    def _forget_policies(self, version: Version, any_policies: bool) -> None:
        """Have policies read when they are asked for, if there are any.

        Args:
            version: of the database, before it was asked.
            any_policies: there were some.
        """
        self._policies_version = version
        self._policies = {} if any_policies else None

    @_explained
    def _load_policies(self, instance_id: int) -> tuple[KeyPolicy, ...]:
        connection, _version = self._look()
        row = connection.execute(_PROJECT, (instance_id,)).fetchone()
        found = () if row is None else load_policies(connection, row[0], instance_id)
        if self._policies is not None:
            self._policies[instance_id] = found
        return found

    @_explained
    def notices(self, instance_id: int) -> list[Notice]:
        """The notices of an instance that are not past, the next first; at most `notices.MOST_NOTICES`.

        Raises:
            StoreError: the store cannot be read.
        """
        connection, _version = self._look()
        return list_current(_OpenStore(connection), instance_id)

    @_explained
    def attributes(self, instance: Instance) -> list[str]:
        """The paths of an instance's attributes, sorted; at most `attributes.MOST_ATTRIBUTES`.

        Raises:
            StoreError: the store cannot be read.
        """
        return list_paths(_OpenStore(self._look()[0]), instance)

    @_explained
    def attribute(self, instance: Instance, path: str) -> bytes | None:
        """The value of an attribute, at most `attributes.VALUE_BYTES`; None if there is none.

        Raises:
            StoreError: the store cannot be read.
        """
        return get_value(_OpenStore(self._look()[0]), instance, path)

    def seen(self, instance_id: int) -> Instance | None:
        """As `instance`, but as of the last `running_in`. Does not look, so it costs next to nothing.

        Returns:
            The instance; None if it is not in memory as it was then. `instance` may find it.
        """
        kept = self._kept.get(instance_id)
        return kept[1] if kept is not None and kept[0] == self._namespaces_version else None

    @_explained
    def snapshot_of(self, instance_id: int) -> tuple[Instance | None, int]:
        """As `instance`, with the id of the change log's last entry at the same moment.

        Returns:
            The instance; and the id, 0 if there was no entry yet. A client that follows the log from there on misses
            nothing, and is told nothing that the instance has in it already.

        Raises:
            StoreError: the store cannot be read.
        """
        connection, version = self._look()
        with snapshot(connection):
            event_id = latest(connection)
            kept = self._kept.get(instance_id)
            if kept is not None and connection.execute(_REVISION, (instance_id,)).fetchone() == (kept[1].revision,):
                return kept[1], event_id
            return self._load(connection, instance_id, version), event_id

    @_explained
    def running_in(self, namespace: int) -> list[tuple[int, int, Init]]:
        """Which instances were registered as running in the PID namespace with this inode number.

        That proves nothing yet: the number may have been handed out again since.

        Returns:
            id, run and init of each; at most one of them can really be running there.

        Raises:
            StoreError: the store cannot be read.
        """
        connection, version = self._look()
        if version != self._namespaces_version:
            self._namespaces.clear()
            self._namespaces_version = version
        found = self._namespaces.get(namespace)
        if found is None:
            rows = connection.execute(_IN_NAMESPACE, (namespace,))
            found = [(row[0], row[1], init) for row in rows if (init := init_of(row[2:]))]
            if len(self._namespaces) >= KEPT_NAMESPACES:
                self._namespaces.clear()
            self._namespaces[namespace] = found
        return found

    def image(self, fingerprint: str) -> Image | None:
        """What the host says now of the image with exactly this fingerprint, or None if there is none.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._read(lambda connection: load_image(connection, fingerprint))

    def has_sources(self) -> bool:
        """Whether a source registers instances in this store.

        Raises:
            StoreError: the store cannot be read.
        """
        return bool(self._read(lambda connection: connection.execute(_SOURCES).fetchone()[0]))

    def latest(self) -> int:
        """The id of the change log's last entry, 0 if there was none yet.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._read(latest)

    def entries(
        self,
        after: int,
        limit: int,
        *,
        instance_id: int | None = None,
        until: int = LAST_ID,
        most_bytes: int = ENTRIES_BYTES,
    ) -> Entries:
        """Entries of the change log in order. As the function `entries`.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._entries(after, limit, instance_id, until, most_bytes)

    @_explained
    def _entries(self, after: int, limit: int, instance_id: int | None, until: int, most_bytes: int) -> Entries:
        connection, version = self._look()
        found = entries(connection, after, limit, instance_id=instance_id, until=until, most_bytes=most_bytes)
        # PERF: `policies_of` is asked next, for each stream that hears of these entries, and need not look then.
        if version != self._policies_version:
            self._forget_policies(version, found.any_policies)
        return found

    def entry_part(self, entry: Notification, start: int) -> bytes | None:
        """A part of an entry's metadata. As the function `entry_part`.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._read(lambda connection: entry_part(connection, entry, start))

    @_explained
    def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        return read(self._look()[0])

    def close(self) -> None:
        """Let go of the connection; the next look opens another."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._index = None
        self._log_inode = None
        self._kept.clear()
        self._kept_bytes = 0
        self._namespaces_version = self._policies_version = -1

    def _look(self) -> tuple[sqlite3.Connection, Version]:
        """The connection, and a value that differs after every commit of another connection."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            self.close()
            raise missing(self.file) from None
        except OSError as error:
            self.close()
            raise StoreError(f"{self.file}: {error.strerror}") from None
        inode = (status.st_dev, status.st_ino)
        if inode != self._inode:
            # Another database lies there now, put back from a copy perhaps: nothing that was read is of it.
            self._refuse_old_log()
            self.close()
            self._held = Held(self.file)
            self._inode = inode
            self.replaced += 1
        connection = self._connection or self._open()
        # PERF: read from memory (0.2 µs), or asked of SQLite (3 µs).
        if self._index is not None:
            return connection, header(self._index)
        return connection, connection.execute("PRAGMA data_version").fetchone()[0]

    def _open(self) -> sqlite3.Connection:
        self._connection = connection = open_reader(self._url).connect()
        # From the first look at its content on, SQLite has log and index open, and shares the lock that keeps them.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        self._index = map_index(self.file)
        self._log_inode, _size = identity(self._log_file)
        return connection

    def _refuse_old_log(self) -> None:
        """Raise if the write-ahead log of the database that was open lies beside the other one now.

        SQLite would take it for the log of that one, and what it shows be a mixture of both.
        """
        inode, size = identity(self._log_file)
        if inode is not None and inode == self._log_inode and size:
            raise StoreError(f"{self.file}: another database was put here, but its -wal file is the old one's")

    def _load(self, connection: sqlite3.Connection, instance_id: int, version: Version) -> Instance | None:
        instance = load(connection, instance_id, value_bytes=READ_BYTES)
        if instance is not None and _size(instance) > INSTANCE_BYTES:
            instance = _without_largest(instance)
        if old := self._kept.pop(instance_id, None):
            self._kept_bytes -= old[2]
        if instance is not None:
            counted = _size(instance)
            if counted > OVERSIZE_BYTES:
                if self._oversize is not None and (last := self._kept.pop(self._oversize, None)):
                    self._kept_bytes -= last[2]
                self._oversize, counted = instance_id, 0
            self._kept[instance_id] = (version, instance, counted)
            self._kept_bytes += counted
            while len(self._kept) > KEPT_INSTANCES or self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= self._kept.popitem(last=False)[1][2]
        return instance


def _without_largest(instance: Instance) -> Instance:
    """Leave the largest values of an instance's configuration out, so that it takes no more than its share.

    Those that no guest asks for by their key stay before all others: switches, which are asked at every request.
    """
    left = INSTANCE_BYTES
    kept: dict[str, str] = {}
    by_size = sorted(instance.config.items(), key=lambda pair: (pair[0].startswith(_READABLE), sys.getsizeof(pair[1])))
    for key, value in by_size:
        left -= sys.getsizeof(key) + sys.getsizeof(value)
        if left < 0:
            break
        kept[key] = value
    large = instance.large | (instance.config.keys() - kept.keys())
    return replace(instance, config={key: kept[key] for key in instance.config if key in kept}, large=large)


def _size(instance: Instance) -> int:
    """About how many bytes of memory an instance takes: its strings, as Python keeps them."""
    mappings = (instance.config, *instance.devices.values(), dict.fromkeys(instance.devices, ""))
    kept = sum(sys.getsizeof(text) for mapping in mappings for pair in mapping.items() for text in pair)
    return kept + sum(map(sys.getsizeof, instance.large))
