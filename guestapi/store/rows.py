"""How rows become nouns: instances, images, and entries of the change log, through any connection to the store."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

from guestapi.model import Device, Init, Instance, KeyPolicy
from guestapi.store.layers import OPERATOR, SOURCE, Layer, Layers, merge_devices

if TYPE_CHECKING:
    from guestapi.records import Image, Notification, Profile

#: The largest number that SQLite has (sqlite.org/autoinc.html).
LARGEST = (1 << 63) - 1
#: An id that no entry of the change log has yet.
LAST_ID = LARGEST
#: Bytes of the change log's entries after which no more are read at a time. One may have `tables.PART_BYTES`.
ENTRIES_BYTES = 256 * 1024

#: The columns of an instance, in the order in which they are read.
INIT_COLUMNS = "init_pid, init_start_time, init_boot_id, init_namespace, init_root_uid, init_user_namespace"
COLUMNS = (
    "id, revision, run, project, name, type, uuid, cloud_init_id, location, ready, source, source_key, hostname, kept, "
    f"{INIT_COLUMNS}"
)
#: Where among these those of the init stand.
INIT = slice(14, 20)
# PERF: what hardly any instance has is asked for in the same statement, and read by another only if there is some.
_ONE = (
    f"SELECT {COLUMNS}, EXISTS (SELECT 1 FROM instance_profiles WHERE instance_id = instances.id), "
    "EXISTS (SELECT 1 FROM policies WHERE policies.project = instances.project OR instance_id = instances.id), "
    "EXISTS (SELECT 1 FROM spends WHERE instance_id = instances.id), "
    "EXISTS (SELECT 1 FROM permissions WHERE permissions.project = instances.project OR instance_id = instances.id) "
    "FROM instances WHERE id = ?"
)
_CONFIG = "SELECT key, CASE WHEN size <= :most THEN value END FROM config WHERE instance_id = :id ORDER BY key, layer"
_DEVICES = "SELECT name, definition FROM devices WHERE instance_id = :id ORDER BY name, layer"
# Of an instance with profiles: the same, with the rows of its profiles before its own. No layer is that weak.
_CONFIG_WITH_PROFILES = (
    "SELECT key, CASE WHEN size <= :most THEN value END, layer FROM config WHERE instance_id = :id UNION ALL "
    "SELECT key, CASE WHEN size <= :most THEN value END, position - 1000000 FROM instance_profiles "
    "JOIN profile_config USING (profile_id) WHERE instance_id = :id ORDER BY key, layer"
)
_DEVICES_WITH_PROFILES = (
    "SELECT name, definition, layer FROM devices WHERE instance_id = :id UNION ALL "
    "SELECT name, definition, position - 1000000 FROM instance_profiles "
    "JOIN profile_devices USING (profile_id) WHERE instance_id = :id ORDER BY name, layer"
)
_PROFILES_OF = (
    "SELECT {} FROM instance_profiles JOIN profiles ON profiles.id = profile_id WHERE instance_id = ? ORDER BY position"
)
_PROFILE_NAMES = _PROFILES_OF.format("name")
_PROFILE_COLUMNS = "id, project, name, description, uuid"
_APPLIED = _PROFILES_OF.format(_PROFILE_COLUMNS)
_PROFILE = f"SELECT {_PROFILE_COLUMNS} FROM profiles WHERE id = ?"
_PROFILE_CONFIG = "SELECT key, value FROM profile_config WHERE profile_id = ? ORDER BY key"
_PROFILE_DEVICES = "SELECT name, definition FROM profile_devices WHERE profile_id = ? ORDER BY name"
_CONFIG_LAYERS = "SELECT layer, key, value FROM config WHERE instance_id = ?"
_DEVICE_LAYERS = "SELECT layer, name, definition FROM devices WHERE instance_id = ?"

_POLICIES = (
    "SELECT pattern, hidden, secret, once, uids FROM policies "
    "WHERE project = ? OR instance_id = ? ORDER BY project IS NULL, pattern"
)
_SPENT = "SELECT key FROM spends WHERE instance_id = ? AND spent"
_ALLOWED = "SELECT DISTINCT feature FROM permissions WHERE project = ? OR instance_id = ?"

#: Whether a device's definition has a type, so stands for itself.
_HAS_TYPE = methodcaller("get", "type")

_IMAGE = "SELECT fingerprint, type, public, cached, created, source FROM images WHERE fingerprint = ?"
_IMAGE_FILES = "SELECT extension, size, mtime_ns FROM image_files WHERE fingerprint = ? ORDER BY number"
_ALIASES = "SELECT alias FROM image_aliases WHERE fingerprint = ? ORDER BY alias"

_LATEST = "SELECT max(id) FROM notifications"
# In a store that was put in the place of the one that was read, the id means another entry.
_PART = (
    "SELECT part FROM notification_parts JOIN notifications ON id = notification_id "
    "WHERE notification_id = ? AND start = ? AND instance_id = ? AND timestamp = ? AND for_guest = ?"
)
# PERF: all in one statement, which is a snapshot of its own. Workers need it at every event. The first row has the
# oldest id and whether there are policies, since NULL sorts first; the entries follow as they are read, without a sort.
_ENTRIES, _OWN_ENTRIES = (
    "SELECT NULL AS id, min(id), EXISTS (SELECT 1 FROM policies), NULL, NULL, NULL, NULL, NULL, NULL "
    "FROM notifications UNION ALL "
    "SELECT id, instance_id, project, instance, type, timestamp, metadata, for_guest, parts_size FROM notifications "
    f"WHERE id > :after AND id <= :until{own} ORDER BY id"
    for own in ("", " AND instance_id = :instance_id AND for_guest")
)


def load(connection: sqlite3.Connection, instance_id: int, *, value_bytes: int | None = None) -> Instance | None:
    """Read one instance, as it was at one moment, through any connection to the store.

    Args:
        connection: to the store.
        instance_id: its id.
        value_bytes: the largest value of its configuration that is read, in bytes; None: all are read.

    Returns:
        The instance; None if there is none.
    """
    # Several statements, one snapshot. Inside a writer's transaction there is one already.
    with snapshot(connection):
        row = connection.execute(_ONE, (instance_id,)).fetchone()
        if row is None:
            return None
        has_profiles, has_policies, has_spends, has_allowed = row[INIT.stop :]
        settings: dict[str, str] = {}
        large: set[str] = set()
        parameters = {"id": instance_id, "most": LARGEST if value_bytes is None else value_bytes}
        profiles: tuple[str, ...] = ()
        if has_profiles:
            profiles = tuple(name for (name,) in connection.execute(_PROFILE_NAMES, (instance_id,)))
        for key, value, *_layer in connection.execute(_CONFIG_WITH_PROFILES if profiles else _CONFIG, parameters):
            # Of one key, the layer that wins comes last.
            settings.pop(key, None)
            large.discard(key)
            if value is None:
                large.add(key)
            else:
                settings[key] = value
        devices = _devices(connection, instance_id, _DEVICES_WITH_PROFILES if profiles else _DEVICES)
        policies = load_policies(connection, row[3], instance_id) if has_policies else ()
        for (key,) in connection.execute(_SPENT, (instance_id,)) if has_spends else ():
            # It counts as unset, whatever the layers have, until it is set anew.
            settings.pop(key, None)
            large.discard(key)
        allowed: frozenset[str] = frozenset()
        if has_allowed:
            allowed = frozenset(feature for (feature,) in connection.execute(_ALLOWED, (row[3], instance_id)))
    number, revision, run, project, name, kind, identity, cloud_init_id, location, ready, *owner = row[: INIT.start]
    source, key, hostname, kept = owner
    return Instance(
        id=number,
        revision=revision,
        run=run,
        project=project,
        name=name,
        type=kind,
        uuid=identity,
        cloud_init_id=cloud_init_id,
        location=location,
        ready=bool(ready),
        init=init_of(row[INIT]),
        config=settings,
        devices=devices,
        source=source,
        key=key,
        hostname=hostname,
        kept=bool(kept),
        large=frozenset(large),
        profiles=profiles,
        policies=policies,
        allowed=allowed,
    )


def load_policies(connection: sqlite3.Connection, project: str, instance_id: int) -> tuple[KeyPolicy, ...]:
    """Read the policies of a project, then those of an instance, each by pattern."""
    return tuple(
        KeyPolicy(pattern, bool(hidden), bool(secret), bool(once), frozenset(json.loads(uids)))
        for pattern, hidden, secret, once, uids in connection.execute(_POLICIES, (project, instance_id))
    )


def _devices(connection: sqlite3.Connection, instance_id: int, query: str) -> dict[str, Device]:
    rows = [(name, json.loads(text)) for name, text, *_layer in connection.execute(query, {"id": instance_id})]
    # PERF: of one name the layer that wins comes last, and hardly ever amends the other.
    devices: dict[str, Device] = dict(rows)
    return devices if all(map(_HAS_TYPE, devices.values())) else merge_devices(rows)


def load_layers(connection: sqlite3.Connection, instance_id: int) -> Layers:
    """Read all layers of an instance's configuration and devices, through any connection to the store."""
    settings: dict[int, dict[str, str]] = {SOURCE: {}, OPERATOR: {}}
    definitions: dict[int, dict[str, Device]] = {SOURCE: {}, OPERATOR: {}}
    with snapshot(connection):
        for layer, key, value in connection.execute(_CONFIG_LAYERS, (instance_id,)):
            settings[layer][key] = value
        for layer, name, text in connection.execute(_DEVICE_LAYERS, (instance_id,)):
            definitions[layer][name] = json.loads(text)
        found = connection.execute(_APPLIED, (instance_id,)).fetchall()
        applied = tuple(_profile(connection, row) for row in found)
    source, operator = (Layer(settings[layer], definitions[layer]) for layer in (SOURCE, OPERATOR))
    return Layers(source, operator, applied)


