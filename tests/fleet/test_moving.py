"""Instances go to other hosts, into a fleet and back, and no two hosts have one at any moment."""

from __future__ import annotations

import contextlib
import json
from typing import Any
from uuid import uuid4

import pytest

from guestapi.fleet import engine
from guestapi.fleet.engine import FleetError, Session
from guestapi.settings import Settings
from guestapi.store import steps
from guestapi.store.lookup import get_instance, list_instances, read_entries
from guestapi.store.view import view
from tests.fleet.conftest import Fleet
from tests.fleet.host import FollowingHost, observe
from tests.fleet.operator import FleetOperator

pytestmark = pytest.mark.root


@pytest.fixture
def operator(fleet: Fleet) -> FleetOperator:
    """An operator of a fleet with hosts h1 and h2, whose instances are web1 and web2."""
    return FleetOperator(fleet)


@pytest.fixture
def hosts(fleet: Fleet) -> tuple[FollowingHost, FollowingHost]:
    """Both hosts, with what they have."""
    both = FollowingHost(fleet), FollowingHost(fleet, "h2")
    for one in both:
        one.follow()
    return both


def test_move(operator: FleetOperator, hosts: tuple[FollowingHost, FollowingHost]) -> None:
    """An instance goes when its host has released it; until then, the move says what it waits for."""
    old, new = hosts
    before = operator.info("web1")
    said = operator.good("instance", "move", "web1", "--to", "h2")
    assert said.startswith("web1 goes to h2 as soon as h1 releases it; h1 is active and was in contact ")
    assert operator.info("web1")["next_host"] == "h2"
    error = operator.fails("instance", "move", "web1", "--to", "h2", "--wait", "--timeout", "0.1")
    assert error.startswith("not within 0.1 s: web1 goes to h2 as soon as h1 releases it; h1 is active")
    new.follow()
    assert (old.names, new.names) == ({"web1"}, {"web2"})
    old.follow()
    assert (old.names, new.names) == (set(), {"web2"})
    new.follow()
    assert operator.good("instance", "move", "web1", "--to", "h2", "--wait") == "web1 is on h2\n"
    assert new.names == {"web1", "web2"}
    after = operator.info("web1")
    assert (after["host"], after["epoch"], after["next_host"]) == ("h2", 2, None)
    assert (after["uuid"], after["cloud_init_id"]) == (before["uuid"], before["cloud_init_id"])
    assert new.shown("web1").config == {"user.password": "secret"}


def test_a_container_that_is_left(operator: FleetOperator, hosts: tuple[FollowingHost, FollowingHost]) -> None:
    """The container on the old host belongs to nothing, then to a new instance, without the data of the fleet."""
    old, new = hosts
    observe(old, "web1", "lxc:web1")
    before = old.shown("web1")
    assert before.init is not None
    operator.good("instance", "move", "web1", "--to", "h2")
    old.follow()
    with view(old.settings.store.url) as store:
        assert list_instances(store) == []
    observe(old, "web1", "lxc:web1")
    new.follow()
    left = old.shown("web1")
    assert (left.config, left.init) == ({}, before.init)
    assert left.uuid != before.uuid
    assert new.shown("web1").uuid == before.uuid


def test_calling_off(operator: FleetOperator, hosts: tuple[FollowingHost, FollowingHost]) -> None:
    """A move that its host has not carried out yet is called off; the host keeps the instance all the time."""
    old, new = hosts
    operator.good("instance", "move", "web1", "--to", "h2")
    assert operator.good("instance", "move", "web1", "--to", "h1") == "web1 is on h1\n"
    old.follow()
    new.follow()
    assert (old.names, new.names) == ({"web1"}, {"web2"})
    assert operator.info("web1")["next_host"] is None


