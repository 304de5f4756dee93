"""The follower, with a real PostgreSQL: a host's store becomes and stays as the fleet's database has it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from guestapi.fleet import engine, follower, inventory, joining
from guestapi.fleet.engine import FleetError
from guestapi.fleet.follower import BATCH, FleetFollower
from guestapi.fleet.inventory import Placement
from guestapi.fleet.joining import connect_host
from guestapi.fleet.placing import write_placements
from guestapi.metrics.exposition import write_metrics
from guestapi.metrics.handover import ReportDirectory
from guestapi.sources.reconcile import reconcile
from guestapi.store import placements, steps
from guestapi.store.lookup import find_instance, get_instance, list_problems
from guestapi.store.transaction import Change
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.fleet.conftest import Fleet
from tests.fleet.host import FollowingHost, observe, this_process
from tests.harness.service import COMMAND

pytestmark = pytest.mark.root

SECONDS = 20.0


@contextmanager
def changing(fleet: Fleet, host: str, *uuids: UUID) -> Iterator[psycopg.Connection[Any]]:
    """A transaction of the operator's that changes instances of a host."""
    with fleet.admin() as connection, connection.transaction():
        connection.execute("SELECT guestapi.note(%s, %s)", (host, list(uuids)))
        yield connection


class EndError(BaseException):
    """Ends a follower that goes on after every other error."""


