"""After each fault, every change that was acknowledged is there, and each host's store is as the database.

The fixture `field` has a writer running during each test, and checks all of that when the test has ended.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.fleet_faults.field import DATABASE, Field, copy, lose, put_back, until

pytestmark = pytest.mark.root


def test_the_primary_is_killed(field: Field) -> None:
    """Changes go on at the standby that has received most; the old primary comes back as an empty standby."""
    field.wait_for_changes()
    old = field.replicas.primary
    old.kill()
    field.replicas.promote()
    field.wait_for_changes()
    field.replicas.rebuild(old)
    field.wait_for_changes()


def test_the_primary_is_stopped_and_continued(field: Field) -> None:
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


def _is_first(field: Field, port: int) -> bool:
    """Whether servers that are named before this one take changes, so that nobody comes to it."""
    ports = [node.port for node in field.replicas.nodes]
    return ports.index(field.replicas.primary.port) < ports.index(port)


def test_a_standby_loses_its_disk(field: Field) -> None:
    """One standby is enough; the other is made anew."""
    field.wait_for_changes()
    lost = next(node for node in field.replicas.nodes if node is not field.replicas.primary)
    lost.kill()
    field.wait_for_changes()
    field.replicas.rebuild(lost)
    field.replicas.wait_for_standbys(2)
    field.wait_for_changes()


def test_both_standbys_are_away(field: Field) -> None:
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


def test_followers_are_killed(field: Field) -> None:
    """A follower that is killed at any moment goes on where its store is."""
    for number in range(15):
        host = field.hosts[number % 3]
        field.wait_for_changes(3)
        host.kill()
        host.start()
    field.wait_for_changes()


def test_stores_are_lost_and_put_back(field: Field, tmp_path: Path) -> None:
    """A store that is lost, or replaced by an older copy while its follower runs, becomes as the database again."""
    saved = tmp_path / "saved.db"
    copy(field.hosts[1], saved)
    field.wait_for_changes(40)
    field.hosts[0].kill()
    lose(field.hosts[0])
    field.hosts[0].start()
    put_back(field.hosts[1], saved)
    field.wait_for_changes(40)


def test_the_log_is_trimmed_while_a_host_is_away(field: Field) -> None:
    """A host that has missed what the log does not have any more looks at everything."""
    host = field.hosts[2]
    host.kill()
    field.wait_for_changes(40)
    with field.replicas.primary.connect(DATABASE) as connection, connection.transaction():
        connection.execute("UPDATE guestapi.hosts SET oldest = revision WHERE name = %s", (host.name,))
        connection.execute("DELETE FROM guestapi.log WHERE host = %s", (host.name,))
    host.start()
    field.wait_for_changes()


def _is_on(field: Field, name: str, host: str) -> bool:
    return name in field.rows(host)


def test_instances_move_meanwhile(field: Field) -> None:
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