def test_mistakes(operator: FleetOperator, hosts: tuple[FollowingHost, FollowingHost]) -> None:
    """What cannot be moved is refused."""
    assert operator.fails("instance", "move", "web9", "--to", "h2").startswith("no instance 'web9'")
    assert operator.fails("instance", "move", "web1", "--to", "h9").startswith("there is no host 'h9'")
    error = operator.fails("instance", "move", "web1", "--to", "h2", "--fenced")
    assert error.startswith("host h1 is not fenced, so it may still serve 'web1'; make sure that it is off")
    assert "is for a fleet" in operator.local.misuse("instance", "move", "web1", "--to", "h2")
    assert operator.info("web1")["next_host"] is None


def test_a_dead_host(operator: FleetOperator, fleet: Fleet, hosts: tuple[FollowingHost, FollowingHost]) -> None:
    """An instance of a fenced host goes at once; that host, when it is let in again, has lost it at its first look.

    What it says of the instance until then changes nothing.
    """
    old, new = hosts
    with fleet.admin() as connection:
        connection.execute("UPDATE guestapi.hosts SET state = 'fenced' WHERE name = 'h1'")
    assert operator.good("instance", "move", "web1", "--to", "h2", "--fenced") == "web1 is on h2\n"
    new.follow()
    assert new.names == {"web1", "web2"}
    with pytest.raises(FleetError):
        old.follow()
    assert old.names == {"web1"}
    with fleet.admin() as connection:
        connection.execute("UPDATE guestapi.hosts SET state = 'active' WHERE name = 'h1'")
    with fleet.host("h1") as connection:
        uuid = operator.info("web1")["uuid"]
        for epoch in (1, 2):
            assert connection.execute(
                "SELECT guestapi.report(%s, %s, 9, 1, true, true), guestapi.release(%s, %s)", (uuid, epoch, uuid, epoch)
            ).fetchone() == (False, False)
    old.follow()
    assert old.names == set()


def test_a_move_twice(operator: FleetOperator, hosts: tuple[FollowingHost, FollowingHost]) -> None:
    """An order that is repeated changes nothing."""
    operator.good("instance", "move", "web1", "--to", "h2")
    before = operator.revisions()
    operator.good("instance", "move", "web1", "--to", "h2")
    assert operator.revisions() == before


def test_an_operation_of_a_move_twice(operator: FleetOperator, hosts: tuple[FollowingHost, FollowingHost]) -> None:
    """A move that is asked again changes nothing, and says where the instance goes now, whatever has come since."""
    told = "this operation was carried out before; nothing was changed now\n"
    number = str(uuid4())

    def again(to: str, *words: str) -> tuple[int, str, str]:
        done = operator.local("--fleet", "instance", "move", "web2", "--to", to, "--operation", number, *words)
        assert done.err.startswith(told), done.err
        return done.code, done.out, done.err.removeprefix(told)

    operator.good("instance", "move", "web2", "--to", "h1", "--operation", number)
    code, out, error = again("h1")
    assert (code, error) == (0, "")
    assert out.startswith("web2 goes to h1 as soon as h2 releases it")
    assert again("h2")[1].startswith("web2 goes to h1 as soon as h2 releases it")
    operator.good("instance", "move", "web2", "--to", "h2")
    before = operator.revisions()
    for to in ("h1", "h2"):
        assert again(to) == (0, "web2 is on h2\n", "")
    code, _out, error = again("h1", "--wait")
    assert (code, error.partition("\n")[0]) == (1, "Error: web2 is on h2; it does not go to h1")
    hosts[1].follow()
    assert again("h2", "--wait") == (0, "web2 is on h2\n", "")
    assert operator.revisions() == before
    assert operator.info("web2")["next_host"] is None
    operator.good("instance", "remove", "web2")
    assert again("h1") == (1, "", "Error: no instance 'web2'\nHint: 'guestapi --fleet instance list' shows all\n")


