"""guestapi-fleet.service under a real systemd, on two hosts of one fleet, with a container of LXC on each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guestapi.fleet import moving, setup
from guestapi.fleet.engine import session
from guestapi.fleet.operating import FleetStore, Wishes, new_operation
from guestapi.store import steps
from tests.harness.fleet_host import UNIT, join
from tests.harness.machine import CHECKOUT, Installed
from tests.harness.postgresql import Postgres, running
from tests.harness.waiting import until

pytestmark = pytest.mark.root

DATABASE = "guestapi"
LXC = """
lxc.uts.name = web
lxc.rootfs.path = dir:{path}/web/rootfs
lxc.init.cmd = /sbin/init
lxc.net.0.type = empty
lxc.mount.auto = proc:rw
lxc.include = /etc/guestapi/lxc-guestapi.conf
"""


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
        join(machine, name, server, DATABASE, self._path, "127.0.0.1")
        machine.run("mkdir", f"{self._path}/web")
        rootfs = str(CHECKOUT / "tests/harness/rootfs.py")
        machine.run("/usr/bin/python3", "-I", "-S", rootfs, f"{self._path}/web/rootfs")
        machine.write(f"{self._path}/web/config", LXC.format(path=self._path))
        machine.run("lxc-start", "-P", self._path, "-n", "web")

    def ask(self) -> str:
        """What the container is told its role is."""
        ask = ("curl", "-s", "--unix-socket", "/dev/incus/sock", "http://x/1.0/config/user.role")
        return self.machine.run("lxc-attach", "-P", self._path, "-n", "web", "--", *ask, check=False).stdout

    def property_of(self, name: str) -> str:
        """A property of the follower's unit."""
        return self.machine.run("systemctl", "show", "--value", "-p", name, UNIT).stdout.strip()

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
    with ExitStack() as stack:
        found = []
        for name in ("h1", "h2"):
            machine = stack.enter_context(Installed(staged))
            found.append(FleetHost(machine, name, server))
            stack.callback(found[-1].stop)
        yield found


def test_a_container_moves(server: Postgres, hosts: list[FleetHost]) -> None:
    """An instance goes from one host to the other and back, and never do containers of both have an answer."""
    url = server.url(DATABASE)
    fleet = FleetStore(lambda: session(url), 1 << 20)
    with fleet.change([("default", "web")], Wishes(new_operation(), "h1")) as change:
        steps.add(change, "default", "web", location="h1", config={"user.role": "frontend"})
    until(lambda: hosts[0].ask() == "frontend", "the instance at h1")
    assert hosts[1].ask() != "frontend"
    for source, target in (hosts, hosts[::-1]):
        wishes = Wishes(new_operation())
        moving.move(lambda: session(url), ("default", "web"), target.name, fenced=False, wishes=wishes)
        _wait_for_answer(source, target)


def _wait_for_answer(source: FleetHost, target: FleetHost) -> None:
    """Ask the new host until it answers; from then on, the old one does not."""
    until(lambda: target.ask() == "frontend", f"the instance at {target.name}", pause=0.0)
    assert source.ask() != "frontend"


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
        assert host.ask() == "frontend"
        assert "FAIL fleet" in host.machine.run("guestapi", "check", check=False).stdout
    finally:
        server.start()
    until(lambda: host.property_of("StatusText").startswith("follows the fleet"), "it follows")
