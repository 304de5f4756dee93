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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, bindparam, func, select
from sqlalchemy.exc import DBAPIError

from guestapi.model import Image, ImageFile, Init, Instance, Mirror, Notification
from guestapi.names import is_text
from guestapi.store.files import Held, Identity, identity
from guestapi.store.schema import (
    StoreError,
    UnknownImageError,
    UnknownInstanceError,
    config,
    database_file,
    devices,
    explain,
    image_aliases,
    image_files,
    images,
    instances,
    mirrors,
    missing,
    notifications,
    open_reader,
)
from guestapi.store.walindex import header, map_index

#: How much a worker keeps: instances, and bytes of their configuration and devices, whichever comes first.
KEPT_INSTANCES = 1024
KEPT_BYTES = 32 * 1024 * 1024
#: Bytes of the change log's entries after which no more are read at a time: one may have 4 MiB.
ENTRIES_BYTES = 256 * 1024

_ONE = select(instances).where(instances.c.id == bindparam("id"))
_REVISION = select(instances.c.revision).where(instances.c.id == bindparam("id"))
_CONFIG = select(config.c.key, config.c.value).where(config.c.instance_id == bindparam("id")).order_by(config.c.key)
_DEVICES = (
    select(devices.c.name, devices.c.definition)
    .where(devices.c.instance_id == bindparam("id"))
    .order_by(devices.c.name)
)
_IN_NAMESPACE = select(instances).where(instances.c.init_namespace == bindparam("namespace"))

_IMAGE = select(images).where(images.c.fingerprint == bindparam("fingerprint"))
_IMAGE_FILES = (
    select(image_files.c.extension, image_files.c.size, image_files.c.mtime_ns)
    .where(image_files.c.fingerprint == bindparam("fingerprint"))
    .order_by(image_files.c.number)
)
_ALIASES = (
    select(image_aliases.c.alias)
    .where(image_aliases.c.fingerprint == bindparam("fingerprint"))
    .order_by(image_aliases.c.alias)
)

_MIRROR = [mirrors.c[name] for name in ("name", "socket", "connected", "contact", "lag", "fault")]

_MIRRORS = select(func.count()).select_from(mirrors)

_log = notifications.c
_LATEST = select(func.max(_log.id))
_OLDEST = select(func.min(_log.id))
_ENTRIES = select(
    _log.id,
    _log.instance_id,
    _log.project,
    _log.instance,
    _log.type,
    _log.timestamp,
    _log.metadata,
    _log.for_guest,
).order_by(_log.id)

T = TypeVar("T")

#: The state of the database, as far as it can be told whether it is still the same.
Version = bytes | int


