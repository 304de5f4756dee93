"""Reads the change log and delivers each event to the subscriptions that it is for.

A subscription notes the id of the log's last entry when it is made, and receives every entry committed after it. It is
made before its client is answered, so the client misses nothing in between. What a resuming client missed earlier is
read from the log up to that same id, so nothing is sent twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol
from weakref import WeakValueDictionary

from guestapi.http.websocket import CloseCode
from guestapi.model import Notification
from guestapi.notifications.events import EncodedEvent, gap_event
from guestapi.notifications.waiting import Waiter, WaitingList
from guestapi.store.errors import StoreError
from guestapi.store.rows import ENTRIES_BYTES, LAST_ID, Entries

#: The types of events that only a client receives that names them: Incus and LXD have no such events.
NAMED_TYPES = frozenset({"attribute", "notice"})
#: How many entries are read at a time. Reading and encoding them takes less than 1 ms.
BATCH = 64
#: After how many bytes of entries it is enough for a client that resumes: what its stream holds is its own, so there
#: may be as much of it as there are streams.
MISSED_BYTES = 32 * 1024
#: How many streams and waiting requests are checked at a time: about half a millisecond.
CHECKED_AT_ONCE = 512
#: The part of an instance's places that only its root may have: one in so many.
ROOT_PART = 8
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


class TooManySubscriptionsError(Exception):
    """The instance has as many subscriptions and waiting requests as it may have."""


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
        broker: Broker,
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


class Broker:
    """All subscriptions of a worker, and the requests that wait for a change.

    Attributes:
        log: the change log.
        queue_limit: the most events that may wait for one client.
        waiting: the waiting requests.
    """

    def __init__(self, log: ChangeLog, *, queue_limit: int, subscriptions_per_instance: int) -> None:
        """Make a broker without subscriptions.

        Args:
            log: the change log.
            queue_limit: the most events that may wait for one client.
            subscriptions_per_instance: the most subscriptions and waiting requests of an instance.
        """
        self.log = log
        self.waiting = WaitingList()
        self.queue_limit = queue_limit
        self._limit = subscriptions_per_instance
        self._subscriptions: dict[int, set[Subscription]] = {}
        self._position = 0
        self._log_number = 0
        #: How many events were given to subscriptions, and when the oldest entry was written that `poll` read last.
        self.delivered = 0
        self.oldest_read: str | None = None
        #: Events that some subscription still has to send, so that each is encoded once for all of them. The key is the
        #: number of the log and the id of the entry.
        self._events: WeakValueDictionary[tuple[int, int], EncodedEvent] = WeakValueDictionary()

    def subscribe(
        self,
        instance_id: int,
        types: frozenset[str] | None,
        since: int | None,
        authorize: Callable[[], int | None],
        is_alive: Callable[[], bool] = lambda: True,
        view: Callable[[EncodedEvent], EncodedEvent | None] = lambda event: event,
    ) -> Subscription:
        """Make a subscription. It receives every event from now on.

        Args:
            instance_id: whose events.
            types: which types; None for all.
            since: the id after which the client resumes; None to begin now.
            authorize: called after each change that could end the subscription. It returns None, or the `CloseCode`
                with which to end; it raises StoreError if the store cannot be read.
            is_alive: called each second: whether the instance's init still runs.
            view: called for each event when it is about to be sent. It returns the event as the client may see it, or
                None; it raises StoreError if the store cannot be read.

        Raises:
            TooManySubscriptionsError: the instance has as many as it may have.
            StoreError: the log cannot be read.
        """
        self._check_limit(instance_id)
        after = self.log.latest()
        self._begin(after)
        others = self._subscriptions.get(instance_id, set())
        subscription = Subscription(self, instance_id, types, since, after, authorize, is_alive, view)
        self._subscriptions.setdefault(instance_id, others).add(subscription)
        return subscription

    def wait(
        self,
        instance_id: int,
        key: str | None,
        authorize: Callable[[], int | None],
        is_alive: Callable[[], bool],
        *,
        was_set: bool,
        seconds: float,
        after: int,
        root: bool = True,
    ) -> Waiter:
        """Make a waiter.

        Args:
            instance_id: as `Waiter.instance_id`.
            key: as `Waiter.key`.
            authorize: as of `subscribe`.
            is_alive: as of `subscribe`.
            was_set: as `Waiter.was_set`.
            seconds: how long it waits.
            after: the id of the log's last entry at the moment at which there was nothing to answer.
            root: whether the instance's root waits. Other users leave root a part.

        Raises:
            TooManySubscriptionsError: the instance has as many as it may have.
        """
        self._check_limit(instance_id, 0 if root else max(1, self._limit // ROOT_PART))
        self._begin(after)
        waiter = Waiter(
            self.waiting, instance_id, key, authorize, is_alive, was_set=was_set, seconds=seconds, after=after
        )
        # Reading may have taken so long that later entries were delivered meanwhile.
        waiter.due = self._position > after
        self.waiting.add(waiter)
        return waiter

    def _check_limit(self, instance_id: int, left: int = 0) -> None:
        """Refuse one more if the instance has all that it may have but `left`."""
        if len(self._subscriptions.get(instance_id, ())) + self.waiting.count(instance_id) >= self._limit - left:
            raise TooManySubscriptionsError

    def _begin(self, after: int) -> None:
        """Begin to read the log after this id if nobody is there: then nobody has missed what was not read."""
        if not self._subscriptions and not self.waiting:
            self._position = after
            self._log_number = self.log.replaced

    def unsubscribe(self, subscription: Subscription) -> None:
        """Remove a subscription. Doing so twice is harmless."""
        others = self._subscriptions.get(subscription.instance_id)
        if others is not None:
            others.discard(subscription)
            if not others:
                del self._subscriptions[subscription.instance_id]

    def poll(self) -> bool:
        """Read one batch of entries committed since the last call, and deliver them.

        Returns:
            Whether there may be more.

        Raises:
            StoreError: the log cannot be read. Nothing was delivered, and the next call reads the same entries.
        """
        if not self._subscriptions and not self.waiting:
            return False
        entries = self.log.entries(self._position, BATCH)
        if self.log.replaced != self._log_number or (not entries.found and self.log.latest() < self._position):
            # Another store took the place of this one, or this one began anew: its ids mean other entries.
            self._log_number = self.log.replaced
            self._position = self.log.latest()
            self.close_all(CloseCode.TRY_AGAIN_LATER)
            self.waiting.deliver_to_all()
            return False
        if entries.oldest > self._position + 1 and self._position:
            # The log was trimmed faster than this worker read it, so every client may have missed something.
            self.close_all(CloseCode.TRY_AGAIN_LATER)
            self.waiting.deliver_to_all()
        self.oldest_read = entries.found[0].timestamp if entries.found else None
        for entry in entries.found:
            subscriptions = self._subscriptions.get(entry.instance_id)
            if subscriptions:
                event = self.encoded(entry)
                for subscription in tuple(subscriptions):
                    subscription.deliver(event)
                self.delivered += len(subscriptions)
            self.waiting.deliver(entry)
            self._position = entry.id
        return entries.more

    def encoded(self, entry: Notification) -> EncodedEvent:
        """Return the event of an entry: the same object for all subscriptions that have to send it now."""
        key = (self.log.replaced, entry.id)
        event = self._events.get(key)
        if event is None:
            self._events[key] = event = EncodedEvent(entry)
        return event

    def check_all(self) -> Iterator[None]:
        """Close the streams of clients that may no longer receive events, though the log has no entry about it.

        The same for requests that wait. There may be tens of thousands, so others have to be served in between.

        Yields:
            None, each time after about `CHECKED_AT_ONCE`.
        """
        checked = 0
        for instance_id in tuple(self._subscriptions.keys() | self.waiting.instances()):
            for subscription in tuple(self._subscriptions.get(instance_id, ())):
                subscription.check()
                checked += 1
            checked += self.waiting.check(instance_id)
            if checked >= CHECKED_AT_ONCE:
                checked = 0
                yield

    def close_all(self, code: int) -> None:
        """Close all streams with this `CloseCode`."""
        for subscription in self._all():
            subscription.close(code)

    def sizes(self) -> dict[int, int]:
        """The number of subscriptions of each instance that has one."""
        return {one: len(subscriptions) for one, subscriptions in self._subscriptions.items()}

    def __len__(self) -> int:
        """The number of subscriptions."""
        return sum(map(len, self._subscriptions.values()))

    def _all(self) -> list[Subscription]:
        return [subscription for subscriptions in self._subscriptions.values() for subscription in subscriptions]


def _wake_nobody() -> None:
    """Stand in for `Subscription.wake` until somebody serves the subscription."""
