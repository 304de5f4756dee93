"""Requests that wait until something may have changed that their answer depends on.

A waiter is registered for one key, or for all that its guest may read. An entry of the change log makes the waiters due
that it concerns, and no others. A change can concern thousands of waiters at once. So those that are due are woken a
few at a time, and whoever else has something to ask is served in between.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Set

from guestapi.dialects import DIALECTS
from guestapi.model import Notification
from guestapi.store.changes import key_of
from guestapi.store.transaction import NO_INSTANCE

#: How many waiters are woken at a time: their answers take about a millisecond together.
WOKEN_AT_ONCE = 4

#: What the keys begin with that something in a tree is made of: those that a guest may read in some dialect, and those
#: with the generated hardware addresses of NICs.
_IN_TREE = ("volatile.", *sorted({prefix for dialect in DIALECTS.values() for prefix in dialect.readable}))
#: How the metadata of an entry about a policy begins (`store.policies`).
_POLICY_CHANGED = '{"action":"policy-changed"'


class Waiter:
    """One waiting request.

    Attributes:
        instance_id: of the instance that asks.
        key: the configuration key that the answer depends on; None: it depends on all that the guest may read.
        was_set: whether there was something to answer with when it began to wait.
        until: when it has waited long enough, in seconds of the monotonic clock.
        after: entries up to this id are in what was read last.
        due: whether something may have changed since then. Whoever answers the request resets it.
        over: whether it must be answered now, changed or not.
        wake: called when `due` or `over` becomes true. Whoever serves the client sets it.
    """

    __slots__ = (
        "_authorize",
        "_is_alive",
        "_waiting",
        "after",
        "due",
        "instance_id",
        "key",
        "over",
        "until",
        "wake",
        "was_set",
    )

    def __init__(
        self,
        waiting: WaitingList,
        instance_id: int,
        key: str | None,
        authorize: Callable[[], int | None],
        is_alive: Callable[[], bool],
        *,
        was_set: bool,
        seconds: float,
        after: int,
    ) -> None:
        self._waiting = waiting
        self._authorize = authorize
        self._is_alive = is_alive
        self.instance_id = instance_id
        self.key = key
        self.was_set = was_set
        self.until = time.monotonic() + seconds
        self.after = after
        self.due = False
        self.over = False
        self.wake: Callable[[], None] = _wake_nobody

    def finish(self) -> None:
        """Have the request answered now."""
        if not self.over:
            self.over = True
            self.wake()

    def cancel(self) -> None:
        """Wait no more. Doing so twice is harmless."""
        self._waiting.remove(self)

    def may_have_ended(self) -> bool:
        """Tell whether the client may not have the answer any more, as far as it can be told."""
        return self._authorize() is not None

    def is_alive(self) -> bool:
        """Tell whether the init of its instance is alive."""
        return self._is_alive()


class WaitingList:
    """All waiting requests of a worker."""

    def __init__(self) -> None:
        self._by_instance: dict[int, dict[str | None, dict[Waiter, None]]] = {}
        self._counts: dict[int, int] = {}
        self._due: deque[Waiter] = deque()

    def add(self, waiter: Waiter) -> None:
        """Register a waiter."""
        keys = self._by_instance.setdefault(waiter.instance_id, {})
        keys.setdefault(waiter.key, {})[waiter] = None
        self._counts[waiter.instance_id] = self._counts.get(waiter.instance_id, 0) + 1

    def remove(self, waiter: Waiter) -> None:
        """Remove a waiter, if it is there."""
        keys = self._by_instance.get(waiter.instance_id, {})
        waiters = keys.get(waiter.key, {})
        if waiter not in waiters:
            return
        del waiters[waiter]
        if not waiters:
            del keys[waiter.key]
        if not keys:
            del self._by_instance[waiter.instance_id]
        self._counts[waiter.instance_id] -= 1
        if not self._counts[waiter.instance_id]:
            del self._counts[waiter.instance_id]

    def count(self, instance_id: int) -> int:
        """The number of waiting requests of an instance."""
        return self._counts.get(instance_id, 0)

    def deliver(self, entry: Notification) -> None:
        """Make those due whose answer an entry of the change log may have changed."""
        if entry.instance_id == NO_INSTANCE:
            # A policy of a project, of which any instance may be.
            self.deliver_to_all()
            return
        keys = self._by_instance.get(entry.instance_id)
        if keys is None:
            return
        if entry.type == "lifecycle" and entry.metadata.startswith(_POLICY_CHANGED):
            for waiter in self._of(entry.instance_id):
                self._make_due(waiter, entry.id)
            return
        key = key_of(entry.type, entry.metadata)
        for waiter in tuple(keys.get(None, ())):
            # A device, the state or the name is in the tree; most keys of other prefixes are not.
            if key is None or key.startswith(_IN_TREE):
                self._make_due(waiter, entry.id)
        if key is not None:
            for waiter in tuple(keys.get(key, ())):
                self._make_due(waiter, entry.id)
        if not entry.for_guest:
            # A switch was changed, or the instance started or stopped.
            for waiter in self._of(entry.instance_id):
                if not waiter.due and waiter.may_have_ended():
                    self._make_due(waiter, entry.id)

    def deliver_to_all(self) -> None:
        """Make all due: what has changed is not known."""
        for waiter in self._all():
            self._make_due(waiter, None)

    def instances(self) -> Set[int]:
        """The ids of instances that have waiting requests."""
        return self._by_instance.keys()

    def check(self, instance_id: int) -> int:
        """Make those of an instance due whose init has ended. The log has no entry about that.

        Returns:
            How many were looked at.
        """
        waiters = self._of(instance_id)
        for waiter in waiters:
            if not waiter.is_alive():
                self._make_due(waiter, None)
        return len(waiters)

    def wake_some(self) -> bool:
        """Wake a few of those that are due.

        Returns:
            Whether there are more.
        """
        woken = 0
        while self._due and woken < WOKEN_AT_ONCE:
            waiter = self._due.popleft()
            if waiter.due:
                waiter.wake()
                woken += 1
        return bool(self._due)

    def __len__(self) -> int:
        """The number of waiting requests."""
        return sum(self._counts.values())

    def _make_due(self, waiter: Waiter, event_id: int | None) -> None:
        if not waiter.due and (event_id is None or event_id > waiter.after):
            waiter.due = True
            self._due.append(waiter)

    def _of(self, instance_id: int) -> list[Waiter]:
        keys = self._by_instance.get(instance_id, {})
        return [waiter for waiters in keys.values() for waiter in waiters]

    def _all(self) -> Iterator[Waiter]:
        for instance_id in tuple(self._by_instance):
            yield from self._of(instance_id)


def _wake_nobody() -> None:
    """Stand in for `Waiter.wake` until somebody serves the request."""