def test_a_move_whose_answer_was_lost(operator: FleetOperator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A move whose server is lost in its commit is ordered once, and says so as any other."""
    real = engine.commit
    lost: list[bool] = []

    def lose(connection: Any) -> None:
        real(connection)
        if not lost:
            lost.append(True)
            connection.close()
            raise engine.UncertainError("not certain", lost=True)

    monkeypatch.setattr("guestapi.fleet.moving.commit", lose)
    before = operator.revisions()["h1"]
    assert operator.good("instance", "move", "web1", "--to", "h2").startswith("web1 goes to h2 as soon as h1 releases")
    assert lost
    assert operator.revisions()["h1"] == before + 1


class CutSession(Session):
    """A session that is cut at a question: before the server has it, or after the server has done what it asks."""

    left = 0
    after = False

    def ask(self, query: str, parameters: Any = (), *, often: bool = False) -> list[tuple[Any, ...]]:
        """As `Session`."""
        cls = CutSession
        cls.left -= 1
        if cls.left >= 0:
            return super().ask(query, parameters, often=often)
        if cls.left == -1 and cls.after:
            super().ask(query, parameters, often=often)
        raise FleetError("cut off")


@pytest.mark.parametrize("after", [False, True])
def test_cut_off_at_every_step(
    operator: FleetOperator, hosts: tuple[FollowingHost, FollowingHost], monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """A host that is cut off at any question of a move never has the instance at the same moment as the other."""
    old, new = hosts
    operator.good("instance", "move", "web1", "--to", "h2")
    CutSession.after = after
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Session", CutSession)
        for step in range(100):
            for host in (old, new):
                CutSession.left = step
                with contextlib.suppress(FleetError):
                    host.follow()
                having = [name for host in hosts for name in host.names]
                assert len(having) == len(set(having)), f"two have it, cut off at question {step}"
            if new.names == {"web1", "web2"}:
                break
    assert (old.names, new.names) == (set(), {"web1", "web2"})
    assert operator.info("web1")["epoch"] == 2


def local(fleet: Fleet, operator: FleetOperator, host: FollowingHost) -> Settings:
    """Have the test's commands be those of this host."""
    config = fleet.guestapi.config
    url = fleet.server.url(fleet.database, "anna")
    text = config.read_text().replace("/store.db", f"/{host.name}.db")
    config.write_text(f'{text}host = "{host.name}"\n')
    assert url in text
    return host.settings


def test_join_and_leave(operator: FleetOperator, fleet: Fleet) -> None:
    """A host's own instances become the fleet's and back; they keep what guests read, their runs and their UUIDs."""
    host = FollowingHost(fleet)
    local(fleet, operator, host)
    guestapi = operator.local
    guestapi.good("instance", "add", "own", "-c", "user.a=1")
    observe(host, "ct", "/var/lib/lxc ct")
    with host.writer.change() as change:
        steps.configure(change, get_instance(change, "default", "ct"), {"user.b": "2"})
    guestapi.good("profile", "set", "default", "user.c=3")
    before = {name: host.shown(name) for name in ("own", "ct")}
    with view(host.settings.store.url) as store:
        entries = len(read_entries(store, 0, 1000).found)
    said = guestapi.good("fleet", "join", "--import")
    assert said.startswith("2 instances added to the fleet\nhost h1 can follow fleet ")
    assert guestapi.good("fleet", "join", "--import").startswith("0 instances added")
    host.follow()
    assert host.names == {"own", "ct", "web1"}
    for name, was in before.items():
        now = host.shown(name)
        assert (now.id, now.uuid, now.cloud_init_id, now.run, now.init) == (
            was.id,
            was.uuid,
            was.cloud_init_id,
            was.run,
            was.init,
        )
        assert (now.config, now.devices) == (was.config, was.devices)
    with view(host.settings.store.url) as store:
        new = read_entries(store, 0, 1000).found[entries:]
    assert not [one for one in new if one.instance in ("own", "ct") and one.for_guest]
    operator.good("config", "set", "ct", "user.b=4")
    assert guestapi.good("fleet", "leave").startswith("3 instances are this host's own")
    assert host.names == set()
    assert host.shown("ct").config == {"user.b": "4", "user.c": "3"}
    assert host.shown("ct").init == before["ct"].init
    assert [row["name"] for row in json.loads(operator.good("list", "-f", "json"))] == ["web2"]
    guestapi.good("config", "set", "ct", "user.b=5")
    with pytest.raises(FleetError):
        host.follow()
    with view(host.settings.store.url) as store:
        assert len(list_instances(store)) == 3


def test_taken_names(operator: FleetOperator, fleet: Fleet) -> None:
    """Names that the fleet has already stop an import, all of it, and are listed."""
    host = FollowingHost(fleet)
    local(fleet, operator, host)
    operator.local.good("instance", "add", "web2")
    operator.local.good("instance", "add", "new")
    error = operator.local.fails("fleet", "join", "--import")
    assert error.startswith("the fleet has other instances of these names: web2 (project default); nothing was changed")
    assert len(json.loads(operator.good("list", "-f", "json"))) == 2


def test_leaving_while_something_moves(
    operator: FleetOperator, fleet: Fleet, hosts: tuple[FollowingHost, FollowingHost]
) -> None:
    """A host does not leave while an instance is to go from it, nor takes that with it."""
    local(fleet, operator, hosts[0])
    operator.good("instance", "move", "web1", "--to", "h2")
    assert operator.local.fails("fleet", "leave").startswith("instances are to go to another host: web1; wait")


def test_forgetting(operator: FleetOperator, fleet: Fleet, hosts: tuple[FollowingHost, FollowingHost]) -> None:
    """A host whose database is gone for good keeps its instances as its own."""
    local(fleet, operator, hosts[0])
    assert operator.local.good("fleet", "leave", "--forget").startswith("1 instances are this host's own")
    operator.local.good("config", "set", "web1", "user.a=1")
    found: Any = operator.info("web1")
    assert "user.a" not in found["config"]


def test_profiles_come_into_the_fleet_and_are_forgotten(operator: FleetOperator, fleet: Fleet) -> None:
    """What profiles gave to instances that join stays theirs, whatever the fleet's profile of that name has.

    A host that forgets the fleet keeps its profiles as its own, one beside its own of the same name.
    """
    host = FollowingHost(fleet)
    local(fleet, operator, host)
    guestapi = operator.local
    operator.good("profile", "create", "web", "user.role=fleet", "user.more=fleet")
    guestapi.good("profile", "create", "web", "user.role=host")
    guestapi.good("profile", "device", "add", "web", "eth0", "nic", "mtu=1500")
    guestapi.good("instance", "add", "own", "-p", "web", "-c", "user.a=1")
    before = host.shown("own")
    assert guestapi.good("fleet", "join", "--import").startswith("1 instances added")
    host.follow()
    assert (host.shown("own").config, host.shown("own").devices) == (before.config, before.devices)
    assert operator.info("own")["profiles"] == []
    assert operator.info("own")["config"] == {"user.a": "1", "user.role": "host"}
    operator.good("profile", "add", "own", "web")
    host.follow()
    assert host.shown("own").config == {"user.a": "1", "user.role": "host", "user.more": "fleet"}
    fleet.server.stop()
    try:
        assert guestapi.good("fleet", "leave", "--forget").startswith("2 instances are this host's own")
    finally:
        fleet.server.start()
    assert host.shown("own").config == {"user.a": "1", "user.role": "host", "user.more": "fleet"}
    assert host.shown("own").profiles == ("web.1",)
    guestapi.good("profile", "set", "web.1", "user.more=host")
    assert host.shown("own").config["user.more"] == "host"
    assert json.loads(guestapi.good("profile", "show", "web", "--format", "json"))["config"] == {"user.role": "host"}
    assert guestapi.good("fleet", "leave", "--forget").startswith("0 instances")
