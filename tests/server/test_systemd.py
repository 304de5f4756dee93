"""The installed units with a systemd as PID 1: `make install`, containers, journald."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.containers import Container
from tests.harness.machine import CHECKOUT, Installed
from tests.harness.waiting import until

pytestmark = pytest.mark.root

INCUS, LXD = "/var/lib/incus/guestapi", "/var/lib/lxd/devlxd"


@pytest.fixture(scope="module")
def container(machine: Installed) -> Iterator[Container]:
    """An unprivileged container on that machine, registered by the operator's command."""
    binds = [(Path(INCUS), "/dev/incus"), (Path(LXD), "/dev/lxd")]
    machine.run("guestapi", "instance", "add", "c1", "--config", "user.foo=bar")
    with Container(binds, enter=machine.enter) as running:
        machine.run("guestapi", "instance", "start", "c1", "--pid", str(running.pid))
        yield running


def test_first_connection_activates(machine: Installed, container: Container) -> None:
    """A guest's first request starts the service, and is answered."""
    machine.run("systemctl", "stop", "guestapi.service")
    assert machine.property_of("ActiveState") == "inactive"
    assert container.ask("/1.0/config/user.foo").text == "bar"
    assert machine.property_of("ActiveState") == "active"
    assert machine.property_of("User") == "guestapi"


def test_names_of_descriptors_are_dialects(container: Container, machine: Installed) -> None:
    """FileDescriptorName= of a socket unit sets the dialect of its socket."""
    machine.run("guestapi", "config", "set", "c1", "security.devlxd=false")
    assert container.ask("/1.0/config", socket="/dev/lxd/sock").status == 403
    assert container.ask("/1.0/config", socket="/dev/incus/sock").status == 200
    machine.run("guestapi", "config", "unset", "c1", "security.devlxd")
    assert container.ask("/1.0/config", socket="/dev/lxd/sock").status == 200


def test_check_reports_no_failure(machine: Installed, container: Container) -> None:
    """After `make install` and enabling the sockets, `guestapi check` reports no failure."""
    assert container.ask("/").status == 200
    checked = machine.run("guestapi", "check")
    assert "FAIL" not in checked.stdout
    listed = json.loads(machine.run("guestapi", "instance", "list", "--format", "json").stdout)
    running = [one["name"] for one in listed if one["status"] == "running"]
    assert "c1" in running
    assert f"{len(listed)} known, {len(running)} running" in checked.stdout


def test_journal_has_the_fields(machine: Installed, container: Container) -> None:
    """A refused request is in the journal with instance, project, caller, status and dialect as searchable fields."""
    assert container.ask("/1.0/config/security.x").status == 403
    assert container.ask("/1.0", become=["uid:1000"]).status == 401
    found = machine.run("journalctl", "-u", "guestapi", "-o", "json", "INSTANCE=c1", "STATUS=403").stdout.splitlines()
    entry = json.loads(found[-1])
    wanted = {"INSTANCE": "c1", "PROJECT": "default", "CALLER_UID": "100000", "STATUS": "403", "DIALECT": "incus"}
    assert {key: entry.get(key) for key in wanted} == wanted
    assert int(entry["CALLER_PID"]) > 1
    refused = machine.run("journalctl", "-u", "guestapi", "-o", "json", "STATUS=401").stdout.splitlines()
    assert json.loads(refused[-1])["CALLER_UID"] == str(100000 + 1000)


def test_bad_configuration_is_not_loaded(machine: Installed, container: Container) -> None:
    """`systemctl reload` with an unknown setting fails and names it; the service keeps its configuration."""
    before = machine.property_of("MainPID")
    machine.run("sh", "-c", "echo 'wrokers = 2' >/etc/guestapi/gunicorn.conf.py")
    assert machine.run("systemctl", "reload", "guestapi.service", check=False).returncode != 0
    assert "wrokers: gunicorn has no such setting" in machine.run("journalctl", "-u", "guestapi", "-n", "20").stdout
    assert container.ask("/1.0/config/user.foo").text == "bar"
    assert machine.property_of("MainPID") == before
    machine.set_workers(2)
    machine.run("systemctl", "reload", "guestapi.service")


def test_stop_is_quick(machine: Installed, container: Container) -> None:
    """A stop ends well before its timeout, and the socket starts the service again."""
    assert container.ask("/").status == 200
    began = time.monotonic()
    machine.run("systemctl", "stop", "guestapi.service")
    # TimeoutStopSec= is 15. test_worker.py tests the duration itself; here a whole systemd adds to the load.
    assert time.monotonic() - began < 10
    assert container.ask("/").status == 200


