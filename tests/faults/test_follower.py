"""A follower that is missing, killed, without disk space or blocked: containers start, and the store is right later."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from guestapi.sources.lxc.monitor import address
from guestapi.store.lookup import list_problems, list_sources
from guestapi.store.view import view
from tests.faults.killing import killed_before
from tests.harness.following import RunningFollower
from tests.harness.lxc_monitors import PlayedLxc
from tests.harness.service import Service
from tests.harness.waiting import TIMEOUT, until

pytestmark = pytest.mark.root

#: The calls of a follower that have effects outside of it: on files, sockets and processes.
CALLS = (
    "write,pwrite64,fsync,fdatasync,ftruncate,unlink,close,fcntl,sendto,sendmsg,recvfrom,accept4,pidfd_open,"
    "openat,bind,listen,rename,flock,epoll_ctl"
)


class Scenario:
    """A service and a follower of a simulated LXC."""

    def __init__(self) -> None:
        self.service = Service(dialects=["incus"], workers=1)
        self.follower = RunningFollower(
            self.service, sources=f'[sources.lxc]\npaths = ["{self.service.root}/lxc"]\n', start=False
        )
        self.lxc = PlayedLxc(self.service)

    def running(self) -> dict[str, int]:
        """Return name and PID of each registered container that runs."""
        return {one["name"]: one["pid"] for one in self.service.listed() if one["status"] == "running"}

    def has_status(self) -> bool:
        """Return whether the follower has written its status."""
        with view(self.service.settings.store.url) as store:
            return any(one.name == "lxc" for one in list_sources(store))

    def is_current(self) -> bool:
        """Return whether the store has exactly the running containers."""
        return self.running() == {name: one.pid for name, one in self.lxc.containers.items()}


@pytest.fixture
def scenario() -> Iterator[Scenario]:
    """A service, a simulated LXC, and its follower, which is not started yet."""
    one = Scenario()
    with one.lxc, one.service, one.follower:
        yield one


def test_a_hundred_at_once(scenario: Scenario) -> None:
    """A hundred containers that start at once are all registered before their first request."""
    scenario.follower.start()
    names = [f"c{number}" for number in range(100)]
    for name in names:
        scenario.lxc.start(name)
    hooks = {name: scenario.lxc.hook(name) for name in names}
    waiting = dict(hooks)
    while waiting:
        for name, hook in list(waiting.items()):
            if hook.poll() is not None:
                # Its init runs now.
                scenario.lxc.containers[name].ask()
                del waiting[name]
        time.sleep(0.002)
    # 404 for an unset key means registered; an unregistered container gets 500.
    assert {name: scenario.lxc.containers[name].status() for name in names} == dict.fromkeys(names, 404)
    assert [hook.wait() for hook in hooks.values()] == [0] * 100
    assert scenario.is_current()
    for name in names[::2]:
        scenario.lxc.end(name)
    until(scenario.is_current, "the end of half of them")


def test_hook_without_a_follower(scenario: Scenario) -> None:
    """Without a follower a hook costs no time; the next follower registers the container."""
    scenario.lxc.start("web")
    began = time.monotonic()
    assert "no service listens at" in scenario.lxc.hook("web").communicate()[1]
    assert time.monotonic() - began < 2
    scenario.follower.start()
    until(scenario.is_current, "the follower")


def test_locked(scenario: Scenario) -> None:
    """While another writer locks the store, hooks give up after two seconds; their containers are registered later."""
    scenario.follower.start()
    with closing(sqlite3.connect(scenario.service.state / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for name in ("one", "two"):
            scenario.lxc.start(name)
            assert "not registered within 2 s" in scenario.lxc.hook(name).communicate()[1]
        other.execute("ROLLBACK")
    until(scenario.is_current, "the store")


@contextmanager
def full(scenario: Scenario) -> Iterator[None]:
    """Fill the disk of the store."""
    filling = scenario.service.state / "filling"
    with filling.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass  # ENOSPC, as intended.
    try:
        yield
    finally:
        filling.unlink()


def test_full() -> None:
    """On a full disk containers start unregistered; they are registered when there is space again."""
    scenario = Scenario()
    state = scenario.service.state
    # The store moves to a small file system.
    saved = scenario.service.root / "saved"
    state.rename(saved)
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0770", "tmpfs", state], check=True)
    subprocess.run(f"cp -a {saved}/. {state}/ && chown --reference={saved} {state}", shell=True, check=True)
    state.chmod(0o770)
    with scenario.lxc, scenario.service:
        try:
            with scenario.follower:
                scenario.follower.start()
                until(scenario.has_status, "its first note")
                with full(scenario):
                    for name in ("one", "two"):
                        scenario.lxc.start(name)
                        assert "the container goes on without" in scenario.lxc.hook(name).communicate()[1]
                    assert scenario.running() == {}
                until(scenario.is_current, "room")
        finally:
            scenario.service.stop()
            subprocess.run(["umount", "-l", state], check=True)


def test_killed_anywhere(scenario: Scenario) -> None:
    """Whichever system call a follower is killed before, its container starts, and the next one corrects the store."""
    before, number, ended = "", 1, False
    while not ended:
        scenario.follower.start()
        until(scenario.is_current, f"the state before call {number}")
        name = f"c{number}"
        scenario.lxc.start(name)
        with killed_before(scenario.follower.pid, number, CALLS):
            assert scenario.lxc.hook(name).wait(TIMEOUT) == 0
            # Give it time for its periodic work; the ring is done by now.
            time.sleep(0.1)
            ended = scenario.follower.is_alive()
        scenario.follower.kill()
        if before:
            scenario.lxc.end(before)
        before = name
        number += 1 + number // 8
    assert number > 20


def test_killed_at_its_start(scenario: Scenario) -> None:
    """A follower that is killed during its start does not keep the next one from starting."""
    scenario.lxc.start("web")
    for delay in (0.05, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        scenario.follower.launch()
        time.sleep(delay)
        scenario.follower.kill()
    scenario.follower.start()
    until(scenario.is_current, "the last one")


def test_stopped(scenario: Scenario) -> None:
    """A follower stops at once without an error; ends of containers in the meantime are written by the next one."""
    scenario.follower.start()
    for name in ("one", "two"):
        scenario.lxc.start(name)
        assert scenario.lxc.hook(name).communicate()[1] == ""
    began = time.monotonic()
    assert scenario.follower.stop() == 0
    assert time.monotonic() - began < 5
    assert not (scenario.follower.doorbells / "lxc.sock").exists()
    scenario.lxc.end("one")
    scenario.follower.start()
    until(scenario.is_current, "the end of one")


def test_monitor_that_hangs(scenario: Scenario) -> None:
    """A monitor that does not answer delays no other container, and is reported as a problem."""
    # Before the socket is created, which the containers would inherit.
    for name in ("one", "two", "three"):
        scenario.lxc.start(name)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(b"\0" + address(str(scenario.lxc.path), "hanging"))
        hanging.listen()
        scenario.follower.start()
        until(scenario.is_current, "the others")

        def is_reported() -> bool:
            with view(scenario.service.settings.store.url) as store:
                return any("did not answer within 1.0 s" in one.reason for one in list_problems(store))

        until(is_reported, "the problem in the store")
        assert scenario.lxc.hook("one").communicate()[1] == ""
    until(lambda: not is_reported(), "its end")
