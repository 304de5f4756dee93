"""systemd-nspawn@.service with the drop-in that is shipped, under a real systemd with machined."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.machine import CHECKOUT, Machine

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

DROP_IN = "/etc/systemd/system/systemd-nspawn@.service.d/guestapi.conf"
#: The name is also that of a network interface, and the machine shares this one's network.
WEB, DB = f"web-{os.getpid()}", f"db-{os.getpid()}"
SOCKETS = ("guestapi.socket", "guestapi-lxd.socket")
ROOTFS = str(CHECKOUT / "tests/harness/rootfs.py")


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine with guestapi and the drop-in as they are shipped, and two root directories to boot."""
    with Machine() as booted:
        booted.run("make", "-C", str(CHECKOUT), "install", timeout=300)
        booted.run("install", "-D", "-m", "0644", str(CHECKOUT / "systemd/nspawn-guestapi.conf"), DROP_IN)
        booted.run("systemctl", "daemon-reload")
        booted.run("systemctl", "enable", "--now", *SOCKETS)
        for name in (WEB, DB, "odd.name"):
            booted.run("/usr/bin/python3", "-I", ROOTFS, f"/var/lib/machines/{name}")
        yield booted


@pytest.fixture(autouse=True)
def stopped(machine: Machine) -> Iterator[None]:
    """Each test starts its own."""
    yield
    machine.run("systemctl", "stop", "systemd-nspawn@*.service")


def start(machine: Machine, name: str) -> None:
    """Start a container's unit."""
    machine.run("systemctl", "start", f"systemd-nspawn@{name}.service")


def leader(machine: Machine, name: str) -> int:
    """The PID of the container's init, as machined knows it."""
    return int(machine.run("machinectl", "show", "--value", "-p", "Leader", name).stdout)


def inside(machine: Machine, name: str, *argv: str, check: bool = True) -> str:
    """Run a program in a container, as its root."""
    return machine.run(
        "nsenter", "-t", str(leader(machine, name)), "-a", "--setuid", "0", "--setgid", "0", *argv, check=check
    ).stdout


def ask(machine: Machine, name: str, path: str, dialect: str = "incus") -> str:
    """A request from inside a container."""
    curl = ["/usr/bin/curl", "-sS", "--max-time", "10", "--unix-socket", f"/dev/{dialect}/sock"]
    return inside(machine, name, *curl, f"http://x{path}")


def listed(machine: Machine) -> dict[str, dict[str, Any]]:
    """What `guestapi instance list` says, by name."""
    found = json.loads(machine.run("guestapi", "instance", "list", "--format", "json").stdout)
    return {one["name"]: one for one in found}


def wait_for(machine: Machine, name: str, status: str, besides: int = 0) -> dict[str, Any]:
    """Wait until an instance has a status, and a PID other than `besides`."""
    until = time.monotonic() + 20
    while (one := listed(machine)[name])["status"] != status or one["pid"] == besides:
        unit = f"systemd-nspawn@{name}.service"
        assert time.monotonic() < until, [one, machine.run("systemctl", "status", "-l", unit, check=False).stdout]
    return one


def test_starts_before_the_sockets(machine: Machine) -> None:
    """A container that was there before the sockets finds them as soon as they are."""
    machine.run("systemctl", "stop", *SOCKETS, "guestapi.service")
    machine.run("rm", "-r", "/var/lib/incus", "/var/lib/lxd/devlxd")
    start(machine, WEB)
    assert inside(machine, WEB, "/bin/ls", "/dev/incus", "/dev/lxd").split() == ["/dev/incus:", "/dev/lxd:"]
    machine.run("systemctl", "start", *SOCKETS)
    assert json.loads(ask(machine, WEB, "/1.0"))["instance_type"] == "container"


def test_registered_with_the_leader(machine: Machine) -> None:
    """When `systemctl start` returns, the instance runs, its init is the leader, and it is answered."""
    start(machine, WEB)
    one = listed(machine)[WEB]
    assert (one["status"], one["pid"]) == ("running", leader(machine, WEB))
    machine.run("guestapi", "config", "set", WEB, "user.foo=bar")
    assert ask(machine, WEB, "/1.0/config/user.foo") == "bar"
    assert f"local-hostname: {WEB}" in ask(machine, WEB, "/1.0/meta-data", "lxd")


