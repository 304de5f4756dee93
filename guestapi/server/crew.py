"""Greenlets that serve one connection after another: to make and to bury one for each costs as much as its answer.

A greenlet has a stack for Python's frames, 16 KiB that the kernel maps and unmaps. So some wait for what comes next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import gevent
from gevent.hub import get_hub
from greenlet import getcurrent

if TYPE_CHECKING:
    from greenlet import greenlet

#: How many wait at the most.
_MOST = 64


class Crew:
    """The greenlets of a worker's connections."""

    def __init__(self) -> None:
        self._hub = get_hub()
        self._idle: list[greenlet] = []
        #: What greenlets that are on their way will find. No argument, which a new one would keep for all its life.
        self._work: deque[Callable[[], None]] = deque()

    def run(self, work: Callable[[], None]) -> None:
        """Have `work` done in a greenlet of its own, next time around in the event loop. It must raise nothing."""
        self._work.append(work)
        if self._idle:
            self._hub.loop.run_callback(self._idle.pop().switch)
        else:
            gevent.spawn_raw(self._serve)

    def _serve(self) -> None:
        while True:
            self._work.popleft()()
            if len(self._idle) >= _MOST:
                return
            self._idle.append(getcurrent())
            self._hub.switch()
