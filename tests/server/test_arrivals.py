"""`ArrivalQueue`: containers take turns at identification, then their users; a turn is limited in number and time."""

from __future__ import annotations

import itertools
from functools import partial

import gevent
import pytest
from gevent.hub import get_hub

from guestapi.server.arrivals import ALONE_FACTOR, FREE_STARTS, STARTS, TURN_SECONDS, ArrivalQueue
from tests.harness.clock import ManualClock
from tests.harness.waiting import TIMEOUT


class Arrivals:
    """Connections that arrive at a queue; records their order of identification and the event loop's iterations."""

    def __init__(self) -> None:
        self.clock = ManualClock(0.0)
        self.queue = ArrivalQueue(self.clock)
        self.order: list[tuple[int, int]] = []
        self.iterations: list[int] = []
        self.looks = 0
        self.looked: list[tuple[int, int]] = []
        self._pids = itertools.count(1)
        self._come = 0

    def come(self, container: int, uid: int = 0, count: int = 1, seconds: float = 0.0, pid: int | None = None) -> None:
        """Let `count` connections of a user of a container arrive; each takes `seconds` to identify.

        They are of the process `pid`, or each is of another one.
        """
        for _number in range(count):
            process = next(self._pids) if pid is None else pid
            self._come += 1
            self._add(container, process, uid, seconds)

    def wait(self) -> None:
        """Wait until all connections are identified."""
        with gevent.Timeout(TIMEOUT):
            while len(self.order) < self._come:
                gevent.sleep(0)

    def _add(self, container: int, pid: int, uid: int, seconds: float) -> None:
        def look() -> int:
            self.looks += 1
            self.looked.append((get_hub().loop.iteration, pid))
            return container

        def start() -> None:
            self.clock.now += seconds
            self.order.append((container, uid))
            self.iterations.append(get_hub().loop.iteration)

        self.queue.add(pid, uid, look, start)


@pytest.fixture
def arrivals() -> Arrivals:
    """A queue without connections."""
    return Arrivals()


def test_few_arrivals_are_identified_at_once(arrivals: Arrivals) -> None:
    """A few connections in an iteration are identified at once, without finding their containers."""
    arrivals.come(1, count=FREE_STARTS)
    arrivals.wait()
    assert arrivals.looks == 0
    assert len(set(arrivals.iterations)) == 1


def test_connections_of_a_process_cost_one_look(arrivals: Arrivals) -> None:
    """The container of a process is found once in an iteration, however many connections it makes."""
    arrivals.come(1, count=FREE_STARTS)
    arrivals.come(1, count=50, pid=4711)
    arrivals.come(2, count=50, pid=4712)
    arrivals.wait()
    # gevent may divide so many greenlets between iterations, in each of which a process is looked at once.
    assert len(set(arrivals.looked)) == len(arrivals.looked) < 10
    assert {pid for _iteration, pid in arrivals.looked} == {4711, 4712}
    # A PID may belong to another container in a later iteration.
    before = arrivals.looks
    arrivals.come(3, count=FREE_STARTS + 10, pid=4711)
    arrivals.wait()
    assert arrivals.looks > before


def test_invisible_processes_are_looked_at_singly(arrivals: Arrivals) -> None:
    """Processes that the service does not see all have the PID 0, and may be in different containers."""
    arrivals.come(1, count=100, pid=0)
    arrivals.wait()
    assert len(set(arrivals.looked)) < len(arrivals.looked)


def test_thousands_of_one_container_do_not_delay_another(arrivals: Arrivals) -> None:
    """Thousands of connections of a container get only a few starts between two connections of another container."""
    arrivals.come(3, count=FREE_STARTS)
    arrivals.come(2, count=20)
    arrivals.come(1, count=3000)
    arrivals.wait()
    rest = [container for container, _uid in arrivals.order[FREE_STARTS:]]
    last = len(rest) - rest[::-1].index(2)
    assert rest[:last].count(1) <= STARTS * (20 // STARTS + 1)
    assert len(rest) == 3020


def test_lone_container_has_more_starts(arrivals: Arrivals) -> None:
    """While only one container has waiting connections, it gets more starts in an iteration."""
    arrivals.come(1, count=FREE_STARTS + 10 * STARTS * ALONE_FACTOR)
    arrivals.wait()
    assert len(set(arrivals.iterations)) <= 11


def test_users_of_a_container_take_turns(arrivals: Arrivals) -> None:
    """A user with a thousand connections does not delay another user of the same container."""
    arrivals.come(3, count=FREE_STARTS)
    arrivals.come(2, count=5)
    arrivals.come(1, uid=0, count=5)
    arrivals.come(1, uid=1000, count=1000)
    arrivals.wait()
    mine = [uid for container, uid in arrivals.order[FREE_STARTS:] if container == 1]
    assert mine[:10].count(0) == 5


def test_first_come_first_served(arrivals: Arrivals) -> None:
    """The connections of a user are identified in the order of their arrival."""
    numbers: list[int] = []

    for number in range(100):
        arrivals.queue.add(1, 0, lambda: 1, partial(numbers.append, number))
    with gevent.Timeout(TIMEOUT):
        while len(numbers) < 100:
            gevent.sleep(0)
    assert numbers == list(range(100))


@pytest.mark.parametrize("turns", [0.3, 1, 5, 40])
def test_containers_share_time(arrivals: Arrivals, turns: float) -> None:
    """A container whose callers take long to identify, such as in nested namespaces, gets no more time than others."""
    dear, cheap = turns * TURN_SECONDS, TURN_SECONDS / STARTS / 1.01
    arrivals.come(3, count=FREE_STARTS)
    arrivals.come(2, count=400, seconds=cheap)
    arrivals.come(1, count=400, seconds=dear)
    arrivals.wait()
    rest = [container for container, _uid in arrivals.order[FREE_STARTS:]]
    last = len(rest) - rest[::-1].index(2)
    spent = rest[:last].count(1) * dear
    assert spent <= 1.5 * 400 * cheap + 2 * dear


def test_nothing_is_left(arrivals: Arrivals) -> None:
    """When no connection waits, the queue keeps no entry of a container."""
    for container in range(50):
        arrivals.come(container, count=3, seconds=2 * TURN_SECONDS)
    arrivals.wait()
    gevent.sleep(0.001)
    assert len(arrivals.queue) == 0
    assert vars(arrivals.queue)["_debts"] == {}
