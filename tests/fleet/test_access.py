"""What a role can do in a fleet's database, above all that of a hostile host."""

from __future__ import annotations

import threading
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.fleet.conftest import Fleet

pytestmark = pytest.mark.root

#: What a host may call; everything else in the schema is refused.
CALLED = {"contact", "look", "me", "my_profiles", "release", "report"}


def tables(connection: psycopg.Connection[Any]) -> list[str]:
    """Return all tables and views of the fleet."""
    query = (
        "SELECT relname FROM pg_class WHERE relnamespace = 'guestapi'::regnamespace AND relkind IN ('r','p','v','m')"
    )
    return sorted(name for (name,) in connection.execute(query))


def placed(fleet: Fleet) -> dict[str, UUID]:
    """Return the instance of each host."""
    with fleet.admin() as connection:
        return dict(connection.execute("SELECT host, uuid FROM guestapi.instances").fetchall())


def fill(fleet: Fleet) -> dict[str, UUID]:
    """Give each table rows of both hosts, and return the instance of each host."""
    with fleet.admin() as connection:
        rows = connection.execute("SELECT host, uuid FROM guestapi.instances").fetchall()
        connection.execute("INSERT INTO guestapi.ops (op, result) VALUES (gen_random_uuid(), '{}')")
        for host, number in rows:
            connection.execute("INSERT INTO guestapi.said VALUES (%s, %s, 1, 1, 1, true, true)", (number, host))
            connection.execute("INSERT INTO guestapi.seen VALUES (%s, now(), 0, 'x', '')", (host,))
            profile = uuid4()
            connection.execute("INSERT INTO guestapi.profiles VALUES (%s, 'default', %s, '')", (profile, f"of-{host}"))
            connection.execute("INSERT INTO guestapi.profile_config VALUES (%s, %s, 'x')", (profile, f"user.{host}"))
            connection.execute("INSERT INTO guestapi.profile_devices VALUES (%s, %s, '{}')", (profile, f"eth-{host}"))
            connection.execute("INSERT INTO guestapi.instance_profiles VALUES (%s, 0, %s)", (number, profile))
    return dict(rows)


def test_every_table_has_row_level_security(fleet: Fleet) -> None:
    """Each table, also one that is added later, has row-level security and a policy for hosts."""
    with fleet.admin() as connection:
        rows = connection.execute(
            "SELECT relname, relkind, relrowsecurity, (SELECT count(*) FROM pg_policy WHERE polrelid = pg_class.oid "
            "AND 'guestapi_host'::regrole = ANY (polroles) AND polcmd = 'r') FROM pg_class "
            "WHERE relnamespace = 'guestapi'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f')"
        ).fetchall()
        assert len(rows) > 5
        assert [name for name, kind, secure, policies in rows if (kind, secure, policies) != ("r", True, 1)] == []
        # No policy counts for everybody, and none lets a host write.
        wide = (
            "SELECT polname FROM pg_policy WHERE 0 = ANY (polroles) OR polcmd != 'r' AND %s::regrole = ANY (polroles)"
        )
        assert connection.execute(wide, ("guestapi_host",)).fetchall() == []


def test_a_host_writes_no_table(fleet: Fleet) -> None:
    """The role of a host has no right on any table but to read it, and may call the known functions alone."""
    with fleet.admin() as connection:
        for table in tables(connection):
            for right in ("INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"):
                query = "SELECT has_table_privilege('guestapi_host_h1', %s, %s)"
                assert connection.execute(query, (f"guestapi.{table}", right)).fetchone() == (False,), (table, right)
        called = connection.execute(
            "SELECT proname FROM pg_proc WHERE pronamespace = 'guestapi'::regnamespace "
            "AND has_function_privilege('guestapi_host_h1', oid, 'EXECUTE')"
        )
        assert {name for (name,) in called} == CALLED
        unsafe = connection.execute(
            "SELECT proname FROM pg_proc WHERE pronamespace = 'guestapi'::regnamespace "
            "AND NOT (prosecdef AND 'search_path=pg_catalog, pg_temp' = ANY (proconfig))"
        )
        assert unsafe.fetchall() == []