class Reader:
    """One worker's view of the store. Not for use by two threads at once."""

    def __init__(self, url: str) -> None:
        """A view of the store at the SQLAlchemy URL `url`; it is opened at the first look, whenever it can be.

        Raises:
            StoreError: the URL is none of a store.
        """
        self._url = url
        self._file = database_file(url)
        # PERF: os.stat of a Path takes three times as long, and it is asked at every request.
        self._path = str(self._file)
        self._log_file = self._file.with_name(self._file.name + "-wal")
        self._connection: Connection | None = None
        self._driver: Any = None
        self._index: mmap | None = None
        self._inode: Identity | None = None
        self._held: Held | None = None
        #: The write-ahead log's, of the open connection.
        self._log_inode: Identity | None = None
        #: Grows whenever another database is found in the place of the one that was open.
        self.replaced = 0
        self._kept: OrderedDict[int, tuple[Version, Instance, int]] = OrderedDict()
        self._kept_bytes = 0
        self._namespaces: dict[int, list[tuple[int, int, Init]]] = {}
        self._namespaces_version: Version = -1

    def instance(self, instance_id: int) -> Instance | None:
        """What the host says now of the instance with this id, or None if it was removed.

        Raises:
            StoreError: the store cannot be read.
        """
        try:
            connection, version = self._look()
            kept = self._kept.get(instance_id)
            if kept is not None:
                if kept[0] == version:
                    return kept[1]
                if connection.execute(_REVISION, {"id": instance_id}).scalar() == kept[1].revision:
                    self._kept[instance_id] = (version, kept[1], kept[2])
                    self._kept.move_to_end(instance_id)
                    return kept[1]
            return self._load(connection, instance_id, version)
        except (DBAPIError, sqlite3.Error) as error:
            self.close()
            raise explain(error, self._file) from None

    def running_in(self, namespace: int) -> list[tuple[int, int, Init]]:
        """Which instances were registered as running in the PID namespace with this inode number.

        That proves nothing yet: the number may have been handed out again since.

        Returns:
            id, run and init of each; at most one of them can really be running there.

        Raises:
            StoreError: the store cannot be read.
        """
        try:
            connection, version = self._look()
            if version != self._namespaces_version:
                self._namespaces.clear()
                self._namespaces_version = version
            found = self._namespaces.get(namespace)
            if found is None:
                rows = connection.execute(_IN_NAMESPACE, {"namespace": namespace}).mappings()
                found = [(row["id"], row["run"], init) for row in rows if (init := init_of(row))]
                # Only those that are found: whatever number a guest comes with, it cannot make this grow.
                if found:
                    self._namespaces[namespace] = found
            return found
        except (DBAPIError, sqlite3.Error) as error:
            self.close()
            raise explain(error, self._file) from None

    def image(self, fingerprint: str) -> Image | None:
        """What the host says now of the image with exactly this fingerprint, or None if there is none.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._read(lambda connection: load_image(connection, fingerprint))

    def mirrored(self) -> bool:
        """Whether a mirror brings instances to this store.

        Raises:
            StoreError: the store cannot be read.
        """
        return bool(self._read(lambda connection: connection.execute(_MIRRORS).scalar()))

    def latest(self) -> int:
        """The id of the change log's last entry, 0 if there was none yet.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._read(latest)

    def entries(self, after: int, limit: int, *, instance_id: int | None = None, until: int | None = None) -> Entries:
        """Entries of the change log in order. As the function `entries`.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._read(lambda connection: entries(connection, after, limit, instance_id=instance_id, until=until))

    def _read(self, read: Callable[[Connection], T]) -> T:
        try:
            return read(self._look()[0])
        except (DBAPIError, sqlite3.Error) as error:
            self.close()
            raise explain(error, self._file) from None

    def close(self) -> None:
        """Let go of the connection; the next look opens another."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._index = None
        self._log_inode = None
        self._kept.clear()
        self._kept_bytes = 0
        self._namespaces_version = -1

    def _look(self) -> tuple[Connection, Version]:
        """The connection, and what is different when anybody else has committed."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            self.close()
            raise missing(self._file) from None
        except OSError as error:
            self.close()
            raise StoreError(f"{self._file}: {error.strerror}") from None
        inode = (status.st_dev, status.st_ino)
        if inode != self._inode:
            # Another database lies there now, put back from a copy perhaps: nothing that was read is of it.
            self._refuse_old_log()
            self.close()
            self._held = Held(self._file)
            self._inode = inode
            self.replaced += 1
        connection = self._connection or self._open()
        # PERF: read from memory (0.2 µs), or asked of the driver itself (3 µs); SQLAlchemy would take 20.
        if self._index is not None:
            return connection, header(self._index)
        return connection, self._driver.execute("PRAGMA data_version").fetchone()[0]

    def _open(self) -> Connection:
        self._connection = connection = open_reader(self._url).connect()
        self._driver = connection.connection.driver_connection
        # From the first look at its content on, SQLite has log and index open, and shares the lock that keeps them.
        self._driver.execute("SELECT count(*) FROM sqlite_master").fetchone()
        self._index = map_index(self._file)
        self._log_inode, _size = identity(self._log_file)
        return connection

    def _refuse_old_log(self) -> None:
        """Raise if the write-ahead log of the database that was open lies beside the other one now.

        SQLite would take it for the log of that one, and what it shows be a mixture of both.
        """
        inode, size = identity(self._log_file)
        if inode is not None and inode == self._log_inode and size:
            raise StoreError(f"{self._file}: another database was put here, but its -wal file is the old one's")

    def _load(self, connection: Connection, instance_id: int, version: Version) -> Instance | None:
        instance = load(connection, instance_id)
        if old := self._kept.pop(instance_id, None):
            self._kept_bytes -= old[2]
        if instance is not None:
            size = _size(instance)
            self._kept[instance_id] = (version, instance, size)
            self._kept_bytes += size
            while len(self._kept) > KEPT_INSTANCES or self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= self._kept.popitem(last=False)[1][2]
        return instance


@dataclass(frozen=True, slots=True)
class Entries:
    """Some entries of the change log.

    Attributes:
        found: in order.
        more: there are others behind these.
        oldest: the id of the oldest entry that the log still holds; 0 if it never had one.
    """

    found: list[Notification]
    more: bool
    oldest: int


def latest(connection: Connection) -> int:
    """The id of the change log's last entry, 0 if there was none yet."""
    return connection.execute(_LATEST).scalar() or 0