def load_profile(connection: sqlite3.Connection, profile_id: int) -> Profile | None:
    """Read one profile whole, as it was at one moment, through any connection to the store; None if there is none."""
    with snapshot(connection):
        row = connection.execute(_PROFILE, (profile_id,)).fetchone()
        return None if row is None else _profile(connection, row)


def _profile(connection: sqlite3.Connection, row: tuple[int, str, str, str, str | None]) -> Profile:
    settings = dict(connection.execute(_PROFILE_CONFIG, (row[0],)).fetchall())
    definitions = connection.execute(_PROFILE_DEVICES, (row[0],))
    # PERF: loaded where there is a profile.
    from guestapi.records import Profile

    number, project, name, description, uuid = row
    devices = {name: json.loads(text) for name, text in definitions}
    return Profile(number, project, name, description, settings, devices, uuid)


def load_image(connection: sqlite3.Connection, fingerprint: str) -> Image | None:
    """Read one image whole, as it was at one moment, through any connection to the store."""
    # PERF: loaded where there is an image.
    from guestapi.model import Image, ImageFile

    with snapshot(connection):
        row = connection.execute(_IMAGE, (fingerprint,)).fetchone()
        if row is None:
            return None
        files = tuple(ImageFile(*file) for file in connection.execute(_IMAGE_FILES, (fingerprint,)))
        aliases = tuple(alias for (alias,) in connection.execute(_ALIASES, (fingerprint,)))
    _fingerprint, kind, public, cached, created, source = row
    return Image(fingerprint, kind, bool(public), bool(cached), created, files, aliases, source)


