"""Instances take turns, then their connections; each waits for a few requests of every other instance."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import gevent
import pytest
from gevent.hub import get_hub

from guestapi.server.scheduler import ALONE_FACTOR, LARGE_INPUT, QUANTUM, FairScheduler, InstanceQueue


class Connections:
    """Connections of some instances; their turns are recorded in order."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self._sockets: list[socket.socket] = []
        self._queues: list[InstanceQueue] = []

    def queue(self) -> InstanceQueue:
        """Make the queue of one more instance."""
        self._queues.append(InstanceQueue(lambda: False))
        return self._queues[-1]

    def ready(self, queue: InstanceQueue, name: str, *, waited: Callable[[], bool] = lambda: True) -> int:
        """Add a connection that always has input."""
        ours, theirs = socket.socketpair()
        theirs.send(b"x")
        self._sockets += [ours, theirs]

        def resume() -> bool:
            self.order.append(name)
            return waited()

        queue.join(ours.fileno(), resume)
        return ours.fileno()

    def until(self, enough: Callable[[], bool]) -> None:
        """Run the event loop until `enough`."""
        with gevent.Timeout(10):
            while not enough():
                gevent.sleep(0.0001)

    def close(self) -> None:
        """Close everything."""
        for queue in self._queues:
            queue.close()
        for one in self._sockets:
            one.close()


@pytest.fixture
def connections() -> Iterator[Connections]:
    """No connections yet."""
    made = Connections()
    yield made
    made.close()


def test_instances_take_turns(connections: Connections) -> None:
    """Between two turns of an instance with one connection, an instance with a hundred has exactly its quantum."""
    busy, quiet = connections.queue(), connections.queue()
    for _one in range(100):
        connections.ready(busy, "busy")
    connections.ready(quiet, "quiet")
    connections.until(lambda: connections.order.count("quiet") > 10)
    gaps = "".join(name[0] for name in connections.order).split("q")
    assert {len(gap) for gap in gaps[1:-1]} == {QUANTUM}


def test_quantum_of_the_only_instance(connections: Connections) -> None:
    """While only one instance has connections, its quantum is larger."""
    scheduler, order = FairScheduler(), connections.order
    queue = scheduler.enter(1)
    for _one in range(100):
        connections.ready(queue, "x")
    ours, theirs = socket.socketpair()
    theirs.send(b"x")
    each_round = get_hub().loop.io(ours.fileno(), 1)
    each_round.start(order.append, "|")
    found = []
    for change in (lambda: None, lambda: scheduler.enter(2), lambda: scheduler.leave(2)):
        change()
        order.clear()
        connections.until(lambda: order.count("|") > 20)
        found.append({len(gap) for gap in "".join(order).split("|")[1:-1]})
    assert found == [{QUANTUM * ALONE_FACTOR}, {QUANTUM}, {QUANTUM * ALONE_FACTOR}]
    each_round.close()
    queue.close()
    ours.close()
    theirs.close()


def test_connections_take_turns(connections: Connections) -> None:
    """No connection of an instance is served twice before all others are served once."""
    queue = connections.queue()
    names = [str(number) for number in range(50)]
    for name in names:
        connections.ready(queue, name)
    connections.until(lambda: len(connections.order) >= 200)
    for start in range(0, 200, 50):
        assert sorted(connections.order[start : start + 50]) == sorted(names)


def test_connection_that_does_not_wait(connections: Connections) -> None:
    """A connection that does not wait for input is not resumed until it joins again."""
    queue = connections.queue()
    number = connections.ready(queue, "at work", waited=lambda: False)
    connections.ready(queue, "other")
    connections.until(lambda: connections.order.count("other") > 10)
    assert connections.order.count("at work") == 1

    def back() -> bool:
        connections.order.append("back")
        return True

    queue.join(number, back)
    connections.until(lambda: "back" in connections.order)


def test_pipelined_request(connections: Connections) -> None:
    """A pipelined request waits for the turn of its instance."""
    pipelining, quiet = connections.queue(), connections.queue()

    def again() -> bool:
        connections.order.append("pipelined")
        pipelining.requeue(again)
        return True

    pipelining.requeue(again)
    connections.ready(quiet, "quiet")
    connections.until(lambda: connections.order.count("quiet") > 10)
    gaps = "".join(name[0] for name in connections.order).split("q")
    assert max(map(len, gaps)) <= QUANTUM + 1


def test_large_input_is_a_turn(connections: Connections) -> None:
    """A large piece of input is the whole turn of its instance."""
    large, quiet = connections.queue(), connections.queue()

    def again() -> bool:
        connections.order.append("large")
        large.requeue(again, LARGE_INPUT)
        return True

    for _one in range(20):
        large.requeue(again, LARGE_INPUT)
    connections.ready(quiet, "quiet")
    connections.until(lambda: connections.order.count("quiet") > 10)
    gaps = "".join(name[0] for name in connections.order).split("q")
    assert max(map(len, gaps[1:-1])) == 1


def test_forgotten_socket(connections: Connections) -> None:
    """A forgotten socket is not resumed."""
    queue = connections.queue()
    number = connections.ready(queue, "gone")
    queue.forget(number)
    connections.ready(queue, "other")
    connections.until(lambda: connections.order.count("other") > 3)
    assert "gone" not in connections.order


def test_unused_queues_are_bounded() -> None:
    """Few unused queues are kept, so the number of descriptors is bounded."""
    scheduler = FairScheduler()
    before = len(os.listdir("/proc/self/fd"))
    for _time in range(2):
        entered = {number: scheduler.enter(number) for number in range(1, 100)}
        assert len({id(queue) for queue in entered.values()}) == 99
        for number, queue in entered.items():
            assert scheduler.enter(number) is queue
            assert queue.users == 2
            scheduler.leave(number)
            assert queue.users == 1
            scheduler.leave(number)
    assert len(os.listdir("/proc/self/fd")) - before <= 4