def entries(
    connection: Connection, after: int, limit: int, *, instance_id: int | None = None, until: int | None = None
) -> Entries:
    """Entries of the change log, and where the log begins, as they were at one moment.

    Args:
        connection: to the store.
        after: the id after which to begin.
        limit: how many at the most; fewer if they are large, but one at least.
        instance_id: those that this instance may hear of; None: all of all instances.
        until: the last id; None: no end.
    """
    query = _ENTRIES.where(_log.id > after)
    if instance_id is not None:
        query = query.where(_log.instance_id == instance_id, _log.for_guest)
    if until is not None:
        query = query.where(_log.id <= until)
    with _snapshot(connection):
        found: list[Notification] = []
        size = 0
        rows = connection.execute(query.limit(limit + 1))
        for row in rows:
            if len(found) == limit or size > ENTRIES_BYTES:
                break
            found.append(Notification(*row))
            size += len(found[-1].metadata)
        else:
            row = None
        rows.close()
        return Entries(found, row is not None, connection.execute(_OLDEST).scalar() or 0)


def _size(instance: Instance) -> int:
    """About how many bytes of memory an instance takes: its strings, as Python keeps them."""
    mappings = (instance.config, *instance.devices.values(), dict.fromkeys(instance.devices, ""))
    return sum(sys.getsizeof(text) for mapping in mappings for pair in mapping.items() for text in pair)