def init_of(columns: tuple[Any, ...]) -> Init | None:
    """The init that the columns `INIT` name."""
    return None if columns[0] is None else Init(*columns)


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Several statements that see the same moment; a writer's transaction is that already.

    Raises:
        sqlite3.Error: the store cannot be read.
    """
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        # SQLite may have ended it by itself, after an error that matters more than this.
        if connection.in_transaction:
            connection.execute("ROLLBACK")


class Entries(NamedTuple):
    """Some entries of the change log.

    Attributes:
        found: in order.
        more: there are others behind these.
        oldest: the id of the oldest entry that the log still holds; 0 if it never had one.
        any_policies: there were key policies in the store at that moment.
    """

    found: list[Notification]
    more: bool
    oldest: int
    any_policies: bool


def latest(connection: sqlite3.Connection) -> int:
    """The id of the change log's last entry, 0 if there was none yet."""
    (number,) = connection.execute(_LATEST).fetchone()
    return number or 0


def entries(
    connection: sqlite3.Connection,
    after: int,
    limit: int,
    *,
    instance_id: int | None = None,
    until: int = LAST_ID,
    most_bytes: int = ENTRIES_BYTES,
) -> Entries:
    """Entries of the change log, and where the log begins, as they were at one moment. Large metadata is not read.

    Args:
        connection: to the store.
        after: the id after which to begin.
        limit: how many at the most; fewer if they are large, but one at least.
        instance_id: those that this instance may hear of; None: all of all instances.
        until: the last id.
        most_bytes: after how many bytes of metadata no more entries are read.

    Raises:
        sqlite3.Error: they cannot be read.
    """
    parameters = {"after": after, "until": until}
    if instance_id is not None:
        parameters["instance_id"] = instance_id
    found: list[Notification] = []
    size, more = 0, False
    # Closed: rows that are not fetched would keep the snapshot open.
    with closing(connection.execute(_ENTRIES if instance_id is None else _OWN_ENTRIES, parameters)) as rows:
        _none, oldest, any_policies, *_rest = next(rows)
        for row in rows:
            if len(found) == limit or size > most_bytes:
                more = True
                break
            found.append(_entry(*row))
            size += len(found[-1].metadata)
    return Entries(found, more, oldest or 0, bool(any_policies))


def entry_part(connection: sqlite3.Connection, entry: Notification, start: int) -> bytes | None:
    """A part of the metadata that `entries` has left out.

    Args:
        connection: to the store.
        entry: the entry.
        start: place of its first byte: 0, or where the part before ended.

    Returns:
        Bytes, `tables.PART_BYTES` at the most; None if the log does not have the entry any more, or not as it was.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    parameters = (entry.id, start, entry.instance_id, entry.timestamp, entry.for_guest)
    found: tuple[bytes] | None = connection.execute(_PART, parameters).fetchone()
    return None if found is None else found[0]


def complete(connection: sqlite3.Connection, entry: Notification) -> Notification:
    """The entry with all its metadata, at the moment at which it was read."""
    if not entry.left_out:
        return entry
    content = b""
    while len(content) < entry.left_out and (part := entry_part(connection, entry, len(content))):
        content += part
    return replace(entry, metadata=content.decode(), left_out=0)


def _entry(
    number: int, instance_id: int, project: str, name: str, kind: str, at: str, told: str, for_guest: int, left: int
) -> Notification:
    # PERF: loaded where there is an entry.
    from guestapi.records import Notification

    return Notification(number, instance_id, project, name, kind, at, told, bool(for_guest), left)
