"""How a database gets its tables, and how older tables become those of today."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

from guestapi.model import DAEMONS, Device
from guestapi.store.errors import StoreError
from guestapi.store.layers import OPERATOR, SOURCE
from guestapi.store.tables import BEGINNING_BYTES, INDEXES, PART_BYTES, TABLES, VERSION

#: The first version of the tables with profiles.
PROFILES_SINCE = 4
#: The first version of the tables with attributes, and with what is allowed.
ATTRIBUTES_SINCE = 8
#: What version 2 called a container of an OCI runtime that had no other name: the first digits of its id.
_EPHEMERAL_NAME = re.compile("[0-9a-f]{12}")
#: What version 2's hook of LXC wrote of a NIC, and of a mount.
_HOOK_NIC = frozenset({"type", "name", "nictype", "parent", "hwaddr", "mtu"})
_HOOK_DISK = frozenset({"type", "source", "path", "readonly"})


def check_version(connection: sqlite3.Connection, file: Path | str, *, create: bool) -> None:
    """Make the tables those of this version, if they can be.

    Args:
        connection: to the database, in autocommit mode.
        file: the database, for the error.
        create: make tables where there are none.

    Raises:
        StoreError: the tables are missing, another program's, or of a newer version.
    """
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
        raise StoreError(f"{file}: has no tables of guestapi", "'guestapi instance add' makes them")
    elif version > VERSION:
        raise StoreError(f"{file}: has tables of version {version}, this guestapi knows version {VERSION}")
    elif version < VERSION:
        _upgrade(connection)


def was_written_by_hook(name: str, definition: Device) -> bool:
    """Whether a device of version 2 looks exactly like what the hook of LXC wrote.

    Version 2 did not say who wrote a device. What the hook wrote is to be replaced by what the container has.
    """
    if definition.get("type") == "nic":
        return definition.get("name") == name and "nictype" in definition and definition.keys() <= _HOOK_NIC
    if definition == {"type": "disk", "path": "/"}:
        return name == "root"
    path = definition.get("path", "")
    named = path.startswith("/") and path[1:].replace("/", "-") == name
    return definition.get("type") == "disk" and named and definition.keys() <= _HOOK_DISK


def _create_tables(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    # Another process may have been quicker.
    if connection.execute("PRAGMA user_version").fetchone() == (0,):
        for statement in (*TABLES.values(), *INDEXES.values()):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _upgrade(connection: sqlite3.Connection) -> None:
    """Upgrade older tables in one transaction. Any process that opens the database may do it; no data is lost."""
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for step in range(version, VERSION):
        _UPGRADES[step](connection)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _from_1_to_2(connection: sqlite3.Connection) -> None:
    """Mirrors: to which one an instance or image belongs, and how each mirror is."""
    for statement in (
        "ALTER TABLE instances ADD COLUMN source TEXT",
        "ALTER TABLE instances ADD COLUMN told_ready BOOLEAN",
        "ALTER TABLE images ADD COLUMN source TEXT",
        """CREATE TABLE mirrors (
            name TEXT NOT NULL PRIMARY KEY, socket TEXT NOT NULL, connected BOOLEAN NOT NULL, contact FLOAT NOT NULL,
            lag FLOAT NOT NULL, fault TEXT NOT NULL
        )""",
    ):
        connection.execute(statement)


def _from_2_to_3(connection: sqlite3.Connection) -> None:
    """Sources: keys of instances, layers of configuration and devices, and what could not be taken over.

    What came from a mirror is the source's. What was set by hand, or came from an annotation, is the operator's; so are
    devices, but for those that look as the hook of LXC wrote them.
    """
    for statement in (
        "ALTER TABLE instances RENAME COLUMN told_ready TO acknowledged_ready",
        "ALTER TABLE instances ADD COLUMN source_key TEXT",
        "ALTER TABLE instances ADD COLUMN hostname TEXT",
        "ALTER TABLE instances ADD COLUMN kept BOOLEAN DEFAULT 0 NOT NULL",
        "ALTER TABLE instances ADD COLUMN init_root_uid INTEGER",
        "ALTER TABLE instances ADD COLUMN init_user_namespace INTEGER",
        # A mirror gave each of its instances a UUID of its own, and knew it again by that.
        "UPDATE instances SET source_key = uuid WHERE source IS NOT NULL",
        "ALTER TABLE mirrors RENAME TO sources",
        TABLES["source_problems"],
        "ALTER TABLE notifications ADD COLUMN by_guest BOOLEAN DEFAULT 0 NOT NULL",
    ):
        connection.execute(statement)
    for index in ("instances_by_source", "notifications_not_by_guest", "notifications_by_guest"):
        connection.execute(INDEXES[index])
    by_hand = connection.execute("SELECT id, name FROM instances WHERE source IS NULL").fetchall()
    kept = [(number,) for number, name in by_hand if not _EPHEMERAL_NAME.fullmatch(name)]
    connection.executemany("UPDATE instances SET kept = 1 WHERE id = ?", kept)
    for table in ("config", "devices"):
        connection.execute(f"ALTER TABLE {table} RENAME TO {table}_2")
        connection.execute(TABLES[table])
    layer = f"CASE WHEN instances.source IS NULL THEN {OPERATOR} ELSE {SOURCE} END"
    connection.execute(
        "INSERT INTO config (instance_id, key, layer, size, value) "
        f"SELECT instance_id, key, {layer}, length(CAST(value AS BLOB)), value "
        "FROM config_2 JOIN instances ON instances.id = instance_id"
    )
    connection.execute(
        f"INSERT INTO devices (instance_id, name, layer, definition) SELECT instance_id, devices_2.name, {layer}, "
        "definition FROM devices_2 JOIN instances ON instances.id = instance_id"
    )
    connection.execute("DROP TABLE config_2")
    connection.execute("DROP TABLE devices_2")
    rows = connection.execute("SELECT instance_id, name, definition FROM devices WHERE layer = ?", (OPERATOR,))
    hooks = [
        (SOURCE, number, name) for number, name, text in rows.fetchall() if was_written_by_hook(name, json.loads(text))
    ]
    connection.executemany("UPDATE devices SET layer = ? WHERE instance_id = ? AND name = ?", hooks)


def _from_3_to_4(connection: sqlite3.Connection) -> None:
    """Profiles. Instances that followers have added get the profile ``default`` of their project, which is empty yet.

    The source's layer of these still has what hooks.template said, so nothing that counts changes. A follower takes
    that into the profile when it starts (`profiles.take_template`), and out of the layer at its next observation.
    """
    for table in ("profiles", "profile_config", "profile_devices", "instance_profiles"):
        connection.execute(TABLES[table])
    connection.execute(INDEXES["instance_profiles_by_profile"])
    daemons = ", ".join(f"'{name}'" for name in sorted(DAEMONS))
    followed = f"instances WHERE source NOT IN ({daemons})"
    connection.execute(f"INSERT INTO profiles (project, name) SELECT DISTINCT project, 'default' FROM {followed}")
    connection.execute(
        "INSERT INTO instance_profiles (instance_id, position, profile_id) SELECT id, 0, "
        f"(SELECT profiles.id FROM profiles WHERE profiles.project = instances.project) FROM {followed}"
    )


def _from_4_to_5(connection: sqlite3.Connection) -> None:
    """Key policies, to whom values were given that are given once, and large entries of the change log in parts."""
    for table in ("policies", "spends"):
        connection.execute(TABLES[table])
    for index in ("policies_by_scope", "policies_by_instance"):
        connection.execute(INDEXES[index])
    connection.execute("ALTER TABLE notifications ADD COLUMN parts_size INTEGER DEFAULT 0 NOT NULL")
    connection.execute(TABLES["notification_parts"])
    _divide_large_entries(connection)


def _divide_large_entries(connection: sqlite3.Connection) -> None:
    rows = connection.execute("SELECT id FROM notifications WHERE length(CAST(metadata AS BLOB)) > ?", (PART_BYTES,))
    for (number,) in rows.fetchall():
        (text,) = connection.execute("SELECT metadata FROM notifications WHERE id = ?", (number,)).fetchone()
        content = text.encode()
        beginning = content[:BEGINNING_BYTES].decode(errors="ignore")
        connection.execute(
            "UPDATE notifications SET metadata = ?, parts_size = ? WHERE id = ?", (beginning, len(content), number)
        )
        connection.executemany(
            "INSERT INTO notification_parts (notification_id, start, part) VALUES (?, ?, ?)",
            [(number, start, content[start : start + PART_BYTES]) for start in range(0, len(content), PART_BYTES)],
        )


def _from_5_to_6(connection: sqlite3.Connection) -> None:
    """Notices."""
    connection.execute(TABLES["notices"])
    connection.execute(INDEXES["notices_by_instance"])


def _from_6_to_7(connection: sqlite3.Connection) -> None:
    """The fleet, and which instances it has placed on this host."""
    for table in ("fleet", "placements"):
        connection.execute(TABLES[table])


def _from_7_to_8(connection: sqlite3.Connection) -> None:
    """Attributes, and what is allowed."""
    for table in ("permissions", "attributes"):
        connection.execute(TABLES[table])
    for index in ("permissions_by_scope", "permissions_by_instance"):
        connection.execute(INDEXES[index])


def _from_8_to_9(connection: sqlite3.Connection) -> None:
    """Profiles of a fleet. Only names of this host's own profiles are unique from now on.

    SQLite takes a constraint away by making the table anew (sqlite.org/lang_altertable.html, section 7). References are
    not enforced meanwhile: whoever upgrades has not switched that on.
    """
    connection.execute(TABLES["profiles"].replace("TABLE profiles", "TABLE profiles_9", 1))
    connection.execute(
        "INSERT INTO profiles_9 (id, project, name, description, has_template) "
        "SELECT id, project, name, description, has_template FROM profiles"
    )
    # Numbers of profiles that are gone are not given again.
    connection.execute("DELETE FROM sqlite_sequence WHERE name = 'profiles_9'")
    connection.execute(
        "INSERT INTO sqlite_sequence (name, seq) SELECT 'profiles_9', seq FROM sqlite_sequence WHERE name = 'profiles'"
    )
    connection.execute("DROP TABLE profiles")
    connection.execute("ALTER TABLE profiles_9 RENAME TO profiles")
    connection.execute(INDEXES["profiles_by_name"])


#: What makes a database of one version into one of the next.
_UPGRADES: dict[int, Callable[[sqlite3.Connection], None]] = {
    1: _from_1_to_2,
    2: _from_2_to_3,
    3: _from_3_to_4,
    4: _from_4_to_5,
    5: _from_5_to_6,
    6: _from_6_to_7,
    7: _from_7_to_8,
    8: _from_8_to_9,
}
