"""The real units: right after installation, with sockets opened and restarted at any time, and with faults."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.containers import Container
from tests.harness.machine import Installed
from tests.harness.waiting import TIMEOUT, until

pytestmark = pytest.mark.root

#: A hook with which a worker allocates more memory than permitted, after a certain request.
GREEDY = """
def post_request(worker, req, environ, resp):
    if req.path.endswith("greedy"):
        environ["taken"] = b"x" * (300 << 20)
"""


@pytest.fixture
def container(machine: Installed) -> Iterator[Container]:
    """A registered container on that machine."""
    machine.set_workers(2)
    machine.run("guestapi", "instance", "add", "f1", "--config", "user.foo=bar", "--config", "user.greedy=yes")
    with Container([(Path("/var/lib/incus/guestapi"), "/dev/incus")], enter=machine.enter) as running:
        machine.run("guestapi", "instance", "start", "f1", "--pid", str(running.pid))
        yield running
    machine.run("guestapi", "instance", "remove", "f1")


def exists(machine: Installed, pid: int) -> bool:
    """Return whether a process exists on the machine."""
    return machine.run("test", "-e", f"/proc/{pid}", check=False).returncode == 0


def test_killed_arbiter(machine: Installed, container: Container) -> None:
    """Workers end with a killed arbiter; a client that connects then waits, and is answered by the next service."""
    machine.run("systemctl", "restart", "guestapi.service")
    machine.wait_for_workers(2)
    master, workers = machine.property_of("MainPID"), machine.workers()
    restarts = int(machine.property_of("NRestarts"))
    machine.run("kill", "-KILL", master)
    until(lambda: not any(exists(machine, pid) for pid in workers), "the workers' end")
    assert container.ask("/1.0/config/user.foo").text == "bar"
    assert machine.property_of("MainPID") not in (master, "0")
    assert int(machine.property_of("NRestarts")) > restarts


@contextmanager
def limited(machine: Installed, limit: int, pids: list[int]) -> Iterator[None]:
    """Limit the memory of these processes together to this many bytes."""
    if "memory" in machine.run("cat", "/sys/fs/cgroup/cgroup.controllers").stdout:
        machine.run("systemctl", "set-property", "--runtime", "guestapi.service", f"MemoryMax={limit}")
        yield
        machine.run("systemctl", "set-property", "--runtime", "guestapi.service", "MemoryMax=infinity")
        return
    # This machine has version 1 of the memory controller, which its systemd cannot use.
    group = Path(f"/sys/fs/cgroup/memory/guestapi-test-{machine.pid}")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        for pid in pids:
            # From outside of the machine's PID namespace, to which the PIDs belong.
            enter = ["nsenter", "-t", str(machine.pid), "-p", "sh", "-c", 'echo "$1" >"$2/cgroup.procs"', "move"]
            subprocess.run([*enter, str(pid), str(group)], check=True)
        yield
    finally:
        until(lambda: _emptied(group), "the group's end")


def _emptied(group: Path) -> bool:
    # Remaining processes go back to the parent group.
    for pid in (group / "cgroup.procs").read_text().split():
        (group.parent / "cgroup.procs").write_text(pid)
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def test_worker_out_of_memory(machine: Installed, container: Container) -> None:
    """When the kernel kills a worker for its memory, others go on, it is replaced, and the journal has the reason."""
    machine.set_workers(2, GREEDY)
    machine.run("systemctl", "restart", "guestapi.service")
    machine.wait_for_workers(2)
    master, before = machine.property_of("MainPID"), machine.workers()
    assert machine.property_of("OOMPolicy") == "continue"
    with limited(machine, 200 << 20, before):
        assert container.ask("/1.0/config/user.greedy").text == "yes"
        end = time.monotonic() + TIMEOUT
        while len(after := machine.workers()) != 2 or after == before:
            assert time.monotonic() < end, "no worker was killed, or none replaced"
        assert len(set(before) & set(after)) == 1
        assert container.ask("/1.0/config/user.foo").text == "bar"
    assert machine.property_of("MainPID") == master
    assert "out of memory?" in machine.run("journalctl", "-u", "guestapi", "-n", "50").stdout
    machine.set_workers(2)
    machine.run("systemctl", "reload", "guestapi.service")


#: A client that sends a request each five milliseconds until its standard input ends. Prints a line at the first
#: response, and at the end the number of responses and of each error.
LOOP = """
import collections, json, select, socket, sys
counts = collections.Counter()
while True:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(300)
            connection.connect(sys.argv[1])
            connection.sendall(b"OPTIONS * HTTP/1.0\\r\\n\\r\\n")
            counts["good" if connection.recv(100).startswith(b"HTTP/1.0 200") else "cut"] += 1
    except OSError as error:
        counts[type(error).__name__] += 1
    if counts["good"] == 1:
        print("answered", flush=True)
    if select.select([sys.stdin], [], [], 0.005)[0]:
        break
print(json.dumps(counts))
"""

INCUS, LXD = "/var/lib/incus/guestapi/sock", "/var/lib/lxd/devlxd/sock"


@dataclass
class SocketLoad:
    """A client that sends requests to one socket. `counts` is set when it has ended."""

    counts: dict[str, int]


@contextmanager
def load(machine: Installed, path: str) -> Iterator[SocketLoad]:
    """Run a client of that socket, after its first response."""
    command = [*machine.enter, "python3", "-c", LOOP, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "answered\n"
        running = SocketLoad({})
        yield running
        out, _none = process.communicate(timeout=TIMEOUT)
        running.counts = json.loads(out.splitlines()[-1])


def ask(machine: Installed, path: str) -> bool:
    """Return whether the service answers at that socket."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(f"/proc/{machine.pid}/root{path}")
            connection.sendall(b"OPTIONS * HTTP/1.0\r\n\r\n")
            return connection.recv(100).startswith(b"HTTP/1.0 200")
    except ConnectionRefusedError:
        return False