class View:
    """The store at one moment, for the operator's command.

    Attributes:
        connection: for the modules of this room alone.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def fault(self) -> str | None:
        """What is wrong with the database's pages, if anything is; all of them are read."""
        found = str(self.connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
        return None if found == "ok" else " ".join(found.split())

    def latest(self) -> int:
        """As the function `latest`."""
        return latest(self.connection)

    def entries(self, after: int, limit: int) -> Entries:
        """As the function `entries`, of all instances."""
        return entries(self.connection, after, limit)

    def instances(self, project: str | None = None) -> list[Instance]:
        """All instances, of one project or of all, by project and name."""
        if project is not None and not is_text(project):
            return []
        query = select(instances.c.id).order_by(instances.c.project, instances.c.name)
        if project is not None:
            query = query.where(instances.c.project == project)
        found = (load(self.connection, number) for number in self.connection.execute(query).scalars().all())
        return [instance for instance in found if instance is not None]

    def find(self, project: str, name: str) -> Instance | None:
        """The instance of that name, or None."""
        if not (is_text(project) and is_text(name)):
            return None
        query = select(instances.c.id).where(instances.c.project == project, instances.c.name == name)
        number = self.connection.execute(query).scalar()
        return None if number is None else load(self.connection, number)

    def instance(self, project: str, name: str) -> Instance:
        """The instance of that name.

        Raises:
            UnknownInstanceError: there is none.
        """
        found = self.find(project, name)
        if found is None:
            where = "" if project == "default" else f" in project {project!r}"
            raise UnknownInstanceError(f"no instance {name!r}{where}; 'guestapi instance list' shows all")
        return found

    def mirrors(self) -> list[Mirror]:
        """How the mirrors of daemons are, by name."""
        query = select(*_MIRROR).order_by(mirrors.c.name)
        return [Mirror(*row) for row in self.connection.execute(query)]

    def images(self) -> list[Image]:
        """All images, by fingerprint."""
        found = self.connection.execute(select(images.c.fingerprint).order_by(images.c.fingerprint)).scalars().all()
        return [image for one in found if (image := load_image(self.connection, one)) is not None]

    def image(self, name: str) -> Image:
        """The image that an operator means: by alias, fingerprint, or the beginning of one fingerprint alone.

        Raises:
            UnknownImageError: there is none, or more than one.
        """
        known = is_text(name)
        alias = select(image_aliases.c.fingerprint).where(image_aliases.c.alias == name)
        found = list(self.connection.execute(alias).scalars()) if known else []
        if not found and name and known:
            begins = func.substr(images.c.fingerprint, 1, len(name)) == name.lower()
            found = list(self.connection.execute(select(images.c.fingerprint).where(begins).limit(2)).scalars())
        if len(found) > 1:
            raise UnknownImageError(f"{name!r} is the beginning of more than one fingerprint; give more of it")
        image = load_image(self.connection, found[0]) if found else None
        if image is None:
            raise UnknownImageError(f"no image {name!r}; 'guestapi image list' shows all")
        return image


@contextmanager
def view(url: str) -> Iterator[View]:
    """Look at the store at the SQLAlchemy URL `url`, as it is now and stays until the end of the block.

    Raises:
        StoreError: it is missing or cannot be used.
    """
    try:
        with open_reader(url).connect() as connection, _snapshot(connection):
            yield View(connection)
    except DBAPIError as error:
        raise explain(error, database_file(url)) from None


def load(connection: Connection, instance_id: int) -> Instance | None:
    """Read one instance whole, as it was at one moment, through any connection to the store."""
    # Three statements, one snapshot. Inside a writer's transaction there is one already.
    with _snapshot(connection):
        row = connection.execute(_ONE, {"id": instance_id}).mappings().first()
        if row is None:
            return None
        return Instance(
            id=row["id"],
            revision=row["revision"],
            run=row["run"],
            project=row["project"],
            name=row["name"],
            type=row["type"],
            uuid=row["uuid"],
            cloud_init_id=row["cloud_init_id"],
            location=row["location"],
            ready=row["ready"],
            init=init_of(row),
            config={row.key: row.value for row in connection.execute(_CONFIG, {"id": instance_id})},
            devices={row.name: row.definition for row in connection.execute(_DEVICES, {"id": instance_id})},
            source=row["source"],
        )


def load_image(connection: Connection, fingerprint: str) -> Image | None:
    """Read one image whole, as it was at one moment, through any connection to the store."""
    with _snapshot(connection):
        row = connection.execute(_IMAGE, {"fingerprint": fingerprint}).mappings().first()
        if row is None:
            return None
        return Image(
            fingerprint=row["fingerprint"],
            type=row["type"],
            public=row["public"],
            cached=row["cached"],
            created=row["created"],
            files=tuple(ImageFile(*file) for file in connection.execute(_IMAGE_FILES, {"fingerprint": fingerprint})),
            aliases=tuple(connection.execute(_ALIASES, {"fingerprint": fingerprint}).scalars()),
            source=row["source"],
        )


def init_of(row: RowMapping) -> Init | None:
    """The init that a row of ``instances`` names."""
    if row["init_pid"] is None:
        return None
    return Init(row["init_pid"], row["init_start_time"], row["init_boot_id"], row["init_namespace"])


@contextmanager
def _snapshot(connection: Connection) -> Iterator[None]:
    """Several statements that see the same moment; a writer's transaction is that already."""
    # Optional to SQLAlchemy, for a connection that was given back; this one is in use.
    if connection.connection.driver_connection.in_transaction:  # type: ignore[union-attr]
        yield
        return
    connection.exec_driver_sql("BEGIN")
    try:
        yield
    finally:
        # SQLite may have ended it by itself, after an error that matters more than this.
        if connection.connection.driver_connection.in_transaction:  # type: ignore[union-attr] # as above
            connection.exec_driver_sql("ROLLBACK")
