"""Who is served next. Instances take turns in the event loop, and so do the connections of an instance.

All connections of an instance are in an epoll(7) set of their own, and the event loop watches only that set. In each
iteration the loop lets every instance that has input serve a few of its connections. So a client waits for a few
requests of each other instance, however many connections those keep busy. The kernel moves what it has reported to the
end of a set's list, so the connections of an instance take turns too.

A turn is measured in time: it ends after `TURN_SECONDS`, and an instance whose request took longer pays with its next
turns, while others have connections. So it does not matter to others how many costly requests it sends. What waits to
be sent, and events, take turns in the same way as requests.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from gevent.hub import get_hub

#: How many requests of an instance are served in a turn: few, so that others do not wait for long; several, so that
#: they share the loop's own work (about 3 µs).
QUANTUM = 4
#: How many times more are served in a turn while no other instance has connections.
ALONE_FACTOR = 4
#: How many times more connections than that go on that need not wait for their clients: an event for many streams. A
#: turn less is an iteration of the event loop less, and a client that finds the next event before it sleeps costs less.
REQUEUED_FACTOR = 4
#: Seconds of a turn: enough for the requests of a turn, even on a slow machine, unless they are costly ones.
TURN_SECONDS = 0.001
#: The most seconds that an instance can owe. The process may have been kept from running meanwhile.
MOST_DEBT = 0.1
#: When more instances than this had a turn in the last iteration of the event loop, turns are shorter, so that a new
#: connection does not wait for four requests of each of a hundred instances.
FEW_INSTANCES = 16
_TURN = (QUANTUM, TURN_SECONDS)
_LONG_TURN = (QUANTUM * ALONE_FACTOR, TURN_SECONDS * ALONE_FACTOR)
_SHORT_TURN = (1, TURN_SECONDS / QUANTUM)
#: How many unused queues are kept for the next instances. Each has a descriptor. While many instances boot, each of
#: their connections needs one for a moment.
SPARE = 16
#: Event type of an io watcher of gevent's loop.
_READABLE = 1


class InstanceQueue:
    """The connections of one instance that wait for their clients or for their turn.

    Attributes:
        users: number of connections.
    """

    def __init__(
        self,
        is_alone: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        count_turn: Callable[[], int] = int,
        start_arrivals: Callable[[], object] = int,
    ) -> None:
        """Make an empty queue.

        Args:
            is_alone: whether no other instance has connections.
            clock: returns seconds.
            count_turn: counts a turn; returns how many there were in the last iteration of the event loop.
            start_arrivals: starts new connections that came in this iteration. Called before short turns.
        """
        loop = get_hub().loop
        self.users = 0
        self._is_alone = is_alone
        self._count_turn = count_turn
        self._start_arrivals = start_arrivals
        self._set = select.epoll()
        self._resume: dict[int, Callable[[], bool]] = {}
        self._requeued: deque[Callable[[], object]] = deque()
        #: Sockets that were reported when the turn was over.
        self._left: list[int] = []
        #: Seconds that it has had beyond its turns.
        self._debt = 0.0
        self._clock = clock
        self._readable: Any = loop.io(self._set.fileno(), _READABLE)
        self._readable.start(self._run)
        self._next: Any = loop.timer(0.0)
        self._loop = loop
        #: The next turn of `_requeued`, if the loop calls it before it looks who else has input.
        self._soon: Any = None

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

    def requeue(self, resume: Callable[[], object]) -> None:
        """Have `resume` called once, when it is the turn of a connection that need not wait for its client."""
        if not self._requeued:
            self._next.start(self._run_requeued)
        self._requeued.append(resume)

    def requeue_woken(self, resume: Callable[[], object]) -> None:
        """As `requeue`, for a connection that has waited for something else than its turn: for an event.

        The first turn comes before the loop looks who else has input (PERF: 20 µs of the way from a commit to a
        client); what is left follows as with `requeue`. A connection waits anew for each such turn, so it cannot keep
        others from the loop.
        """
        if not self._requeued:
            self._soon = self._loop.run_callback(self._run_requeued)
        self._requeued.append(resume)

    def reset(self) -> None:
        """Forget what the queue knows of its instance. It must have no users."""
        self._left.clear()
        self._debt = 0.0

    def close(self) -> None:
        """Free the queue's descriptor. It must have no users."""
        self._readable.close()
        self._next.close()
        if self._soon is not None:
            self._soon.stop()
        self._set.close()

    def _run(self) -> None:
        if self._debt and self._pays():
            return
        most, seconds = self._turn()
        if self._count_turn() > FEW_INSTANCES:
            most, seconds = _SHORT_TURN
            # Otherwise a new connection would wait for the turns of all others in this iteration.
            self._start_arrivals()
        if self._left:
            descriptors, self._left = self._left, []
        else:
            descriptors = [descriptor for descriptor, _event in self._set.poll(0, most)]
        # PERF: local names. Every request comes through here.
        clock, get_resume = self._clock, self._resume.get
        until = clock() + seconds
        for served, descriptor in enumerate(descriptors, 1):
            # A connection that was served in this very turn may have closed others.
            resume = get_resume(descriptor)
            if resume is not None and not resume():
                self._set.unregister(descriptor)
                del self._resume[descriptor]
            now = clock()
            if now > until:
                self._debt = min(now - until, MOST_DEBT)
                self._left = descriptors[served:]
                return

    def _run_requeued(self) -> None:
        if not (self._debt and self._pays()):
            most, seconds = self._turn()
            # PERF: local names, as above.
            clock, requeued = self._clock, self._requeued
            until = clock() + seconds
            if most > QUANTUM:
                most *= REQUEUED_FACTOR
            for _one in range(min(most, len(requeued))):
                requeued.popleft()()
                now = clock()
                if now > until:
                    self._debt = min(now - until, MOST_DEBT)
                    break
        self._next.stop()
        if self._requeued:
            # A timer, not a callback: the loop runs callbacks in a row, without a look at who else has input.
            self._next.start(self._run_requeued)

    def _pays(self) -> bool:
        """Pay a turn's time of what is owed; return whether this turn is lost for it."""
        if self._is_alone():
            self._debt = 0.0
            return False
        self._debt = max(0.0, self._debt - TURN_SECONDS)
        return True

    def _turn(self) -> tuple[int, float]:
        """How many requests a turn has at the most, and how many seconds."""
        return _LONG_TURN if self._is_alone() else _TURN


