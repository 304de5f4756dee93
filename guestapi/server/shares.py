"""Who may have how many of a worker's connections. This file does no I/O, and knows a connection only as a `Holder`.

An instance has so many of its own. When all that the worker has are taken, by many instances together, room is made
for whoever has fewer at the cost of whoever has most: a full worker is nobody's to keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

#: How many refused connections of an instance are kept at a time until their clients have seen why.
_LINGERING = 16


class Holder(Protocol):
    """A connection: `connection.Connection`."""

    @property
    def idle(self) -> bool:
        """Nothing was asked that is not answered."""
        ...

    def abort(self) -> None:
        """End it."""
        ...


@dataclass(frozen=True, slots=True)
class Excess:
    """Why a connection or a request is one too many: what the guest is told, and which setting it is that says so."""

    status: int
    text: str
    limit: str


TOO_MANY = Excess(429, "too many connections of this instance", "connections_per_instance")
#: As any unknown caller: one that will be known in a moment tries again on 500, and only on that.
UNKNOWN = Excess(500, "pid not in container?", "connections_per_instance")
#: Not this instance's fault, and it passes.
_FULL = Excess(500, "temporarily unavailable, try again", "worker_connections")


class Shares:
    """The connections of a worker, by instance. ``None`` stands for all callers together that are in none."""

    def __init__(self, each: int, most: int, ended: Callable[[int | None], None]) -> None:
        """Args:
        each: how many an instance may have.
        most: how many there may be in all.
        ended: called with the instance whose connection was ended in favour of another's.
        """
        self._each = each
        self._most = most
        self._ended = ended
        self._held: dict[int | None, dict[Holder, None]] = {}
        self._count = 0
        self._lingering: Counter[int | None] = Counter()

    def enter(self, instance_id: int | None, holder: Holder, *, full: bool = False) -> Excess | None:
        """Count a connection of an instance; why not, if it may not be served.

        Args:
            instance_id: whose.
            holder: the connection.
            full: there is no room, though there may be fewer than `most`.
        """
        excess = self.excess(instance_id)
        if excess is not None:
            return excess
        count = len(self._held.get(instance_id, ()))
        if (full or self._count >= self._most) and not self.make_room(count + 1):
            return UNKNOWN if instance_id is None else _FULL
        self._held.setdefault(instance_id, {})[holder] = None
        self._count += 1
        return None

    def excess(self, instance_id: int | None) -> Excess | None:
        """Why an instance may have no more than it has; None if it may."""
        if len(self._held.get(instance_id, ())) < self._each:
            return None
        return UNKNOWN if instance_id is None else TOO_MANY

    def of_one(self) -> bool:
        """Whether all connections are of one instance."""
        return len(self._held) < 2

    def make_room(self, least: int) -> bool:
        """End a connection of whoever has most, if those are more than `least`; whether there was one."""
        greediest = max(self._held, key=lambda instance_id: len(self._held[instance_id]), default=None)
        held = self._held.get(greediest, {})
        if len(held) <= least:
            return False
        # They stand in the order in which they came. One that is idle may be closed at any time, as clients know.
        holder = next((holder for holder in held if holder.idle), None) or next(iter(held))
        self.leave(greediest, holder)
        holder.abort()
        self._ended(greediest)
        return True

    def leave(self, instance_id: int | None, holder: Holder) -> None:
        """The opposite of `enter`; once more does no harm."""
        held = self._held.get(instance_id, {})
        if holder in held:
            del held[holder]
            self._count -= 1
            if not held:
                del self._held[instance_id]

    def linger(self, instance_id: int | None) -> bool:
        """Whether a connection that was refused may wait for its client; if so, `lingered` is called afterwards."""
        if self._lingering[instance_id] >= _LINGERING:
            return False
        self._lingering[instance_id] += 1
        return True

    def lingered(self, instance_id: int | None) -> None:
        """The opposite of `linger`."""
        self._lingering[instance_id] -= 1
        if not self._lingering[instance_id]:
            del self._lingering[instance_id]
