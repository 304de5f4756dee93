"""Which connections and requests a worker admits. No I/O.

A connection is pending from accept until its instance is known; meanwhile it counts for its process. Then it counts for
its instance. When the worker has all the connections it may have, an instance with few gets one at the expense of the
instance with most, so that no instance can occupy a worker. In an instance, a part of what it may have is for its root
alone, so that none of its other users, who get no answers but refusals, keeps root from being answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from guestapi.callers.identify import Caller
from guestapi.http.errors import ProtocolError
from guestapi.rate_limit import RateLimit
from guestapi.settings import LimitSettings

#: The part of an instance's connections and requests that only its root may have: one in so many.
ROOT_PART = 8
#: How many refused connections of an instance may stay open until their clients have read why.
_MOST_LINGERING = 16
#: From this many pending connections on, each process may have only one, and the new ones of a container are counted.
_MANY_PENDING = 1024
#: The part of a worker's descriptors that pending connections may have: one in so many.
_PENDING_PART = 4
#: Descriptors that admitted connections leave free: for pending and lingering connections, namespaces and processes
#: that the worker looks at, image files, and the store.
_RESERVED_DESCRIPTORS = 64
#: Of these, descriptors that pending connections leave free: identifying a caller takes a few, and fails without.
_RESERVED_FROM_PENDING = 16


class EvictableConnection(Protocol):
    """A connection that can be ended in favour of another. `connection.Connection` implements it."""

    @property
    def idle(self) -> bool:
        """Whether it has no unanswered request, not even a part of one."""
        ...

    def abort(self) -> None:
        """End the connection."""
        ...


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a connection is not admitted.

    Attributes:
        status: HTTP status code of the answer.
        text: one line for the guest.
        limit: name of the setting that was exceeded.
    """

    status: int
    text: str
    limit: str


TOO_MANY_CONNECTIONS = Rejection(429, "too many connections of this instance", "connections_per_instance")
#: The answer to any unknown caller. A client whose instance is registered a moment later tries again on 500 alone.
UNKNOWN_CALLER = Rejection(500, "pid not in container?", "connections_per_instance")
#: Not the instance's fault, and temporary.
WORKER_FULL = Rejection(500, "temporarily unavailable, try again", "worker_connections")


class _Process:
    __slots__ = ("container", "identified", "instance_id", "pending")

    def __init__(self, container: int | None) -> None:
        self.container = container
        self.pending = 0
        self.identified = False
        self.instance_id: int | None = None


class PendingConnections:
    """Connections that were accepted, of which the instance is not known yet, by process.

    Identifying a caller takes longer than connecting, so a guest can have any number of connections waiting. If they
    waited in the kernel's queue, no other client could connect (connect(2), EAGAIN). So they are accepted at once and
    wait here. The kernel names their process at once. A process with more of them than an instance may have is refused
    without being identified.

    When there are very many, a container may add as many processes as there is room for still, and always as many as
    an instance may have connections. Few are refused so: a process that is refused connects again at once, and the
    kernel's queue is first come, first served for all, so its next connection would stand before another instance's.
    """

    def __init__(self, per_process: int, most: int = 0) -> None:
        """Begin with none.

        Args:
            per_process: the most pending connections of a process: as many as its instance may have.
            most: how many pending connections there is room for. When there are very many, containers share what is
                left of it.
        """
        self._per_process = per_process
        self._most = most
        self._processes: dict[int, _Process] = {}
        #: Processes of each container that were added when there were very many.
        self._containers: Counter[int] = Counter()
        self._count = 0

    def add(self, pid: int, get_container: Callable[[], int]) -> bool:
        """Count one more of process `pid`; return False if it, or its container, may have no more.

        Args:
            pid: the process.
            get_container: returns a number of its container. Called only when there are very many.
        """
        process = self._processes.get(pid)
        if process is None:
            container = get_container() if self._count >= _MANY_PENDING else None
            if container is not None:
                # With as many as there are places left, one container leaves half of them, and ten a tenth each.
                if self._containers[container] >= max(self._per_process, self._most - self._count):
                    return False
                self._containers[container] += 1
            process = self._processes[pid] = _Process(container)
        elif process.pending >= self._per_process or self._count >= _MANY_PENDING:
            return False
        process.pending += 1
        self._count += 1
        return True

    def remove(self, pid: int, caller: Caller | None) -> None:
        """Count one less of process `pid`.

        Args:
            pid: the process.
            caller: who it is; None if it was not identified.
        """
        process = self._processes[pid]
        if caller is not None:
            process.instance_id = caller.instance_id
            process.identified = True
        process.pending -= 1
        self._count -= 1
        if not process.pending:
            del self._processes[pid]
            if process.container is not None:
                self._containers[process.container] -= 1
                if not self._containers[process.container]:
                    del self._containers[process.container]

    def rejection(self, pid: int) -> tuple[int | None, Rejection]:
        """Return the instance of a process that `add` refused, as far as it is known, and why it was refused."""
        process = self._processes.get(pid)
        if process is None:
            # Its container has too many processes, and it is not known which instance that is.
            return None, WORKER_FULL
        unknown = process.identified and process.instance_id is None
        return process.instance_id, UNKNOWN_CALLER if unknown else TOO_MANY_CONNECTIONS


