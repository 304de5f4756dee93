"""Profiles of a fleet: what operators do with them, and what hosts make of it."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from msgspec.structs import replace

from guestapi.fleet import access, engine, follower, inventory, placing, plan, setup
from guestapi.fleet.engine import FleetError
from guestapi.fleet.schema import UPGRADES
from guestapi.names import count_entries
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import profiles, steps
from guestapi.store.errors import ConflictError, UnknownProfileError
from guestapi.store.lookup import get_instance, get_layers, list_problems, read_entries
from guestapi.store.view import view
from tests.fleet.conftest import Fleet
from tests.fleet.host import FollowingHost, observe
from tests.fleet.operator import FleetOperator

pytestmark = pytest.mark.root


@pytest.fixture
def operator(fleet: Fleet) -> FleetOperator:
    """An operator of a fleet with hosts h1 and h2, whose instances are web1 and web2."""
    return FleetOperator(fleet)


def rows(fleet: Fleet, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """What the database has."""
    with fleet.admin() as connection:
        return connection.execute(query.encode(), parameters).fetchall()


def told(host: FollowingHost, after: int = 0) -> list[tuple[str, Any]]:
    """What the host's listeners have heard of configuration: instance, key, old and new value."""
    with view(host.settings.store.url) as store:
        entries = read_entries(store, after, 1000).found
    return [(one.instance, json.loads(one.metadata)) for one in entries if one.type == "config"]


def latest(host: FollowingHost) -> int:
    """The last entry of the host's change log."""
    with view(host.settings.store.url) as store:
        return max((one.id for one in read_entries(store, 0, 1000).found), default=0)


@contextmanager
def committing(operator: FleetOperator, *words: str) -> Iterator[psycopg.Connection[Any]]:
    """A command that has locked what it changes and cannot commit yet; it has ended after the block."""
    with operator.fleet.admin() as connection:
        connection.execute("BEGIN")
        # Written last, before COMMIT.
        connection.execute("LOCK TABLE guestapi.ops IN SHARE MODE")
        thread = threading.Thread(target=operator.good, args=words)
        thread.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        until = time.monotonic() + 60
        with operator.fleet.admin() as looking:
            while looking.execute(waiting).fetchone() == (0,):
                assert time.monotonic() < until, "the command waits for nothing"
                time.sleep(0.01)
        yield connection
        connection.execute("ROLLBACK")
    thread.join()


def test_a_profile(operator: FleetOperator) -> None:
    """A profile is made, changed, shown, renamed and deleted, and an instance that has it has what it gives."""
    operator.good("profile", "create", "web", "--description", "front", "user.role=front", "user.a=1")
    operator.good("profile", "device", "add", "web", "eth0", "nic", "mtu=1500")
    operator.good("instance", "add", "i1", "--host", "h1", "-p", "web", "-c", "user.a=own")
    shown = operator.info("i1")
    assert (shown["profiles"], shown["config"]) == (["web"], {"user.a": "own", "user.role": "front"})
    assert shown["devices"] == {"eth0": {"type": "nic", "mtu": "1500"}}
    operator.good("profile", "set", "web", "user.role=back")
    operator.good("profile", "device", "set", "web", "eth0", "mtu=9000")
    assert operator.info("i1")["config"]["user.role"] == operator.good("profile", "get", "web", "user.role").strip()
    assert operator.info("i1")["devices"] == {"eth0": {"type": "nic", "mtu": "9000"}}
    operator.good("profile", "rename", "web", "front")
    assert operator.info("i1")["profiles"] == ["front"]
    found = json.loads(operator.good("profile", "show", "front", "--format", "json"))
    assert (found["description"], found["used_by"]) == ("front", [{"project": "default", "name": "i1"}])
    (listed,) = json.loads(operator.good("profile", "list", "--format", "json"))
    assert (listed["name"], listed["users"]) == ("front", 1)
    assert "cannot be removed: instance 'i1' has it" in operator.fails("profile", "delete", "front")
    operator.good("profile", "remove", "i1", "front")
    assert operator.info("i1")["config"] == {"user.a": "own"}
    operator.good("profile", "delete", "front")
    assert operator.good("profile", "list", "--format", "json").strip() == "[]"
    assert operator.fails("profile", "show", "front").startswith("no profile 'front'")


def test_several_profiles(operator: FleetOperator) -> None:
    """Of several profiles the last one wins; a definition names them, and is exported and applied with them."""
    for name in ("one", "two"):
        operator.good("profile", "create", name, f"user.role={name}", f"user.{name}=1")
    operator.good("profile", "assign", "web1", "two,one")
    assert operator.info("web1")["config"]["user.role"] == "one"
    assert "cannot have profile 'one' twice" in operator.fails("profile", "add", "web1", "one")
    definition = {"name": "new", "location": "h2", "profiles": ["one", "two"], "config": {"user.own": "1"}}
    operator.good("apply", "-f", "-", stdin=json.dumps(definition))
    shown = operator.info("new")
    assert (shown["profiles"], shown["config"]["user.role"], shown["host"]) == (["one", "two"], "two", "h2")
    exported = operator.good("export", "--all")
    assert "user.role" not in exported
    assert "0 changed" in operator.good("apply", "-f", "-", stdin=exported)
    table = operator.good("list", "--columns", "n,profiles,user.role", "--format", "csv")
    assert 'new,"one,two",two' in table
    assert operator.fails("profile", "assign", "web1", "none").startswith("no profile 'none'")
    assert operator.info("web1")["profiles"] == ["two", "one"]


