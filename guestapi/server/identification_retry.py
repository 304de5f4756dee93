"""Identifies a caller again whose instance is not registered yet.

Where a mirror or a follower registers instances, a container may run before it is registered, and its first program may
connect at once. So a caller from an unregistered container is identified again, up to ``callers.wait_seconds``, before
it is refused.

Only ``callers.waiting`` callers wait at a time. The places are shared out by container, since anybody may run in one
that will never be registered: when all are taken, a container with few waiting callers gets the place of the one that
has waited longest in the container with most.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import gevent

from guestapi.callers.identify import Caller, Identifier
from guestapi.settings import CallerSettings

#: Seconds between two attempts.
_INTERVAL_SECONDS = 0.05


class _Waiting:
    """A caller that waits, until it is `evicted`."""

    __slots__ = ("evicted",)

    def __init__(self) -> None:
        self.evicted = False


class WaitingPlaces:
    """Which callers may wait, by the PID namespace of their container. No I/O."""

    def __init__(self, most: int) -> None:
        """Begin with no caller.

        Args:
            most: how many callers may wait at a time.
        """
        self._most = most
        #: In the order in which they came.
        self._waiting: dict[int, dict[_Waiting, None]] = {}
        self._count = 0

    def add(self, container: int) -> _Waiting | None:
        """Let one more caller of a container wait; None if it may not."""
        if self._count >= self._most and not self._evict(len(self._waiting.get(container, ())) + 1):
            return None
        waiting = _Waiting()
        self._waiting.setdefault(container, {})[waiting] = None
        self._count += 1
        return waiting

    def remove(self, container: int, waiting: _Waiting) -> None:
        """Free the place of a caller. Doing so twice is harmless."""
        others = self._waiting.get(container, {})
        if waiting in others:
            del others[waiting]
            self._count -= 1
            if not others:
                del self._waiting[container]

    def __len__(self) -> int:
        return self._count

    def _evict(self, least: int) -> bool:
        """Take a place from the container that has most, if it has more than `least`; whether there was one."""
        greediest = max(self._waiting, key=lambda container: len(self._waiting[container]), default=0)
        others = self._waiting.get(greediest, {})
        if len(others) <= least:
            return False
        oldest = next(iter(others))
        oldest.evicted = True
        self.remove(greediest, oldest)
        return True


class IdentificationRetry:
    """Waits for a source to register the instance of a caller."""

    def __init__(
        self,
        identifier: Identifier,
        has_sources: Callable[[], bool],
        version: Callable[[], object],
        settings: CallerSettings,
    ) -> None:
        """Wait for nobody yet.

        Args:
            identifier: identifies callers.
            has_sources: whether a mirror or a follower registers instances.
            version: of the store: equal as long as nobody has committed.
            settings: how long a caller waits, and how many may wait at a time.
        """
        self._identifier = identifier
        self._has_sources = has_sources
        self._version = version
        self._seconds = settings.wait_seconds
        self._places = WaitingPlaces(settings.waiting)

    def wait(self, connection: socket.SocketType, caller: Caller) -> Caller:
        """Wait until the caller's instance is registered, but not for long. Blocks the calling greenlet alone.

        Args:
            connection: the caller's.
            caller: as identified.

        Returns:
            The caller as it was identified last.

        Raises:
            StoreError: the store cannot be read.
        """
        container = caller.container
        if caller.instance_id is not None or container is None or not self._has_sources():
            return caller
        waiting = self._places.add(container)
        if waiting is None:
            return caller
        try:
            until = time.monotonic() + self._seconds
            seen: object = None
            while time.monotonic() < until and not waiting.evicted:
                gevent.sleep(_INTERVAL_SECONDS)
                # The deeper a guest nests its namespaces, the more an attempt costs.
                if (version := self._version()) != seen:
                    seen = version
                    caller = self._identifier.identify(connection, caller.credentials)
                    if caller.instance_id is not None or caller.container is None:
                        break
        finally:
            self._places.remove(container, waiting)
        return caller