class ConnectionQuota:
    """The connections of a worker by instance. The id None stands for all unknown callers together."""

    def __init__(self, per_instance: int, most: int, on_eviction: Callable[[int | None], None]) -> None:
        """Begin with no connection.

        Args:
            per_instance: the most connections of an instance.
            most: the most connections in all.
            on_eviction: called with the instance whose connection was ended in favour of another instance's.
        """
        self._per_instance = per_instance
        self._most = most
        self._on_eviction = on_eviction
        self._others_per_instance = per_instance - per_instance // ROOT_PART
        self._held: dict[int | None, dict[EvictableConnection, None]] = {}
        #: Of these, the connections of users other than the instance's root.
        self._others: dict[int | None, dict[EvictableConnection, None]] = {}
        self._count = 0
        self._lingering: Counter[int | None] = Counter()

    def add(
        self, instance_id: int | None, connection: EvictableConnection, *, full: bool = False, root: bool = True
    ) -> Rejection | None:
        """Count a connection of an instance.

        Args:
            instance_id: whose.
            connection: to count.
            full: whether the worker is full although it may have fewer than ``most`` connections.
            root: whether it is of the instance's root. If not, it has fewer places, and an idle one is ended in favour
                of root's.

        Returns:
            None, or why it is not admitted.
        """
        if root and self.rejection(instance_id) is not None:
            self._evict_other(instance_id)
        rejection = self.rejection(instance_id, root=root)
        if rejection is not None:
            return rejection
        count = len(self._held.get(instance_id, ()))
        if (full or self._count >= self._most) and not self.evict(count + 1):
            return UNKNOWN_CALLER if instance_id is None else WORKER_FULL
        self._held.setdefault(instance_id, {})[connection] = None
        if not root:
            self._others.setdefault(instance_id, {})[connection] = None
        self._count += 1
        return None

    def remove(self, instance_id: int | None, connection: EvictableConnection) -> None:
        """Stop counting a connection. Doing so twice is harmless."""
        held = self._held.get(instance_id, {})
        if connection in held:
            del held[connection]
            self._count -= 1
            if not held:
                del self._held[instance_id]
            others = self._others.get(instance_id)
            if others is not None:
                others.pop(connection, None)
                if not others:
                    del self._others[instance_id]

    def sizes(self) -> dict[int, int]:
        """How many connections each instance has."""
        return {one: len(held) for one, held in self._held.items() if one is not None}

    def rejection(self, instance_id: int | None, *, root: bool = True) -> Rejection | None:
        """Tell why an instance, or its users other than root, may have no more connections; None if they may."""
        if len(self._held.get(instance_id, ())) < self._per_instance and (
            root or len(self._others.get(instance_id, ())) < self._others_per_instance
        ):
            return None
        return UNKNOWN_CALLER if instance_id is None else TOO_MANY_CONNECTIONS

    def _evict_other(self, instance_id: int | None) -> None:
        """End an idle connection of a user other than root, if the instance has one."""
        idle = next((one for one in self._others.get(instance_id, ()) if one.idle), None)
        if idle is not None:
            self.remove(instance_id, idle)
            idle.abort()

    def evict(self, least: int) -> bool:
        """End a connection of the instance that has most, if it has more than `least`.

        Returns:
            Whether there was one.
        """
        greediest = max(self._held, key=lambda instance_id: len(self._held[instance_id]), default=None)
        held = self._held.get(greediest, {})
        if len(held) <= least:
            return False
        # They are in the order in which they came. Clients know that an idle connection may be closed at any time.
        others = self._others.get(greediest, {})
        connection = (
            next((one for one in others if one.idle), None)
            or next((one for one in held if one.idle), None)
            or next(iter(others or held))
        )
        self.remove(greediest, connection)
        connection.abort()
        self._on_eviction(greediest)
        return True

    def begin_linger(self, instance_id: int | None) -> bool:
        """Tell whether a refused connection may stay open for its client. If so, `end_linger` has to follow."""
        if self._lingering[instance_id] >= _MOST_LINGERING:
            return False
        self._lingering[instance_id] += 1
        return True

    def end_linger(self, instance_id: int | None) -> None:
        """Undo `begin_linger`."""
        self._lingering[instance_id] -= 1
        if not self._lingering[instance_id]:
            del self._lingering[instance_id]


