"""The units, for real: a systemd as PID 1, what `make install` installs, containers, journald."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.containers import Container
from tests.harness.machine import CHECKOUT, Machine

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

LOOPING = (Path(__file__).parents[1] / "harness" / "looping.py").read_text()
INCUS, LXD = "/var/lib/incus/guestapi", "/var/lib/lxd/devlxd"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine on which guestapi was installed as the README says."""
    with Machine() as booted:
        booted.run("make", "-C", str(CHECKOUT), "install", timeout=300)
        booted.run("systemctl", "enable", "--now", "guestapi.socket", "guestapi-lxd.socket")
        yield booted


@pytest.fixture(scope="module")
def container(machine: Machine) -> Iterator[Container]:
    """An unprivileged container on that machine, registered by the operator's command."""
    binds = [(Path(INCUS), "/dev/incus"), (Path(LXD), "/dev/lxd")]
    machine.run("guestapi", "instance", "add", "c1", "--config", "user.foo=bar")
    with Container(binds, enter=machine.enter) as running:
        machine.run("guestapi", "instance", "start", "c1", "--pid", str(running.pid))
        yield running


def property_of(machine: Machine, name: str) -> str:
    """A property of the service's unit."""
    return machine.run("systemctl", "show", "--value", "-p", name, "guestapi.service").stdout.strip()


def wait_for(machine: Machine, name: str, value: str, seconds: float = 20) -> None:
    """Wait until a property has a value."""
    until = time.monotonic() + seconds
    while property_of(machine, name) != value:
        assert time.monotonic() < until, f"{name} is {property_of(machine, name)}, not {value}"
        time.sleep(0.1)


def set_workers(machine: Machine, count: int, more: str = "") -> None:
    """Write gunicorn.conf.py."""
    machine.run("sh", "-c", f"printf 'workers = {count}\\n{more}' >/etc/guestapi/gunicorn.conf.py")


def test_first_connection_activates(machine: Machine, container: Container) -> None:
    """The service is not running; a guest's first request starts it, and is answered."""
    assert property_of(machine, "ActiveState") == "inactive"
    assert container.ask("/1.0/config/user.foo").text == "bar"
    assert property_of(machine, "ActiveState") == "active"
    assert property_of(machine, "User") == "guestapi"


def test_names_of_descriptors_are_dialects(container: Container, machine: Machine) -> None:
    """Each socket unit's FileDescriptorName= decides what is spoken on it."""
    machine.run("guestapi", "config", "set", "c1", "security.devlxd=false")
    assert container.ask("/1.0/config", socket="/dev/lxd/sock").status == 403
    assert container.ask("/1.0/config", socket="/dev/incus/sock").status == 200
    machine.run("guestapi", "config", "unset", "c1", "security.devlxd")
    assert container.ask("/1.0/config", socket="/dev/lxd/sock").status == 200


def test_check_finds_all_in_place(machine: Machine, container: Container) -> None:
    """After `make install` and enabling the sockets, `guestapi check` has nothing to complain of."""
    assert container.ask("/").status == 200
    checked = machine.run("guestapi", "check")
    assert "FAIL" not in checked.stdout
    assert "1 known, 1 running" in checked.stdout


def test_journal_has_the_fields(machine: Machine, container: Container) -> None:
    """A refused request is in the journal with instance, project, caller, status and dialect, to be searched for."""
    assert container.ask("/1.0/config/security.x").status == 403
    assert container.ask("/1.0", become=["uid:1000"]).status == 401
    found = machine.run("journalctl", "-u", "guestapi", "-o", "json", "INSTANCE=c1", "STATUS=403").stdout.splitlines()
    entry = json.loads(found[-1])
    wanted = {"INSTANCE": "c1", "PROJECT": "default", "CALLER_UID": "100000", "STATUS": "403", "DIALECT": "incus"}
    assert {key: entry.get(key) for key in wanted} == wanted
    assert int(entry["CALLER_PID"]) > 1
    refused = machine.run("journalctl", "-u", "guestapi", "-o", "json", "STATUS=401").stdout.splitlines()
    assert json.loads(refused[-1])["CALLER_UID"] == str(100000 + 1000)


@pytest.mark.parametrize("verb", ["reload", "restart"])
def test_no_request_fails_meanwhile(machine: Machine, container: Container, verb: str) -> None:
    """Clients ask in a loop, with and without keeping connections; reload and restart with another worker count."""
    kinds = ("connect", "keep")
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        clients = []
        for kind in kinds:
            machine.run("guestapi", "instance", "add", f"{verb}-{kind}", "--config", "user.foo=bar")
            inside = stack.enter_context(Container([(Path(INCUS), "/dev/incus")], enter=machine.enter))
            machine.run("guestapi", "instance", "start", f"{verb}-{kind}", "--pid", str(inside.pid))
            clients.append(pool.submit(inside.run, "/usr/bin/python3", "-c", LOOPING, "50", kind))
        # Each client's first requests.
        time.sleep(0.5)
        for count in (4, 1, 3):
            set_workers(machine, count)
            machine.run("systemctl", verb, "guestapi.service")
            wait_for(machine, "StatusText", f"{count} of {count} workers answer on 2 sockets")
        for kind in kinds:
            machine.run("guestapi", "config", "set", f"{verb}-{kind}", "user.foo=enough")
        for client in clients:
            seen = json.loads(client.result().out)
            assert seen["failed"] == []
            assert seen["good"] > 100
    machine.run("systemctl", "is-active", "guestapi.service")


