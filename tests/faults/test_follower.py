"""A follower that is away, killed anywhere, without room or kept waiting: containers start, and all is well again."""

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
from tests.harness.following import RunningFollower, until
from tests.harness.lxc_monitors import PlayedLxc
from tests.harness.service import Service

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

#: What a follower does to be seen from outside: files, sockets, processes.
CALLS = (
    "write,pwrite64,fsync,fdatasync,ftruncate,unlink,close,fcntl,sendto,sendmsg,recvfrom,accept4,pidfd_open,"
    "openat,bind,listen,rename,flock,epoll_ctl"
)


class Rack:
    """A service and a follower of LXC, with containers that are played."""

    def __init__(self) -> None:
        self.service = Service(dialects=["incus"], workers=1)
        self.follower = RunningFollower(
            self.service, sources=f'[sources.lxc]\npaths = ["{self.service.root}/lxc"]\n', start=False
        )
        self.lxc = PlayedLxc(self.service)

    def running(self) -> dict[str, int]:
        """Name and PID of each registered container that runs."""
        return {one["name"]: one["pid"] for one in self.service.listed() if one["status"] == "running"}

    def noted(self) -> bool:
        """Whether the follower has written how it is."""
        with view(self.service.settings.store.url) as store:
            return any(one.name == "lxc" for one in list_sources(store))

    def right(self) -> bool:
        """Whether the store is as things are."""
        return self.running() == {name: one.pid for name, one in self.lxc.containers.items()}


@pytest.fixture
def rack() -> Iterator[Rack]:
    """A rack, for one test."""
    one = Rack()
    with one.lxc, one.service, one.follower:
        yield one


def test_two_hundred_at_once(rack: Rack) -> None:
    """Two hundred containers that start at once are all registered, and the first request of each is answered."""
    rack.follower.start()
    names = [f"c{number}" for number in range(200)]
    for name in names:
        rack.lxc.start(name)
    hooks = {name: rack.lxc.hook(name) for name in names}
    waiting = dict(hooks)
    while waiting:
        for name, hook in list(waiting.items()):
            if hook.poll() is not None:
                # Its init runs at once.
                rack.lxc.containers[name].ask()
                del waiting[name]
        time.sleep(0.002)
    # 404: there is no such key, as far as it is registered; who is not registered gets 500.
    assert {name: rack.lxc.containers[name].status() for name in names} == dict.fromkeys(names, 404)
    assert [hook.wait() for hook in hooks.values()] == [0] * 200
    assert rack.right()
    for name in names[::2]:
        rack.lxc.end(name)
    until(rack.right, "the end of half of them")


def test_away(rack: Rack) -> None:
    """Without a follower a hook costs no time; what started meanwhile is registered when there is one."""
    rack.lxc.start("web")
    began = time.monotonic()
    assert "nobody listens at" in rack.lxc.hook("web").communicate()[1]
    assert time.monotonic() - began < 2
    rack.follower.start()
    until(rack.right, "the follower")


def test_locked(rack: Rack) -> None:
    """While another writer holds the store, hooks give up after two seconds, and nothing that rang is forgotten."""
    rack.follower.start()
    with closing(sqlite3.connect(rack.service.state / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for name in ("one", "two"):
            rack.lxc.start(name)
            assert "not registered within 2 s" in rack.lxc.hook(name).communicate()[1]
        other.execute("ROLLBACK")
    until(rack.right, "the store")


@contextmanager
def full(rack: Rack) -> Iterator[None]:
    """No more room where the store is."""
    filling = rack.service.state / "filling"
    with filling.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass  # As it should be.
    try:
        yield
    finally:
        filling.unlink()


def test_full() -> None:
    """A full disk: the containers start unregistered, and are registered when there is room again."""
    rack = Rack()
    state = rack.service.state
    # The store moves to a small file system of its own.
    saved = rack.service.root / "saved"
    state.rename(saved)
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0770", "tmpfs", state], check=True)
    subprocess.run(f"cp -a {saved}/. {state}/ && chown --reference={saved} {state}", shell=True, check=True)
    state.chmod(0o770)
    with rack.lxc, rack.service:
        try:
            with rack.follower:
                rack.follower.start()
                until(rack.noted, "its first note")
                with full(rack):
                    for name in ("one", "two"):
                        rack.lxc.start(name)
                        assert "the container goes on without" in rack.lxc.hook(name).communicate()[1]
                    assert rack.running() == {}
                until(rack.right, "room")
        finally:
            rack.service.stop()
            subprocess.run(["umount", "-l", state], check=True)


def test_killed_anywhere(rack: Rack) -> None:
    """Whichever system call a follower is killed before: its container starts, and the next follower sets all right."""
    before, number, ended = "", 1, False
    while not ended:
        rack.follower.start()
        until(rack.right, f"all that was so before call {number}")
        name = f"c{number}"
        rack.lxc.start(name)
        with killed_before(rack.follower.pid, number, CALLS):
            assert rack.lxc.hook(name).wait(30) == 0
            # It goes on to do what it does each second; a ring is done by now.
            time.sleep(0.1)
            ended = rack.follower.is_alive()
        rack.follower.kill()
        if before:
            rack.lxc.end(before)
        before = name
        number += 1 + number // 8
    assert number > 20


def test_killed_at_its_start(rack: Rack) -> None:
    """Killed at any moment of its start, it leaves nothing that keeps the next one from starting."""
    rack.lxc.start("web")
    for delay in (0.05, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        rack.follower.launch()
        time.sleep(delay)
        rack.follower.kill()
    rack.follower.start()
    until(rack.right, "the last one")


def test_stopped(rack: Rack) -> None:
    """A stop ends it at once and without a complaint; containers go on, and what ends meanwhile is seen afterwards."""
    rack.follower.start()
    for name in ("one", "two"):
        rack.lxc.start(name)
        assert rack.lxc.hook(name).communicate()[1] == ""
    began = time.monotonic()
    assert rack.follower.stop() == 0
    assert time.monotonic() - began < 5
    assert not (rack.follower.doorbells / "lxc.sock").exists()
    rack.lxc.end("one")
    rack.follower.start()
    until(rack.right, "the end of one")


def test_monitor_that_hangs(rack: Rack) -> None:
    """A monitor that answers nothing keeps nobody else from being registered, and the operator hears of it."""
    # Before the socket is made, which they would inherit.
    for name in ("one", "two", "three"):
        rack.lxc.start(name)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(b"\0" + address(str(rack.lxc.path), "hanging"))
        hanging.listen()
        rack.follower.start()
        until(rack.right, "the others")

        def is_told() -> bool:
            with view(rack.service.settings.store.url) as store:
                return any("did not answer within 1.0 s" in one.reason for one in list_problems(store))

        until(is_told, "what the operator is told", 40)
        assert rack.lxc.hook("one").communicate()[1] == ""
    until(lambda: not is_told(), "its end", 90)
