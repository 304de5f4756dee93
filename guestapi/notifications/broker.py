"""Reads the change log and delivers each event to the subscriptions that it is for.

A subscription notes the id of the log's last entry when it is made, and receives every entry committed after it. It is
made before its client is answered, so the client misses nothing in between. What a resuming client missed earlier is
read from the log up to that same id, so nothing is sent twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from weakref import WeakValueDictionary

from guestapi.http.websocket import CloseCode
from guestapi.model import Notification
from guestapi.notifications.events import EncodedEvent
from guestapi.notifications.subscription import BATCH, ChangeLog, Subscription
from guestapi.notifications.waiting import Waiter, WaitingList

#: How many streams and waiting requests are checked at a time: about half a millisecond.
CHECKED_AT_ONCE = 512
#: The part of an instance's places that only its root may have: one in so many.
ROOT_PART = 8


class TooManySubscriptionsError(Exception):
    """The instance has as many subscriptions and waiting requests as it may have."""


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
