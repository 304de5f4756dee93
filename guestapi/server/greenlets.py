"""Greenlets that serve one connection after another, because starting and ending one costs as much as a response.

A greenlet has a stack for Python's frames: 16 KiB that the kernel maps and unmaps. So some idle ones are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import gevent
from gevent.hub import get_hub
from greenlet import getcurrent, greenlet

#: The most idle greenlets that are kept.
_MOST_IDLE = 64


class GreenletPool:
    """The greenlets that serve a worker's connections."""

    def __init__(self) -> None:
        self._hub = get_hub()
        self._idle: list[greenlet] = []
        #: Tasks for greenlets that are about to run. A new greenlet would keep an argument for all its life.
        self._tasks: deque[Callable[[], None]] = deque()

    def run(self, task: Callable[[], None]) -> None:
        """Call `task` in a greenlet, in the next iteration of the event loop. It must not raise."""
        self._tasks.append(task)
        if self._idle:
            self._hub.loop.run_callback(self._idle.pop().switch)
        else:
            gevent.spawn_raw(self._serve)

    def run_now(self, task: Callable[[], None]) -> None:
        """As `run`, at once, until the task waits for something. Only the event loop's own greenlet may call this."""
        self._tasks.append(task)
        if self._idle:
            self._idle.pop().switch()
        else:
            greenlet(self._serve, self._hub).switch()

    def _serve(self) -> None:
        while True:
            self._tasks.popleft()()
            if len(self._idle) >= _MOST_IDLE:
                return
            self._idle.append(getcurrent())
            self._hub.switch()
