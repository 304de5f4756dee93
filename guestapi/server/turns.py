"""Whose turn it is: instances take turns in the event loop, and so do the connections of an instance.

All connections of an instance are in an epoll(7) set of their own, and the event loop watches only that set. Each time
around, the loop lets every instance that has something to read serve a few of its connections, then looks anew. So a
client waits for a few requests of each other instance, however many connections they keep busy. The kernel moves what
it has reported to the end of a set's list, so connections of the same instance take turns too.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable
from typing import Any

from gevent.hub import get_hub

#: How many requests of an instance are served in a turn: few enough that others do not wait for long, enough that the
#: loop's own work (about 3 µs) is shared by some.
EACH_TURN = 4
#: As many times more are served in a turn while there is no other instance to wait for it.
ALONE = 4
#: Bytes from which on a piece of a request is all of an instance's turn: it may be made to take milliseconds.
LARGE = 4096
#: How many that nobody uses are kept, for instances that come next: each has a descriptor.
_SPARE = 4
#: Event type of a gevent loop's io watcher.
_READABLE = 1


class Turns:
    """The connections of one instance, as far as they wait for their clients.

    Attributes:
        users: how many connections there are.
    """

    def __init__(self, alone: Callable[[], bool]) -> None:
        """Args:
        alone: whether nobody else waits for a turn.
        """
        loop = get_hub().loop
        self.users = 0
        self._alone = alone
        self._set = select.epoll()
        self._resume: dict[int, Callable[[], bool]] = {}
        self._again: deque[tuple[Callable[[], object], int]] = deque()
        self._readable: Any = loop.io(self._set.fileno(), _READABLE)
        self._readable.start(self._run)
        self._next: Any = loop.timer(0.0)

    def join(self, descriptor: int, resume: Callable[[], bool]) -> None:
        """Have `resume` called when it is the turn of a socket that has something to read.

        It is to say whether that was waited for; if not, it is not called again before the socket joins anew.
        """
        self._resume[descriptor] = resume
        self._set.register(descriptor, select.EPOLLIN)

    def forget(self, descriptor: int) -> None:
        """The socket is about to be closed, which takes it out of the set by itself (epoll(7), question 6)."""
        self._resume.pop(descriptor, None)

    def again(self, resume: Callable[[], object], size: int = 0) -> None:
        """Have `resume` called once when it is the turn of whoever need not wait for his client.

        Args:
            resume: who.
            size: of what there is to look at, in bytes.
        """
        if not self._again:
            self._next.start(self._run_again)
        self._again.append((resume, size))

    def close(self) -> None:
        """Away with it, when nobody is left."""
        self._readable.close()
        self._next.close()
        self._set.close()

    def _run(self) -> None:
        for descriptor, _event in self._set.poll(0, self._most()):
            # One that was served in this very turn may have closed others.
            resume = self._resume.get(descriptor)
            if resume is not None and not resume():
                self._set.unregister(descriptor)
                del self._resume[descriptor]

    def _run_again(self) -> None:
        for _one in range(min(self._most(), len(self._again))):
            resume, size = self._again.popleft()
            resume()
            if size >= LARGE:
                break
        self._next.stop()
        if self._again:
            # A timer, not a callback: those are run in a row, without a look at who else has something to read.
            self._next.start(self._run_again)

    def _most(self) -> int:
        return EACH_TURN * ALONE if self._alone() else EACH_TURN


class Places:
    """The turns of each instance that has connections, and of unknown callers together."""

    def __init__(self) -> None:
        self._turns: dict[int | None, Turns] = {}
        self._spare: list[Turns] = []

    def enter(self, instance_id: int | None) -> Turns:
        """The turns of an instance, for one more connection."""
        turns = self._turns.get(instance_id)
        if turns is None:
            turns = self._turns[instance_id] = self._spare.pop() if self._spare else Turns(self._of_one)
        turns.users += 1
        return turns

    def leave(self, instance_id: int | None) -> None:
        """The opposite of `enter`."""
        turns = self._turns[instance_id]
        turns.users -= 1
        if not turns.users:
            del self._turns[instance_id]
            if len(self._spare) < _SPARE:
                self._spare.append(turns)
            else:
                turns.close()

    def _of_one(self) -> bool:
        """Whether all connections are of one instance."""
        return len(self._turns) < 2
