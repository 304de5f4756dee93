"""Who is served next. Instances take turns in the event loop, and so do the connections of an instance.

All connections of an instance are in an epoll(7) set of their own, and the event loop watches only that set. In each
iteration the loop lets every instance that has input serve a few of its connections. So a client waits for a few
requests of each other instance, however many connections those keep busy. The kernel moves what it has reported to the
end of a set's list, so the connections of an instance take turns too.

New connections, whose instance is not known yet, are limited for each process in each iteration of the loop.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable
from typing import Any

from gevent.hub import get_hub
from greenlet import getcurrent, greenlet

#: How many requests of an instance are served in a turn: few, so that others do not wait for long; several, so that
#: they share the loop's own work (about 3 µs).
QUANTUM = 4
#: How many times more are served in a turn while no other instance has connections.
ALONE_FACTOR = 4
#: From this size on, in bytes, one piece of input is all of an instance's turn, because it may take milliseconds.
LARGE_INPUT = 4096
#: How many unused queues are kept for the next instances. Each has a descriptor.
_SPARE = 4
#: How many times more starts there are in an iteration while only one process waits for them.
_ALONE_STARTS = 8
#: Event type of an io watcher of gevent's loop.
_READABLE = 1


class InstanceQueue:
    """The connections of one instance that wait for their clients or for their turn.

    Attributes:
        users: number of connections.
    """

    def __init__(self, is_alone: Callable[[], bool]) -> None:
        """Make an empty queue.

        Args:
            is_alone: whether no other instance has connections.
        """
        loop = get_hub().loop
        self.users = 0
        self._is_alone = is_alone
        self._set = select.epoll()
        self._resume: dict[int, Callable[[], bool]] = {}
        self._requeued: deque[tuple[Callable[[], object], int]] = deque()
        self._readable: Any = loop.io(self._set.fileno(), _READABLE)
        self._readable.start(self._run)
        self._next: Any = loop.timer(0.0)

    def join(self, descriptor: int, resume: Callable[[], bool]) -> None:
        """Have `resume` called each time that a socket has input and it is its turn.

        Args:
            descriptor: of the socket.
            resume: returns whether its connection waited for input. If not, it is not called again until the socket
                joins anew.
        """
        self._resume[descriptor] = resume
        self._set.register(descriptor, select.EPOLLIN)

    def forget(self, descriptor: int) -> None:
        """Remove a socket that is about to be closed. Closing takes it out of the epoll set (epoll(7), question 6)."""
        self._resume.pop(descriptor, None)

    def requeue(self, resume: Callable[[], object], size: int = 0) -> None:
        """Have `resume` called once, when it is the turn of a connection that has its input already.

        Args:
            resume: continues the connection.
            size: bytes of its input.
        """
        if not self._requeued:
            self._next.start(self._run_requeued)
        self._requeued.append((resume, size))

    def close(self) -> None:
        """Free the queue's descriptor. It must have no users."""
        self._readable.close()
        self._next.close()
        self._set.close()

    def _run(self) -> None:
        for descriptor, _event in self._set.poll(0, self._quantum()):
            # A connection that was served in this very turn may have closed others.
            resume = self._resume.get(descriptor)
            if resume is not None and not resume():
                self._set.unregister(descriptor)
                del self._resume[descriptor]

    def _run_requeued(self) -> None:
        for _one in range(min(self._quantum(), len(self._requeued))):
            resume, size = self._requeued.popleft()
            resume()
            if size >= LARGE_INPUT:
                break
        self._next.stop()
        if self._requeued:
            # A timer, not a callback: the loop runs callbacks in a row, without a look at who else has input.
            self._next.start(self._run_requeued)

    def _quantum(self) -> int:
        return QUANTUM * ALONE_FACTOR if self._is_alone() else QUANTUM


class FairScheduler:
    """The queue of each instance that has connections. All unknown callers share one, under the id None."""

    def __init__(self) -> None:
        self._queues: dict[int | None, InstanceQueue] = {}
        self._spare: list[InstanceQueue] = []

    def enter(self, instance_id: int | None) -> InstanceQueue:
        """Return the queue of an instance for one more connection."""
        queue = self._queues.get(instance_id)
        if queue is None:
            queue = self._queues[instance_id] = self._spare.pop() if self._spare else InstanceQueue(self._has_one)
        queue.users += 1
        return queue

    def leave(self, instance_id: int | None) -> None:
        """Give back what `enter` returned."""
        queue = self._queues[instance_id]
        queue.users -= 1
        if not queue.users:
            del self._queues[instance_id]
            if len(self._spare) < _SPARE:
                self._spare.append(queue)
            else:
                queue.close()

    def _has_one(self) -> bool:
        return len(self._queues) < 2


class IterationLimiter:
    """Limits how many times each process may start something in an iteration of the event loop.

    Without it, an iteration would last as long as the greediest process has something to start. With it, an iteration
    lasts as long as there are many processes.
    """

    def __init__(self, per_iteration: int, is_alone: Callable[[], bool]) -> None:
        """Limit starts.

        Args:
            per_iteration: starts of each process in an iteration.
            is_alone: whether only one process waits.
        """
        self._per_iteration = per_iteration
        self._is_alone = is_alone
        self._hub = get_hub()
        self._loop = self._hub.loop
        self._iteration = -1
        self._started: dict[int, int] = {}
        self._waiting: dict[int, deque[greenlet]] = {}
        #: Fires in the iteration after the one in which it is started.
        self._next = self._loop.timer(0)

    def acquire(self, pid: int) -> None:
        """Wait until process `pid` may start something. Blocks the calling greenlet alone."""
        self._begin_iteration()
        started = self._started.get(pid, 0)
        # A later connection does not overtake those that wait.
        if pid not in self._waiting and (
            started < self._per_iteration or (started < self._per_iteration * _ALONE_STARTS and self._is_alone())
        ):
            self._started[pid] = started + 1
            return
        if not self._waiting:
            self._next.start(self._resume_waiting)
        self._waiting.setdefault(pid, deque()).append(getcurrent())
        self._hub.switch()

    def _resume_waiting(self) -> None:
        """In the next iteration, resume those of each process that have waited longest."""
        self._begin_iteration()
        most = self._per_iteration * _ALONE_STARTS if self._is_alone() else self._per_iteration
        due: list[greenlet] = []
        for pid, waiting in list(self._waiting.items()):
            started = self._started.get(pid, 0)
            count = max(0, min(most - started, len(waiting)))
            due.extend(waiting.popleft() for _start in range(count))
            self._started[pid] = started + count
            if not waiting:
                del self._waiting[pid]
        if self._waiting:
            self._next.start(self._resume_waiting)
        for waiter in due:
            waiter.switch()

    def _begin_iteration(self) -> None:
        if self._loop.iteration != self._iteration:
            self._iteration = self._loop.iteration
            self._started.clear()
