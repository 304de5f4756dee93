"""`guestapi fleet check`, with a standby that is really there and really gone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from guestapi.fleet import checks, engine, inventory
from tests.fleet.conftest import Fleet
from tests.harness import waiting
from tests.harness.postgresql import Postgres

pytestmark = pytest.mark.root

_SECONDS = 20.0
_WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND usename = 'guestapi_host_h1'"


def found(fleet: Fleet, user: str = "postgres") -> dict[str, tuple[bool, str]]:
    """Return what the check finds, by the name of the check; its exit code agrees with it."""
    config = fleet.guestapi.config
    config.write_text(config.read_text().replace("//postgres@", f"//{user}@"))
    done = fleet.guestapi("fleet", "check")
    rows = [line.partition(": ") for line in done.out.splitlines()]
    findings = {head[5:]: (head.startswith("ok"), text) for head, _, text in rows}
    assert done.code == (0 if all(passed for passed, _ in findings.values()) else 1), done
    return findings


def until(condition: Callable[[], bool]) -> None:
    """Wait for a change at the server, which no event tells."""
    waiting.until(condition, "the change", pause=0.05, seconds=_SECONDS)


@pytest.fixture
def standby(server: Postgres) -> Iterator[Postgres]:
    """A standby of the server, streaming; the server is set up to need it."""
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    other = server.standby(directory)
    try:
        other.start()
        yield other
    finally:
        configure(server, synchronous_standby_names="", synchronous_commit="on")
        other.stop()
        shutil.rmtree(directory)


def configure(server: Postgres, **settings: str) -> None:
    """Change settings of the server, and wait until they hold in new sessions."""
    with server.connect() as connection:
        # A change of settings must not itself wait for a standby that is away.
        connection.execute("SET synchronous_commit = local")
        for name, value in settings.items():
            connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
    server.reload()

    def holds() -> bool:
        with server.connect() as connection:
            return all(
                connection.execute("SELECT current_setting(%s)", (name,)).fetchone() == (value,)
                for name, value in settings.items()
            )

    until(holds)


def test_replication(fleet: Fleet, standby: Postgres) -> None:
    """Asynchronous replication fails, and so does a synchronous standby that is away or not waited for."""
    until(lambda: "asynchronous, 1 standbys" in found(fleet)["replication"][1])
    assert not found(fleet)["replication"][0]
    configure(fleet.server, synchronous_standby_names="ANY 1 (*)")
    until(lambda: found(fleet)["replication"] == (True, "synchronous, 1 of 1 standbys"))
    for weak in ("local", "remote_write"):
        configure(fleet.server, synchronous_commit=weak)
        passed, text = found(fleet)["replication"]
        assert (passed, text.startswith(f"synchronous_commit is {weak}: ")) == (False, True)
    configure(fleet.server, synchronous_commit="remote_apply")
    assert found(fleet)["replication"][0]
    configure(fleet.server, synchronous_commit="on")
    standby.stop()
    until(lambda: "no synchronous standby" in found(fleet)["replication"][1])


@pytest.fixture
def anna(fleet: Fleet) -> Iterator[str]:
    """An operator; roles are of all databases of the server."""
    with fleet.admin() as connection:
        connection.execute("SET synchronous_commit = local")
        create(connection, "anna")
        yield "anna"
        connection.execute("DROP ROLE anna")


@pytest.mark.parametrize(
    ("whose", "named"),
    [
        ("ROLE anna", "role anna"),
        ("ROLE anna IN DATABASE {database}", "role anna"),
        ("DATABASE {database}", "database {database}"),
        ("ROLE ALL", "each role"),
    ],
)
def test_settings_of_roles(fleet: Fleet, standby: Postgres, anna: str, whose: str, named: str) -> None:
    """A role, a database, and a role in a database that do not wait for a standby's disk are named."""
    configure(fleet.server, synchronous_standby_names="ANY 1 (*)")
    until(lambda: found(fleet)["replication"][0])
    altered, named = (text.format(database=fleet.database) for text in (whose, named))
    # The session that checks has a setting of its own, which wins: it is not the one that is missed.
    with fleet.admin() as connection:
        connection.execute("SET synchronous_commit = local")
        connection.execute("ALTER ROLE postgres SET synchronous_commit = on")
        try:
            for weak in ("off", "local", "remote_write", "'FALSE'"):
                connection.execute(f"ALTER {altered} SET synchronous_commit = {weak}".encode())
                passed, text = found(fleet)["replication"]
                assert (passed, text.partition(": ")[0]) == (
                    False,
                    "{} has synchronous_commit={}".format(named, weak.strip("'")),
                )
            for strong in ("on", "'TRUE'", "remote_apply"):
                connection.execute(f"ALTER {altered} SET synchronous_commit = {strong}".encode())
                assert found(fleet)["replication"][0]
        finally:
            connection.execute(f"ALTER {altered} RESET synchronous_commit".encode())
            connection.execute("ALTER ROLE postgres RESET synchronous_commit")


