"""Faults under the real unit: its master killed, its memory at an end."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.containers import Container
from tests.harness.machine import Installed
from tests.server.test_worker import until

pytestmark = [pytest.mark.root, pytest.mark.timeout(200)]

#: A hook with which a worker takes more memory than there is, after it has answered a certain request.
GREEDY = """
def post_request(worker, req, environ, resp):
    if req.path.endswith("greedy"):
        environ["taken"] = b"x" * (300 << 20)
"""


@pytest.fixture
def container(machine: Installed) -> Iterator[Container]:
    """A container on that machine."""
    machine.set_workers(2)
    machine.run("guestapi", "instance", "add", "f1", "--config", "user.foo=bar", "--config", "user.greedy=yes")
    with Container([(Path("/var/lib/incus/guestapi"), "/dev/incus")], enter=machine.enter) as running:
        machine.run("guestapi", "instance", "start", "f1", "--pid", str(running.pid))
        yield running
    machine.run("guestapi", "instance", "remove", "f1")


def exists(machine: Installed, pid: int) -> bool:
    """Whether there is such a process on the machine."""
    return machine.run("test", "-e", f"/proc/{pid}", check=False).returncode == 0


def test_master_killed(machine: Installed, container: Container) -> None:
    """Its workers go with it; who connects then waits, and is answered by the next, which comes within seconds."""
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
    """These processes may have so many bytes together from now on."""
    if "memory" in machine.run("cat", "/sys/fs/cgroup/cgroup.controllers").stdout:
        machine.run("systemctl", "set-property", "--runtime", "guestapi.service", f"MemoryMax={limit}")
        yield
        machine.run("systemctl", "set-property", "--runtime", "guestapi.service", "MemoryMax=infinity")
        return
    # The memory controller is one of version 1 here, which systemd on the machine does not know: by hand, then.
    group = Path(f"/sys/fs/cgroup/memory/guestapi-test-{machine.pid}")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        for pid in pids:
            # Out of the machine's PID namespace, in which the number is that of the process.
            enter = ["nsenter", "-t", str(machine.pid), "-p", "sh", "-c", 'echo "$1" >"$2/cgroup.procs"', "move"]
            subprocess.run([*enter, str(pid), str(group)], check=True)
        yield
    finally:
        until(lambda: _emptied(group), "the group's end")


def _emptied(group: Path) -> bool:
    # Whoever is left goes back to where it came from.
    for pid in (group / "cgroup.procs").read_text().split():
        (group.parent / "cgroup.procs").write_text(pid)
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def test_memory_at_an_end(machine: Installed, container: Container) -> None:
    """The kernel kills one worker; the others, and the master, live on, another comes, and the journal says why."""
    machine.set_workers(2, GREEDY)
    machine.run("systemctl", "restart", "guestapi.service")
    machine.wait_for_workers(2)
    master, before = machine.property_of("MainPID"), machine.workers()
    assert machine.property_of("OOMPolicy") == "continue"
    with limited(machine, 200 << 20, before):
        assert container.ask("/1.0/config/user.greedy").text == "yes"
        end = time.monotonic() + 20
        while len(after := machine.workers()) != 2 or after == before:
            assert time.monotonic() < end, "no worker was killed, or none replaced"
        assert len(set(before) & set(after)) == 1
        assert container.ask("/1.0/config/user.foo").text == "bar"
    assert machine.property_of("MainPID") == master
    assert "out of memory?" in machine.run("journalctl", "-u", "guestapi", "-n", "50").stdout
    machine.set_workers(2)
    machine.run("systemctl", "reload", "guestapi.service")
