"""A process that connects again is recognised by less, and never as somebody else."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from guestapi.callers import namespaces, processes
from guestapi.callers.credentials import credentials, peer_pidfd
from guestapi.callers.identify import Caller, Identifier
from guestapi.callers.processes import KnownProcesses, has_numbers
from tests.callers.test_identify import IdentifyingListener, Registered
from tests.harness.containers import Container

pytestmark = pytest.mark.root

#: Connects as often as it is told, one connection after the other, and waits for an answer to each.
CONNECTS = """
import socket, sys
for _number in range(int(sys.argv[1])):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("/dev/incus/sock")
        connection.send(b"x")
        connection.recv(1)
"""


@pytest.fixture
def listener() -> Iterator[IdentifyingListener]:
    """A listener that identifies by pidfd."""
    opened = IdentifyingListener(Identifier(Registered()))
    yield opened
    opened.close()


@pytest.fixture
def inside(listener: IdentifyingListener) -> Iterator[Container]:
    """A container that runs as instance 1."""
    with Container([(listener.directory, "/dev/incus")]) as container:
        listener.identifier = Identifier(Registered(i=namespaces.examine(container.pid)))
        yield container


def callers_of_one_process(listener: IdentifyingListener, container: Container, times: int) -> Iterator[Caller]:
    """Yield how one process is identified each time that it connects."""
    command = ("python3", "-c", CONNECTS, str(times))
    thread = threading.Thread(target=container.run, args=command)
    thread.start()
    for _number in range(times):
        connection, _address = listener._listening.accept()
        with connection:
            connection.recv(1)
            caller = listener.identifier.identify(connection, credentials(connection))
            assert listener.identifier.find_container(connection, credentials(connection)) == caller.container
            yield caller
            connection.send(b"!")
    thread.join()


def _remembers() -> bool:
    """Whether this kernel gives pidfds of callers, and numbers them."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pidfd = peer_pidfd(ours)
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is not None and has_numbers()


def count_openings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count in a list how often a namespace of a caller is opened."""
    opened: list[int] = []
    real = namespaces.open_namespace

    def counting(pid: int, pidfd: int | None, *, by_ioctl: bool = True) -> int:
        opened.append(pid)
        return real(pid, pidfd, by_ioctl=by_ioctl)

    monkeypatch.setattr(namespaces, "open_namespace", counting)
    return opened


def test_namespace_is_opened_once(
    listener: IdentifyingListener, inside: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All connections of a process are identified in the same way. Its namespace is opened at the first alone.

    Where the kernel does not number processes, it is opened twice for each connection, as before.
    """
    opened = count_openings(monkeypatch)
    callers = list(callers_of_one_process(listener, inside, 3))
    assert callers[0].instance_id == 1
    assert callers == [callers[0]] * 3
    assert opened.count(callers[0].credentials.pid) == (1 if _remembers() else 6)
    (other,) = callers_of_one_process(listener, inside, 1)
    assert other.credentials.pid != callers[0].credentials.pid
    assert opened.count(other.credentials.pid) == (1 if _remembers() else 2)


def test_kernel_whose_pidfds_share_a_number(
    listener: IdentifyingListener, inside: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the number of a pidfd says nothing, nothing is remembered by it."""
    monkeypatch.setattr(processes, "has_numbers", lambda: False)
    opened = count_openings(monkeypatch)
    callers = list(callers_of_one_process(listener, inside, 2))
    assert [caller.instance_id for caller in callers] == [1, 1]
    # Each time it is identified, and each time its container is looked for.
    assert opened.count(callers[0].credentials.pid) == 4


def test_instance_that_is_registered_anew(listener: IdentifyingListener, inside: Container) -> None:
    """What is remembered of a process is not which instance it belongs to: that is looked up each time."""
    known = Registered(i=namespaces.examine(inside.pid))
    listener.identifier = Identifier(known)
    callers = callers_of_one_process(listener, inside, 4)
    assert next(callers).instance_id == 1
    init = known.inits.pop("i")
    assert next(callers).instance_id is None
    with Container() as other:
        known.inits = {"other": namespaces.examine(other.pid), "again": init}
        assert next(callers).instance_id == 2
    # The other one's init has ended, and the number of its namespace is as good as this one's.
    known.inits = {"forged": replace(known.inits["other"], namespace=init.namespace)}
    assert next(callers).instance_id is None
    assert next(callers, None) is None


def test_process_that_has_ended(listener: IdentifyingListener, inside: Container) -> None:
    """Nothing holds of a process that has ended: the number of its namespace may be another container's by now."""
    thread = threading.Thread(target=inside.run, args=("python3", "-c", CONNECTS, "1"))
    thread.start()
    connection, _address = listener._listening.accept()
    with connection:
        connection.recv(1)
        assert listener.identifier.identify(connection, credentials(connection)).instance_id == 1
        pidfd = os.pidfd_open(credentials(connection).pid)
        connection.send(b"!")
        assert select.select([pidfd], [], [], 30)[0]
        os.close(pidfd)
        thread.join()
        assert listener.identifier.identify(connection, credentials(connection)).instance_id is None


def test_numbers_of_processes() -> None:
    """Two processes have two numbers, and a process has one, whatever pidfd of it is asked; or numbers say nothing."""
    with subprocess.Popen(["sleep", "60"]) as child:
        numbers = []
        for pid in (os.getpid(), child.pid, os.getpid()):
            pidfd = os.pidfd_open(pid)
            numbers.append(os.fstat(pidfd).st_ino)
            os.close(pidfd)
        child.kill()
    assert numbers[0] == numbers[2]
    assert (numbers[0] != numbers[1]) is has_numbers()


def test_number_of_processes_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes that have connected and gone do not take memory for ever: the oldest are forgotten."""
    assert processes.MOST_PROCESSES == 4096
    monkeypatch.setattr(processes, "MOST_PROCESSES", 2)
    monkeypatch.setattr(processes, "has_numbers", lambda: True)
    known = KnownProcesses()
    # Files, whose inodes have numbers of their own with every kernel.
    pidfds = [os.open(tmp_path / str(number), os.O_CREAT) for number in range(3)]
    for number, pidfd in enumerate(pidfds):
        known.add(pidfd, 100 + number)
    assert len(known) == 2
    assert [known.get(pidfd) for pidfd in pidfds] == [None, 101, 102]
    known.add(pidfds[2], 103)
    assert known.get(pidfds[1]) == 101
    for pidfd in pidfds:
        os.close(pidfd)


def test_memory_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes cannot be told apart, none is remembered."""
    monkeypatch.setattr(processes, "has_numbers", lambda: False)
    known = KnownProcesses()
    pidfd = os.pidfd_open(os.getpid())
    known.add(pidfd, 5)
    assert known.get(pidfd) is None
    os.close(pidfd)


def test_pidfds_of_one_number_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.9, pidfds are of the file system of all nameless files, and so is an eventfd."""
    monkeypatch.setattr(os, "pidfd_open", lambda _pid: os.eventfd(0))
    assert not has_numbers.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)
    assert not has_numbers.__wrapped__()
