"""The shipped guestapi-lxc.service under a real systemd, with a dozen real containers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator

import pytest

from tests.harness.machine import CHECKOUT, Installed
from tests.harness.waiting import until

pytestmark = pytest.mark.root

UNIT = "guestapi-lxc.service"
#: The machine shares this one's network namespace, which has the monitors' sockets.
NAMES = [f"unit{os.getpid()}-{number}" for number in range(12)]
#: CAP_NET_ADMIN and CAP_SYS_PTRACE as bits (capabilities(7)).
CAPABILITIES = 1 << 12 | 1 << 19

CONFIG = """
lxc.uts.name = {name}
lxc.rootfs.path = dir:/var/lib/lxc/rootfs-of-all
lxc.init.cmd = /sbin/init
lxc.net.0.type = empty
lxc.mount.auto = proc:rw
lxc.include = /etc/guestapi/lxc-guestapi.conf
"""


class Followed:
    """A machine with the follower, and what it has registered."""

    def __init__(self, machine: Installed) -> None:
        self.machine = machine

    def running(self) -> set[str]:
        """Return the names of the registered containers of LXC that run."""
        found = json.loads(self.machine.run("guestapi", "instance", "list", "--format", "json").stdout)
        return {one["name"] for one in found if one["source"] == "lxc" and one["status"] == "running"}

    def faults(self) -> list[str]:
        """Return the failures that ``guestapi check`` reports about the source."""
        found = json.loads(self.machine.run("guestapi", "check", "--format", "json", check=False).stdout)
        return [one["text"] for one in found if "lxc" in one["check"] and not one["ok"]]

    def until(self, true: Callable[[], object]) -> None:
        """Poll until a condition holds."""
        until(true, lambda: self.machine.run("systemctl", "status", UNIT, check=False).stdout)

    def each(self, command: str, names: list[str]) -> None:
        """Run a command of LXC on several containers at once."""
        self.machine.run("sh", "-c", f'for name; do {command} "$name" & done; wait', "each", *names)


@pytest.fixture
def followed(machine: Installed) -> Iterator[Followed]:
    """A machine with a dozen containers that do not run yet."""
    machine.run("/usr/bin/python3", "-I", "-S", str(CHECKOUT / "tests/harness/rootfs.py"), "/var/lib/lxc/rootfs-of-all")
    for name in NAMES:
        machine.run("mkdir", "-p", f"/var/lib/lxc/{name}")
        machine.write(f"/var/lib/lxc/{name}/config", CONFIG.format(name=name))
    machine.run("systemctl", "enable", "--now", UNIT)
    yield Followed(machine)
    machine.run("sh", "-c", 'for name; do lxc-stop -k "$name" & done; wait', "stop", *NAMES, check=False)
    machine.run("systemctl", "disable", "--now", UNIT)
    # Half a minute later `guestapi check` would report to the modules after this one that the follower does not run.
    machine.run("guestapi", "follow", "lxc", "--forget")
    machine.run("rm", "-rf", *(f"/var/lib/lxc/{name}" for name in [*NAMES, "rootfs-of-all"]))


def test_dozen(followed: Followed) -> None:
    """Twelve containers that start at once are registered, also if the follower is killed, stopped or restarted."""
    machine = followed.machine
    pid = machine.run("systemctl", "show", "--value", "-p", "MainPID", UNIT).stdout.strip()
    status = dict(line.split(":\t", 1) for line in machine.run("cat", f"/proc/{pid}/status").stdout.splitlines())
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == CAPABILITIES
    assert (status["NoNewPrivs"], status["Uid"].split()[0]) == ("1", "0")
    followed.each("lxc-start", NAMES)
    followed.until(lambda: followed.running() == set(NAMES))
    for name in NAMES[:3]:
        init = machine.run("lxc-info", "-pH", name).stdout.strip()
        inside = [
            "nsenter",
            "-t",
            init,
            "-a",
            "curl",
            "-s",
            "--unix-socket",
            "/dev/incus/sock",
            "http://x/1.0/meta-data",
        ]
        assert f"local-hostname: {name}\n" in machine.run(*inside).stdout
    followed.until(lambda: followed.faults() == [])
    machine.run("systemctl", "kill", "--signal=KILL", UNIT)
    followed.each("lxc-stop -k", NAMES[:6])
    followed.until(lambda: followed.running() == set(NAMES[6:]))
    machine.run("systemctl", "stop", UNIT)
    followed.each("lxc-start", NAMES[:2])
    assert followed.running() == set(NAMES[6:])
    machine.run("systemctl", "start", UNIT)
    followed.until(lambda: followed.running() == {*NAMES[:2], *NAMES[6:]})