class FairScheduler:
    """The queue of each instance that has connections. All unknown callers share one, under the id None."""

    def __init__(self, start_arrivals: Callable[[], object] = int) -> None:
        """Begin with no instance.

        Args:
            start_arrivals: starts new connections that came in this iteration of the event loop.
        """
        self._start_arrivals = start_arrivals
        self._queues: dict[int | None, InstanceQueue] = {}
        self._spare: list[InstanceQueue] = []
        self._loop = get_hub().loop
        self._iteration = -1
        #: Turns in this iteration of the event loop, and in the last one.
        self._turns = self._last_turns = 0

    def enter(self, instance_id: int | None) -> InstanceQueue:
        """Return the queue of an instance for one more connection."""
        queue = self._queues.get(instance_id)
        if queue is None:
            queue = self._queues[instance_id] = self._spare.pop() if self._spare else self._make()
        queue.users += 1
        return queue

    def leave(self, instance_id: int | None) -> None:
        """Give back what `enter` returned."""
        queue = self._queues[instance_id]
        queue.users -= 1
        if not queue.users:
            del self._queues[instance_id]
            if len(self._spare) < SPARE:
                queue.reset()
                self._spare.append(queue)
            else:
                queue.close()

    def _make(self) -> InstanceQueue:
        return InstanceQueue(self._has_one, count_turn=self._count_turn, start_arrivals=self._start_arrivals)

    def _count_turn(self) -> int:
        iteration = self._loop.iteration
        if iteration != self._iteration:
            self._last_turns = self._turns if iteration == self._iteration + 1 else 0
            self._iteration, self._turns = iteration, 0
        self._turns += 1
        return self._last_turns

    def _has_one(self) -> bool:
        return len(self._queues) < 2
