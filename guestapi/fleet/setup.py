"""Making and upgrading the tables of a fleet, and the hosts that belong to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from guestapi.errors import OperatorError
from guestapi.fleet import access
from guestapi.fleet.schema import HOST_BYTES, HOSTS, OPERATORS, OWNER, ROLE_PREFIX, UPGRADES, VERSION, VIEWERS

if TYPE_CHECKING:
    import psycopg

#: A host's name, which is also the CommonName of its certificate: as of RFC 1123, section 2.1, in lower case.
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
#: Sessions that a host may have: one listens, one reads, and both once more while an old one has not ended yet.
_SESSIONS = 4
#: Key of the advisory lock that is held while tables are made or upgraded, so that two commands do not do it at once.
#: Any number that no other program uses for such a lock in this database.
_LOCK = 0x67_75_65_73_74


class FleetMisuseError(OperatorError):
    """What the operator wants cannot be done in this fleet."""


@dataclass(frozen=True, slots=True)
class HostStatus:
    """A host of a fleet.

    Attributes:
        name: the host's name.
        role: its role in PostgreSQL.
        state: ``active`` or ``fenced``.
        instances: how many instances belong to it.
        behind: how many changes of its instances it has not applied yet.
        contact: when it was last in contact, by the primary's clock; None: never.
        age: seconds since then, by the same clock.
        fault: the fault that it has reported.
    """

    name: str
    role: str
    state: str
    instances: int
    behind: int
    contact: datetime | None
    age: float | None
    fault: str


def init(connection: psycopg.Connection[Any]) -> UUID:
    """Make roles, tables, functions and policies, and return the fleet's identity.

    Raises:
        FleetMisuseError: there is a fleet in this database, or the tables would be another program's.
    """
    with connection.transaction():
        _lock(connection)
        if _has_schema(connection):
            raise FleetMisuseError(
                "there is a fleet in this database already", "'guestapi fleet upgrade' brings its tables up to date"
            )
        for role in (OWNER, HOSTS, OPERATORS, VIEWERS):
            if connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)).fetchone() is None:
                connection.execute(f"CREATE ROLE {role} NOLOGIN".encode())
        connection.execute(f"CREATE SCHEMA guestapi AUTHORIZATION {OWNER}".encode())
        _write(connection, 0)
        row = connection.execute("SELECT id FROM guestapi.fleet").fetchone()
    assert row is not None, "it was inserted"
    return UUID(str(row[0]))


def upgrade(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """Make the tables those of this version, and write functions and policies anew.

    Returns:
        The versions before and after.

    Raises:
        FleetMisuseError: there is no fleet, or it is newer than this program.
    """
    with connection.transaction():
        _lock(connection)
        if not _has_schema(connection):
            raise FleetMisuseError("there is no fleet in this database yet", "'guestapi fleet init' makes one")
        row = connection.execute("SELECT version FROM guestapi.fleet").fetchone()
        assert row is not None, "init inserts it in the transaction that makes the schema"
        before = int(row[0])
        if before > VERSION:
            raise FleetMisuseError(
                f"the fleet has tables of version {before}, this guestapi knows version {VERSION}",
                "upgrade guestapi on this host",
            )
        _write(connection, before)
    return before, VERSION


def add_host(connection: psycopg.Connection[Any], name: str) -> str:
    """Add a host, and return the role that it logs in as. A host that was fenced becomes active again.

    Raises:
        FleetMisuseError: the name is invalid, or the host is there already.
    """
    if len(name) > HOST_BYTES or not _HOST.fullmatch(name):
        raise FleetMisuseError(
            f"host {name[:80]!r} cannot be one",
            f"1 to {HOST_BYTES} small letters, digits, '.' or '-' are needed, as in the CommonName of its certificate",
        )
    role = ROLE_PREFIX + name
    with connection.transaction():
        _lock(connection)
        row = connection.execute("SELECT state FROM guestapi.hosts WHERE name = %s FOR UPDATE", (name,)).fetchone()
        if row is not None and row[0] == "active":
            raise FleetMisuseError(
                f"host {name!r} belongs to the fleet already", "'guestapi fleet host list' shows all"
            )
        if connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)).fetchone() is None:
            connection.execute(f'CREATE ROLE "{role}"'.encode())
        connection.execute(
            f'ALTER ROLE "{role}" LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS '
            f"CONNECTION LIMIT {_SESSIONS}".encode()
        )
        connection.execute(f'GRANT {HOSTS} TO "{role}"'.encode())
        connection.execute(f"ALTER ROLE \"{role}\" SET temp_file_limit = '64MB'".encode())
        connection.execute(
            "INSERT INTO guestapi.hosts (name, role) VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET state = 'active'",
            (name, role),
        )
    return role


def fence_host(connection: psycopg.Connection[Any], name: str) -> int:
    """Revoke a host's right to log in and to read, and end its sessions; return how many there were.

    The host's instances stay its own. A host that is still running goes on serving them as last known.

    Raises:
        FleetMisuseError: there is no such host.
    """
    with connection.transaction():
        _lock(connection)
        row = connection.execute(
            "UPDATE guestapi.hosts SET state = 'fenced' WHERE name = %s RETURNING role", (name,)
        ).fetchone()
        if row is None:
            raise FleetMisuseError(f"there is no host {name[:80]!r}", "'guestapi fleet host list' shows all")
        connection.execute(f'ALTER ROLE "{row[0]}" NOLOGIN'.encode())
    # After the commit: a session that begins now is refused.
    ended = connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (row[0],))
    return len(ended.fetchall())


def list_hosts(connection: psycopg.Connection[Any]) -> list[HostStatus]:
    """The hosts of the fleet, by name."""
    rows = connection.execute(
        "SELECT name, role, state, (SELECT count(*) FROM guestapi.instances WHERE host = hosts.name), "
        "revision - coalesce(applied, 0), contact, extract(epoch FROM clock_timestamp() - contact)::float8, "
        "coalesce(fault, '') FROM guestapi.hosts LEFT JOIN guestapi.seen ON host = name ORDER BY name"
    )
    return [HostStatus(*row) for row in rows.fetchall()]


def _lock(connection: psycopg.Connection[Any]) -> None:
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))


def _has_schema(connection: psycopg.Connection[Any]) -> bool:
    return connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'guestapi'").fetchone() is not None


def _write(connection: psycopg.Connection[Any], version: int) -> None:
    """Write tables of later versions than this one, as the owner; then functions and policies."""
    for statement in access.administrators_statements():
        connection.execute(statement.encode())
    connection.execute(f"SET LOCAL ROLE {OWNER}".encode())
    for step in range(version + 1, VERSION + 1):
        for statement in UPGRADES[step]:
            connection.execute(statement.encode())
    if version == 0:
        connection.execute("INSERT INTO guestapi.fleet (version, oldest_version) VALUES (%s, %s)", (VERSION, VERSION))
    else:
        connection.execute("UPDATE guestapi.fleet SET version = %s", (VERSION,))
    for statement in access.statements():
        connection.execute(statement.encode())
    connection.execute("RESET ROLE")
