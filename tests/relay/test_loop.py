"""The relay: bounds for each virtual machine, turns, and workers that end."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.relay import handover
from guestapi.relay.loop import HANDED, HANDED_OF_ONE, MOST, MOST_OF_ONE, WAIT_SECONDS, Relay
from tests.harness.vmm import FakeVsock


class Bench:
    """A relay with a listener, a handover socket, and a clock that stands still."""

    def __init__(self, directory: Path) -> None:
        self.listener = FakeVsock()
        self.path = directory / "handover"
        self.workers = socket.socket(socket.AF_UNIX)
        self.workers.bind(str(self.path))
        self.workers.listen(256)
        self.workers.setblocking(False)
        self.now = 0.0
        self.relay = Relay([(self.listener, "incus")], str(self.path), lambda: self.now)
        self.clients: list[socket.socket] = []

    def connect(self, cid: int, count: int = 1) -> list[socket.socket]:
        """Connect so many times from a CID."""
        made = [self.listener.connect(cid) for _ in range(count)]
        self.clients += made
        return made

    def run(self, steps: int = 1) -> None:
        """Let the relay do what there is to do."""
        for _step in range(steps):
            self.relay.step(0)

    def handed(self) -> list[socket.socket]:
        """Accept what was handed over, as workers do."""
        found = []
        try:
            while True:
                found.append(self.workers.accept()[0])
        except BlockingIOError:
            return found

    def take(self, worker: socket.socket) -> int:
        """Take a connection over, and close it; return its CID."""
        with worker:
            connection, cid, _dialect = handover.receive(worker)
            connection.close()
            worker.send(handover.TAKEN)
        return cid

    def close(self) -> None:
        """Close everything."""
        self.relay.close()
        self.listener.close()
        self.workers.close()
        for client in self.clients:
            client.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A relay."""
    made = Bench(tmp_path)
    yield made
    made.close()


def is_closed(client: socket.socket) -> bool:
    """Whether the other end is closed."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


def test_a_connection_is_kept_until_it_is_taken(bench: Bench) -> None:
    """A worker that ends before it has taken a connection loses none: another one gets it."""
    (client,) = bench.connect(42)
    bench.run()
    (worker,) = bench.handed()
    worker.close()
    bench.run(2)
    assert not is_closed(client)
    (other,) = bench.handed()
    assert bench.take(other) == 42
    bench.run()
    assert is_closed(client)
    assert len(bench.relay) == 0


def test_a_connection_that_ends_each_worker(bench: Bench) -> None:
    """A connection is not handed over for ever."""
    (client,) = bench.connect(42)
    for _attempt in range(5):
        bench.run(2)
        for worker in bench.handed():
            worker.close()
    bench.run()
    assert is_closed(client)
    assert bench.handed() == []


def test_nothing_is_read(bench: Bench) -> None:
    """What a guest has sent is still there for the worker."""
    (client,) = bench.connect(42)
    client.sendall(b"GET / HTTP/1.1\r\n")
    bench.run()
    (worker,) = bench.handed()
    with worker:
        handed = handover.receive(worker)
        with handed.connection:
            assert handed.connection.recv(100) == b"GET / HTTP/1.1\r\n"


def test_machines_take_turns(bench: Bench) -> None:
    """While a machine has hundreds of connections that wait, another one's only waits for a turn."""
    bench.connect(42, MOST_OF_ONE)
    bench.connect(43)
    bench.run(20)
    order = [bench.take(worker) for worker in bench.handed()]
    assert Counter(order) == {42: HANDED_OF_ONE, 43: 1}
    assert 43 in order[:2]


def test_the_kernels_queue_is_emptied_first(bench: Bench) -> None:
    """However many connections of one machine are before another's in the kernel's queue, the other has its turn."""
    bench.connect(42, MOST_OF_ONE + 1000)
    bench.connect(43)
    bench.run()
    assert {bench.take(worker) for worker in bench.handed()} == {42, 43}


def test_a_machine_that_floods(bench: Bench) -> None:
    """A machine has a bounded number of connections that wait; more are closed, and nobody else's."""
    own = bench.connect(42, MOST_OF_ONE + HANDED_OF_ONE + 100)
    others = bench.connect(43, 5)
    bench.run(20)
    open_ones = [client for client in own if not is_closed(client)]
    assert len(open_ones) <= MOST_OF_ONE + HANDED_OF_ONE
    assert len(open_ones) >= MOST_OF_ONE
    assert not any(map(is_closed, others))


def test_many_machines_that_flood(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the relay is full, the machine with most connections loses its newest, not the one that comes."""
    assert MOST > HANDED
    monkeypatch.setattr("guestapi.relay.loop.MOST", 10)
    bench.workers.close()
    greedy = bench.connect(42, 12)
    bench.run()
    (lone,) = bench.connect(43)
    bench.run()
    assert not is_closed(lone)
    assert sum(map(is_closed, greedy)) == 3
    assert len(bench.relay) == 10


def test_without_a_worker(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A connection waits for a worker, but not for ever, and the log says what is wrong."""
    bench.workers.close()
    bench.path.unlink()
    (client,) = bench.connect(42)
    bench.run(2)
    assert not is_closed(client)
    assert "is guestapi-handover.socket active?" in caplog.text
    bench.now += WAIT_SECONDS
    bench.run()
    assert is_closed(client)
    assert "no worker takes connections" in caplog.text


def test_workers_that_hang(bench: Bench) -> None:
    """What workers do not take in time is closed, and others are handed over."""
    clients = [bench.connect(cid)[0] for cid in range(100, 100 + HANDED + 1)]
    bench.run(3)
    hanging = bench.handed()
    assert len(hanging) == HANDED
    bench.now += WAIT_SECONDS / 2
    bench.run()
    assert not any(map(is_closed, clients))
    bench.now += WAIT_SECONDS
    bench.run(2)
    for worker in hanging:
        worker.close()
    assert all(map(is_closed, clients))


def test_out_of_descriptors(bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without descriptors the relay pauses, and goes on."""
    real = bench.listener.accept

    def refuse() -> tuple[int, tuple[int, int]]:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(bench.listener, "accept", refuse)
    bench.connect(42)
    bench.run(3)
    assert caplog.text.count("raise LimitNOFILE=") == 1
    monkeypatch.setattr(bench.listener, "accept", real)
    bench.now += 1
    bench.run(2)
    assert len(bench.handed()) == 1
