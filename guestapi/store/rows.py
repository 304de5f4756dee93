"""How rows become nouns: instances, images, and entries of the change log, through any connection to the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, case, func, select

from guestapi.model import Device, Image, ImageFile, Init, Instance, Notification
from guestapi.store.layers import OPERATOR, SOURCE, Layer, Layers, merge_devices
from guestapi.store.tables import config, devices, image_aliases, image_files, images, instances, notifications, plain

#: The largest number that SQLite has (sqlite.org/autoinc.html).
LARGEST = (1 << 63) - 1
#: An id that no entry of the change log has yet.
LAST_ID = LARGEST
#: Bytes of the change log's entries after which no more are read at a time: one may have 4 MiB.
ENTRIES_BYTES = 256 * 1024

_ONE = select(instances).where(instances.c.id == bindparam("id"))
_CONFIG = (
    select(config.c.key, case((config.c.size <= bindparam("most"), config.c.value)))
    .where(config.c.instance_id == bindparam("id"))
    .order_by(config.c.key, config.c.layer)
)
_DEVICES = (
    select(devices.c.name, devices.c.definition)
    .where(devices.c.instance_id == bindparam("id"))
    .order_by(devices.c.name, devices.c.layer)
)
_CONFIG_LAYERS = select(config.c.layer, config.c.key, config.c.value).where(config.c.instance_id == bindparam("id"))
_DEVICE_LAYERS = select(devices.c.layer, devices.c.name, devices.c.definition).where(
    devices.c.instance_id == bindparam("id")
)

#: Whether a device's definition has a type, so stands for itself.
_HAS_TYPE = methodcaller("get", "type")

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

_log = notifications.c
_LATEST = select(func.max(_log.id))
_ENTRIES = (
    select(
        _log.id,
        _log.instance_id,
        _log.project,
        _log.instance,
        _log.type,
        _log.timestamp,
        _log.metadata,
        _log.for_guest,
    )
    .where(_log.id > bindparam("after"), _log.id <= bindparam("until"))
    .order_by(_log.id)
)
_OWN_ENTRIES = _ENTRIES.where(_log.instance_id == bindparam("instance_id"), _log.for_guest)
# PERF: asked of the driver itself, which every event waits for.
_ENTRIES_SQL, _OWN_ENTRIES_SQL, _OLDEST_SQL = map(plain, (_ENTRIES, _OWN_ENTRIES, select(func.min(_log.id))))


def load(connection: Connection, instance_id: int, *, value_bytes: int | None = None) -> Instance | None:
    """Read one instance, as it was at one moment, through any connection to the store.

    Args:
        connection: to the store.
        instance_id: its id.
        value_bytes: the largest value of its configuration that is read, in bytes; None: all are read.

    Returns:
        The instance; None if there is none.
    """
    # Three statements, one snapshot. Inside a writer's transaction there is one already.
    with snapshot(connection):
        row = connection.execute(_ONE, {"id": instance_id}).mappings().first()
        if row is None:
            return None
        settings: dict[str, str] = {}
        large: set[str] = set()
        parameters = {"id": instance_id, "most": LARGEST if value_bytes is None else value_bytes}
        for key, value in connection.execute(_CONFIG, parameters):
            # Of one key, the layer that wins comes last.
            settings.pop(key, None)
            large.discard(key)
            if value is None:
                large.add(key)
            else:
                settings[key] = value
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
            config=settings,
            devices=_devices(connection, instance_id),
            source=row["source"],
            key=row["source_key"],
            hostname=row["hostname"],
            kept=row["kept"],
            large=frozenset(large),
        )


def _devices(connection: Connection, instance_id: int) -> dict[str, Device]:
    rows = connection.execute(_DEVICES, {"id": instance_id}).all()
    # PERF: of one name the layer that wins comes last, and hardly ever amends the other.
    devices: dict[str, Device] = dict(rows)
    return devices if all(map(_HAS_TYPE, devices.values())) else merge_devices(rows)


def load_layers(connection: Connection, instance_id: int) -> Layers:
    """Read both layers of an instance's configuration and devices, through any connection to the store."""
    settings: dict[int, dict[str, str]] = {SOURCE: {}, OPERATOR: {}}
    definitions: dict[int, dict[str, Device]] = {SOURCE: {}, OPERATOR: {}}
    with snapshot(connection):
        for layer, key, value in connection.execute(_CONFIG_LAYERS, {"id": instance_id}):
            settings[layer][key] = value
        for layer, name, definition in connection.execute(_DEVICE_LAYERS, {"id": instance_id}):
            definitions[layer][name] = definition
    source, operator = (Layer(settings[layer], definitions[layer]) for layer in (SOURCE, OPERATOR))
    return Layers(source, operator)


def load_image(connection: Connection, fingerprint: str) -> Image | None:
    """Read one image whole, as it was at one moment, through any connection to the store."""
    with snapshot(connection):
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
    return Init(
        row["init_pid"],
        row["init_start_time"],
        row["init_boot_id"],
        row["init_namespace"],
        row["init_root_uid"],
        row["init_user_namespace"],
    )


@contextmanager
def snapshot(connection: Connection) -> Iterator[None]:
    """Several statements that see the same moment; a writer's transaction is that already.

    Raises:
        sqlite3.Error: the store cannot be read.
    """
    driver: Any = connection.connection.driver_connection
    if driver.in_transaction:
        yield
        return
    # PERF: said to the driver itself, as all that an event waits for.
    driver.execute("BEGIN")
    try:
        yield
    finally:
        # SQLite may have ended it by itself, after an error that matters more than this.
        if driver.in_transaction:
            driver.execute("ROLLBACK")


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
    connection: Connection, after: int, limit: int, *, instance_id: int | None = None, until: int = LAST_ID
) -> Entries:
    """Entries of the change log, and where the log begins, as they were at one moment.

    Args:
        connection: to the store.
        after: the id after which to begin.
        limit: how many at the most; fewer if they are large, but one at least.
        instance_id: those that this instance may hear of; None: all of all instances.
        until: the last id.

    Raises:
        sqlite3.Error: they cannot be read.
    """
    parameters = {"after": after, "until": until}
    if instance_id is not None:
        parameters["instance_id"] = instance_id
    with snapshot(connection):
        driver: Any = connection.connection.driver_connection
        found: list[Notification] = []
        size = 0
        # Closed: rows that are not fetched would keep the snapshot open.
        with closing(driver.execute(_ENTRIES_SQL if instance_id is None else _OWN_ENTRIES_SQL, parameters)) as rows:
            for row in rows:
                if len(found) == limit or size > ENTRIES_BYTES:
                    break
                found.append(_entry(*row))
                size += len(found[-1].metadata)
            else:
                row = None
        (oldest,) = driver.execute(_OLDEST_SQL).fetchone()
        return Entries(found, row is not None, oldest or 0)


def _entry(
    number: int, instance_id: int, project: str, name: str, kind: str, at: str, told: str, for_guest: int
) -> Notification:
    return Notification(number, instance_id, project, name, kind, at, told, bool(for_guest))
