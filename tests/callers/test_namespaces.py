"""Looking at processes, and what the operator is told of one that cannot be an instance's init."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from guestapi.callers import namespaces
from guestapi.callers.namespaces import NotAnInitError
from tests.harness.containers import BASE, Container


def ended() -> int:
    """The PID of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_start_time_tells_processes_apart() -> None:
    """It is the same on each look, and that of a process that has ended is an error, before and after it is reaped."""
    assert namespaces.start_time(os.getpid()) == namespaces.start_time(os.getpid())
    with pytest.raises(ProcessLookupError):
        namespaces.start_time(ended())
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):
        namespaces.start_time(zombie.pid)
    zombie.wait()


def test_start_time_of_an_odd_name() -> None:
    """A process may be called anything, parentheses and numbers too."""
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b') R 1 2 (3'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert abs(namespaces.start_time(process.pid) - namespaces.start_time(os.getpid())) < 100 * 3600
        assert namespaces.start_time(process.pid) >= namespaces.start_time(os.getpid())
        process.communicate()


@pytest.mark.root
@pytest.mark.parametrize("by_ioctl", [True, False])
@pytest.mark.parametrize("with_pidfd", [True, False])
def test_all_ways_find_the_same_namespace(by_ioctl: bool, with_pidfd: bool) -> None:
    """By ioctl, by /proc guarded by a pidfd (Linux 6.5 to 6.10), by /proc alone: one answer."""
    with Container() as container:
        pidfd = os.pidfd_open(container.pid) if with_pidfd else None
        found = namespaces.open_namespace(container.pid, pidfd, by_ioctl=by_ioctl)
        assert namespaces.inode(found) == os.stat(f"/proc/{container.pid}/ns/pid").st_ino
        around = namespaces.open_parent(found)
        assert around is not None
        assert namespaces.inode(around) == namespaces.own_namespace()
        for descriptor in (found, around):
            os.close(descriptor)
        if pidfd is not None:
            container.kill()
            with pytest.raises(ProcessLookupError):
                namespaces.open_namespace(container.pid, pidfd, by_ioctl=by_ioctl)
            os.close(pidfd)


@pytest.mark.root
def test_root_uid() -> None:
    """Which user is root inside comes from the ID map; on the host it is root."""
    assert namespaces.root_uid(os.getpid()) == 0
    with Container() as container:
        assert namespaces.root_uid(container.pid) == BASE
    with Container(base=None) as container:
        assert namespaces.root_uid(container.pid) == 0


@pytest.mark.root
def test_init_of_a_container_is_examined() -> None:
    """What identifies a container's init is its PID, start time, boot and namespace, and it is alive until it ends."""
    with Container() as container:
        init = namespaces.examine(container.pid)
        assert (init.pid, init.boot_id) == (container.pid, namespaces.boot_id())
        assert init.namespace == os.stat(f"/proc/{container.pid}/ns/pid").st_ino
        assert namespaces.is_alive(init)
        container.kill()
        assert not namespaces.is_alive(init)


def test_no_such_process_is_refused() -> None:
    """A PID that nobody has cannot be an init; the error says which to give."""
    with pytest.raises(NotAnInitError, match=r"no process \d+; give the PID of the container's init"):
        namespaces.examine(ended())
    with pytest.raises(NotAnInitError):
        namespaces.examine(2**40)


def test_process_of_the_host_is_refused() -> None:
    """A process in the host's own PID namespace is no container's init."""
    with pytest.raises(NotAnInitError, match="in the host's PID namespace"):
        namespaces.examine(os.getpid())


@pytest.mark.root
def test_other_process_of_a_container_is_refused() -> None:
    """Only PID 1 of a namespace can stand for it: the others may end before it does."""
    with Container() as container:
        child = subprocess.Popen(["nsenter", "-t", str(container.pid), "-p", "sleep", "60"])
        (inside,) = _children(child.pid)
        with pytest.raises(NotAnInitError, match=r"is number \d+ in its PID namespace; give the container's init"):
            namespaces.examine(inside)
        container.kill()
        child.wait()


def _children(pid: int) -> list[int]:
    while True:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            if found := [int(child) for child in file.read().split()]:
                return found
