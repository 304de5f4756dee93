"""The script and the drop-ins of docs/extensions.md that announce each stop: with nspawn, LXC and Incus as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.docs.documents import CHECKOUT
from tests.docs.test_guides import LXC, play
from tests.harness.daemon_units import install_daemon
from tests.harness.machine import Installed, Machine
from tests.harness.waiting import TIMEOUT, until

pytestmark = pytest.mark.root

ROOTFS = str(CHECKOUT / "tests/harness/rootfs.py")
#: Also the name of a network interface, and the machine shares this one's network namespace.
SHOP = f"shop-{os.getpid()}"
NOTICES = "/1.0/guestapi/notices"
#: Files of the section: the path, in the paragraph before a block, and the block.
FILES = re.compile(r"`(/[^`]+)`[^`]*:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)


def section() -> str:
    """The section."""
    text = (CHECKOUT / "docs/extensions.md").read_text()
    return re.split(r"^##+ ", text.partition("### Announce each stop\n")[2], flags=re.MULTILINE)[0]


@pytest.fixture(scope="module")
def machine(staged: Path) -> Iterator[Installed]:
    """A machine with guestapi and the files of the section."""
    with Installed(staged) as booted:
        files = FILES.findall(section())
        assert len(files) == 3
        for path, content in files:
            booted.run("mkdir", "-p", str(Path(path).parent))
            booted.write(path, content)
        # The first line of the block; the tests type the others.
        booted.run("chmod", "+x", "/usr/local/sbin/announced-stop")
        play(booted, "docs/extensions.md", "systemctl daemon-reload")
        yield booted


def commands() -> list[str]:
    """The commands of the block after the script."""
    (text,) = re.findall(r"```console\n(# chmod.*?)```", section(), re.DOTALL)
    return [line.removeprefix("# ") for line in text.splitlines()]


def test_every_command_is_typed() -> None:
    """The script is made executable, and then called for Incus and for LXC."""
    assert [line.split()[0] for line in commands()] == ["chmod", "announced-stop", "announced-stop"]
    assert [line.split()[3:] for line in commands()[1:]] == [["incus", "stop", "web"], ["lxc-stop", "-n", "db"]]


Ask = Callable[..., str]


def asking(machine: Machine, *enter: str) -> Ask:
    """How an instance asks, which a prefix enters."""

    def ask(path: str, method: str = "GET") -> str:
        curl = ["/usr/bin/curl", "-sS", "--max-time", "30", "--unix-socket", "/dev/incus/sock", "-X", method]
        return machine.run(*enter, *curl, f"http://x{path}").stdout

    return ask


def acknowledge(ask: Ask) -> None:
    """Have an instance acknowledge a stop as soon as it is announced."""
    found: list[dict[str, str]] = []

    def announced() -> bool:
        found[:] = json.loads(ask(NOTICES))
        return bool(found)

    until(announced, "a notice")
    (notice,) = found
    assert (notice["type"], notice["status"]) == ("stop", "pending")
    assert ask(f"{NOTICES}/{notice['id']}/ack", "POST") == ""


#: Run on the machine, with an instance's name: type and metadata of its entries in the change log, one a line.
_LOG = """
import sys
from guestapi.store.lookup import read_entries
from guestapi.store.view import view
with view("sqlite:////var/lib/guestapi/store.db") as store:
    for entry in read_entries(store, 0, 1000).found:
        if entry.instance == sys.argv[1]:
            print(entry.type, entry.metadata)
"""


def told(machine: Machine, name: str) -> list[str]:
    """What the change log has of an instance: the statuses of its notices, and its stops."""
    lines = machine.run("/opt/guestapi/bin/python", "-c", _LOG, name).stdout.splitlines()
    documents = [(kind, json.loads(metadata)) for kind, metadata in (line.split(" ", 1) for line in lines)]
    words = [metadata["status"] if kind == "notice" else metadata.get("action") for kind, metadata in documents]
    return [word for word in words if word in ("pending", "acknowledged", "instance-stopped")]


@contextmanager
def held(machine: Machine, unit: str) -> Iterator[None]:
    """Keep what systemd knows of a unit after its end, by another unit that refers to it."""
    holder = f"holder-{os.getpid()}.service"
    machine.run("systemd-run", f"--unit={holder}", f"--property=After={unit}", "sleep", "infinity")
    try:
        yield
    finally:
        machine.run("systemctl", "stop", holder)


def announced(machine: Machine, unit: str) -> str:
    """The exit status of `guestapi notice` as a command of a unit's stop."""
    shown = machine.run("systemctl", "show", "--property=ExecStop", "--value", unit).stdout
    (line,) = (line for line in shown.splitlines() if "guestapi notice" in line)
    (status,) = re.findall(r"status=(\d+)", line)
    return str(status)