def test_a_change_is_one_entry_for_a_host(operator: FleetOperator) -> None:
    """A changed profile is one entry in the log of each host that has an instance with it, and none of others."""
    operator.good("profile", "create", "web", "user.role=a")
    for number in range(5):
        operator.good("instance", "add", f"i{number}", "--host", "h1", "-p", "web")
    host, other = FollowingHost(operator.fleet, "h1"), FollowingHost(operator.fleet, "h2")
    host.follow()
    other.follow()
    before = operator.revisions()
    entry = latest(host)
    operator.good("profile", "set", "web", "user.role=b")
    assert operator.revisions() == {**before, "h1": before["h1"] + 1}
    query = "SELECT host FROM guestapi.log WHERE revision > %s AND host = 'h1' OR host = 'h2' AND revision > %s"
    assert rows(operator.fleet, query, before["h1"], before["h2"]) == [("h1",)]
    host.follow()
    heard = told(host, entry)
    assert sorted(name for name, _what in heard) == [f"i{number}" for number in range(5)]
    assert all(what == {"key": "user.role", "old_value": "a", "value": "b"} for _name, what in heard)
    assert host.shown("i3").config == {"user.role": "b"}
    assert host.shown("i3").profiles == ("web",)
    entry = latest(host)
    host.follow()
    assert told(host, entry) == []