def until(met: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + SECONDS
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_first_look(fleet: Fleet) -> None:
    """A host gets its own instances, with their configuration and devices, and no other's; and says what it has."""
    host = FollowingHost(fleet)
    host.follow()
    assert host.names == {"web1"}
    shown = host.shown("web1")
    assert shown.config == {"user.password": "secret"}
    assert shown.devices == {"eth0": {"type": "nic"}}
    with fleet.admin() as connection:
        (uuid, cloud_init_id, fleet_id) = connection.execute(
            "SELECT uuid::text, cloud_init_id::text, fleet.id::text FROM guestapi.instances, guestapi.fleet "
            "WHERE name = 'web1'"
        ).fetchone() or ("", "", "")
        applied = connection.execute("SELECT applied FROM guestapi.seen WHERE host = 'h1'").fetchone()
    assert (shown.uuid, shown.cloud_init_id) == (uuid, cloud_init_id)
    assert host.cursor == (fleet_id, 1, 1)
    assert applied == (1,)


def test_a_notification_is_heard_once(fleet: Fleet) -> None:
    """A notification leads to one look; one that comes while the host asks leads to another."""
    host = FollowingHost(fleet)
    with connect_host(host.url, host.settings.fleet) as session:
        inventory.listen(session, "h1")
        fleet.place("h1", "other")
        assert session.wait(SECONDS)
        assert len(inventory.look(session, inventory.read_state(session).cursor._replace(revision=0)).changed) == 2
        assert not session.wait(0)
        session.ask("NOTIFY guestapi_h1")
        assert session.wait(0)
        assert not session.wait(0)


def test_tables_without_the_function(fleet: Fleet) -> None:
    """A host whose guestapi is newer than the tables says what is to be done."""
    with fleet.admin() as connection:
        connection.execute("DROP FUNCTION guestapi.look")
    host = FollowingHost(fleet)
    with pytest.raises(FleetError) as caught:
        host.follow()
    assert (caught.value.message, caught.value.hint) == (
        "the fleet's tables are older than this guestapi",
        "run 'guestapi fleet upgrade'",
    )
    assert fleet.guestapi.good("fleet", "upgrade") == "version 2\n"
    host.follow()
    assert host.names == {"web1"}


def test_changes(fleet: Fleet) -> None:
    """What is changed, renamed, added and removed is so in the store after one look, with the cursor."""
    host = FollowingHost(fleet)
    other = fleet.place("h1", "other")
    host.follow()
    with fleet.admin() as connection:
        (uuid,) = connection.execute("SELECT uuid FROM guestapi.instances WHERE name = 'web1'").fetchone() or (None,)
    assert isinstance(uuid, UUID)
    with changing(fleet, "h1", uuid, other) as connection:
        connection.execute("DELETE FROM guestapi.instances WHERE uuid = %s", (other,))
        connection.execute("UPDATE guestapi.instances SET name = 'other' WHERE uuid = %s", (uuid,))
        connection.execute("UPDATE guestapi.config SET value = '\\x0041'::bytea WHERE uuid = %s", (uuid,))
        connection.execute("DELETE FROM guestapi.devices WHERE uuid = %s", (uuid,))
    fleet.place("h1", "new")
    host.follow()
    assert host.names == {"other", "new"}
    shown = host.shown("other")
    assert (shown.uuid, shown.config, shown.devices) == (str(uuid), {"user.password": "\0A"}, {})
    assert host.cursor.revision == 4
    revision = shown.revision
    host.follow()
    assert host.shown("other").revision == revision


def test_names_go_round(fleet: Fleet) -> None:
    """Two instances that change their names with each other are the same instances afterwards."""
    host = FollowingHost(fleet)
    first, second = fleet.place("h1", "a"), fleet.place("h1", "b")
    host.follow()
    before = {name: host.shown(name).id for name in ("a", "b")}
    with changing(fleet, "h1", first, second) as connection:
        connection.execute("UPDATE guestapi.instances SET name = 'c' WHERE uuid = %s", (first,))
        connection.execute("UPDATE guestapi.instances SET name = 'a' WHERE uuid = %s", (second,))
        connection.execute("UPDATE guestapi.instances SET name = 'b' WHERE uuid = %s", (first,))
    host.follow()
    assert {name: host.shown(name).id for name in ("a", "b")} == {"a": before["b"], "b": before["a"]}


def test_much_has_changed(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than is read at once is read in parts, and all of it is there after one look; so is what is gone."""
    host = FollowingHost(fleet)
    numbers = [fleet.place("h1", f"i{number}", b"before") for number in range(6)]
    host.follow()
    monkeypatch.setattr(inventory, "_CHUNK_BYTES", 100)
    looks = 0

    def change() -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            # The first look is at everything.
            with changing(fleet, "h1", *numbers) as connection:
                connection.execute("UPDATE guestapi.config SET value = %s WHERE uuid = ANY(%s)", (b"x" * 60, numbers))
                connection.execute("DELETE FROM guestapi.instances WHERE uuid = %s", (numbers[0],))
        return looks == 2

    host.follower().follow(until=change)
    assert host.names == {"web1", *(f"i{number}" for number in range(1, 6))}
    for number in range(1, 6):
        assert host.shown(f"i{number}").config == {"user.password": "x" * 60}


def test_a_look_reads_no_other_host(fleet: Fleet) -> None:
    """Who is asking is found by an index, so what a host asks takes no longer the more hosts there are."""
    with fleet.admin() as connection:
        # These tables are so small that they would be read as a whole.
        connection.execute("ALTER ROLE guestapi_host_h1 SET enable_seqscan = off")
    with fleet.host("h1") as connection, connection.transaction():
        assert connection.execute("SELECT guestapi.me()").fetchone() == ("h1",)
        read = "SELECT seq_scan, idx_scan FROM pg_stat_xact_user_tables WHERE relname = 'hosts'"
        assert connection.execute(read).fetchone() == (0, 1)


def test_nothing_is_compiled(fleet: Fleet) -> None:
    """PostgreSQL compiles nothing of what hosts and operators ask, however costly it takes that for."""
    costly = "EXPLAIN SELECT count(*) FROM pg_class AS a, pg_class AS b, pg_class AS c WHERE a.reltuples > b.reltuples"
    with fleet.admin() as connection:
        connection.execute("SET jit = on")
        assert any("JIT" in row for (row,) in connection.execute(costly.encode()))
    host = FollowingHost(fleet)
    with connect_host(host.url, host.settings.fleet) as of_host:
        assert not any("JIT" in row for (row,) in of_host.ask(costly))
    with engine.session(host.url) as of_operator:
        assert not any("JIT" in row for (row,) in of_operator.execute(costly.encode()))


def test_process(fleet: Fleet) -> None:
    """The command follows by itself: a change arrives within a second, killed it resumes, and it ends by SIGTERM."""
    config = fleet.guestapi.config
    config.write_text(config.read_text() + 'host = "h1"\n')
    Writer(fleet.guestapi.settings, create=True)
    process = subprocess.Popen([COMMAND, "--config", config, "fleet", "follow"], stderr=subprocess.PIPE)
    url = fleet.guestapi.settings.store.url

    def names() -> set[str]:
        with view(url) as store:
            return {one.name for one in placements.list_placed(store).values()}

    try:
        until(lambda: names() == {"web1"})
        fleet.place("h1", "second")
        until(lambda: names() == {"web1", "second"})
        process.send_signal(signal.SIGKILL)
        process.wait()
        fleet.place("h1", "third")
        process = subprocess.Popen([COMMAND, "--config", config, "fleet", "follow"], stderr=subprocess.PIPE)
        until(lambda: names() == {"web1", "second", "third"})
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("connected", [True, False])
def test_fifty_a_transaction(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, connected: bool) -> None:
    """At most 50 instances are in a transaction, and a follower that fails in every second one ends equal all the same.

    The cursor never stands for what is not in the store.
    """
    host = FollowingHost(fleet)
    host.follow()
    sizes: list[int] = []

    def failing(change: Change, some: Sequence[Placement], gone: Sequence[str]) -> None:
        write_placements(change, some, gone)
        sizes.append(len(some) + len(gone))
        if len(sizes) % 2:
            raise FleetError("killed in its transaction")

    placed: list[UUID] = []

    def place() -> bool:
        if placed:
            return True
        placed.extend(fleet.place("h1", f"i{number}") for number in range(2 * BATCH + 10))
        return False

    monkeypatch.setattr(follower, "write_placements", failing)
    if not connected:
        place()
    for _round in range(10):
        try:
            host.follower().follow(until=place)
            break
        except FleetError:
            assert host.cursor.revision <= len(host.names)
    assert len(host.names) == 1 + 2 * BATCH + 10 == host.cursor.revision
    assert max(sizes) == BATCH
    assert len(sizes) >= 6


def test_too_old_a_cursor(fleet: Fleet) -> None:
    """A host that has missed what the log does not have any more looks at everything."""
    host = FollowingHost(fleet)
    host.follow()
    with fleet.admin() as connection:
        connection.execute("DELETE FROM guestapi.instances WHERE host = 'h1'")
        connection.execute("DELETE FROM guestapi.log WHERE host = 'h1'")
        connection.execute("UPDATE guestapi.hosts SET revision = 5, oldest = 5 WHERE name = 'h1'")
    host.follow()
    assert (host.names, host.cursor.revision) == (set(), 5)


def test_the_log_is_trimmed(fleet: Fleet) -> None:
    """The log keeps the latest changes of a host, and says from where on."""
    with fleet.admin() as connection:
        connection.execute("UPDATE guestapi.hosts SET revision = 10999 WHERE name = 'h1'")
        connection.execute("INSERT INTO guestapi.log VALUES ('h1', 1001, gen_random_uuid())")
        connection.execute("SELECT guestapi.note('h1', ARRAY[gen_random_uuid()])")
        rows = connection.execute("SELECT revision FROM guestapi.log WHERE host = 'h1' ORDER BY 1").fetchall()
        oldest = connection.execute("SELECT oldest FROM guestapi.hosts WHERE name = 'h1'").fetchone()
    assert (rows, oldest) == ([(1001,), (11000,)], (1000,))


def test_store_lost_or_restored(fleet: Fleet) -> None:
    """A running follower whose store is lost, or replaced by an older copy, makes it equal to the database again."""
    host = FollowingHost(fleet)
    database = fleet.guestapi.directory / "h1.db"
    rounds = iter(range(100))

    def disturb() -> bool:
        number = next(rounds)
        if number == 0:
            fleet.place("h1", "second")
        if number == 1:
            with host.writer.change() as change:
                placements.write_cursor(change, host.cursor._replace(revision=1))
                steps.remove(change, get_instance(change, "default", "second"))
        return number == 2

    host.follower().follow(until=disturb)
    assert host.names == {"web1", "second"}
    for file in database.parent.glob("h1.db*"):
        file.unlink()
    host.follow()
    assert host.names == {"web1", "second"}


def test_older_timeline(fleet: Fleet) -> None:
    """A primary that was replaced, and any other fleet, is refused, and the store stays as it is."""
    host = FollowingHost(fleet)
    host.follow()
    cursor = host.cursor
    with host.writer.change() as change:
        placements.write_cursor(change, cursor._replace(timeline=2))
    with pytest.raises(FleetError, match="timeline 1 of the database, and timeline 2"):
        host.follow()
    with host.writer.change() as change:
        placements.write_cursor(change, cursor._replace(fleet=str(uuid4())))
    with pytest.raises(FleetError, match="but this host belongs to"):
        host.follow()
    assert host.names == {"web1"}


def test_version(fleet: Fleet) -> None:
    """A follower that is too old, or newer than the tables, does not follow."""
    host = FollowingHost(fleet)
    with fleet.admin() as connection:
        connection.execute("UPDATE guestapi.fleet SET version = 9, oldest_version = 9")
    with pytest.raises(FleetError) as raised:
        host.follow()
    assert raised.value.hint == "upgrade guestapi on this host"
    with fleet.admin() as connection:
        connection.execute("UPDATE guestapi.fleet SET version = 9, oldest_version = 1")
    host.follow()
    assert host.names == {"web1"}


def test_fenced(fleet: Fleet) -> None:
    """A fenced host cannot follow; it keeps what it knows."""
    host = FollowingHost(fleet)
    host.follow()
    assert fleet.guestapi.good("fleet", "host", "fence", "h1").startswith("fenced h1")
    with pytest.raises(FleetError):
        host.follow()
    assert host.names == {"web1"}


def test_stopped_server(fleet: Fleet) -> None:
    """A server whose processes are stopped in the middle of a session is noticed within seconds."""
    host = FollowingHost(fleet)
    stopped: list[int] = []

    def stop() -> bool:
        with fleet.admin() as connection:
            rows = connection.execute("SELECT pid FROM pg_stat_activity WHERE usename = 'guestapi_host_h1'").fetchall()
        stopped.extend(pid for (pid,) in rows)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        return False

    began = time.monotonic()
    try:
        with pytest.raises(FleetError, match="has not answered for 3 s"):
            host.follower().follow(until=stop)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert stopped
    assert time.monotonic() - began < SECONDS


def test_a_database_that_is_busy(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """While answers take long, each try waits twice as long as the one before; after one that was in time, as usual.

    Otherwise hosts that all come at once would end each other's questions for ever.
    """
    monkeypatch.setattr(joining, "ANSWER_SECONDS", 0.25)
    host = FollowingHost(fleet)
    told: list[str] = []

    with ExitStack() as locks:
        busy = locks.enter_context(fleet.admin())
        busy.execute("BEGIN; LOCK TABLE guestapi.fleet IN ACCESS EXCLUSIVE MODE")

        def tell(what: str) -> None:
            if what.startswith("follows") and "ended" not in told:
                busy.execute("BEGIN; LOCK TABLE guestapi.fleet IN ACCESS EXCLUSIVE MODE")
                told.append("ended")
            elif found := re.search("has not answered for (.*) s$", what):
                told.append(found[1])
                if "ended" in told:
                    raise EndError
                if len(told) == 5:
                    busy.execute("COMMIT")

        with pytest.raises(EndError):
            FleetFollower(host.settings, partial(connect_host, host.url, host.settings.fleet), tell).run()
    assert told == ["0.25", "0.5", "1", "2", "2", "ended", "0.25"]


def test_a_database_that_is_too_busy_to_connect(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that could not connect in time is given twice the time at its next tries, and no more."""
    # The shortest that there is.
    monkeypatch.setattr(engine, "_CONNECT_SECONDS", 2)
    connect, given = psycopg.connect, list[int]()

    def note(*words: Any, connect_timeout: int, **options: Any) -> Any:
        given.append(connect_timeout)
        if len(given) == 3:
            fleet.server.thaw()
        return connect(*words, connect_timeout=connect_timeout, **options)

    def tell(what: str) -> None:
        if what.startswith("follows"):
            raise EndError

    host = FollowingHost(fleet)
    monkeypatch.setattr(psycopg, "connect", note)
    fleet.server.freeze()
    try:
        with pytest.raises(EndError):
            FleetFollower(host.settings, partial(connect_host, host.url, host.settings.fleet), tell).run()
    finally:
        fleet.server.thaw()
    assert given == [2, 4, 4]


def test_a_lost_session(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that connects again goes on from the log, and says anew what the database has lost of it."""
    host = FollowingHost(fleet)
    follower = host.follower()
    follower.follow(until=lambda: True)
    with host.writer.change() as change:
        steps.start(change, get_instance(change, "default", "web1"), this_process())
    follower.follow(until=lambda: True)
    said = "SELECT run, running FROM guestapi.said WHERE host = 'h1'"
    with fleet.admin() as connection:
        assert connection.execute(said).fetchall() == [(1, True)]
        connection.execute("DELETE FROM guestapi.said")
    fleet.place("h1", "second")
    time.sleep(1)  # An instance is reported once a second.
    with monkeypatch.context() as patch:
        patch.setattr(inventory, "list_mine", None)
        follower.follow(until=lambda: True)
    assert host.names == {"web1", "second"}
    with fleet.admin() as connection:
        assert connection.execute(said).fetchall() == [(1, True)]


def test_a_dump_is_put_back(fleet: Fleet) -> None:
    """A follower that connects again finds tables from a dump, which others have changed, and looks at everything."""
    host = FollowingHost(fleet)
    follower = host.follower()
    follower.follow(until=lambda: True)
    dump = fleet.server.dump(fleet.database)
    fleet.place("h1", "second")
    follower.follow(until=lambda: True)
    assert host.names == {"web1", "second"}
    with fleet.admin() as connection:
        connection.execute("DROP SCHEMA guestapi CASCADE")
    fleet.server.put_back(fleet.database, dump)
    fleet.place("h1", "third")
    follower.follow(until=lambda: True)
    assert host.names == {"web1", "third"}


def test_a_session_is_lost_before_a_release(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a follower has removed, and could not release, it releases when it connects again."""
    host = FollowingHost(fleet)
    follower = host.follower()
    follower.follow(until=lambda: True)
    with fleet.admin() as connection:
        (uuid,) = connection.execute("SELECT uuid FROM guestapi.instances WHERE name = 'web1'").fetchone() or (None,)
    assert isinstance(uuid, UUID)
    with changing(fleet, "h1", uuid) as connection:
        connection.execute("UPDATE guestapi.instances SET next_host = 'h2' WHERE uuid = %s", (uuid,))

    def lose(*_words: object) -> bool:
        raise FleetError("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(inventory, "release", lose)
        with pytest.raises(FleetError):
            follower.follow(until=lambda: True)
    assert host.names == set()
    follower.follow(until=lambda: True)
    with fleet.admin() as connection:
        assert connection.execute("SELECT host FROM guestapi.instances WHERE uuid = %s", (uuid,)).fetchone() == ("h2",)


def test_moves_away(fleet: Fleet) -> None:
    """An instance that is to go to another host is out of the old store before the new one has it."""
    old, new = FollowingHost(fleet), FollowingHost(fleet, "h2")
    old.follow()
    new.follow()
    with fleet.admin() as connection:
        (uuid,) = connection.execute("SELECT uuid FROM guestapi.instances WHERE name = 'web1'").fetchone() or (None,)
    assert isinstance(uuid, UUID)
    with changing(fleet, "h1", uuid) as connection:
        connection.execute("UPDATE guestapi.instances SET next_host = 'h2' WHERE uuid = %s", (uuid,))
    new.follow()
    assert (old.names, new.names) == ({"web1"}, {"web2"})
    old.follow()
    assert (old.names, new.names) == (set(), {"web2"})
    new.follow()
    assert new.names == {"web1", "web2"}
    with fleet.admin() as connection:
        assert connection.execute("SELECT host, epoch FROM guestapi.instances WHERE uuid = %s", (uuid,)).fetchone() == (
            "h2",
            2,
        )


def test_reports(fleet: Fleet) -> None:
    """What instances say of themselves reaches the database, also from a store that was lost."""
    host = FollowingHost(fleet)
    host.follow()
    with host.writer.change() as change:
        steps.start(change, get_instance(change, "default", "web1"), this_process())
    host.follow()
    query = "SELECT run, running, ready FROM guestapi.said WHERE host = 'h1'"
    with fleet.admin() as connection:
        assert connection.execute(query).fetchall() == [(1, True, False)]
        instance = host.shown("web1")
        assert host.writer.set_ready(instance.id, instance.run, True)
        host.follow()
        assert connection.execute(query).fetchall() == [(1, True, True)]
        for file in fleet.guestapi.directory.glob("h1.db*"):
            file.unlink()
        host.follow()
        assert connection.execute(query).fetchall() == [(0, False, False)]


def test_a_container_of_that_name(fleet: Fleet) -> None:
    """A runtime's container is the placed instance of its name, whichever was there first; it ends with the container.

    The fleet's configuration wins, this host's profiles do not count, and the name is the fleet's.
    """
    host = FollowingHost(fleet)
    observe(host, "web1", "/var/lib/lxc web1")
    host.follow()
    shown = host.shown("web1")
    assert (shown.source, shown.running, shown.profiles) == ("lxc", True, ())
    assert shown.config == {"user.password": "secret"}
    assert set(shown.devices) == {"eth0", "root"}
    assert fleet.place("h1", "later")
    host.follow()
    with host.writer.change() as change:
        reconcile(change, "lxc", [], gone=["/var/lib/lxc web1"], is_alive=lambda _init: False)
    shown = host.shown("web1")
    assert (shown.source, shown.running, set(shown.devices)) == (None, False, {"eth0"})
    observe(host, "later", "/var/lib/lxc later")
    assert host.shown("later").profiles == ()
    observe(host, "else", "/var/lib/lxc later")
    assert (host.shown("later").running, host.shown("else").running) == (False, True)
    assert host.names == {"web1", "later"}


def test_a_name_that_is_taken(fleet: Fleet) -> None:
    """An instance of this host's own keeps its name; the placement is a problem until it is free."""
    host = FollowingHost(fleet)
    with host.writer.change() as change:
        steps.add(change, "default", "web1", config={"user.own": "1"})
    host.follow()
    assert host.names == set()
    assert host.shown("web1").config == {"user.own": "1"}
    with view(host.settings.store.url) as store:
        (problem,) = list_problems(store, "fleet")
    assert (problem.name, problem.refused) == ("web1", True)
    assert "its name belongs to instance 'web1', of this host" in problem.reason
    with host.writer.change() as change:
        steps.remove(change, get_instance(change, "default", "web1"))
    host.follow()
    assert host.names == {"web1"}
    with view(host.settings.store.url) as store:
        assert list_problems(store, "fleet") == []


def test_what_cannot_be_taken(fleet: Fleet) -> None:
    """A key that the store cannot take is left out alone, and named."""
    host = FollowingHost(fleet)
    uuid = fleet.place("h1", "bad")
    with changing(fleet, "h1", uuid) as connection:
        connection.execute("INSERT INTO guestapi.config VALUES (%s, 'user.bytes', '\\xff')", (uuid,))
        connection.execute("""INSERT INTO guestapi.devices VALUES (%s, 'odd', '{"type": 1}')""", (uuid,))
    host.follow()
    assert host.shown("bad").config == {"user.password": "secret"}
    with view(host.settings.store.url) as store:
        reasons = [one.reason for one in list_problems(store, "fleet")]
    assert len(reasons) == 2
    assert "'user.bytes' is not valid UTF-8" in reasons[0]
    with changing(fleet, "h1", uuid) as connection:
        connection.execute("UPDATE guestapi.instances SET name = 'a/b' WHERE uuid = %s", (uuid,))
    host.follow()
    assert host.names == {"web1"}


def test_local_commands(fleet: Fleet) -> None:
    """A command for this host alone does not change what the fleet has placed here; it registers its init."""
    config = fleet.guestapi.config
    config.write_text(config.read_text().replace("/store.db", "/h1.db"))
    host = FollowingHost(fleet)
    host.follow()
    guestapi = fleet.guestapi
    for words in (
        ("config", "set", "web1", "user.x=1"),
        ("device", "remove", "web1", "eth0"),
        ("rename", "web1", "web9"),
        ("instance", "remove", "web1"),
    ):
        assert guestapi.fails(*words).startswith("instance 'web1' belongs to the fleet; "), words
    assert guestapi.good("instance", "unregister", "web1") == ""
    assert guestapi.good("fleet", "follow", "--anew").startswith("the follower will look at everything")
    assert host.cursor.timeline == 0
    with view(host.settings.store.url) as store:
        assert find_instance(store, "default", "web1") is not None


def test_check(fleet: Fleet) -> None:
    """`guestapi check` says up to where the store is as the database, and what it serves while that is away."""
    config = fleet.guestapi.config
    config.write_text(config.read_text().replace("/store.db", "/h1.db"))
    host = FollowingHost(fleet)

    def found() -> dict[str, Any]:
        done = fleet.guestapi("check", "--format", "json")
        return next(one for one in json.loads(done.out) if one["check"] == "fleet")

    host.follow()
    assert found()["ok"]
    assert re.match(r"follows, 1 instances, revision 1; last contact \d+ s ago, lag ", found()["text"])
    host.url = "postgresql://127.0.0.1:1/guestapi"
    with pytest.raises(FleetError):
        host.follow()

    def end(_status: str) -> None:
        raise EndError

    with pytest.raises(EndError):
        FleetFollower(host.settings, partial(connect_host, host.url, host.settings.fleet), end).run()
    assert not found()["ok"]
    assert found()["text"].startswith("1 instances as last known (revision 1); last contact ")
    assert "the fleet at postgresql://127.0.0.1:1/guestapi cannot be reached: " in found()["text"]
    assert fleet.guestapi.good("config", "get", "web1", "user.password") == "secret\n"


def test_metrics(fleet: Fleet) -> None:
    """Metrics say up to which revision the store is as the database, of how many instances, and how the follower is."""
    host = FollowingHost(fleet)
    fleet.place("h1", "second")
    host.follow()

    def metrics() -> dict[str, float]:
        text = write_metrics(ReportDirectory(fleet.guestapi.directory), host.settings.store.url).decode()
        return {name: float(value) for name, value in re.findall(r"^(guestapi_\S+) (\S+)$", text, re.MULTILINE)}

    shown = metrics()
    assert (shown["guestapi_fleet_revision"], shown["guestapi_fleet_instances"]) == (2, 2)
    assert shown['guestapi_source_connected{source="fleet"}'] == 1
    assert 'guestapi_source_contact_seconds{source="fleet"}' in shown
    assert shown['guestapi_source_problems{source="fleet"}'] == 0