def test_bad_configuration_is_not_loaded(machine: Machine, container: Container) -> None:
    """`systemctl reload` with a typo fails and says where; the service goes on with what it had."""
    before = property_of(machine, "MainPID")
    machine.run("sh", "-c", "echo 'wrokers = 2' >/etc/guestapi/gunicorn.conf.py")
    assert machine.run("systemctl", "reload", "guestapi.service", check=False).returncode != 0
    assert "wrokers: gunicorn has no such setting" in machine.run("journalctl", "-u", "guestapi", "-n", "20").stdout
    assert container.ask("/1.0/config/user.foo").text == "bar"
    assert property_of(machine, "MainPID") == before
    set_workers(machine, 2)
    machine.run("systemctl", "reload", "guestapi.service")


def test_stop_is_quick(machine: Machine, container: Container) -> None:
    """A stop is done before systemd's patience ends, and the socket starts the service again."""
    assert container.ask("/").status == 200
    began = time.monotonic()
    machine.run("systemctl", "stop", "guestapi.service")
    # TimeoutStopSec= is 15. How much quicker it is, test_worker.py looks at; here is a whole systemd under load.
    assert time.monotonic() - began < 10
    assert container.ask("/").status == 200


def test_hardening(machine: Machine) -> None:
    """`systemd-analyze security` rates the unit below 2.0; it has one capability."""
    report = machine.run("systemd-analyze", "security", "--no-pager", "guestapi.service").stdout
    rating = re.search(r"Overall exposure level for guestapi.service: ([0-9.]+)", report)
    assert rating
    assert float(rating[1]) < 2.0
    status = machine.run("sh", "-c", f"cat /proc/{property_of(machine, 'MainPID')}/status").stdout
    assert "CapEff:\t0000000000080000" in status
    assert "NoNewPrivs:\t1" in status


def test_watchdog_bites_when_workers_hang(machine: Machine, container: Container) -> None:
    """The master lives, its workers are stopped: it is not enough for the watchdog, and the service is restarted."""
    drop_in = "/run/systemd/system/guestapi.service.d"
    machine.run("sh", "-c", f"mkdir -p {drop_in}; printf '[Service]\\nWatchdogSec=3\\n' >{drop_in}/watchdog.conf")
    set_workers(machine, 1, "timeout = 300\\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "guestapi.service")
    wait_for(machine, "StatusText", "1 of 1 workers answer on 2 sockets")
    before = property_of(machine, "MainPID")
    time.sleep(4)
    assert property_of(machine, "MainPID") == before, "bitten although the worker answers"
    workers = machine.run("pgrep", "-P", before).stdout.split()
    machine.run("kill", "-STOP", *workers)
    until = time.monotonic() + 30
    while property_of(machine, "MainPID") in (before, "0"):
        assert time.monotonic() < until, "not restarted"
        time.sleep(0.2)
    assert container.ask("/1.0/config/user.foo").text == "bar"
    machine.run("rm", "-r", drop_in)
    machine.run("systemctl", "daemon-reload")


def test_uninstall_leaves_the_state(machine: Machine, container: Container) -> None:
    """`make uninstall` takes away all that `make install` brought, but for the store."""
    machine.run("make", "-C", str(CHECKOUT), "uninstall")
    left = machine.run("sh", "-c", "ls -d /opt/guestapi /etc/guestapi /etc/systemd/system/guestapi*", check=False)
    assert left.stdout == ""
    assert machine.run("ls", "/var/lib/guestapi/store.db").stdout


def test_destdir_is_respected(tmp_path: Path) -> None:
    """With DESTDIR nothing outside of it is touched, and what is installed knows its final place."""
    import subprocess

    subprocess.run(["make", "-C", CHECKOUT, "install", f"DESTDIR={tmp_path}"], check=True, capture_output=True)
    command = tmp_path / "opt/guestapi/bin/guestapi"
    assert command.read_text().startswith("#!/opt/guestapi/bin/python")
    assert (
        "ExecStart=/opt/guestapi/bin/guestapi serve" in (tmp_path / "etc/systemd/system/guestapi.service").read_text()
    )
    assert (tmp_path / "etc/guestapi/guestapi.toml").exists()
    assert not Path("/opt/guestapi").exists()
    subprocess.run(["make", "-C", CHECKOUT, "uninstall", f"DESTDIR={tmp_path}"], check=True, capture_output=True)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir())
    assert left == []
    assert (tmp_path / "var/lib/guestapi").is_dir()
