"""The shipped units of followers under a real systemd: nspawn with machined, podman, crun.

The commands are taken from docs/nspawn.md, docs/podman.md and docs/oci.md.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.test_guides import play
from tests.harness.containers import BASE
from tests.harness.engines import CURL
from tests.harness.machine import CHECKOUT, Machine
from tests.harness.oci import write_bundle
from tests.harness.waiting import TIMEOUT

pytestmark = pytest.mark.root

#: The names are also names of network interfaces, and the machine shares this one's network namespace.
WEB, DB = f"web-{os.getpid()}", f"db-{os.getpid()}"
# The documents begin with the same command, which tests/docs/test_guides.py runs as it stands there.
INSTALLED = {"make install": "guestapi --version"}
SOCKETS = ("guestapi.socket", "guestapi-lxd.socket")
ROOTFS = str(CHECKOUT / "tests/harness/rootfs.py")
#: Settings for a development machine, which may lack cgroup controllers, overlay on overlay, raised limits and a
#: network.
STORAGE = '[storage]\ndriver = "vfs"\nrunroot = "/run/containers/storage"\ngraphroot = "/var/lib/containers/storage"\n'
CONTAINERS = """[containers]
cgroups = "disabled"
netns = "none"
default_ulimits = ["nofile=1024:4096", "nproc=1000:1000"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


@pytest.fixture(scope="module")
def machine(staged: Path) -> Iterator[Machine]:
    """A machine with guestapi, set up as in docs/nspawn.md, and root directories to boot."""
    with Machine() as booted:
        booted.run("/usr/bin/python3", "-I", ROOTFS, "/var/lib/machines/shop")
        for name in (WEB, DB, "odd.name"):
            booted.run("/usr/bin/python3", "-I", ROOTFS, f"/var/lib/machines/{name}")
        booted.put(staged)
        play(booted, "docs/nspawn.md", "make install", INSTALLED)
        assert listed(booted)["shop"]["status"] == "running"
        booted.run("systemctl", "enable", "--now", *SOCKETS)
        yield booted


@pytest.fixture(autouse=True)
def stopped(machine: Machine) -> Iterator[None]:
    """Stop all containers after each test."""
    yield
    machine.run("systemctl", "stop", "systemd-nspawn@*.service")
    assert machine.run("systemctl", "is-failed", "guestapi-*.service", check=False).stdout.count("failed") == 0


def write(machine: Machine, path: str, content: str) -> None:
    """Write a file on the machine."""
    machine.run("sh", "-c", 'printf %s "$1" >"$2"', "write", content, path)


def start(machine: Machine, name: str) -> None:
    """Start a container's unit."""
    machine.run("systemctl", "start", f"systemd-nspawn@{name}.service")


def leader(machine: Machine, name: str) -> int:
    """Return the PID of the container's init according to machined."""
    return int(machine.run("machinectl", "show", "--value", "-p", "Leader", name).stdout)


def inside(machine: Machine, name: str, *argv: str, check: bool = True) -> str:
    """Run a program in a container, as its root; return its output."""
    return machine.run(
        "nsenter", "-t", str(leader(machine, name)), "-a", "--setuid", "0", "--setgid", "0", *argv, check=check
    ).stdout


def ask(machine: Machine, name: str, path: str, dialect: str = "incus") -> str:
    """Send a request from inside a container; return the output."""
    curl = ["/usr/bin/curl", "-sS", "--max-time", "10", "--unix-socket", f"/dev/{dialect}/sock"]
    return inside(machine, name, *curl, f"http://x{path}")


def listed(machine: Machine) -> dict[str, dict[str, Any]]:
    """Return the output of `guestapi instance list`, by name."""
    found = json.loads(machine.run("guestapi", "instance", "list", "--format", "json").stdout)
    return {one["name"]: one for one in found}


def wait_for(machine: Machine, name: str, status: str, besides: int = 0) -> dict[str, Any]:
    """Wait until an instance has a status, and a PID other than `besides`."""
    until = time.monotonic() + TIMEOUT
    while (one := listed(machine)[name])["status"] != status or one["pid"] == besides:
        unit = f"systemd-nspawn@{name}.service"
        assert time.monotonic() < until, [one, machine.run("systemctl", "status", "-l", unit, check=False).stdout]
    return one


def test_starts_before_the_sockets(machine: Machine) -> None:
    """A container that starts before the sockets can connect as soon as they exist."""
    machine.run("systemctl", "stop", *SOCKETS, "guestapi.service")
    machine.run("rm", "-r", "/var/lib/incus", "/var/lib/lxd/devlxd")
    start(machine, WEB)
    assert inside(machine, WEB, "/bin/ls", "/dev/incus", "/dev/lxd").split() == ["/dev/incus:", "/dev/lxd:"]
    machine.run("systemctl", "start", *SOCKETS)
    assert json.loads(ask(machine, WEB, "/1.0"))["instance_type"] == "container"


def test_registered_with_the_leader(machine: Machine) -> None:
    """When `systemctl start` returns, the instance runs with the leader as its init, and gets answers."""
    start(machine, WEB)
    one = listed(machine)[WEB]
    assert (one["status"], one["pid"]) == ("running", leader(machine, WEB))
    machine.run("guestapi", "config", "set", WEB, "user.foo=bar")
    assert ask(machine, WEB, "/1.0/config/user.foo") == "bar"
    assert f"local-hostname: {WEB}" in ask(machine, WEB, "/1.0/meta-data", "lxd")


def test_is_in_a_user_namespace(machine: Machine) -> None:
    """With -U, root in the container is an unprivileged user on the host, and is identified as the instance's root."""
    start(machine, WEB)
    uid_map = machine.run("cat", f"/proc/{leader(machine, WEB)}/uid_map").stdout.split()
    assert uid_map[0] == "0"
    assert int(uid_map[1]) >= 65536
    assert ask(machine, WEB, "/1.0/config").startswith("[")


def test_stop(machine: Machine) -> None:
    """When `systemctl stop` returns, the instance is stopped, and keeps its configuration."""
    start(machine, WEB)
    machine.run("guestapi", "config", "set", WEB, "user.stays=yes")
    machine.run("systemctl", "stop", f"systemd-nspawn@{WEB}.service")
    one = listed(machine)[WEB]
    assert (one["status"], one["config"]["user.stays"]) == ("stopped", "yes")


def test_restart(machine: Machine) -> None:
    """After `systemctl restart` the instance has the new init."""
    start(machine, WEB)
    before = leader(machine, WEB)
    machine.run("systemctl", "restart", f"systemd-nspawn@{WEB}.service")
    one = listed(machine)[WEB]
    assert one["status"] == "running"
    assert one["pid"] == leader(machine, WEB) != before
    assert ask(machine, WEB, "/1.0/config").startswith("[")


def test_reboot_and_poweroff_from_inside(machine: Machine) -> None:
    """A reboot from inside restarts the unit; a poweroff ends it."""
    start(machine, WEB)
    before = leader(machine, WEB)
    inside(machine, WEB, "/bin/reboot", "-f", check=False)
    assert wait_for(machine, WEB, "running", besides=before)["pid"] == leader(machine, WEB)
    assert ask(machine, WEB, "/1.0/config").startswith("[")
    inside(machine, WEB, "/bin/poweroff", "-f", check=False)
    wait_for(machine, WEB, "stopped")


def test_two_containers_with_different_maps(machine: Machine) -> None:
    """Two containers with different ID maps read only their own values."""
    for name in (WEB, DB):
        start(machine, name)
        machine.run("guestapi", "config", "set", name, f"user.me={name}", f"user.{name}=x")
    for name, other in ((WEB, DB), (DB, WEB)):
        assert ask(machine, name, "/1.0/config/user.me") == name
        assert f"user.{other}" not in ask(machine, name, "/1.0/config")
    maps = {machine.run("cat", f"/proc/{leader(machine, name)}/uid_map").stdout for name in (WEB, DB)}
    assert len(maps) == 2


def test_killed(machine: Machine) -> None:
    """kill -9 of nspawn ends its init, which the follower notices without a hook."""
    start(machine, WEB)
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=SIGKILL", f"systemd-nspawn@{WEB}.service")
    wait_for(machine, WEB, "stopped")
    machine.run("systemctl", "reset-failed", f"systemd-nspawn@{WEB}.service")


def test_odd_name(machine: Machine) -> None:
    """A machine whose name is not a host name is registered, and gets a valid host name."""
    start(machine, "odd.name")
    assert listed(machine)["odd.name"]["status"] == "running"
    assert "local-hostname: odd" in ask(machine, "odd.name", "/1.0/meta-data")


def test_devices(machine: Machine) -> None:
    """Mounts from the host and the network interface are devices; mounts of every container are not."""
    machine.run("mkdir", "-p", "/etc/systemd/nspawn", "/srv/data")
    # As in docs/nspawn.md: mounts in such a file replace those of the drop-in.
    ours = "Bind=/var/lib/incus/guestapi:/dev/incus"
    write(machine, f"/etc/systemd/nspawn/{WEB}.nspawn", f"[Files]\n{ours}\nBindReadOnly=/srv/data:/srv/data\n")
    start(machine, WEB)
    one = listed(machine)[WEB]
    assert one["status"] == "running"
    devices = one["devices"]
    assert devices["srv-data"] == {"type": "disk", "source": "/srv/data", "path": "/srv/data", "readonly": "true"}
    assert devices["root"] == {"type": "disk", "path": "/"}
    assert devices["host0"]["type"] == "nic"
    assert devices.keys() == {"srv-data", "root", "host0"}
    machine.run("rm", f"/etc/systemd/nspawn/{WEB}.nspawn")


def test_started_by_hand(machine: Machine) -> None:
    """A container that is started without a unit is registered if it has guestapi's mount."""
    for name, options in ((WEB, ["--bind=/var/lib/incus/guestapi:/dev/incus"]), (DB, [])):
        nspawn = ["systemd-nspawn", "--quiet", "--boot", "-U", f"--machine={name}", *options]
        machine.run("systemd-run", f"--unit=byhand-{name}", *nspawn)
    wait_for(machine, WEB, "running")
    assert listed(machine)[WEB]["pid"] == leader(machine, WEB)
    assert listed(machine).get(DB, {}).get("status", "stopped") == "stopped"
    machine.run("systemctl", "stop", f"byhand-{WEB}", f"byhand-{DB}")
    wait_for(machine, WEB, "stopped")


def test_0_1_drop_in(machine: Machine) -> None:
    """The drop-in of guestapi 0.1, which calls `guestapi hook nspawn`, still registers containers."""
    file = "/etc/systemd/system/systemd-nspawn@.service.d/guestapi.conf"
    kept = machine.run("cat", file).stdout
    hooks = "".join(
        f"Exec{stage}=/opt/guestapi/bin/guestapi hook nspawn {action} %i\n"
        for stage, action in (("StartPost", "start"), ("StopPost", "stop"))
    )
    write(machine, file, kept.partition("# The container is registered")[0] + hooks)
    machine.run("systemctl", "daemon-reload")
    try:
        start(machine, WEB)
        assert listed(machine)[WEB]["status"] == "running"
        machine.run("systemctl", "stop", f"systemd-nspawn@{WEB}.service")
        wait_for(machine, WEB, "stopped")
    finally:
        write(machine, file, kept)
        machine.run("systemctl", "daemon-reload")


def test_machined_restarts(machine: Machine) -> None:
    """A restart of machined and the follower keeps registrations, and later starts are registered."""
    start(machine, WEB)
    before = listed(machine)[WEB]
    machine.run("systemctl", "restart", "systemd-machined.service", "guestapi-nspawn.service")
    start(machine, DB)
    wait_for(machine, DB, "running")
    assert listed(machine)[WEB] == before


def test_podman(machine: Machine) -> None:
    """podman's unit, hook and documented commands work: with an image, and with a root file system of another user."""
    machine.run("mkdir", "-p", "/etc/containers", "/srv/web")
    write(machine, "/etc/containers/storage.conf", STORAGE)
    write(machine, "/etc/containers/containers.conf", CONTAINERS)
    machine.run("/usr/bin/python3", "-I", ROOTFS, "/srv/web")
    machine.run("sh", "-c", "tar -C /srv/web -c . | podman import - docker.io/library/debian:latest")
    play(machine, "docs/podman.md", "make install", INSTALLED)
    play(machine, "docs/podman.md", "podman run -d --name web --volume")
    assert listed(machine)["web"]["status"] == "running"
    machine.run("podman", "rm", "--force", "--time=0", "web")
    play(machine, "docs/podman.md", "chown -R 100000:100000 /srv/web")
    # The operator's settings apply to the next container of that name.
    said = machine.run("podman", "exec", "web", *CURL, "http://x/1.0/config/user.role").stdout
    assert said == "frontend"
    assert listed(machine)["web"]["source"] == "podman"
    assert "podman" in machine.run("guestapi", "check", check=False).stdout
    # The hook rings before the program runs, without events and the API.
    machine.run("systemctl", "stop", "podman.socket", "podman.service")
    mount = "--volume=/var/lib/incus/guestapi:/dev/incus"
    once = machine.run("podman", "run", "--rm", mount, "docker.io/library/debian", *CURL, "http://x/1.0")
    assert json.loads(once.stdout)["state"] == "Started"
    machine.run("podman", "rm", "--all", "--force", "--time=0")


def test_crun(machine: Machine) -> None:
    """crun's unit, the hook in a bundle, and the documented commands work."""
    machine.run("/usr/bin/python3", "-I", ROOTFS, "/srv/bundle/rootfs")
    machine.run("chown", "-R", f"{BASE}:{BASE}", "/srv/bundle/rootfs")
    play(machine, "docs/oci.md", "make install", INSTALLED)
    document = write_bundle("/srv/bundle/rootfs", [("/var/lib/incus/guestapi", "/dev/incus")])
    hook = {"path": "/opt/guestapi/bin/guestapi-hook", "args": ["guestapi-hook", "oci"]}
    document["hooks"] = {"createRuntime": [hook]}
    write(machine, "/srv/bundle/config.json", json.dumps(document))
    # The container keeps the standard output of its starting process open.
    run = "crun run --detach --bundle /srv/web web"
    instead = {run: "crun --cgroup-manager=disabled run --detach --bundle /srv/bundle alone >/dev/null 2>&1 </dev/null"}
    play(machine, "docs/oci.md", run, {**instead, "set web": "set alone"})
    one = listed(machine)["alone"]
    assert (one["status"], one["source"], one["config"]["user.role"]) == ("running", "oci", "frontend")
    machine.run("crun", "kill", "alone", "KILL")
    wait_for(machine, "alone", "stopped")
    machine.run("crun", "delete", "--force", "alone")