@pytest.fixture
def both_sockets(machine: Installed) -> Iterator[None]:
    """Enable both sockets, before and after the test."""
    machine.run("systemctl", "enable", "--now", "guestapi.socket", "guestapi-lxd.socket")
    yield
    machine.run("systemctl", "enable", "--now", "guestapi.socket", "guestapi-lxd.socket")


def test_check_right_after_installation(machine: Installed) -> None:
    """Right after `systemctl enable --now guestapi.socket`, `guestapi check` starts the service, without a failure."""
    machine.run("systemctl", "disable", "--now", "guestapi.socket", "guestapi-lxd.socket")
    machine.run("systemctl", "stop", "guestapi.service")
    machine.run("sh", "-c", "rm -rf /var/lib/guestapi/*")
    machine.run("systemctl", "enable", "--now", "guestapi.socket")
    checked = machine.run("guestapi", "check")
    assert "FAIL" not in checked.stdout
    assert "instances: 0 known, 0 running" in checked.stdout
    assert f"socket lxd: {LXD}: guestapi-lxd.socket is switched off" in checked.stdout
    machine.run("systemctl", "enable", "--now", "guestapi-lxd.socket")
    assert f"socket lxd: {LXD} answers" in machine.run("guestapi", "check").stdout


@pytest.mark.usefixtures("both_sockets")
def test_sockets_at_any_time(machine: Installed) -> None:
    """Sockets can be enabled and restarted in any order while the service runs under load; all answer afterwards."""
    commands = [
        ["restart", "guestapi-lxd.socket", "guestapi.service"],
        ["restart", "guestapi.socket"],
        ["restart", "guestapi-lxd.socket"],
        ["restart", "guestapi.service", "guestapi-lxd.socket", "guestapi.socket"],
    ]
    with load(machine, INCUS) as incus, load(machine, LXD) as lxd:
        for one, another in itertools.pairwise([*commands, commands[0]]):
            machine.run("systemctl", *one)
            machine.run("systemctl", *another)
            assert ask(machine, INCUS), (one, another)
            assert ask(machine, LXD), (one, another)
    assert incus.counts["good"] > 1
    assert lxd.counts["good"] > 1
    machine.run("guestapi", "check")


@pytest.mark.usefixtures("both_sockets")
def test_socket_that_is_switched_on_later(machine: Installed) -> None:
    """`systemctl enable --now` of another socket, also after `disable --now`, fails no request on the first one."""
    with load(machine, INCUS) as incus:
        for _time in range(3):
            machine.run("systemctl", "disable", "--now", "guestapi-lxd.socket")
            assert not ask(machine, LXD)
            machine.run("systemctl", "enable", "--now", "guestapi-lxd.socket")
            assert ask(machine, LXD)
    assert set(incus.counts) == {"good"}
    machine.run("guestapi", "check")


@pytest.mark.usefixtures("both_sockets")
def test_socket_that_is_switched_off(machine: Installed) -> None:
    """A stopped socket stays closed when the other one starts the service again."""
    with load(machine, INCUS) as incus, load(machine, LXD):
        machine.run("systemctl", "stop", "guestapi-lxd.socket")
        assert ask(machine, INCUS)
        assert not ask(machine, LXD)
        machine.run("systemctl", "restart", "guestapi.service")
        assert ask(machine, INCUS)
        assert not ask(machine, LXD)
    assert set(incus.counts) == {"good"}
    machine.run("systemctl", "start", "guestapi-lxd.socket")
    with load(machine, LXD) as lxd:
        machine.run("systemctl", "stop", "guestapi.socket")
        assert ask(machine, LXD)
        assert not ask(machine, INCUS)
        machine.run("systemctl", "start", "guestapi.socket")
    assert set(lxd.counts) == {"good"}


@pytest.mark.usefixtures("both_sockets")
def test_start_of_running_units(machine: Installed) -> None:
    """Starting what already runs changes nothing: the service is the same process."""
    machine.ask()
    before = machine.property_of("MainPID")
    machine.run("systemctl", "enable", "--now", "guestapi.socket", "guestapi-lxd.socket")
    machine.run("systemctl", "start", "guestapi.service", "guestapi.socket")
    machine.ask()
    assert machine.property_of("MainPID") == before


@pytest.mark.usefixtures("both_sockets")
def test_service_without_a_socket(machine: Installed) -> None:
    """A service that is started without an open socket reports what is missing, and starts when there is one."""
    machine.run("systemctl", "stop", "guestapi.socket", "guestapi-lxd.socket", "guestapi.service")
    assert machine.run("systemctl", "start", "guestapi.service", check=False).returncode != 0
    assert "'systemctl start guestapi.socket'" in machine.run("journalctl", "-u", "guestapi", "-n", "10").stdout
    machine.run("systemctl", "start", "guestapi.socket")
    assert ask(machine, INCUS)
    machine.run("systemctl", "start", "guestapi-lxd.socket")
    machine.run("guestapi", "check")