def test_a_host_reads_its_own_rows_alone(fleet: Fleet) -> None:
    """In each table a host sees rows of its own, and none in which another host or its instance stands."""
    numbers = fill(fleet)
    with fleet.host("h1") as connection:
        for table in tables(connection):
            rows = [str(row) for row in connection.execute(f"SELECT * FROM guestapi.{table}".encode())]
            assert table == "ops" or rows, f"{table}: nothing of h1's own is seen, so this test proves nothing"
            assert not [row for row in rows if "h2" in row or str(numbers["h2"]) in row], table
        assert connection.execute("SELECT count(*) FROM guestapi.ops").fetchone() == (0,)


def test_a_look_shows_its_own_rows_alone(fleet: Fleet) -> None:
    """Whatever a host asks `look` for, it gets its own instances with their profiles, and nothing of what is gone."""
    numbers = fill(fleet)
    with fleet.admin() as connection:
        profiles = dict(connection.execute("SELECT name, id FROM guestapi.profiles").fetchall())
        # As if the instance and the profile of h2 had been h1's before.
        mixed = [numbers["h1"], numbers["h2"], profiles["of-h1"], profiles["of-h2"]]
        connection.execute("SELECT guestapi.note('h1', %s)", (mixed,))
        query = "SELECT id::text, left(pg_walfile_name(pg_current_wal_lsn()), 8) FROM guestapi.fleet"
        identity = connection.execute(query).fetchone()
        assert identity is not None
    look = "SELECT * FROM guestapi.look(%s, %s, %s, %s)"
    with fleet.host("h1") as connection:
        rows = connection.execute(look, (*identity, 0, 1 << 20)).fetchall()
        assert "web1" in str(rows)
        assert "user.h1" in str(rows)
        for words in ((0, 1 << 62), (-1, 1 << 20), (1, -1), (0, None), (None, 0), (1 << 62, 0)):
            found = str(connection.execute(look, (*identity, *words)).fetchall())
            for one in ("web2", "h2", "of-h2"):
                assert one not in found, words
        rows = connection.execute(look, (*identity, 0, 1 << 20)).fetchall()
        by_uuid = {row[9]: row for row in rows}
        assert set(by_uuid) == {str(one) for one in mixed}
        for gone in (numbers["h2"], profiles["of-h1"], profiles["of-h2"]):
            assert set(by_uuid[str(gone)][11:]) <= {None, False}
        for wrong in (("x", identity[1]), (identity[0], "FFFFFFFF"), (None, None)):
            ((*state, _last),) = [(*row[:8], row[8:]) for row in connection.execute(look, (*wrong, 0, 1 << 20))]
            assert state[3] == "h1"
            assert set(_last) == {None}
    with fleet.admin() as connection:
        assert connection.execute(look, (*identity, 0, 1 << 20)).fetchall() == []


def test_certificate(fleet: Fleet) -> None:
    """A certificate opens sessions of its own role alone."""
    with fleet.host("h1") as connection:
        assert connection.execute("SELECT guestapi.me()").fetchone() == ("h1",)
    for role in ("guestapi_host_h2", "postgres", "guestapi_fleet", "guestapi_operator"):
        with pytest.raises(psycopg.OperationalError):
            fleet.host("h1", role)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO guestapi.config SELECT uuid, 'user.x', 'x' FROM guestapi.instances",
        "UPDATE guestapi.instances SET epoch = 9",
        "UPDATE guestapi.hosts SET revision = 9223372036854775807",
        "DELETE FROM guestapi.log",
        "TRUNCATE guestapi.instances CASCADE",
        "SELECT guestapi.note('h2', ARRAY[gen_random_uuid()])",
        "SELECT guestapi.note('h1', ARRAY[gen_random_uuid()])",
        "SET ROLE guestapi_fleet",
        "SET ROLE guestapi_operator",
        "SET ROLE guestapi_host_h2",
        "SET SESSION AUTHORIZATION guestapi_host_h2",
        "SET row_security = off; SELECT * FROM guestapi.instances",
        "ALTER ROLE guestapi_host_h1 CONNECTION LIMIT -1",
        "SET temp_file_limit = -1",
        "CREATE TEMPORARY TABLE filling (x text)",
        "CREATE TABLE public.filling (x text)",
        "CREATE TABLE guestapi.filling (x text)",
        "CREATE FUNCTION guestapi.me() RETURNS text LANGUAGE sql AS $$ SELECT 'h2' $$",
        "CREATE SCHEMA filling",
        "SELECT lo_create(0)",
        "SELECT lo_from_bytea(0, 'x')",
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_try_advisory_lock(1)",
        "SELECT pg_advisory_xact_lock_shared(1, 1)",
        "BEGIN; LOCK TABLE guestapi.instances IN ACCESS EXCLUSIVE MODE",
        "BEGIN; LOCK TABLE guestapi.hosts IN ROW EXCLUSIVE MODE",
        "SELECT * FROM guestapi.instances FOR UPDATE",
        "COPY guestapi.instances TO PROGRAM 'true'",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
        "SELECT rolpassword FROM pg_authid",
    ],
)
def test_a_hostile_host_is_refused(shared: Fleet, statement: str) -> None:
    """What a host does with its session beyond its own rows is refused."""
    with shared.admin(), shared.host("h1") as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement.encode())