@pytest.mark.parametrize(
    ("given", "made"),
    [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")],
)
def test_sessions_wait_for_standbys(fleet: Fleet, anna: str, given: str, made: str) -> None:
    """An operator's session waits for a standby's disk whatever is set for the role, and a stronger wish stays."""
    with fleet.admin() as connection:
        connection.execute(f"ALTER ROLE anna SET synchronous_commit = {given}".encode())
    with engine.session(fleet.server.url(fleet.database, anna)) as connection:
        assert connection.execute("SHOW synchronous_commit").fetchone() == (made,)


def test_a_release_waits_for_standbys(fleet: Fleet) -> None:
    """A host's release of an instance waits for a standby, whatever is set for its role; its contact does not."""
    web3 = fleet.place("h1", "web3")
    with fleet.admin() as connection:
        connection.execute("UPDATE guestapi.instances SET next_host = 'h2' WHERE uuid = %s", (web3,))
        connection.execute("ALTER ROLE guestapi_host_h1 SET synchronous_commit = off")
    configure(fleet.server, synchronous_standby_names="nobody")
    url = fleet.server.url_of_host("h1", fleet.database, "guestapi_host_h1")
    with engine.open_session(url, {}, _SECONDS) as session, ThreadPoolExecutor() as aside, fleet.admin() as admin:
        try:
            inventory.listen(session, "h1")
            inventory.say_contact(session, 1, "")
            released = aside.submit(inventory.release, session, str(web3), 1)
            until(lambda: released.done() or admin.execute(_WAITING).fetchone() == (1,))
            assert not released.done()
        finally:
            configure(fleet.server, synchronous_standby_names="")
            admin.execute("ALTER ROLE guestapi_host_h1 RESET synchronous_commit")
        assert released.result()


def test_without_a_standby(fleet: Fleet) -> None:
    """A single server fails the check of replication alone, if its hosts follow."""
    follow(fleet)
    findings = found(fleet)
    assert [name for name, (passed, _) in findings.items() if not passed] == ["replication"]
    assert set(findings) == {"server", "tables", "hosts", "replication", "notifications", "sessions"}


def test_tables(fleet: Fleet) -> None:
    """Tables without row-level security, and of another version, fail."""
    with fleet.admin() as connection:
        connection.execute("ALTER TABLE guestapi.config DISABLE ROW LEVEL SECURITY")
        assert "no row-level security on config" in found(fleet)["tables"][1]
        connection.execute("UPDATE guestapi.fleet SET version = 0")
        assert found(fleet)["tables"][1].endswith("run 'guestapi fleet upgrade'")


def test_idle_transactions(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that keeps a transaction open is named."""
    monkeypatch.setattr(checks, "_IDLE_SECONDS", 0)
    with fleet.host("h1") as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT 1")
        passed, text = found(fleet)["sessions"]
        assert (passed, "one of guestapi_host_h1" in text) == (False, True)
        connection.execute("ROLLBACK")
    assert found(fleet)["sessions"][0]


def test_who_sees_no_standbys(fleet: Fleet) -> None:
    """A role that does not see the standbys hears that, instead of that there are none."""
    with fleet.admin() as connection:
        for name in ("ops1", "ops2"):
            create(connection, name)
        connection.execute("GRANT pg_monitor TO ops2")
    assert "pg_monitor" in found(fleet, "ops1")["replication"][1]
    config = fleet.guestapi.config
    config.write_text(config.read_text().replace("//ops1@", "//postgres@"))
    assert found(fleet, "ops2")["replication"][1].startswith("asynchronous, 0 standbys")


def create(connection: psycopg.Connection[Any], name: str) -> None:
    """Make a role of an operator."""
    connection.execute(f"CREATE ROLE {name} LOGIN IN ROLE guestapi_operator".encode())


def follow(fleet: Fleet, fault: str = "") -> None:
    """Have both hosts say that they follow; the second one with what is wrong."""
    for name, wrong in (("h1", ""), ("h2", fault)):
        with fleet.host(name) as connection:
            connection.execute("SELECT guestapi.contact(1, '1.0', %s)", (wrong,))


def test_hosts(fleet: Fleet) -> None:
    """A host with instances that does not follow, is cut off or has a fault is named; one without is not."""
    assert found(fleet)["host h1"] == (False, "no contact yet, 1 instances, 1 changes behind")
    fleet.guestapi.good("fleet", "host", "add", "h3")
    follow(fleet, "tired")
    findings = found(fleet)
    assert findings["hosts"] == (False, "3 active, 2 follow or need not")
    assert findings["host h2"][1].endswith("1 instances, 0 changes behind; tired")
    with fleet.admin() as connection:
        connection.execute("UPDATE guestapi.seen SET fault = '', contact = contact - interval '40 seconds'")
        connection.execute("UPDATE guestapi.hosts SET revision = 4 WHERE name = 'h1'")
    findings = found(fleet)
    assert findings["host h1"][1].startswith("last contact 20")
    assert findings["host h1"][1].endswith(" s ago, 1 instances, 3 changes behind")
    fleet.guestapi.good("fleet", "host", "fence", "h1")
    assert "host h1" not in found(fleet)
