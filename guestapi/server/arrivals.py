"""Which new connection is identified next. Containers take turns, then the users of a container.

While few connections come, each is identified at once. When more come in an iteration of the event loop than are
identified in it, all others wait here, by container. A first look tells the container: one inode number, for much less
than it takes to identify the caller. So an instance with thousands of processes that connect is one that waits, and so
are the users of an instance: none keeps its root from being identified.

A turn is measured in time, not only counted: who takes longer than a turn pays with the next ones.

A connection that waits here has no greenlet yet, so thousands cost little.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from gevent.hub import get_hub

#: How many connections are identified in an iteration without a look at where they are from, and for how many seconds.
FREE_STARTS = 16
_FREE_SECONDS = 0.002
#: How many are identified in a turn of a container.
STARTS = 2
#: How many times more while only one container waits.
ALONE_FACTOR = 8
#: Seconds of a turn. Identifying a caller and answering its first request takes 60 to 200 µs.
TURN_SECONDS = 0.0005
#: The most seconds that a container can owe. The process may have been kept from running meanwhile.
MOST_DEBT = 0.1


class ArrivalQueue:
    """New connections of which the instance is not known yet, in the order in which they are identified."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nobody.

        Args:
            clock: returns seconds.
        """
        self._clock = clock
        self._loop = get_hub().loop
        self._iteration = -1
        self._free = 0
        self._began = 0.0
        #: Those that came in this iteration: process, user, what finds the container, and what starts them.
        self._come: deque[tuple[int, int, Callable[[], int], Callable[[], None]]] = deque()
        #: By container, then by user. Both in the order of their turns.
        self._waiting: dict[int, dict[int, deque[Callable[[], None]]]] = {}
        #: The container of each process, in this iteration. PERF: a look takes a fifth of a connection's time.
        self._containers: dict[int, int] = {}
        #: Seconds that a container has had beyond its turns.
        self._debts: dict[int, float] = {}
        #: Fires in the iteration after the one in which it is started.
        self._next = self._loop.timer(0)

    def add(self, pid: int, uid: int, get_container: Callable[[], int], start: Callable[[], None]) -> None:
        """Have a connection started when it may be identified: after this iteration's events at the earliest.

        Args:
            pid: the process that connected; 0 if it is not visible.
            uid: the user of the process.
            get_container: returns a number of its container. Called only if there are many, once for a process in an
                iteration.
            start: identifies the connection, and serves it until it has to wait. Called once, in the event loop's own
                greenlet. It must not raise.
        """
        if not self._come:
            self._loop.run_callback(self.start_those_that_came)
        self._come.append((pid, uid, get_container, start))

    def start_those_that_came(self) -> None:
        """Start those that came, as far as they are few. The others wait. For the event loop, and between turns."""
        if not self._come:
            return
        if self._loop.iteration != self._iteration:
            self._iteration = self._loop.iteration
            self._free, self._began = FREE_STARTS, self._clock()
            if self._containers:
                self._containers = {}
        come = self._come
        while come:
            pid, uid, get_container, start = come.popleft()
            # A later connection does not overtake those that wait.
            if self._free and not self._waiting and self._clock() < self._began + _FREE_SECONDS:
                self._free -= 1
                start()
                continue
            container = self._containers.get(pid)
            if container is None:
                container = get_container()
                if pid:
                    self._containers[pid] = container
            if not self._waiting:
                self._next.start(self._run)
            self._waiting.setdefault(container, {}).setdefault(uid, deque()).append(start)

    def _run(self) -> None:
        """Give each container that waits a turn."""
        alone = len(self._waiting) == 1
        # While nobody else has to be waited for, nobody pays.
        debts = {} if alone else self._debts
        self._debts = {container: debt - TURN_SECONDS for container, debt in debts.items() if debt > TURN_SECONDS}
        for container in list(self._waiting):
            if container not in debts:
                self._take_turn(container, ALONE_FACTOR if alone else 1)
        self._next.stop()
        if self._waiting:
            self._next.start(self._run)
        else:
            self._debts.clear()

    def _take_turn(self, container: int, factor: int) -> None:
        users = self._waiting[container]
        began = self._clock()
        spent = 0.0
        for _one in range(STARTS * factor):
            uid, waiting = next(iter(users.items()))
            start = waiting.popleft()
            # The next one is of the next user.
            del users[uid]
            if waiting:
                users[uid] = waiting
            if not users:
                del self._waiting[container]
            start()
            spent = self._clock() - began
            if spent >= TURN_SECONDS * factor or self._waiting.get(container) is not users:
                break
        if spent > TURN_SECONDS * factor:
            self._debts[container] = min(spent, MOST_DEBT) - TURN_SECONDS

    def __len__(self) -> int:
        """How many containers wait."""
        return len(self._waiting)
