"""Checks whether the database of a fleet is as a fleet needs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from guestapi.fleet.schema import VERSION
from guestapi.fleet.setup import list_hosts

if TYPE_CHECKING:
    import psycopg

#: The oldest PostgreSQL that tests run with, as of ``server_version_num``.
_OLDEST_SERVER = 150000
#: Seconds that a transaction may be open and idle: while it is, the queue of notifications is not emptied.
_IDLE_SECONDS = 60
#: Seconds without contact after which a host counts as cut off: it makes contact every five. The most that are shown.
_STALE_SECONDS, _MOST_HOSTS = 30, 50
#: Part of the queue of notifications that may be full. When all of it is, no change can be committed.
_QUEUE = 0.5

#: Values of synchronous_commit with which a standby has a change on its disk before it is acknowledged, in all
#: spellings that the server takes. With `remote_write` the standby's kernel has it: it is lost if both machines stop.
_DURABLE = "('on', 'remote_apply', 'true', 'yes', '1')"
# This session has a setting of its own (`engine.session`), so that of new ones counts.
_REPLICATION = (
    "SELECT current_setting('synchronous_standby_names'), "
    f"(SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit' AND lower(reset_val) NOT IN {_DURABLE}), "
    "(SELECT count(*) FROM pg_stat_replication), "
    "(SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state IN ('sync', 'quorum'))"
)
#: Roles, or the whole database, for which a setting of their own has changes not wait for a standby.
_CARELESS = (
    "SELECT coalesce('role ' || quote_ident(rolname), 'database ' || quote_ident(datname), 'each role'), setting "
    "FROM pg_db_role_setting CROSS JOIN unnest(setconfig) AS setting LEFT JOIN pg_roles ON pg_roles.oid = setrole "
    "LEFT JOIN pg_database ON pg_database.oid = setdatabase "
    "WHERE split_part(setting, '=', 1) = 'synchronous_commit' "
    f"AND lower(split_part(setting, '=', 2)) NOT IN {_DURABLE} "
    "AND (setdatabase = 0 OR datname = current_database()) ORDER BY 1"
)
_IDLE = (
    "SELECT usename, extract(epoch FROM clock_timestamp() - state_change)::int FROM pg_stat_activity "
    "WHERE datname = current_database() AND state LIKE 'idle in transaction%%' "
    "AND clock_timestamp() - state_change > make_interval(secs => %s) ORDER BY 2 DESC"
)
_OPEN = (
    "SELECT relname FROM pg_class WHERE relnamespace = 'guestapi'::regnamespace AND relkind IN ('r', 'p') "
    "AND NOT relrowsecurity ORDER BY relname"
)


class FleetFinding(NamedTuple):
    """The result of one check; attributes as of the findings of ``guestapi check``."""

    check: str
    ok: bool
    text: str


def check(connection: psycopg.Connection[Any]) -> Iterator[FleetFinding]:
    """Yield a finding for each check, in the order in which they are shown."""
    server = connection.info.server_version
    named = f"PostgreSQL {server // 10000}.{server % 10000}"
    if server < _OLDEST_SERVER:
        yield FleetFinding("server", False, f"{named}; 15 or newer is needed")
    else:
        yield FleetFinding("server", True, named)
    yield _tables(connection)
    yield from _hosts(connection)
    if not _one(connection, "SELECT pg_has_role('pg_read_all_stats', 'USAGE')")[0]:
        yield FleetFinding("replication", False, "only a member of pg_monitor sees the standbys; GRANT it to this role")
        return
    yield _replication(connection)
    (used,) = _one(connection, "SELECT pg_notification_queue_usage()")
    yield FleetFinding("notifications", used < _QUEUE, f"{100 * used:.0f}% of the queue used")
    yield _sessions(connection)


def _tables(connection: psycopg.Connection[Any]) -> FleetFinding:
    (version,) = _one(connection, "SELECT version FROM guestapi.fleet")
    if version != VERSION:
        right = "run 'guestapi fleet upgrade'" if version < VERSION else "upgrade guestapi on this host"
        return FleetFinding("tables", False, f"version {version}, this guestapi knows version {VERSION}; {right}")
    unsafe = [name for (name,) in connection.execute(_OPEN.encode())]
    if unsafe:
        text = f"no row-level security on {', '.join(unsafe)}, so hosts read all of it; run 'guestapi fleet upgrade'"
        return FleetFinding("tables", False, text)
    return FleetFinding("tables", True, f"version {version}")


def _hosts(connection: psycopg.Connection[Any]) -> Iterator[FleetFinding]:
    """Yield which hosts are behind, and why. A host that was added and has no instances need not follow yet."""
    hosts = [one for one in list_hosts(connection) if one.state == "active"]
    late = [one for one in hosts if one.fault or (one.age is None and one.instances) or (one.age or 0) > _STALE_SECONDS]
    yield FleetFinding("hosts", not late, f"{len(hosts)} active, {len(hosts) - len(late)} follow or need not")
    for one in late[:_MOST_HOSTS]:
        seen = "no contact yet"
        if one.contact is not None:
            seen = f"last contact {one.contact:%Y-%m-%d %H:%M:%S}, {one.age:.0f} s ago"
        text = f"{seen}, {one.instances} instances, {one.behind} changes behind"
        yield FleetFinding(f"host {one.name}", False, f"{text}; {one.fault}" if one.fault else text)
    if len(late) > _MOST_HOSTS:
        yield FleetFinding("hosts", False, f"and {len(late) - _MOST_HOSTS} more, see 'guestapi fleet host list'")


def _replication(connection: psycopg.Connection[Any]) -> FleetFinding:
    """Acknowledged changes survive the loss of the primary only if a standby has each of them."""
    names, commit, standbys, synchronous = _one(connection, _REPLICATION)
    lost = "changes that were acknowledged are lost with the primary"
    if not names:
        return FleetFinding(
            "replication",
            False,
            f"asynchronous, {standbys} standbys: {lost}; set synchronous_standby_names, as to 'ANY 1 (*)'",
        )
    if commit is not None:
        text = f"synchronous_commit is {commit}: {lost}; set it to on"
        return FleetFinding("replication", False, text)
    if careless := connection.execute(_CARELESS.encode()).fetchall():
        named = ", ".join(f"{whose} has {setting}" for whose, setting in careless)
        return FleetFinding("replication", False, f"{named}: {lost}; ALTER ROLE or DATABASE ... RESET takes it away")
    if not synchronous:
        text = f"no synchronous standby of {names} is connected: changes wait until there is one; start a standby"
        return FleetFinding("replication", False, text)
    return FleetFinding("replication", True, f"synchronous, {synchronous} of {standbys} standbys")


def _sessions(connection: psycopg.Connection[Any]) -> FleetFinding:
    idle = connection.execute(_IDLE.encode(), (_IDLE_SECONDS,)).fetchall()
    if not idle:
        return FleetFinding("sessions", True, "no transaction is idle")
    text = f"{len(idle)} transactions are open and idle, one of {idle[0][0]} for {idle[0][1]} s"
    return FleetFinding("sessions", False, f"{text}; pg_terminate_backend ends them")


def _one(connection: psycopg.Connection[Any], query: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(query.encode()).fetchone()
    assert row is not None, "each of these queries has one row"
    return row