def test_hardening(machine: Installed) -> None:
    """`systemd-analyze security` rates the unit below 1.5; it has one capability."""
    report = machine.run("systemd-analyze", "security", "--no-pager", "guestapi.service").stdout
    rating = re.search(r"Overall exposure level for guestapi.service: ([0-9.]+)", report)
    assert rating
    assert float(rating[1]) < 1.5
    status = machine.run("sh", "-c", f"cat /proc/{machine.property_of('MainPID')}/status").stdout
    assert "CapEff:\t0000000000080000" in status
    assert "NoNewPrivs:\t1" in status


def test_watchdog_restarts_a_service_of_hanging_workers(machine: Installed, container: Container) -> None:
    """When only the workers hang, the watchdog restarts the service, although the arbiter runs."""
    with machine.drop_in("[Service]\nWatchdogSec=3\n"):
        machine.set_workers(1, "timeout = 300\n")
        machine.run("systemctl", "restart", "guestapi.service")
        machine.wait_for_workers(1)
        before = machine.property_of("MainPID")
        time.sleep(4)
        assert machine.property_of("MainPID") == before, "the watchdog ended a service that answers"
        machine.run("kill", "-STOP", *map(str, machine.workers()))
        until(lambda: machine.property_of("MainPID") not in (before, "0"), "a restart")
        assert container.ask("/1.0/config/user.foo").text == "bar"


def test_the_relay_of_virtual_machines(machine: Installed, container: Container) -> None:
    """Its socket opens the handover socket, for root alone, while the service runs; the relay has no capabilities."""
    assert container.ask("/").status == 200

    def sockets() -> int:
        """Return on how many sockets all workers answer; 0 while they do not."""
        found = re.match(r"(\d+) of \1 workers answer on (\d+) sockets", machine.property_of("StatusText"))
        return int(found[2]) if found else 0

    until(sockets, "the workers' status")
    before = sockets()
    machine.run("systemctl", "enable", "--now", "guestapi-vsock.socket")
    try:
        until(lambda: sockets() == before + 1, "one socket more")
        assert machine.run("stat", "-c", "%a %U", "/run/guestapi/handover.sock").stdout == "600 root\n"
        machine.run("systemctl", "start", "guestapi-vsock.service")
        shown = machine.run(
            "systemctl", "show", "-p", "ActiveState,StatusText,MainPID", "guestapi-vsock.service"
        ).stdout
        assert "ActiveState=active" in shown
        assert "StatusText=relays vsock ports 8444 (incus), 8445 (lxd)" in shown
        pid = re.findall(r"MainPID=(\d+)", shown)[0]
        status = machine.run("cat", f"/proc/{pid}/status").stdout
        assert re.search(r"CapEff:\t0+\n", status)
        assert container.ask("/1.0/config/user.foo").text == "bar"
    finally:
        machine.run("systemctl", "disable", "--now", "guestapi-vsock.socket", "guestapi-handover.socket")
        machine.run("systemctl", "stop", "guestapi-vsock.service")
    assert container.ask("/1.0/config/user.foo").text == "bar"


def test_uninstall_leaves_the_state(machine: Installed, container: Container) -> None:
    """`make uninstall` leaves only the store and the file that LXC configurations include."""
    machine.run("make", "-C", str(CHECKOUT), "uninstall")
    left = machine.run("sh", "-c", "ls -d /opt/guestapi /etc/guestapi/* /etc/systemd/system/guestapi*", check=False)
    # An earlier test may have edited gunicorn.conf.py, which then stays.
    assert set(left.stdout.split()) - {"/etc/guestapi/gunicorn.conf.py"} == {"/etc/guestapi/lxc-guestapi.conf"}
    assert machine.run("ls", "/var/lib/guestapi/store.db").stdout


def test_destdir_is_respected(staged: Path, tmp_path: Path) -> None:
    """With DESTDIR, nothing outside of it changes, and the installed files refer to their final paths."""
    import subprocess

    # Of what was installed with DESTDIR, since others use it.
    subprocess.run(["cp", "--archive", f"{staged}/.", tmp_path], check=True)
    command = tmp_path / "opt/guestapi/bin/guestapi"
    assert command.read_text().startswith("#!/opt/guestapi/bin/python")
    assert (
        "ExecStart=/opt/guestapi/bin/guestapi serve" in (tmp_path / "etc/systemd/system/guestapi.service").read_text()
    )
    assert (tmp_path / "etc/guestapi/guestapi.toml").exists()
    assert not Path("/opt/guestapi").exists()
    subprocess.run(["make", "-C", CHECKOUT, "uninstall", f"DESTDIR={tmp_path}"], check=True, capture_output=True)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir())
    assert left == ["etc/guestapi/lxc-guestapi.conf"]
    assert (tmp_path / "var/lib/guestapi").is_dir()