class Admission:
    """All that limits what a worker serves.

    Attributes:
        pending: connections whose instance is not known yet.
        quota: connections by instance.
        counts_requests: whether an instance may make so many requests in a second.
        unsent: bytes of responses that clients of an instance have not accepted yet, for those instances that have any.
    """

    def __init__(self, limits: LimitSettings, quota: ConnectionQuota, *, descriptors: int) -> None:
        """Begin with no connection.

        Args:
            limits: of each instance.
            quota: connections by instance.
            descriptors: how many descriptors the process may have (RLIMIT_NOFILE).
        """
        self.pending = PendingConnections(limits.connections_per_instance, descriptors // _PENDING_PART)
        self.quota = quota
        self._descriptors = descriptors - _RESERVED_DESCRIPTORS
        self._pending_descriptors = descriptors - _RESERVED_FROM_PENDING
        self._requests = (
            RateLimit(limits.requests_per_second, limits.requests_burst) if limits.requests_per_second else None
        )
        self.counts_requests = self._requests is not None
        self._root_burst = limits.requests_burst // ROOT_PART
        self._most_unsent = limits.unsent_per_instance
        self._root_unsent_part = limits.unsent_per_instance // ROOT_PART
        self.unsent: dict[int | None, int] = {}
        #: Of these, what root of the instance leaves unread.
        self._root_unsent: dict[int | None, int] = {}

    def add(
        self, instance_id: int | None, connection: EvictableConnection, descriptor: int, *, root: bool = True
    ) -> Rejection | None:
        """As `ConnectionQuota.add`. The worker is also full when it is about to run out of descriptors.

        Args:
            instance_id: whose.
            connection: to count.
            descriptor: of its socket. The kernel assigns the lowest free number (open(2)), so that many are in use.
            root: whether it is of the instance's root.
        """
        return self.quota.add(instance_id, connection, full=descriptor >= self._descriptors, root=root)

    def must_pause(self, descriptor: int) -> bool:
        """Tell whether accepting must pause after a connection with this descriptor, so that a few stay free."""
        return descriptor >= self._pending_descriptors

    def check_request(self, instance_id: int | None, *, root: bool = True) -> None:
        """Count a request of an instance.

        Args:
            instance_id: whose.
            root: whether it is of the instance's root. Other users leave root a part.

        Raises:
            ProtocolError: it sends too many requests, or leaves too much of earlier responses unread.
        """
        # Unknown callers get the same answer in any case.
        if (
            self._requests is not None
            and instance_id is not None
            and not self._requests.take(instance_id, 0 if root else self._root_burst)
        ):
            raise ProtocolError(429, "too many requests of this instance", "requests_per_second")
        self.check_unsent(instance_id, root=root)

    def check_unsent(self, instance_id: int | None, *, root: bool = True) -> None:
        """Refuse what would be sent to an instance that leaves much unread.

        Args:
            instance_id: whose.
            root: whether it is for the instance's root, for whom a part is kept, whatever other users leave unread.

        Raises:
            ProtocolError: it leaves too much of earlier responses unread.
        """
        unsent = self.unsent.get(instance_id, 0)
        if root:
            refused = unsent >= self._most_unsent and self._root_unsent.get(instance_id, 0) >= self._root_unsent_part
        else:
            refused = unsent >= self._most_unsent - self._root_unsent_part
        if refused:
            raise ProtocolError(429, "this instance leaves too many answers unread", "unsent_per_instance")

    def add_unsent(self, instance_id: int | None, size: int, *, root: bool = True) -> None:
        """Count bytes that begin to wait for a client of the instance, or with a negative size no longer wait."""
        for counts in (self.unsent, self._root_unsent) if root else (self.unsent,):
            if left := counts.get(instance_id, 0) + size:
                counts[instance_id] = left
            else:
                counts.pop(instance_id, None)