def test_a_host_with_many_instances_of_a_profile(operator: FleetOperator, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a transaction's worth of instances, and profiles that are read in parts, end as the database has it."""
    monkeypatch.setattr(follower, "BATCH", 3)
    documents = [{"name": f"i{number}", "location": "h1", "profiles": ["one", "two"]} for number in range(8)]
    for name in ("one", "two"):
        operator.good("profile", "create", name, f"user.{name}={'x' * 200}")
    operator.good("apply", "-f", "-", stdin=json.dumps(documents))
    host = FollowingHost(operator.fleet)
    host.follow()
    assert {host.shown(f"i{number}").config["user.two"] for number in range(8)} == {"x" * 200}
    monkeypatch.setattr(inventory, "_CHUNK_BYTES", 300)
    for name in ("one", "two"):
        operator.good("profile", "set", name, f"user.{name}={'y' * 200}")
    operator.good("profile", "assign", "i0", "two")
    host.follow()
    assert host.shown("i0").config == {"user.two": "y" * 200}
    assert {host.shown(f"i{number}").config["user.one"] for number in range(1, 8)} == {"y" * 200}


def test_cloud_init_starts_over(operator: FleetOperator) -> None:
    """User data of a profile gives those that do not hide it new cloud-init ids, which their host has, too."""
    operator.good("profile", "create", "web", "user.role=a")
    operator.good("instance", "add", "plain", "--host", "h1", "-p", "web")
    operator.good("instance", "add", "own", "--host", "h1", "-p", "web", "-c", "cloud-init.user-data=own")
    host = FollowingHost(operator.fleet)
    host.follow()
    before = {name: operator.info(name)["cloud_init_id"] for name in ("plain", "own")}
    assert {name: host.shown(name).cloud_init_id for name in before} == before
    operator.good("profile", "set", "web", "user.role=b")
    host.follow()
    assert {name: operator.info(name)["cloud_init_id"] for name in before} == before
    assert {name: host.shown(name).cloud_init_id for name in before} == before
    operator.good("profile", "set", "web", "cloud-init.user-data=#cloud-config")
    host.follow()
    after = {name: operator.info(name)["cloud_init_id"] for name in before}
    assert after["own"] == before["own"]
    assert after["plain"] != before["plain"]
    assert {name: host.shown(name).cloud_init_id for name in before} == after
    assert host.shown("plain").config["cloud-init.user-data"] == "#cloud-config"


def test_a_host_that_had_no_user_meanwhile(operator: FleetOperator) -> None:
    """A profile that was changed while no instance of a host had it is not served as it was."""
    operator.good("profile", "create", "web", "user.role=old")
    operator.good("profile", "assign", "web1", "web")
    host = FollowingHost(operator.fleet)
    host.follow()
    # The host hears of all this at once.
    operator.good("profile", "assign", "web1", "")
    operator.good("profile", "set", "web", "user.role=new")
    operator.good("instance", "add", "other", "--host", "h1", "-p", "web")
    host.follow()
    assert host.shown("other").config == {"user.role": "new"}
    operator.good("instance", "remove", "other")
    host.follow()
    with view(host.settings.store.url) as store:
        assert store.connection.execute("SELECT count(*) FROM profiles WHERE uuid IS NOT NULL").fetchone() == (0,)


@pytest.mark.parametrize("first", ["change", "assign"])
def test_profile_is_changed_and_assigned_at_once(operator: FleetOperator, first: str) -> None:
    """Who gets a profile while it is changed has what was changed, whichever of both commits first."""
    operator.good("profile", "create", "web", "user.role=old")
    operator.good("profile", "assign", "web1", "web")
    hosts = [FollowingHost(operator.fleet, name) for name in ("h1", "h2")]
    change, assign = ("profile", "set", "web", "user.role=new"), ("profile", "assign", "web2", "web")
    begun, then = (change, assign) if first == "change" else (assign, change)
    second = threading.Thread(target=operator.good, args=then)
    with committing(operator, *begun):
        for host in hosts:
            host.follow()
        second.start()
        time.sleep(0.3)
    second.join()
    for host in hosts:
        host.follow()
    assert [host.shown(name).config["user.role"] for host, name in zip(hosts, ("web1", "web2"), strict=True)] == [
        "new",
        "new",
    ]


def test_an_instance_moves_with_its_profiles(operator: FleetOperator) -> None:
    """The host that gets an instance gets its profiles; the one that had it keeps none."""
    operator.good("profile", "create", "web", "user.role=a")
    operator.good("profile", "assign", "web1", "web")
    old, new = FollowingHost(operator.fleet, "h1"), FollowingHost(operator.fleet, "h2")
    old.follow()
    new.follow()
    operator.good("instance", "move", "web1", "--to", "h2")
    old.follow()
    new.follow()
    assert new.shown("web1").config["user.role"] == "a"
    for host, count in ((old, 0), (new, 1)):
        with view(host.settings.store.url) as store:
            query = "SELECT count(*) FROM profiles WHERE uuid IS NOT NULL"
            assert store.connection.execute(query).fetchone() == (count,)


def test_names_of_the_host_and_of_the_fleet(operator: FleetOperator) -> None:
    """A profile of the host's own may have the name of one of the fleet's; each is for its own instances."""
    host = FollowingHost(operator.fleet)
    with host.writer.change() as change:
        profiles.create(change, "default", "web", config={"user.role": "host"})
    observe(host, "ct", "ct")
    operator.good("profile", "create", "web", "user.role=fleet")
    operator.good("profile", "create", "other", "user.other=fleet")
    operator.good("profile", "assign", "web1", "web,other")
    host.follow()
    assert host.shown("web1").config["user.role"] == "fleet"
    with host.writer.change() as change:
        profiles.edit(change, profiles.get_profile(change, "default", "web"), config={"user.role": "changed"})
        with pytest.raises(UnknownProfileError, match="is the fleet's"):
            profiles.get_profile(change, "default", "other")
    assert host.shown("web1").config["user.role"] == "fleet"
    assert [one.name for one in owned(host)] == ["default", "web"]


def owned(host: FollowingHost) -> list[Any]:
    """The host's own profiles."""
    with view(host.settings.store.url) as store:
        return [one for one, _users in profiles.list_profiles(store)]


def test_leave(operator: FleetOperator) -> None:
    """A host that leaves keeps the profiles of its instances; one whose name is taken gets another name."""
    from guestapi.fleet import membership
    from guestapi.fleet.engine import session

    host = FollowingHost(operator.fleet)
    with host.writer.change() as change:
        profiles.create(change, "default", "web", config={"user.role": "host"})
    for name in ("web", "db"):
        operator.good("profile", "create", name, f"user.{name}=fleet")
    operator.good("profile", "assign", "web1", "web,db")
    host.follow()
    before, entry = host.shown("web1"), latest(host)
    with session(operator.fleet.server.url(operator.fleet.database)) as connection:
        membership.leave(connection, host.writer, "h1")
    after = host.shown("web1")
    assert (after.config, after.revision, after.profiles) == (before.config, before.revision, ("web.1", "db"))
    assert told(host, entry) == []
    assert [one.name for one in owned(host)] == ["db", "web", "web.1"]
    with host.writer.change() as change:
        profiles.edit(change, profiles.get_profile(change, "default", "db"), config={"user.db": "host"})
    assert host.shown("web1").config["user.db"] == "host"


def test_export_of_a_host(operator: FleetOperator) -> None:
    """What a host exports of a placed instance with profiles can be applied there: nothing changes."""
    operator.good("profile", "create", "web", "user.role=a")
    operator.good("profile", "assign", "web1", "web")
    host = FollowingHost(operator.fleet)
    host.follow()
    local = operator.local
    local.config.write_text(local.config.read_text().replace("/store.db", "/h1.db"))
    exported = local.good("export", "--all")
    assert "profiles" in exported
    assert "1 unchanged" in local.good("apply", "-f", "-", stdin=exported)
    assert "belongs to the fleet" in local.fails("profile", "assign", "web1", "")


def test_a_device_of_a_profile_is_amended(operator: FleetOperator) -> None:
    """An instance changes options of a device that its profile gives it, also on its host."""
    operator.good("profile", "create", "web")
    operator.good("profile", "device", "add", "web", "root", "disk", "path=/", "pool=a", "size=1GiB")
    operator.good("profile", "assign", "web1", "web")
    operator.good("device", "set", "web1", "root", "size=2GiB")
    host = FollowingHost(operator.fleet)
    host.follow()
    with view(host.settings.store.url) as store:
        assert list_problems(store) == []
    assert host.shown("web1").devices["root"] == {"type": "disk", "path": "/", "pool": "a", "size": "2GiB"}
    operator.good("profile", "device", "set", "web", "root", "pool=fast")
    host.follow()
    assert host.shown("web1").devices["root"] == {"type": "disk", "path": "/", "pool": "fast", "size": "2GiB"}


def test_too_much(operator: FleetOperator) -> None:
    """A profile that would make an instance too large is refused with the instance's name, and nothing is changed."""
    config = operator.local.config
    config.write_text(config.read_text().replace("[store]", "[store]\nconfiguration_bytes = 1048576"))
    operator.good("profile", "create", "web", "user.role=a")
    operator.good("profile", "assign", "web1", "web")
    operator.good("config", "set", "web1", f"user.own={'x' * 1000000}")
    before = operator.revisions()
    said = operator.fails("profile", "set", "web", f"user.role={'y' * 100000}")
    assert "'web1'" in said
    assert "1048576 bytes" in said
    assert operator.revisions() == before
    # Hidden by what the instance has itself, it is not too much.
    operator.good("config", "set", "web1", "user.role=own")
    operator.good("profile", "set", "web", f"user.role={'y' * 100000}")


def test_too_many(operator: FleetOperator) -> None:
    """A profile that would give an instance too many keys, devices and options is refused with the instance's name.

    Those of its other profiles and of its devices count. What somebody has written by hand counts as one.
    """
    many = {f"o{number}": "x" for number in range(2000)}
    operator.good("profile", "create", "web", "user.role=a")
    operator.good("profile", "create", "other", *(f"user.{number}=x" for number in range(2080)))
    operator.good("profile", "assign", "web1", "web,other")
    ((other,),) = rows(operator.fleet, "SELECT id FROM guestapi.profiles WHERE name = 'other'")
    (uuid,) = rows(operator.fleet, "SELECT uuid FROM guestapi.instances WHERE name = 'web1'")[0]
    with operator.fleet.admin() as connection, connection.transaction():
        connection.execute("INSERT INTO guestapi.profile_devices VALUES (%s, 'bad', '[1, 2]')", (other,))
        connection.execute(
            "UPDATE guestapi.devices SET definition = %s WHERE uuid = %s", (json.dumps({"type": "nic"} | many), uuid)
        )
    ((has,),) = rows(
        operator.fleet,
        "SELECT (SELECT count(*) FROM guestapi.config WHERE uuid = %s) + 1 + 2001 + 1 + 2080 + 1",
        uuid,
    )
    # With the device that no host can take, which counts for the question and for nothing else.
    free = 4096 - has
    operator.good("profile", "set", "web", *(f"user.more{number}=x" for number in range(free)))
    before = operator.revisions()
    said = operator.fails("profile", "set", "web", "user.last=x", "user.further=x")
    assert "'web1'" in said
    assert "4096 keys, devices and options" in said
    assert operator.revisions() == before
    # Hidden by what the instance has itself, it is not too much.
    operator.good("profile", "set", "web", "user.password=hidden")
    host = FollowingHost(operator.fleet)
    host.follow()
    assert len(host.shown("web1").config) == 2080 + 2 + free


def test_too_many_on_its_host(operator: FleetOperator) -> None:
    """Where a runtime provides so many devices that not all keys of a placement have room, some are left out, named."""
    operator.good("config", "set", "web1", *(f"user.{number}=x" for number in range(100)))
    host = FollowingHost(operator.fleet)
    devices = {f"d{number}": {"type": "none"} for number in range(2000)}
    with host.writer.change() as change:
        reconcile(change, "lxc", [Observed("web1", "default", "web1", devices=devices)], is_alive=lambda _init: False)
    host.follow()
    shown = host.shown("web1")
    assert count_entries(shown.config, shown.devices) == 4096
    assert devices.items() <= shown.devices.items()
    with view(host.settings.store.url) as store:
        reasons = [one.reason for one in list_problems(store)]
    assert any("there may be" in reason for reason in reasons), reasons


def test_what_a_store_cannot_take(operator: FleetOperator) -> None:
    """Of a profile that somebody has written by hand, what cannot be taken is left out and named; the rest is there."""
    operator.good("profile", "create", "web", "user.role=a", "user.b=1")
    operator.good("profile", "assign", "web1", "web")
    (uuid,) = rows(operator.fleet, "SELECT id FROM guestapi.profiles")[0]
    with operator.fleet.admin() as connection, connection.transaction():
        connection.execute("SELECT guestapi.note('h1', ARRAY[%s])", (uuid,))
        connection.execute("UPDATE guestapi.profile_config SET value = '\\xff' WHERE key = 'user.b'")
        connection.execute("INSERT INTO guestapi.profile_devices VALUES (%s, 'eth0', '[1]')", (uuid,))
    host = FollowingHost(operator.fleet)
    for _look in range(2):
        host.follow()
        assert host.shown("web1").config == {"user.password": "secret", "user.role": "a"}
        with view(host.settings.store.url) as store:
            reasons = sorted(one.reason for one in list_problems(store))
        assert reasons == [
            "profile: device 'eth0' is not an object of texts, so it is left out",
            "profile: the value of 'user.b' is not valid UTF-8, so it is left out",
        ]
    with operator.fleet.admin() as connection, connection.transaction():
        connection.execute("SELECT guestapi.note('h1', ARRAY[%s])", (uuid,))
        connection.execute("UPDATE guestapi.profiles SET name = 'a,b'")
    host.follow()
    with view(host.settings.store.url) as store:
        (problem,) = list_problems(store)
        assert get_instance(store, "default", "web1").config == {"user.password": "secret"}
    assert problem.reason.startswith("the profile is empty here: profile name 'a,b' cannot be one")
    operator.good("profile", "assign", "web1", "")
    host.follow()
    with view(host.settings.store.url) as store:
        assert list_problems(store) == []


def test_an_instance_that_is_too_large_on_its_host(operator: FleetOperator) -> None:
    """What a runtime provides may leave no room for a profile; then it is empty there, and the host says so."""
    operator.good("profile", "create", "web", "user.role=a")
    operator.good("profile", "assign", "web1", "web")
    host = FollowingHost(operator.fleet)
    host.follow()
    operator.good("profile", "set", "web", f"user.role={'y' * 200}")
    settings = host.settings
    host.settings = replace(settings, store=replace(settings.store, configuration_bytes=220))
    host.follow()
    assert "user.role" not in host.shown("web1").config
    with view(host.settings.store.url) as store:
        assert "the profile is empty here" in list_problems(store)[0].reason
    host.settings = settings
    host.follow()
    assert host.shown("web1").config["user.role"] == "y" * 200


def test_an_operation_that_is_repeated(operator: FleetOperator) -> None:
    """A change of a profile with the id of one that was made changes nothing."""
    name = str(uuid4())
    operator.good("profile", "create", "web", "user.role=a")
    operator.good("profile", "set", "web", "user.role=b", "--operation", name)
    operator.good("profile", "set", "web", "user.role=c")
    done = operator.local("--fleet", "profile", "set", "web", "user.role=b", "--operation", name)
    assert (done.code, "was carried out before" in done.err) == (0, True)
    assert operator.good("profile", "get", "web", "user.role") == "c\n"


def test_wait(operator: FleetOperator) -> None:
    """A change of a profile waits for all hosts that have an instance with it."""
    operator.good("profile", "create", "web", "user.role=a", "--wait")
    operator.good("profile", "assign", "web1", "web")
    said = operator.fails("profile", "set", "web", "user.role=b", "--wait", "--timeout", "0.1")
    assert "h1 (last contact never) has not applied it" in said
    assert "h2" not in said
    FollowingHost(operator.fleet).follow()
    operator.good("profile", "set", "web", "user.role=b", "--wait", "--timeout", "0.1")


def test_upgrade(empty: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts with an older guestapi follow an upgraded database until it has a profile, which they would not serve."""
    with empty.admin() as connection:
        monkeypatch.setattr(setup, "VERSION", 1)
        monkeypatch.setattr(access, "statements", lambda: iter(()))
        setup.init(connection)
        monkeypatch.undo()
        assert setup.upgrade(connection) == (1, len(UPGRADES))
        setup.add_host(connection, "h1")
    empty.place("h1", "web1")
    operator, host = FleetOperator(empty), FollowingHost(empty)
    monkeypatch.setattr(inventory, "VERSION", 1)
    host.follow()
    monkeypatch.undo()
    operator.good("profile", "create", "web", "user.role=a")
    monkeypatch.setattr(inventory, "VERSION", 1)
    with pytest.raises(FleetError, match="takes followers that know version 2"):
        host.follow()
    monkeypatch.undo()
    operator.good("profile", "assign", "web1", "web")
    host.follow()
    assert host.shown("web1").config["user.role"] == "a"


def test_layers(operator: FleetOperator) -> None:
    """What a runtime provides is stronger than a profile of the fleet's."""
    operator.good("profile", "create", "web", "user.role=a")
    operator.good("profile", "device", "add", "web", "root", "disk", "path=/profile")
    operator.good("profile", "assign", "web1", "web")
    host = FollowingHost(operator.fleet)
    host.follow()
    observe(host, "web1", "ct")
    assert host.shown("web1").devices["root"]["path"] == "/"
    operator.good("profile", "device", "set", "web", "root", "path=/other")
    host.follow()
    shown = host.shown("web1")
    assert (shown.devices["root"]["path"], shown.source, shown.config["user.role"]) == ("/", "lxc", "a")
    with view(host.settings.store.url) as store:
        assert get_layers(store, shown).origin("user.role") == "profile web"


def test_names_that_no_profile_has(operator: FleetOperator) -> None:
    """What is no text, or has a NUL, is the name of no profile and no instance; the database is not asked for it."""
    for name in ("a\0b", "a\ud800b"):
        definition = json.dumps({"name": "new", "location": "h1", "profiles": [name]})
        assert "no profile" in operator.fails("apply", "-f", "-", stdin=definition)
        assert "profile" in operator.fails("instance", "add", "new", "--host", "h1", stdin=definition)
    for words in (
        ("profile", "show", "\udcff"),
        ("profile", "set", "\udcff", "user.a=1"),
        ("profile", "delete", "web", "--project", "\udcff"),
        ("profile", "add", "web1", "\udcff"),
    ):
        assert operator.fails(*words).startswith("no profile"), words
    assert operator.fails("profile", "create", "\udcff").startswith("profile name")
    assert operator.fails("config", "set", "\udcff", "user.a=1").startswith("no instance")
    assert operator.fails("instance", "add", "new", "--host", "\udcff").startswith("there is no host")
    for noun in ("profile", "instance"):
        assert operator.fails(noun, "list", "--project", "\udcff").startswith("no project")


def test_default_is_a_profile_like_others(operator: FleetOperator) -> None:
    """No instance of a fleet gets ``default`` by itself, so it can be renamed and deleted."""
    for verb in (("rename", "default", "x"), ("delete", "default")):
        assert operator.fails("profile", *verb).startswith("no profile 'default'")
    operator.good("profile", "create", "x", "user.a=1")
    operator.good("profile", "rename", "x", "default")
    operator.good("profile", "assign", "web1", "default")
    assert operator.info("web1")["config"]["user.a"] == "1"
    assert "cannot be removed: instance 'web1' has it" in operator.fails("profile", "delete", "default")
    operator.good("profile", "rename", "default", "y")
    assert operator.info("web1")["profiles"] == ["y"]
    operator.good("profile", "assign", "web2", "default")
    operator.good("profile", "assign", "web2", "")
    operator.good("profile", "delete", "default")
    assert [one["name"] for one in json.loads(operator.good("profile", "list", "--format", "json"))] == ["y"]


def test_key_policies_are_the_hosts(operator: FleetOperator) -> None:
    """A policy of a host's project holds for values that the fleet gives to an instance, itself and by a profile."""
    host = FollowingHost(operator.fleet)
    local = operator.local
    local.config.write_text(local.config.read_text().replace("/store.db", "/h1.db"))
    local.good("policy", "add", "user.*word", "--secret")
    operator.good("profile", "create", "web", "user.word=hidden", "user.role=shown")
    operator.good("profile", "assign", "web1", "web")
    host.follow()
    shown = local.good("instance", "info", "web1", "--format", "json")
    assert "shown" in shown
    assert "hidden" not in shown
    assert '"secret"' not in shown
    assert host.shown("web1").config["user.word"] == "hidden"
    assert "this command is not about instances of a fleet" in operator.fails("policy", "add", "user.*", "--secret")


def test_a_placement_that_is_refused_again_and_again(operator: FleetOperator) -> None:
    """While a placement with a profile cannot be taken, looks at everything do not write the profile anew."""
    operator.good("profile", "create", "web", "user.role=a")
    operator.good("profile", "assign", "web1", "web")
    host = FollowingHost(operator.fleet)
    with host.writer.change() as change:
        steps.add(change, "default", "web1", config={"user.own": "1"})
    host.follow()
    with view(host.settings.store.url) as store:
        written = "SELECT seq FROM sqlite_sequence WHERE name = 'profiles'"
        before = store.connection.execute(written).fetchone()
    for _look in range(3):
        host.follow()
    with view(host.settings.store.url) as store:
        assert store.connection.execute(written).fetchone() == before
        assert len(list_problems(store)) == 1
    operator.good("profile", "set", "web", "user.role=b")
    with host.writer.change() as change:
        steps.remove(change, get_instance(change, "default", "web1"))
    host.follow()
    assert host.shown("web1").config["user.role"] == "b"


def test_default_that_is_missing(operator: FleetOperator) -> None:
    """In a fleet without a profile ``default`` nothing shows or changes one."""
    for words in (
        ("show", "default"),
        ("get", "default", "user.a"),
        ("set", "default", "user.a=1"),
        ("unset", "default", "user.a"),
        ("edit", "default"),
        ("device", "list", "default"),
        ("device", "add", "default", "eth0", "nic"),
    ):
        assert operator.fails("profile", *words, stdin="config: {}").startswith("no profile 'default'"), words
    assert operator.good("profile", "list", "--format", "json").strip() == "[]"


def test_edit_does_not_rename(operator: FleetOperator) -> None:
    """A definition with another name changes the profile that is named in the command, and the operator is told."""
    operator.good("profile", "create", "web", "user.role=a")
    document = {"name": "other", "description": "front", "config": {"user.role": "b"}}
    edited = operator.local("--fleet", "profile", "edit", "web", stdin=json.dumps(document))
    assert (edited.code, edited.out) == (0, "")
    assert edited.err.startswith("Warning: profile 'web' keeps its name and project")
    (listed,) = json.loads(operator.good("profile", "list", "--format", "json"))
    assert (listed["name"], listed["description"], listed["config"]) == ("web", "front", {"user.role": "b"})
    shown = operator.good("profile", "show", "web")
    assert operator.local("--fleet", "profile", "edit", "web", stdin=shown).err == ""


def test_completion_offers_nothing_of_the_host(operator: FleetOperator) -> None:
    """Behind --fleet, names of the host's own profiles and instances are not offered."""
    operator.local.good("instance", "add", "own")
    operator.local.good("profile", "create", "web")
    for noun, verb, name in (("profile", "show", "web"), ("instance", "show", "own")):
        found = []
        for start in (["guestapi"], ["guestapi", "--fleet"]):
            words = [*start, noun, verb, ""]
            asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
            answer = operator.local.program(environment={"_GUESTAPI_COMPLETE": "bash_complete", **asked})
            found.append(answer.out.split())
        assert found == [[f"plain,{name}"], []]


def test_hints_name_commands_of_the_fleet(operator: FleetOperator) -> None:
    """A command that a hint names is about the fleet, as the one that failed."""
    assert operator.fails("profile", "show", "none").endswith("'guestapi --fleet profile list' shows all")
    assert operator.fails("config", "set", "none", "user.a=1").endswith("'guestapi --fleet instance list' shows all")
    operator.good("profile", "create", "web")
    operator.good("profile", "assign", "web1", "web")
    for word in operator.fails("profile", "delete", "web").split("'guestapi ")[1:]:
        assert word.startswith("--fleet profile")
    operator.local.good("instance", "add", "own")
    assert operator.local.fails("profile", "show", "none").endswith("'guestapi profile list' shows all")


def waiting_too(operator: FleetOperator, connection: psycopg.Connection[Any], *words: str) -> subprocess.Popen[str]:
    """A second command, which waits while another one is `committing`."""
    process = subprocess.Popen(operator.program(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while connection.execute("SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted").fetchone() != (2,):
        assert time.monotonic() < until, "the command waits for nothing"
        time.sleep(0.01)
    return process


def test_user_data_comes_while_a_profile_is_assigned(operator: FleetOperator) -> None:
    """An instance that waits for its profile's change gets what was changed, and cloud-init starts over for it."""
    operator.good("profile", "create", "web", "user.role=a")
    before = operator.info("web2")["cloud_init_id"]
    with committing(operator, "profile", "set", "web", "cloud-init.user-data=#cloud-config") as connection:
        second = waiting_too(operator, connection, "profile", "assign", "web2", "web")
    assert second.communicate(timeout=60) == ("", "")
    after = operator.info("web2")
    assert after["config"]["cloud-init.user-data"] == "#cloud-config"
    assert after["cloud_init_id"] != before


def test_a_profile_gets_its_name_while_it_is_locked(operator: FleetOperator) -> None:
    """Who waits for a profile whose name another one has got meanwhile has locked that other one then."""
    for name in ("web", "next"):
        operator.good("profile", "create", name)
    fleet, place = operator.fleet, ("default", "web")
    for edited, given in (([place], []), ([], [place])):
        locked, ended = threading.Event(), threading.Event()

        def hold(edited: Any = edited, given: Any = given, locked: Any = locked, ended: Any = ended) -> None:
            with fleet.admin() as connection, connection.transaction():
                plan.lock(connection, [], [], edited, given)
                locked.set()
                assert ended.wait(60)

        thread = threading.Thread(target=hold)
        with fleet.admin() as connection, fleet.admin() as looking:
            with connection.transaction():
                connection.execute("UPDATE guestapi.profiles SET name = 'old' WHERE name = 'web'")
                connection.execute("UPDATE guestapi.profiles SET name = 'web' WHERE name = 'next'")
                connection.execute("UPDATE guestapi.profiles SET name = 'next' WHERE name = 'old'")
                thread.start()
                until = time.monotonic() + 60
                while looking.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() == (0,):
                    assert time.monotonic() < until, "the change waits for nothing"
                    time.sleep(0.01)
            assert locked.wait(60)
            free = "SELECT name FROM guestapi.profiles ORDER BY name FOR UPDATE SKIP LOCKED"
            assert looking.execute(free).fetchall() == [("next",)]
            ended.set()
        thread.join()


def test_a_profile_is_deleted_while_it_is_assigned(operator: FleetOperator) -> None:
    """Who gets a profile that is deleted meanwhile hears that it is not there; one that is made twice, that it is."""
    operator.good("profile", "create", "web", "user.role=a")
    with committing(operator, "profile", "delete", "web") as connection:
        second = waiting_too(operator, connection, "profile", "assign", "web2", "web")
    assert second.communicate(timeout=60)[1].startswith("Error: no profile 'web'\n")
    with committing(operator, "profile", "create", "web") as connection:
        second = waiting_too(operator, connection, "profile", "create", "web")
    assert second.communicate(timeout=60)[1] == "Error: another profile has that name already; nothing was changed\n"


def test_leave_that_was_interrupted(operator: FleetOperator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose ``leave`` was interrupted after it had taken everything home keeps each profile once."""
    from guestapi.fleet import membership
    from guestapi.fleet.engine import session

    host = FollowingHost(operator.fleet)
    with host.writer.change() as change:
        profiles.create(change, "default", "web", config={"user.role": "host"})
    for name in ("web", "db", "default"):
        operator.good("profile", "create", name, f"user.{name}=fleet")
    operator.good("profile", "assign", "web1", "web,db,default")
    host.follow()
    before, entry = host.shown("web1"), latest(host)
    for step in ("write_profile", "write_placements", "lock_hosts", ""):
        with monkeypatch.context() as patch, session(operator.fleet.server.url(operator.fleet.database)) as connection:
            real, calls = plan.lock_hosts, list[Any]()

            def fail(*words: Any, step: str = step, calls: list[Any] = calls, real: Any = real) -> Any:
                calls.append(words)
                if step != "lock_hosts" or len(calls) == 2:
                    raise InterruptedError
                return real(*words)

            if step:
                patch.setattr(plan if step == "lock_hosts" else membership, step, fail)
                with pytest.raises(InterruptedError):
                    membership.leave(connection, host.writer, "h1")
            else:
                membership.leave(connection, host.writer, "h1")
    after = host.shown("web1")
    assert (after.config, after.cloud_init_id) == (before.config, before.cloud_init_id)
    assert after.profiles == ("web.1", "db", "default.1")
    assert told(host, entry) == []
    assert [one.name for one in owned(host)] == ["db", "default.1", "web", "web.1"]


@pytest.mark.parametrize("made", [True, False])
def test_a_change_of_a_profile_whose_answer_was_lost(
    operator: FleetOperator, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    """A command whose server is lost in its commit finds out what became of the profile: it is made once."""
    real = engine.commit
    lost: list[bool] = []

    def lose(connection: Any) -> None:
        if lost:
            real(connection)
            return
        lost.append(True)
        if made:
            real(connection)
        connection.close()
        raise engine.UncertainError("not certain", lost=True)

    monkeypatch.setattr("guestapi.fleet.operating.commit", lose)
    for words in (
        ("create", "web", "user.a=1"),
        ("set", "web", "user.a=2"),
        ("add", "web1", "web"),
        ("set", "web", "cloud-init.user-data=x"),
        ("rename", "web", "db"),
        ("remove", "web1", "db"),
        ("delete", "db"),
    ):
        lost.clear()
        before = operator.revisions()["h1"]
        # Only a profile that an instance has concerns its host.
        concerned = words[0] not in ("create", "delete") and "user.a=2" not in words
        operator.good("profile", *words)
        assert lost
        assert operator.revisions()["h1"] == before + concerned
        if words[0] == "add":
            assert operator.info("web1")["config"]["user.a"] == "2"
    assert operator.good("profile", "list", "--format", "json").strip() == "[]"


@pytest.mark.parametrize("words", [("profile", "set", "web", "user.a=new"), ("config", "set", "web1", "user.a=new")])
def test_a_change_while_a_host_leaves(
    operator: FleetOperator, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """What an operator changes after a host has read its instances is not lost: ``leave`` has to be called again."""
    from guestapi.fleet import membership
    from guestapi.fleet.engine import session

    host = FollowingHost(operator.fleet)
    operator.good("profile", "create", "web", "user.a=old")
    operator.good("profile", "assign", "web1", "web")
    host.follow()

    def change_too(*parameters: Any) -> None:
        monkeypatch.undo()
        operator.good(*words)
        placing.write_placements(*parameters)

    monkeypatch.setattr(membership, "write_placements", change_too)
    url = operator.fleet.server.url(operator.fleet.database)
    with pytest.raises(ConflictError, match="has changed instances of this host meanwhile"), session(url) as connection:
        membership.leave(connection, host.writer, "h1")
    assert operator.info("web1")["host"] == "h1"
    with session(url) as connection:
        membership.leave(connection, host.writer, "h1")
    assert host.shown("web1").config["user.a"] == "new"
    assert operator.fails("instance", "info", "web1").startswith("no instance")


def test_hosts_read_their_own_rows_alone(operator: FleetOperator) -> None:
    """What a host reads to know its profiles does not grow with the instances of other hosts."""
    operator.good("profile", "create", "web", "user.a=1")
    operator.good("profile", "assign", "web1", "web")
    with operator.fleet.admin() as connection:
        connection.execute(
            "INSERT INTO guestapi.instances (uuid, project, name, cloud_init_id, host, revision) "
            "SELECT gen_random_uuid(), 'other', 'x' || number, gen_random_uuid(), 'h' || (2 - number % 100 / 99), 1 "
            "FROM generate_series(1, 10000) AS number"
        )
        connection.execute(
            "INSERT INTO guestapi.instance_profiles SELECT uuid, 0, id FROM guestapi.instances, guestapi.profiles "
            "WHERE instances.project = 'other'"
        )
        connection.execute("ANALYZE guestapi.instances, guestapi.instance_profiles")
        scans = "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'instance_profiles'"
        connection.execute("SELECT pg_stat_force_next_flush()")
        (before,) = connection.execute(scans).fetchone() or (0,)
        host = FollowingHost(operator.fleet)
        host.follow()
        assert host.shown("web1").config["user.a"] == "1"
        (after,) = connection.execute(scans).fetchone() or (0,)
    # Sessions of the operator may have ended late, and have read a row or two.
    assert after - before < 100
