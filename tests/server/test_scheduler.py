"""`FairScheduler`: instances take turns, then their connections; the time of a turn is bounded."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import groupby

import gevent
import pytest
from gevent.hub import get_hub

from guestapi.server.arrivals import ArrivalQueue
from guestapi.server.scheduler import (
    ALONE_FACTOR,
    FEW_INSTANCES,
    MOST_DEBT,
    QUANTUM,
    REQUEUED_FACTOR,
    SPARE,
    TURN_SECONDS,
    FairScheduler,
    InstanceQueue,
)
from tests.harness.clock import ManualClock
from tests.harness.waiting import TIMEOUT


class Connections:
    """Connections of some instances; records the order of their turns."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self._sockets: list[socket.socket] = []
        self._queues: list[InstanceQueue] = []

    def queue(self) -> InstanceQueue:
        """Make the queue of another instance."""
        self._queues.append(InstanceQueue(lambda: False))
        return self._queues[-1]

    def ready(self, queue: InstanceQueue, name: str, *, waited: Callable[[], bool] = lambda: True) -> int:
        """Add a connection that always has input; return its descriptor."""
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
        with gevent.Timeout(TIMEOUT):
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
    """No connections, and queues that are closed afterwards."""
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


def test_quantum_of_the_only_instance(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    """While only one instance has connections, its quantum is larger."""
    # No time passes, so that no turn ends early on a busy machine.
    monkeypatch.setattr("guestapi.server.scheduler.InstanceQueue", partial(InstanceQueue, clock=lambda: 0.0))
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


def test_quantum_beside_many_instances(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    """When many instances have requests, each has one in a turn; with one instance less, each has its quantum."""
    monkeypatch.setattr("guestapi.server.scheduler.InstanceQueue", partial(InstanceQueue, clock=lambda: 0.0))
    scheduler, order = FairScheduler(), connections.order
    queues = [scheduler.enter(number) for number in range(FEW_INSTANCES + 1)]
    for number, queue in enumerate(queues[1:]):
        for _one in range(2 * QUANTUM):
            connections.ready(queue, f"{number}")
    found = []
    for _last in range(2):
        order.clear()
        connections.until(lambda: len(order) > 40 * len(queues))
        # Without the first iterations, of which one may not have begun with this number.
        turns = [len(list(turn)) for _name, turn in groupby(order[len(order) // 2 :])]
        found.append(set(turns[1:-1]))
        connections.ready(queues[0], "first")
    assert found == [{QUANTUM}, {1}]
    for queue in queues:
        queue.close()


def test_a_new_connection_beside_many_instances(connections: Connections) -> None:
    """When many instances have requests, a new connection waits for one turn, not for those of all in the iteration."""
    order = connections.order
    arrivals = ArrivalQueue()
    scheduler = FairScheduler(arrivals.start_those_that_came)
    queues = [scheduler.enter(number) for number in range(4 * FEW_INSTANCES)]

    def come() -> bool:
        """Be served, while a new connection is accepted."""
        if "new" not in order:
            order.append("come")
            arrivals.add(1, 0, lambda: 1, partial(order.append, "new"))
        return True

    for queue in queues:
        connections.ready(queue, "other")
    connections.until(lambda: len(order) > 10 * len(queues))
    order.clear()
    connections.ready(queues[0], "first", waited=come)
    connections.until(lambda: "new" in order)
    assert order[order.index("come") : order.index("new")].count("other") <= 1
    for queue in queues:
        queue.close()


def test_quantum_of_what_need_not_wait(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    """What need not wait for its client has a larger quantum while only one instance has connections, and no other."""
    monkeypatch.setattr("guestapi.server.scheduler.InstanceQueue", partial(InstanceQueue, clock=lambda: 0.0))
    scheduler, order = FairScheduler(), connections.order
    queue = scheduler.enter(1)
    ours, theirs = socket.socketpair()
    theirs.send(b"x")
    each_round = get_hub().loop.io(ours.fileno(), 1)
    each_round.start(order.append, "|")
    found = []
    for change in (lambda: None, lambda: scheduler.enter(2), lambda: scheduler.leave(2)):
        change()
        order.clear()
        for _one in range(5 * QUANTUM * ALONE_FACTOR * REQUEUED_FACTOR):
            queue.requeue(lambda: order.append("x"))
        connections.until(lambda: order.count("x") == 5 * QUANTUM * ALONE_FACTOR * REQUEUED_FACTOR)
        found.append({len(gap) for gap in "".join(order).split("|")} - {0})
    alone = QUANTUM * ALONE_FACTOR * REQUEUED_FACTOR
    assert found == [{alone}, {QUANTUM}, {alone}]
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


def test_woken_connections(connections: Connections) -> None:
    """Connections that an event wakes have two turns before another instance has one, and then take turns."""
    woken, quiet = connections.queue(), connections.queue()
    connections.ready(quiet, "quiet")

    def wake() -> None:
        connections.order.clear()
        for _connection in range(3 * QUANTUM):
            woken.requeue_woken(lambda: connections.order.append("woken"))

    gevent.spawn(wake)
    connections.until(lambda: connections.order.count("woken") == 3 * QUANTUM)
    assert connections.order[:QUANTUM] == ["woken"] * QUANTUM
    gaps = "".join(name[0] for name in connections.order).split("q")
    assert max(map(len, gaps)) <= 2 * QUANTUM


def test_closed_queue_gives_no_turn(connections: Connections) -> None:
    """A queue that is closed before the turn of woken connections does not call them."""
    queue = InstanceQueue(lambda: False)
    queue.requeue_woken(lambda: connections.order.append("late"))
    queue.close()
    gevent.sleep(0.001)
    assert connections.order == []


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("turns", [0.6, 1, 3, 20])
def test_instances_share_time(connections: Connections, turns: float, pipelined: bool) -> None:
    """An instance with expensive requests gets about as much time as another one with cheap requests."""
    clock, cheap = ManualClock(0.0), TURN_SECONDS / QUANTUM / 1.01
    dear = turns * TURN_SECONDS
    spent = {"dear": 0.0, "cheap": 0.0}
    queues = {name: InstanceQueue(lambda: False, clock) for name in spent}
    sockets: list[socket.socket] = []

    def take(name: str, seconds: float) -> bool:
        clock.now += seconds
        spent[name] += seconds
        return True

    def again() -> None:
        take("dear", dear)
        queues["dear"].requeue(again)

    for name, seconds in (("dear", dear), ("cheap", cheap)):
        for _connection in range(30):
            if pipelined and name == "dear":
                queues[name].requeue(again)
                continue
            ours, theirs = socket.socketpair()
            theirs.send(b"x")
            sockets += [ours, theirs]
            queues[name].join(ours.fileno(), lambda name=name, seconds=seconds: take(name, seconds))  # type: ignore[misc]
    connections.until(lambda: spent["dear"] > 100 * dear and spent["cheap"] > 100 * TURN_SECONDS)
    assert spent["dear"] < 2.2 * spent["cheap"] + 2 * dear
    for one in sockets:
        one.close()
    for queue in queues.values():
        queue.close()


def test_debt_is_bounded_and_not_inherited(connections: Connections) -> None:
    """An instance's debt of time is bounded, and a queue that is reused for another instance has no debt."""
    clock = ManualClock(0.0)
    queue = InstanceQueue(lambda: False, clock)

    def take() -> None:
        clock.now += 3600

    queue.requeue(take)
    connections.until(lambda: clock.now > 0)
    assert vars(queue)["_debt"] == MOST_DEBT
    queue.reset()
    assert vars(queue)["_debt"] == 0
    queue.close()


def test_no_connection_starves_in_an_expensive_instance(connections: Connections) -> None:
    """Where each request takes more than a turn, all connections of an instance are served equally often."""
    clock, order = ManualClock(0.0), connections.order
    queue = InstanceQueue(lambda: False, clock)
    sockets: list[socket.socket] = []

    def take(name: str) -> bool:
        clock.now += 2 * TURN_SECONDS
        order.append(name)
        return True

    for number in range(10):
        ours, theirs = socket.socketpair()
        theirs.send(b"x")
        sockets += [ours, theirs]
        queue.join(ours.fileno(), lambda number=number: take(str(number)))  # type: ignore[misc]  # bound at once
    connections.until(lambda: len(order) >= 100)
    assert {order[:100].count(str(number)) for number in range(10)} <= {9, 10, 11}
    queue.close()
    for one in sockets:
        one.close()


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
    # What other tests have left is not closed meanwhile.
    gc.collect()
    before = count_sets()
    for _time in range(2):
        entered = {number: scheduler.enter(number) for number in range(1, 100)}
        assert len({id(queue) for queue in entered.values()}) == 99
        for number, queue in entered.items():
            assert scheduler.enter(number) is queue
            assert queue.users == 2
            scheduler.leave(number)
            assert queue.users == 1
            scheduler.leave(number)
    assert count_sets() - before == SPARE


def count_sets() -> int:
    """How many sets of epoll this process has."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        # The list itself was one of them.
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{number}") == "anon_inode:[eventpoll]"
    return found
