"""After each fault, every change that was acknowledged is there, and each host's store is as the database.

The fixture `field` has a writer running during each test, and checks all of that when the test has ended.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from tests.fleet_faults.field import DATABASE, FaultyFleet, FieldHost, copy, lose, put_back, until

pytestmark = pytest.mark.root


def test_the_primary_is_killed(field: FaultyFleet) -> None:
    """Changes go on at the standby that has received most; the old primary comes back as an empty standby."""
    field.wait_for_changes()
    old = field.replicas.primary
    old.kill()
    field.replicas.promote()
    field.wait_for_changes()
    field.replicas.rebuild(old)
    field.wait_for_changes()


def test_the_primary_is_stopped_and_continued(field: FaultyFleet) -> None:
    """A primary that was replaced and wakes up is followed by nobody, and takes no change that counts."""
    field.wait_for_changes()
    old = field.replicas.primary
    old.freeze()
    field.replicas.promote()
    # Followers that had it are at the new one after three seconds.
    until(lambda: all("has not answered for 3 s" in host.log for host in field.hosts[:3]))
    old.thaw()
    # Who comes to it now is refused.
    field.hosts[0].kill()
    field.hosts[0].start()
    until(lambda: "it is a primary that was replaced" in field.hosts[0].log or _is_first(field, old.port))
    old.kill()
    field.wait_for_changes()
    field.replicas.rebuild(old)


def _is_first(field: FaultyFleet, port: int) -> bool:
    """Whether servers that are named before this one take changes, so that nobody comes to it."""
    ports = [node.port for node in field.replicas.nodes]
    return ports.index(field.replicas.primary.port) < ports.index(port)


def test_a_standby_loses_its_disk(field: FaultyFleet) -> None:
    """One standby is enough; the other is made anew."""
    field.wait_for_changes()
    lost = next(node for node in field.replicas.nodes if node is not field.replicas.primary)
    lost.kill()
    field.wait_for_changes()
    field.replicas.rebuild(lost)
    field.replicas.wait_for_standbys(2)
    field.wait_for_changes()


def test_both_standbys_are_away(field: FaultyFleet) -> None:
    """Changes wait, hosts serve what they have and stay connected, and changes go on when a standby is there."""
    field.wait_for_changes()
    standbys = [node for node in field.replicas.nodes if node is not field.replicas.primary]
    for node in standbys:
        node.kill()
    with field.replicas.primary.connect(DATABASE) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()"
        until(lambda: (connection.execute(query).fetchone() or (0,))[0] > 0)
        waiting = field.count
        contacts = "SELECT count(*) FROM guestapi.seen WHERE contact > now() - interval '7 seconds'"
        until(lambda: connection.execute(contacts).fetchone() == (len(field.hosts),))
    assert field.count == waiting
    assert all(len(host.placed) == len(field.rows(host.name)) for host in field.hosts)
    for node in standbys:
        field.replicas.rebuild(node)
    field.wait_for_changes()


@pytest.mark.parametrize("when", ["commit", "committed"])
def test_followers_are_killed_at_every_commit(field: FaultyFleet, when: str) -> None:
    """A follower that is killed before or after any commit goes on where its store is, from an empty store onwards.

    With one instance a transaction: the first commits are those of the first look, the others those of changes.
    """
    host = field.hosts[0]
    for number in range(1, 10):
        host.kill()
        lose(host)
        host.tell("kill", f"{when}:{number}")
        host.start()
        host.wait_for_its_end()
        host.start()
        until(lambda: host.placed.keys() == field.rows(host.name).keys())
    field.wait_for_changes()


def test_stores_are_lost_and_put_back(field: FaultyFleet, tmp_path: Path) -> None:
    """A store that is lost, or replaced by an older copy while its follower runs, becomes as the database again."""
    saved = tmp_path / "saved.db"
    copy(field.hosts[1], saved)
    field.wait_for_changes(40)
    field.hosts[0].kill()
    lose(field.hosts[0])
    field.hosts[0].start()
    put_back(field.hosts[1], saved)
    field.wait_for_changes(40)


def test_the_log_is_trimmed_while_a_host_is_away(field: FaultyFleet) -> None:
    """A host that has missed what the log does not have any more looks at everything."""
    host = field.hosts[2]
    host.kill()
    field.wait_for_changes(40)
    with field.replicas.primary.connect(DATABASE) as connection, connection.transaction():
        connection.execute("UPDATE guestapi.hosts SET oldest = revision WHERE name = %s", (host.name,))
        connection.execute("DELETE FROM guestapi.log WHERE host = %s", (host.name,))
    host.start()
    field.wait_for_changes()


def test_clocks_are_set_back(field: FaultyFleet) -> None:
    """With the clocks of all servers, then of all hosts, set back by a day and forth again, hosts follow on."""
    day = 24 * 3600
    servers, hosts = field.clocks
    field.wait_for_changes()
    host = field.hosts[0]
    try:
        servers.set(-day)
        with field.replicas.primary.connect(DATABASE) as connection:
            real = "SELECT now() < to_timestamp(%s)"
            until(lambda: connection.execute(real, (time.time() - day / 2,)).fetchone() == (True,))
            contacts = "SELECT count(*) FROM guestapi.seen WHERE contact BETWEEN now() - interval '7 s' AND now()"
            until(lambda: connection.execute(contacts).fetchone() == (len(field.hosts),))
        _goes_on(field, host)
        hosts.set(-day)
        until(lambda: host.ask("SELECT contact FROM fleet") < [(time.time() - day / 2,)])
        _goes_on(field, host)
        servers.set(0)
        _goes_on(field, host)
    finally:
        servers.set(0)
        hosts.set(0)
    _goes_on(field, host)
    until(lambda: host.ask("SELECT contact FROM fleet") > [(time.time() - day / 2,)])


def _goes_on(field: FaultyFleet, host: FieldHost) -> None:
    """Changes are made, and a follower that begins anew applies them."""
    host.kill()
    host.start()
    field.wait_for_changes(40)
    _follows(field, host)


def _follows(field: FaultyFleet, host: FieldHost) -> None:
    """Wait until a host has a change that is newer than this moment."""
    before = field.applied(host.name)
    until(lambda: field.applied(host.name) > before, lambda: host.log[-2000:])


def test_the_network_drops_and_delays(field: FaultyFleet) -> None:
    """Connections that are slow, that are cut after any number of bytes, and that go silent, cost time alone."""
    for host in field.hosts:
        host.wire.delay = 0.05
    field.wait_for_changes(40)
    for host in field.hosts[:5]:
        host.wire.cut_bytes = 3000
        host.kill()
        host.start()
    for host in field.hosts[5:8]:
        host.wire.silent = True
    until(lambda: all(host.wire.cuts > 5 for host in field.hosts[:5]))
    until(lambda: all("has not answered for 3 s" in host.log for host in field.hosts[5:8]))
    field.wait_for_changes(40)
    for host in field.hosts:
        host.wire.mend()
    for host in field.hosts:
        _follows(field, host)


def _is_on(field: FaultyFleet, name: str, host: str) -> bool:
    return name in field.rows(host)


def _to_move(field: FaultyFleet) -> tuple[FieldHost, FieldHost, str]:
    """Two hosts, and an instance of the first, which has more than the second."""
    target, source = sorted(field.hosts[5:7], key=lambda host: len(field.rows(host.name)))
    return source, target, next(iter(field.rows(source.name)))


@pytest.mark.parametrize("silent", [False, True])
def test_a_host_is_cut_off_before_it_hears_of_a_move(field: FaultyFleet, silent: bool) -> None:
    """It goes on serving the instance, and the move waits."""
    source, target, name = _to_move(field)
    if silent:
        source.wire.silent = True
    else:
        source.wire.cut()
    field.move(name, target.name)
    field.wait_for_changes(40)
    assert name in source.placed
    assert name not in target.placed
    source.wire.mend()
    until(lambda: name in target.placed)
    assert name not in source.placed


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("point", ["leaving", "left", "released", "arriving", "arrived"])
def test_a_host_is_cut_off_at_a_step_of_a_move(field: FaultyFleet, point: str, killed: bool) -> None:
    """Wherever a host is cut off, or also killed, no two hosts have the instance, and the move is completed later."""
    source, target, name = _to_move(field)
    host = target if point.startswith("arriv") else source
    host.tell("hold", point)
    field.move(name, target.name)
    until(lambda: host.is_held)
    host.wire.cut()
    assert not (name in source.placed and name in target.placed)
    if killed:
        host.kill()
    host.go_on()
    # Before the old host has released it, it stays the old one's in the database.
    if point in ("leaving", "left"):
        field.wait_for_changes()
        assert name in field.rows(source.name)
        assert name not in target.placed
    if killed:
        host.start()
    host.wire.mend()
    until(lambda: name in target.placed)
    assert name not in source.placed


def test_the_answer_to_a_release_is_lost(field: FaultyFleet) -> None:
    """The old host has released the instance, and does not hear of it: nothing is done twice."""
    source, target, name = _to_move(field)
    source.tell("hold", "left")
    field.move(name, target.name)
    until(lambda: source.is_held)
    source.wire.mute_after = [b"guestapi.release", b"COMMIT"]
    source.go_on()
    until(lambda: name in target.placed)
    assert source.wire.mute
    source.wire.mend()
    _follows(field, source)
    assert name not in source.placed


def test_instances_move_meanwhile(field: FaultyFleet) -> None:
    """Instances that go from host to host, whose followers are killed, are with one host each, and nothing is lost."""
    for number in range(6):
        source, target = field.hosts[3 + number % 2], field.hosts[4 - number % 2]
        name = next(iter(field.rows(source.name)))
        field.move(name, target.name)
        if number % 2:
            source.kill()
            source.start()
        until(partial(_is_on, field, name, target.name))
    field.wait_for_changes()