def test_is_in_a_user_namespace(machine: Machine) -> None:
    """-U: root inside is nobody in particular outside, and is taken for the instance's root all the same."""
    start(machine, WEB)
    uid_map = machine.run("cat", f"/proc/{leader(machine, WEB)}/uid_map").stdout.split()
    assert uid_map[0] == "0"
    assert int(uid_map[1]) >= 65536
    assert ask(machine, WEB, "/1.0/config").startswith("[")


def test_stop(machine: Machine) -> None:
    """Stopped by systemctl: not among the running when that returns, the configuration stays."""
    start(machine, WEB)
    machine.run("guestapi", "config", "set", WEB, "user.stays=yes")
    machine.run("systemctl", "stop", f"systemd-nspawn@{WEB}.service")
    one = listed(machine)[WEB]
    assert (one["status"], one["config"]["user.stays"]) == ("stopped", "yes")


def test_restart(machine: Machine) -> None:
    """Restarted by systemctl: the new init is the instance."""
    start(machine, WEB)
    before = leader(machine, WEB)
    machine.run("systemctl", "restart", f"systemd-nspawn@{WEB}.service")
    one = listed(machine)[WEB]
    assert one["status"] == "running"
    assert one["pid"] == leader(machine, WEB) != before
    assert ask(machine, WEB, "/1.0/config").startswith("[")


def test_reboot_and_poweroff_from_inside(machine: Machine) -> None:
    """The container reboots, which systemd does by a restart of the unit; it powers off, which ends it."""
    start(machine, WEB)
    before = leader(machine, WEB)
    inside(machine, WEB, "/bin/reboot", "-f", check=False)
    assert wait_for(machine, WEB, "running", besides=before)["pid"] == leader(machine, WEB)
    assert ask(machine, WEB, "/1.0/config").startswith("[")
    inside(machine, WEB, "/bin/poweroff", "-f", check=False)
    wait_for(machine, WEB, "stopped")


def test_two_at_once(machine: Machine) -> None:
    """Two containers with id maps of their own see their own values and nobody else's."""
    for name in (WEB, DB):
        start(machine, name)
        machine.run("guestapi", "config", "set", name, f"user.me={name}", f"user.{name}=x")
    for name, other in ((WEB, DB), (DB, WEB)):
        assert ask(machine, name, "/1.0/config/user.me") == name
        assert f"user.{other}" not in ask(machine, name, "/1.0/config")
    maps = {machine.run("cat", f"/proc/{leader(machine, name)}/uid_map").stdout for name in (WEB, DB)}
    assert len(maps) == 2


def test_killed(machine: Machine) -> None:
    """kill -9 of nspawn: the unit fails, and what it does at its end notes that the container has."""
    start(machine, WEB)
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=SIGKILL", f"systemd-nspawn@{WEB}.service")
    wait_for(machine, WEB, "stopped")
    machine.run("systemctl", "reset-failed", f"systemd-nspawn@{WEB}.service")


def test_odd_name(machine: Machine) -> None:
    """A machine's name that no instance can have: it runs unregistered, and its journal says why; or it is refused."""
    start(machine, "odd.name")
    said = machine.run("journalctl", "-o", "cat", "-t", "guestapi").stdout
    assert "nspawn hook: instance name 'odd.name'" in said
    assert ask(machine, "odd.name", "/1.0").strip() == "pid not in container?"
    machine.run("systemctl", "stop", "systemd-nspawn@odd.name.service")
    machine.run("sed", "-i", 's/^on-failure = .*/on-failure = "refuse"/', "/etc/guestapi/guestapi.toml")
    refused = machine.run("systemctl", "start", "systemd-nspawn@odd.name.service", check=False)
    assert refused.returncode != 0
    assert machine.run("machinectl", "show", "odd.name", check=False).returncode != 0
