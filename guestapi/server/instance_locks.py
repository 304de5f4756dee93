"""One thing of each instance at a time, in the order in which they came; those of other instances go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gevent.lock import BoundedSemaphore


class InstanceLocks:
    """A lock for each instance that needs one now."""

    def __init__(self) -> None:
        self._locks: dict[int, tuple[BoundedSemaphore, list[None]]] = {}

    @contextmanager
    def hold(self, instance_id: int) -> Iterator[None]:
        """Hold an instance's lock; blocks the calling greenlet alone until it can."""
        lock, users = self._locks.setdefault(instance_id, (BoundedSemaphore(1), []))
        users.append(None)
        try:
            with lock:
                yield
        finally:
            users.pop()
            if not users:
                del self._locks[instance_id]