def test_shadowed_names_change_nothing(fleet: Fleet) -> None:
    """Functions find their tables whatever the search path of the session is."""
    with fleet.host("h1") as connection:
        connection.execute("SET search_path = guestapi, pg_temp, public")
        connection.execute("SELECT guestapi.contact(0, 'x', '')")
        assert connection.execute("SELECT guestapi.me()").fetchone() == ("h1",)


def test_sessions_are_limited(fleet: Fleet) -> None:
    """A host that opens sessions as fast as it can gets four, and others get theirs."""
    opened = [fleet.host("h1") for _ in range(4)]
    try:
        with pytest.raises(psycopg.OperationalError, match="too many connections"):
            fleet.host("h1")
        fleet.host("h2").close()
    finally:
        for one in opened:
            one.close()


def test_a_flood_of_reports_fills_no_table(fleet: Fleet) -> None:
    """Whatever a host reports, there is one row of each instance and of the host, of bounded size."""
    numbers = fill(fleet)
    with fleet.host("h1") as connection:
        for number in range(200):
            connection.execute("SELECT guestapi.report(%s, 1, %s, 1, true, false)", (numbers["h1"], number))
            connection.execute("SELECT guestapi.report(%s, 1, 1, 1, true, false)", (uuid4(),))
            connection.execute("SELECT guestapi.contact(%s, 'x', '')", (number,))
        for version, fault in (("x" * 101, ""), ("x", "x" * 1001)):
            with pytest.raises(psycopg.errors.CheckViolation):
                connection.execute("SELECT guestapi.contact(1, %s, %s)", (version, fault))
    with fleet.admin() as connection:
        assert connection.execute("SELECT count(*) FROM guestapi.said").fetchone() == (2,)
        assert connection.execute("SELECT count(*) FROM guestapi.seen").fetchone() == (2,)


def test_notify_is_a_doorbell_alone(fleet: Fleet) -> None:
    """A host that rings others changes nothing of theirs."""
    with fleet.admin() as watching, fleet.host("h1") as connection:
        before = watching.execute("SELECT name, revision FROM guestapi.hosts").fetchall()
        for _ in range(100):
            connection.execute("NOTIFY guestapi_h2, 'remove everything'")
        assert watching.execute("SELECT name, revision FROM guestapi.hosts").fetchall() == before


def test_reports(fleet: Fleet) -> None:
    """A report counts if it is of the host's own instance, of this epoch, and newer than the last one."""
    numbers = placed(fleet)
    report = "SELECT guestapi.report(%s, %s, %s, 1, true, true)"
    with fleet.host("h1") as connection:
        outcomes = [
            connection.execute(report, (numbers["h1"], epoch, seq)).fetchone()
            for epoch, seq in ((1, 2), (1, 2), (1, 1), (2, 3), (0, 3), (1, 3))
        ]
        assert outcomes == [(True,), (False,), (False,), (False,), (False,), (True,)]
        assert connection.execute(report, (numbers["h2"], 1, 9)).fetchone() == (False,)