def check_unit(machine: Installed, unit: str, name: str, ask: Ask) -> None:
    """A unit's stop waits until its container has acknowledged; one that never does stops when the time has come."""
    machine.run("systemctl", "start", unit)
    until(lambda: status(machine, name) == "running", "the instance runs")
    with held(machine, unit):
        # The service too, which goes on as long as the container does.
        service = ("guestapi.socket", "guestapi-lxd.socket", "guestapi.service")
        with subprocess.Popen([*machine.enter, "systemctl", "stop", unit, *service]) as stopping:
            acknowledge(ask)
            assert stopping.wait(TIMEOUT) == 0
        assert announced(machine, unit) == "0"
        assert told(machine, name) == ["pending", "acknowledged", "instance-stopped"]
        machine.run("systemctl", "start", "guestapi.socket", unit)
        until(lambda: status(machine, name) == "running", "the instance runs again")
        drop_in = next(path for path, _content in FILES.findall(section()) if path.startswith(unit_directory(unit)))
        machine.run("sed", "-i", "s/--in 60s/--in 1s/", drop_in)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "stop", unit)
        assert announced(machine, unit) == "3"
    until(lambda: status(machine, name) == "stopped", "the instance has stopped")
    assert told(machine, name)[3:] == ["pending", "instance-stopped"]


def unit_directory(unit: str) -> str:
    """The directory of drop-ins for all instances of a template unit."""
    return f"/etc/systemd/system/{unit.partition('@')[0]}@.service.d/"


def status(machine: Machine, name: str) -> str:
    """Whether an instance runs."""
    found = json.loads(machine.run("guestapi", "instance", "list", "--format", "json").stdout)
    return next((str(one["status"]) for one in found if one["name"] == name), "absent")


def test_nspawn(machine: Installed) -> None:
    """The stop of systemd-nspawn's unit is announced."""
    machine.run("/usr/bin/python3", "-I", ROOTFS, f"/var/lib/machines/{SHOP}")
    play(machine, "docs/nspawn.md", "make install", {"make install": "guestapi --version", "shop": SHOP})

    def ask(path: str, method: str = "GET") -> str:
        leader = machine.run("machinectl", "show", "--value", "-p", "Leader", SHOP).stdout.strip()
        enter = ("nsenter", "-t", leader, "-a", "--setuid", "0", "--setgid", "0")
        return asking(machine, *enter)(path, method)

    check_unit(machine, f"systemd-nspawn@{SHOP}.service", SHOP, ask)
    machine.run("systemctl", "disable", "--now", "guestapi-nspawn.service")


@pytest.fixture
def db(machine: Installed) -> Iterator[Ask]:
    """An LXC container called db, which does not run yet; and how it asks."""
    machine.run("/usr/bin/python3", "-I", "-S", ROOTFS, "/var/lib/lxc/db/rootfs")
    machine.write("/var/lib/lxc/db/config", LXC.replace("web", "db"))
    machine.run("sh", "-c", "echo 'lxc.include = /etc/guestapi/lxc-guestapi.conf' >>/var/lib/lxc/db/config")
    machine.run("systemctl", "enable", "--now", "guestapi.socket", "guestapi-lxc.service")
    yield asking(machine, "lxc-attach", "db", "--")
    machine.run("lxc-stop", "-k", "db", check=False)
    machine.run("lxc-destroy", "db")
    machine.run("guestapi", "instance", "remove", "db", "--force", check=False)
    machine.run("systemctl", "disable", "--now", "guestapi-lxc.service")


def test_lxc_unit(machine: Installed, db: Ask) -> None:
    """The stop of LXC's unit is announced."""
    check_unit(machine, "lxc@db.service", "db", db)


def check_script(machine: Installed, line: str, name: str, ask: Ask, *start: str) -> None:
    """The script stops a container when it has acknowledged, or when the time has come."""
    before = len(told(machine, name))
    with subprocess.Popen([*machine.enter, "sh", "-c", line]) as stopping:
        acknowledge(ask)
        assert stopping.wait(TIMEOUT) == 0
    until(lambda: status(machine, name) == "stopped", "the instance has stopped")
    assert told(machine, name)[before:] == ["pending", "acknowledged", "instance-stopped"]
    machine.run(*start)
    until(lambda: status(machine, name) == "running", "the instance runs again")
    machine.run("sh", "-c", line.replace(" 60s ", " 1s "))
    until(lambda: status(machine, name) == "stopped", "the instance has stopped again")
    assert told(machine, name)[before + 3 :] == ["pending", "instance-stopped"]
    # What cannot be announced is not stopped either.
    refused = machine.run("sh", "-c", line.replace(" 60s ", " 1s "), check=False)
    assert refused.returncode == 1
    assert "does not run" in refused.stderr


def test_lxc_script(machine: Installed, db: Ask) -> None:
    """The script with lxc-stop."""
    machine.run("lxc-start", "db")
    until(lambda: status(machine, "db") == "running", "the instance runs")
    check_script(machine, commands()[2], "db", db, "lxc-start", "db")


def test_incus_script(machine: Installed) -> None:
    """The script with `incus stop`, beside a real Incus."""
    install_daemon(machine, "incus")
    machine.run("incus", "launch", "busybox", "web")
    play(machine, "docs/incus.md", "install -D -m 0644 /etc/guestapi/incus-device.conf")
    until(lambda: status(machine, "web") == "running", "the instance runs")
    ask = asking(machine, "incus", "exec", "web", "--")
    until(lambda: ask("/1.0").startswith("{"), "the container has the device")
    check_script(machine, commands()[1], "web", ask, "incus", "start", "web")
    machine.run("incus", "delete", "--force", "web")
