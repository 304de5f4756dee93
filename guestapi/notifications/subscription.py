"""One client that receives the events of one instance: what it has missed, what waits for it, and how it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from guestapi.http.websocket import CloseCode
from guestapi.model import Notification
from guestapi.notifications.events import EncodedEvent, gap_event
from guestapi.store.errors import StoreError
from guestapi.store.rows import ENTRIES_BYTES, LAST_ID, Entries

#: The types of events that only a client receives that names them: Incus and LXD have no such events.
NAMED_TYPES = frozenset({"attribute", "notice"})
#: How many entries are read at a time. Reading and encoding them takes less than 1 ms.
BATCH = 64
#: After how many bytes of entries it is enough for a client that resumes: what its stream holds is its own, so there
#: may be as much of it as there are streams.
MISSED_BYTES = 32 * 1024
#: The most bytes of events that may wait for one client, unless it is a single event.
QUEUE_BYTES = 16 * 1024 * 1024


class ChangeLog(Protocol):
    """The change log. `store.reading.Reader` implements it."""

    @property
    def replaced(self) -> int:
        """A number that grows whenever another log takes the place of this one."""
        ...

    def latest(self) -> int:
        """As `Reader.latest`."""
        ...

    def entries(
        self,
        after: int,
        limit: int,
        *,
        instance_id: int | None = None,
        until: int = LAST_ID,
        most_bytes: int = ENTRIES_BYTES,
    ) -> Entries:
        """As `Reader.entries`."""
        ...

    def entry_part(self, entry: Notification, start: int) -> bytes | None:
        """As `Reader.entry_part`."""
        ...


class SubscriptionBroker(Protocol):
    """What a subscription needs of its broker. `broker.Broker` implements it."""

    @property
    def log(self) -> ChangeLog:
        """The change log."""
        ...

    @property
    def queue_limit(self) -> int:
        """The most events that may wait for one client."""
        ...

    def encoded(self, entry: Notification) -> EncodedEvent:
        """As `Broker.encoded`."""
        ...

    def unsubscribe(self, subscription: Subscription) -> None:
        """As `Broker.unsubscribe`."""
        ...


class Subscription:
    """One client that receives the events of one instance.

    Attributes:
        instance_id: of that instance.
        wake: called when `pop` has something new or `closing` is set. Whoever serves the client sets it.
        closing: the `CloseCode` with which the stream must end; None while it may continue.
        overrun: whether the client fell too far behind. Its stream must end at once, without a close frame.
    """

    __slots__ = (
        "_after",
        "_authorize",
        "_broker",
        "_is_alive",
        "_log_number",
        "_queue",
        "_queued_bytes",
        "_since",
        "_types",
        "_unauthorized",
        "_view",
        "closing",
        "instance_id",
        "overrun",
        "wake",
    )

    def __init__(
        self,
        broker: SubscriptionBroker,
        instance_id: int,
        types: frozenset[str] | None,
        since: int | None,
        after: int,
        authorize: Callable[[], int | None],
        is_alive: Callable[[], bool],
        view: Callable[[EncodedEvent], EncodedEvent | None],
    ) -> None:
        self._view = view
        self._broker = broker
        self._log_number = broker.log.replaced
        self.instance_id = instance_id
        self._types = types
        self._since = since
        self._after = after
        self._authorize = authorize
        self._is_alive = is_alive
        #: The last authorization failed because the store could not be read, so it has to be repeated.
        self._unauthorized = False
        self._queue: deque[EncodedEvent] = deque()
        self._queued_bytes = 0
        self.wake: Callable[[], None] = _wake_nobody
        self.closing: int | None = None
        self.overrun = False

    @property
    def with_id(self) -> bool:
        """Whether the client reads ids, because it resumes."""
        return self._since is not None

    def missed(self) -> Iterator[list[EncodedEvent]]:
        """Read what a resuming client missed, one batch at a time.

        The first event is a gap if the log no longer has all of it. If another log takes the place of this one
        meanwhile, the iteration ends early and `closing` is set, because there the id means another instance.

        Yields:
            Events in order.

        Raises:
            StoreError: the log cannot be read.
        """
        if self._since is None:
            return
        position, log = self._since, self._broker.log
        if position > self._after:
            # The log has not reached that id, so the id is from another store and means nothing here.
            oldest = log.entries(0, 1).oldest
            if self._is_other_log():
                return
            yield [gap_event(position, oldest)]
            position = max(oldest - 1, 0)
        while position < self._after:
            entries = log.entries(
                position, BATCH, instance_id=self.instance_id, until=self._after, most_bytes=MISSED_BYTES
            )
            if self._is_other_log():
                return
            # The ids of the log have no holes, so the entries in between existed and were trimmed.
            if entries.oldest > position + 1:
                yield [gap_event(position, entries.oldest)]
            events = self._viewed(event for event in map(self._broker.encoded, entries.found) if self._wants(event))
            more = entries.more
            if more:
                position = entries.found[-1].id
            # Who takes the events frees them one by one.
            del entries
            yield events
            if not more:
                return

    def read_part(self, event: EncodedEvent, start: int) -> bytes | None:
        """Read a part of the metadata that was left out of an event.

        Args:
            event: the event.
            start: place of the part's first byte: 0, or where the part before ended.

        Returns:
            Bytes; None if the log does not have them any more.

        Raises:
            StoreError: the log cannot be read.
        """
        return None if event.entry is None else self._broker.log.entry_part(event.entry, start)

    def pop(self, most_bytes: int = QUEUE_BYTES) -> list[EncodedEvent]:
        """Remove and return events that came since the last call, in order, as the client may see them now.

        All others go on waiting. None is returned only if none waits.

        Args:
            most_bytes: after how many bytes it is enough.

        Raises:
            StoreError: what it may see cannot be read.
        """
        found: list[EncodedEvent] = []
        size = 0
        # PERF: local names. Each event of each stream comes through here.
        queue, view = self._queue, self._view
        while queue and size <= most_bytes:
            event = queue[0]
            if (seen := view(event)) is not None:
                found.append(seen)
            queue.popleft()
            if found:
                size += event.size
            self._queued_bytes -= event.size
        return found

    def close(self, code: int) -> None:
        """Ask for the stream to end with this `CloseCode`. The first code counts."""
        if self.closing is None:
            self.closing = code
            self.wake()

    def cancel(self) -> None:
        """Receive no more events."""
        self._broker.unsubscribe(self)

    def deliver(self, event: EncodedEvent) -> None:
        """Take an entry about the instance that was committed."""
        if event.id <= self._after:
            return
        if event.for_guest:
            if self._wants(event) and self.closing is None:
                self._queue.append(event)
                self._queued_bytes += event.size
                # A client that has taken everything before gets any event, however large it is.
                if len(self._queue) > self._broker.queue_limit or (
                    self._queued_bytes > QUEUE_BYTES and len(self._queue) > 1
                ):
                    self.overrun = True
                self.wake()
        else:
            # A switch was changed, or the instance started or stopped.
            self.authorize()

    def authorize(self) -> None:
        """Decide again whether the client may receive events; close the stream if not."""
        try:
            code = self._authorize()
        except StoreError:
            self._unauthorized = True
            return
        self._unauthorized = False
        if code is not None:
            self.close(code)

    def check(self) -> None:
        """Authorize again if the init ended or the last authorization failed. The log has no entry about either."""
        # PERF: called for every subscription each second. Whatever else changes has an entry in the log.
        if self._unauthorized or not self._is_alive():
            self.authorize()

    def _viewed(self, events: Iterable[EncodedEvent]) -> list[EncodedEvent]:
        return [seen for event in events if (seen := self._view(event)) is not None]

    def _is_other_log(self) -> bool:
        if self._broker.log.replaced == self._log_number:
            return False
        self.close(CloseCode.TRY_AGAIN_LATER)
        return True

    def _wants(self, event: EncodedEvent) -> bool:
        return event.type not in NAMED_TYPES if self._types is None else event.type in self._types


def _wake_nobody() -> None:
    """Stand in for `Subscription.wake` until somebody serves the subscription."""