def test_release(fleet: Fleet) -> None:
    """Only an instance that is to leave is released, once, by its host; both hosts' revisions are raised."""
    numbers = placed(fleet)
    release = "SELECT guestapi.release(%s, 1)"
    with fleet.admin() as admin, fleet.host("h1") as h1, fleet.host("h2") as h2:
        assert h1.execute(release, (numbers["h1"],)).fetchone() == (False,)
        admin.execute("UPDATE guestapi.instances SET next_host = 'h2' WHERE host = 'h1'")
        assert h2.execute(release, (numbers["h1"],)).fetchone() == (False,)
        assert h2.execute("SELECT name FROM guestapi.instances").fetchall() == [("web2",)]
        assert h1.execute(release, (numbers["h1"],)).fetchone() == (True,)
        assert h1.execute(release, (numbers["h1"],)).fetchone() == (False,)
        assert h1.execute("SELECT name FROM guestapi.instances").fetchall() == []
        query = "SELECT name, epoch, next_host, revision FROM guestapi.instances ORDER BY name"
        assert h2.execute(query).fetchall() == [("web1", 2, None, 2), ("web2", 1, None, 1)]
        logged = "SELECT host, revision, uuid FROM guestapi.log ORDER BY host, revision"
        both = [("h1", 1, numbers["h1"]), ("h1", 2, numbers["h1"]), ("h2", 1, numbers["h2"]), ("h2", 2, numbers["h1"])]
        assert admin.execute(logged).fetchall() == both


def test_releases_that_cross(fleet: Fleet) -> None:
    """Two hosts that release to each other at the same time do not wait for each other for ever."""
    with fleet.admin() as admin:
        for number in range(20):
            fleet.place("h1", f"a{number}")
            fleet.place("h2", f"b{number}")
        admin.execute("UPDATE guestapi.instances SET next_host = CASE host WHEN 'h1' THEN 'h2' ELSE 'h1' END")
        rows = admin.execute("SELECT host, uuid FROM guestapi.instances").fetchall()
    faults: list[Exception] = []

    def release(host: str) -> None:
        try:
            with fleet.host(host) as connection:
                for owner, number in rows:
                    if owner == host:
                        connection.execute("SELECT guestapi.release(%s, 1)", (number,))
        except psycopg.Error as error:
            faults.append(error)

    threads = [threading.Thread(target=release, args=(host,)) for host in ("h1", "h2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    with fleet.admin() as admin:
        assert admin.execute("SELECT count(*) FROM guestapi.instances WHERE epoch = 2").fetchone() == (42,)
        # No revision is missing and none is doubled.
        holes = admin.execute(
            "SELECT host FROM guestapi.log GROUP BY host HAVING count(*) != max(revision) OR min(revision) != 1"
        )
        assert holes.fetchall() == []


def test_a_fenced_host(fleet: Fleet) -> None:
    """Fencing ends a host's sessions, and lets it neither in nor read until it is added again."""
    listening = fleet.host("h1")
    assert fleet.guestapi.good("fleet", "host", "fence", "h1") == "fenced h1; 1 sessions ended\n"
    with pytest.raises(psycopg.OperationalError):
        listening.execute("SELECT * FROM guestapi.instances")
    with pytest.raises(psycopg.OperationalError):
        fleet.host("h1")
    assert fleet.guestapi.good("fleet", "host", "add", "h1") == "guestapi_host_h1\n"
    with fleet.host("h1") as connection:
        assert connection.execute("SELECT name FROM guestapi.instances").fetchall() == [("web1",)]


def test_a_session_that_survived_fencing_reads_nothing(fleet: Fleet) -> None:
    """Also a session that was not ended reads nothing once its host is fenced."""
    with fleet.host("h1") as connection, fleet.admin() as admin:
        admin.execute("UPDATE guestapi.hosts SET state = 'fenced' WHERE name = 'h1'")
        for table in tables(admin):
            assert connection.execute(f"SELECT * FROM guestapi.{table}".encode()).fetchall() == [], table
        assert connection.execute("SELECT * FROM guestapi.look('', '', 0, 0)").fetchall() == []
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT guestapi.contact(1, 'x', '')")
