"""guestapi with a daemon in the two ways of docs/incus.md, with Debian's units and guestapi's on a real systemd."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from guestapi.dialects import DIALECTS
from tests.harness.daemon_units import CLIENTS, install_daemon
from tests.harness.machine import Installed
from tests.harness.waiting import until

pytestmark = pytest.mark.root

#: For each daemon: the unit of guestapi's socket, and the unit of the mirror.
UNITS = {
    "incus": ("guestapi.socket", "guestapi-mirror.service"),
    "lxd": ("guestapi-lxd.socket", "guestapi-mirror-lxd.service"),
}


class Beside:
    """A machine with a daemon and one container of it."""

    def __init__(self, machine: Installed, kind: str) -> None:
        self.machine = machine
        self.kind = kind
        #: Unique by kind: other daemons of this host may have containers, and liblxc has one name space for all.
        self.name = f"unit-{kind}"

    def client(self, *words: str) -> str:
        """Run the daemon's client; return its output."""
        return self.machine.run(CLIENTS[self.kind], *words).stdout

    def systemctl(self, *words: str) -> None:
        """Run systemctl."""
        self.machine.run("systemctl", *words)

    def inside(self, *words: str) -> str:
        """Run a program in the container, without the daemon; return its output."""
        inside = ["nsenter", "-t", self.pid, "-a", "--setuid", "0", "--setgid", "0", "--"]
        return self.machine.run(*inside, *words, check=False).stdout

    def answers(self) -> bool:
        """Return whether guestapi answers in the container: only guestapi refuses POST."""
        path = f"{DIALECTS[self.kind].directory}/sock"
        ask = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket", path]
        return (
            self.inside(*ask, "-X", "POST", "http://x/1.0/config/user.foo") == "405"
            and self.inside(*ask, "http://x/1.0/config/user.foo") == "200"
        )

    def finding(self, check: str) -> dict[str, object]:
        """Return a finding of `guestapi check`."""
        (one,) = (one for one in self.findings() if one["check"] == f"{check} {self.kind}")
        return one

    def findings(self) -> list[dict[str, object]]:
        """Return all findings."""
        found = json.loads(self.machine.run("guestapi", "check", "--format", "json", check=False).stdout)
        assert isinstance(found, list)
        return found

    def wrong(self) -> list[object]:
        """Return the texts of all failures."""
        return [one["text"] for one in self.findings() if not one["ok"]]

    def launch(self) -> None:
        """Launch the container."""
        self.client("launch", "busybox", self.name, "-c", "user.foo=bar")
        self.find()

    def find(self) -> None:
        """Find the running container's init."""
        self.pid = str(json.loads(self.client("query", f"/1.0/instances/{self.name}/state"))["pid"])

    @contextmanager
    def way(self, way: str) -> Iterator[None]:
        """Set up guestapi's socket in one of the two ways for the length of the block."""
        unit, mirror = UNITS[self.kind]
        self.systemctl("disable", "--now", "guestapi.socket", "guestapi-lxd.socket", "guestapi.service")
        directory = f"/etc/systemd/system/{unit}.d"
        source = f"/etc/guestapi/{self.kind}-{way}.conf"
        self.machine.run("install", "-D", "-m", "0644", source, f"{directory}/daemon.conf")
        self.systemctl("daemon-reload")
        try:
            self.systemctl("enable", "--now", unit, mirror)
            yield
        finally:
            self.systemctl("disable", "--now", mirror)
            self.machine.run("guestapi", "mirror", self.kind, "--forget")
            self.systemctl("disable", "--now", unit, "guestapi.service")
            self.machine.run("rm", "-r", directory)
            self.systemctl("daemon-reload")
            self.systemctl("start", f"{self.kind}.service")
            self.client("delete", "--force", self.name)
            self.systemctl("enable", "--now", "guestapi.socket", "guestapi-lxd.socket")


def wait(what: Callable[[], object]) -> None:
    """Poll until a condition holds."""
    until(what, "the expected state")


def wait_until_none(what: Callable[[], list[object]]) -> None:
    """Wait until the list is empty."""
    until(lambda: not what(), lambda: str(what()))


@pytest.fixture(params=["incus", "lxd"])
def beside(request: pytest.FixtureRequest, machine: Installed) -> Beside:
    """A daemon on the machine."""
    install_daemon(machine, request.param)
    return Beside(machine, request.param)


def test_takeover_and_device(beside: Beside) -> None:
    """By takeover and by device, guestapi answers the container, also when the daemon restarts, stops or is killed."""
    takeover = f"guestapi-takeover@{beside.kind}.service"
    with beside.way("takeover"):
        beside.launch()
        assert not beside.answers()
        wait(lambda: "the daemon" in str(beside.finding("guest socket")["text"]))
        beside.systemctl("enable", "--now", takeover)
        wait(beside.answers)
        assert beside.finding("guest socket")["ok"]
        assert beside.finding("mirror")["ok"]
        status = beside.machine.run("systemctl", "show", "-P", "StatusText", UNITS[beside.kind][1]).stdout
        assert "1 instances, 1 running" in status
        listening = beside.machine.property_of("MainPID")
        for words in (("restart",), ("stop",), ("start",), ("kill", "--signal=KILL", "--kill-whom=main"), ("start",)):
            beside.systemctl(*words, f"{beside.kind}.service")
            wait(beside.answers)
        # None of this has restarted guestapi's service.
        assert beside.machine.property_of("MainPID") == listening
        wait_until_none(beside.wrong)
        # Without running instances, the daemon unmounts the directory's file system when it stops.
        beside.client("stop", "--force", beside.name)
        beside.systemctl("restart", f"{beside.kind}.service")
        wait(lambda: beside.finding("guest socket")["ok"])
        beside.client("start", beside.name)
        beside.find()
        wait(beside.answers)
        # As at the host's boot: everything is stopped, then all units are started at once.
        beside.client("stop", "--force", beside.name)
        units = [*UNITS[beside.kind], takeover]
        beside.systemctl("stop", *units, "guestapi.service", f"{beside.kind}.service", f"{beside.kind}.socket")
        # The daemon has been started more often than DefaultStartLimitBurst= permits.
        beside.systemctl("reset-failed", f"{beside.kind}.service")
        beside.systemctl("start", *units)
        beside.client("start", beside.name)
        beside.find()
        wait(beside.answers)
        wait_until_none(beside.wrong)
        beside.systemctl("disable", "--now", takeover)
    with beside.way("device"):
        unit = "/etc/guestapi/guestapi.toml"
        beside.machine.run(
            "sed", "-i.before", f"s#{DIALECTS[beside.kind].socket}#/run/guestapi/{beside.kind}/sock#", unit
        )
        device = ["disk", f"source=/run/guestapi/{beside.kind}", f"path={DIALECTS[beside.kind].directory}"]
        beside.client("profile", "device", "add", "default", "guestapi", *device)
        beside.launch()
        wait(beside.answers)
        assert "1 of 1" in str(beside.finding("guest socket")["text"])
        wait_until_none(beside.wrong)
        beside.systemctl("restart", f"{beside.kind}.service")
        assert beside.answers()
        beside.machine.run("mv", f"{unit}.before", unit)
