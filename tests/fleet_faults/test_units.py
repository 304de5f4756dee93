"""guestapi-fleet.service under a real systemd, on two hosts of one fleet, with a container of LXC on each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from guestapi.fleet import moving, setup
from guestapi.fleet.engine import session
from guestapi.fleet.operating import FleetStore, Wishes, new_operation
from guestapi.store import steps
from tests.harness.fleet_host import UNIT, join, make_container, reached_at
from tests.harness.machine import CHECKOUT, Installed
from tests.harness.postgresql import Postgres, running
from tests.harness.waiting import until
from tests.harness.witness import WitnessedAnswer, check_order, read_record, those_with

pytestmark = pytest.mark.root

DATABASE, ROLE = "guestapi", "frontend"


class FleetHost:
    """A machine with guestapi, set up as docs/fleet.md says, and a container "web" in an lxcpath of its own.

    Machines share the network, in which monitors of LXC have sockets that are named after the lxcpath.
    """

    def __init__(self, machine: Installed, name: str, server: Postgres) -> None:
        self.machine, self.name = machine, name
        self._path = f"/var/lib/lxc-{name}"
        # As docs/fleet.md has it.
        words = ("-m", "pip", "install", "--quiet", "--require-hashes", "-r", str(CHECKOUT / "requirements/fleet.txt"))
        machine.run("/opt/guestapi/bin/python", *words)
        join(machine, name, server.authority, reached_at("127.0.0.1", server.port, DATABASE), self._path)
        machine.run("mkdir", f"{self._path}/web")
        rootfs = str(CHECKOUT / "tests/harness/rootfs.py")
        machine.run("/usr/bin/python3", "-I", "-S", rootfs, f"{self._path}/web/rootfs")
        self._record = make_container(machine, self._path, "web")
        self.start()

    def answers(self) -> list[WitnessedAnswer]:
        """What the container was told, if it has asked yet."""
        return read_record(self.machine.run("cat", self._record, check=False).stdout)

    def wait_for_role(self, since: float) -> None:
        """Wait until the container has the instance's role, on both kinds of connections, asked after a moment."""

        def both() -> bool:
            return {one.how for one in those_with(ROLE, self.answers()) if one.began > since} == {"kept", "new"}

        until(both, f"the instance at {self.name}", pause=0.1)

    def wait_for_others(self, since: float) -> None:
        """Wait until the container has asked after a moment, on both kinds of connections, whatever it was told."""
        both = {"kept", "new"}
        until(lambda: {one.how for one in self.answers() if one.began > since} == both, "questions", pause=0.1)

    def property_of(self, name: str) -> str:
        """A property of the follower's unit."""
        return self.machine.run("systemctl", "show", "--value", "-p", name, UNIT).stdout.strip()

    def start(self) -> None:
        """Start the container."""
        self.machine.run("lxc-start", "-P", self._path, "-n", "web")

    def stop(self) -> None:
        """End the container."""
        self.machine.run("lxc-stop", "-P", self._path, "-k", "-n", "web", check=False)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A fleet of two hosts."""
    with running() as one:
        with one.connect() as connection:
            connection.execute(f"CREATE DATABASE {DATABASE}".encode())
        with one.connect(DATABASE) as connection:
            setup.init(connection)
            for name in ("h1", "h2"):
                setup.add_host(connection, name)
        yield one


@pytest.fixture(scope="module")
def hosts(server: Postgres, staged: Path) -> Iterator[list[FleetHost]]:
    """Both of them."""
    names = ("h1", "h2")
    with ExitStack() as stack, ThreadPoolExecutor() as at_once:
        machines = [stack.enter_context(Installed(staged)) for _name in names]
        found = list(at_once.map(lambda machine, name: FleetHost(machine, name, server), machines, names))
        for host in found:
            stack.callback(host.stop)
        yield found


def test_a_container_moves(server: Postgres, hosts: list[FleetHost]) -> None:
    """An instance goes from one host to the other and back, and never do containers of both have an answer."""
    url = server.url(DATABASE)
    fleet = FleetStore(lambda: session(url), 1 << 20)
    with fleet.change([("default", "web")], Wishes(new_operation(), "h1")) as change:
        steps.add(change, "default", "web", location="h1", config={"user.role": ROLE})
    until(lambda: those_with(ROLE, hosts[0].answers()), "the instance at h1", pause=0.1)
    assert those_with(ROLE, hosts[1].answers()) == []
    began = 0.0
    for source, target in (hosts, hosts[::-1]):
        source.wait_for_role(began)
        # A container whose instance has left is registered as another one when it starts, or a minute later.
        target.stop()
        target.start()
        wishes = Wishes(new_operation())
        moving.move(lambda: session(url), ("default", "web"), target.name, fenced=False, wishes=wishes)
        target.wait_for_role(began)
        since = time.monotonic()
        source.wait_for_others(since)
        old, new = ([one for one in host.answers() if one.began > began] for host in (source, target))
        check_order(ROLE, old, new)
        began = since


def test_the_follower_is_killed(server: Postgres, hosts: list[FleetHost]) -> None:
    """systemd starts a follower that was killed, and `guestapi check` says that it follows."""
    host = hosts[0]
    before = host.property_of("MainPID")
    assert host.property_of("StatusText").startswith("follows the fleet: revision ")
    host.machine.run("kill", "-KILL", before)
    until(lambda: host.property_of("MainPID") not in (before, "0"), "another process")
    until(lambda: host.property_of("StatusText").startswith("follows the fleet"), "it follows")
    assert "ok   fleet: follows, 1 instances" in host.machine.run("guestapi", "check", check=False).stdout
    (user,) = host.machine.run("ps", "-o", "user:20=", "-p", host.property_of("MainPID")).stdout.split()
    assert user == "guestapi-fleet"


def test_the_database_is_away(server: Postgres, hosts: list[FleetHost]) -> None:
    """Containers have their answers while the database is away, and the unit says so."""
    host = hosts[0]
    server.stop()
    try:
        until(lambda: "as last known" in host.property_of("StatusText"), "the status")
        host.wait_for_role(time.monotonic())
        assert "FAIL fleet" in host.machine.run("guestapi", "check", check=False).stdout
    finally:
        server.start()
    until(lambda: host.property_of("StatusText").startswith("follows the fleet"), "it follows")
