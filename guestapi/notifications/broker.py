"""Reads the change log and hands each event to the listeners that it is for.

A listener is registered with the id of the log's last entry at that moment, and hears whatever is committed after it:
it is registered before its client is answered, so nothing in between is lost. What a resuming client has missed before
is read from the log, up to that same id, so nothing is told twice at the seam.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol
from weakref import WeakValueDictionary

from guestapi.http.websocket import CloseCode
from guestapi.model import Notification
from guestapi.notifications.events import Event, gap
from guestapi.store.errors import StoreError
from guestapi.store.rows import LAST_ID, Entries

#: Entries that are read at a time.
BATCH = 256
#: Bytes of events that may wait for one listener: four of the largest, which have an old and a new value of 2 MiB.
QUEUE_BYTES = 16 * 1024 * 1024


class Log(Protocol):
    """The change log: `store.reading.Reader`."""

    @property
    def replaced(self) -> int:
        """Grows whenever the log is another one."""
        ...

    def latest(self) -> int:
        """As `Reader.latest`."""
        ...

    def entries(self, after: int, limit: int, *, instance_id: int | None = None, until: int = LAST_ID) -> Entries:
        """As `Reader.entries`."""
        ...


class TooManyListenersError(Exception):
    """The instance has as many listeners as it may."""


class Listener:
    """One client that listens to the events of one instance.

    Attributes:
        wake: called when there is something new in `pop` or in `closing`; set by whoever serves the listener.
        closing: why the stream is to be ended, as a WebSocket close code (RFC 6455, section 7.4.1); None: it goes on.
        overrun: it fell too far behind: end it, without a word.
    """

    __slots__ = (
        "_after",
        "_alive",
        "_broker",
        "_doubtful",
        "_may",
        "_queue",
        "_queued_bytes",
        "_replaced",
        "_since",
        "_types",
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
        may: Callable[[], int | None],
        alive: Callable[[], bool],
    ) -> None:
        self._broker = broker
        self._replaced = broker.log.replaced
        self.instance_id = instance_id
        self._types = types
        self._since = since
        self._after = after
        self._may = may
        self._alive = alive
        #: Whether it has to be asked again: the last time, nobody could tell.
        self._doubtful = False
        self._queue: deque[Event] = deque()
        self._queued_bytes = 0
        self.wake: Callable[[], None] = _nobody
        self.closing: int | None = None
        self.overrun = False

    @property
    def numbered(self) -> bool:
        """Whether the client can resume, so wants ids."""
        return self._since is not None

    def missed(self) -> Iterator[list[Event]]:
        """What a resuming client has missed, in batches read one at a time; a gap first if the log is too short.

        It ends early, and the stream is to be ended, if the log is another one by now: in that, the instance's number
        is somebody else's.

        Raises:
            StoreError: the log cannot be read.
        """
        if self._since is None:
            return
        position, log = self._since, self._broker.log
        if position > self._after:
            # The log has not come to that id: it is from another store, and says nothing about this one.
            oldest = log.entries(0, 1).oldest
            if self._is_another():
                return
            yield [gap(position, oldest)]
            position = max(oldest - 1, 0)
        while position < self._after:
            entries = log.entries(position, BATCH, instance_id=self.instance_id, until=self._after)
            if self._is_another():
                return
            # The log's ids have no holes, so what lies between was there and is not any more.
            if entries.oldest > position + 1:
                yield [gap(position, entries.oldest)]
            yield [event for event in map(self._broker.event, entries.found) if self._wants(event)]
            if not entries.more:
                return
            position = entries.found[-1].id

    def pop(self) -> list[Event]:
        """What has come in since the last call, in order."""
        events = list(self._queue)
        self._queue.clear()
        self._queued_bytes = 0
        return events

    def close(self, code: int) -> None:
        """Have the stream ended, with this WebSocket close code."""
        if self.closing is None:
            self.closing = code
            self.wake()

    def leave(self) -> None:
        """Listen no more."""
        self._broker.forget(self)

    def hear(self, event: Event) -> None:
        """An entry of the log about the listener's instance has been committed."""
        if event.id <= self._after:
            return
        if event.for_guest:
            if self._wants(event) and self.closing is None:
                self._queue.append(event)
                self._queued_bytes += event.size
                if len(self._queue) > self._broker.queue_limit or self._queued_bytes > QUEUE_BYTES:
                    self.overrun = True
                self.wake()
        else:
            self.ask()

    def ask(self) -> None:
        """Whether the client may still listen; if not, have the stream ended."""
        try:
            code = self._may()
        except StoreError:
            # It cannot be told now.
            self._doubtful = True
            return
        self._doubtful = False
        if code is not None:
            self.close(code)

    def check(self) -> None:
        """As `ask`, if there is a reason though the log has none: its init has ended, or nobody could tell before."""
        # PERF: of every listener, each second; whoever listens changes through the log, or ends.
        if self._doubtful or not self._alive():
            self.ask()

    def _is_another(self) -> bool:
        if self._broker.log.replaced == self._replaced:
            return False
        self.close(CloseCode.TRY_AGAIN_LATER)
        return True

    def _wants(self, event: Event) -> bool:
        return self._types is None or event.type in self._types


class Broker:
    """All listeners of a worker."""

    def __init__(self, log: Log, *, queue_limit: int, listeners_per_instance: int) -> None:
        """Args:
        log: the change log.
        queue_limit: how many events may wait for one listener.
        listeners_per_instance: how many listeners an instance may have.
        """
        self.log = log
        self.queue_limit = queue_limit
        self._limit = listeners_per_instance
        self._listeners: dict[int, set[Listener]] = {}
        self._position = 0
        self._replaced = 0
        #: Those that some listener still has to send, so that they are encoded once for all who do.
        #: By which log it is, and id.
        self._events: WeakValueDictionary[tuple[int, int], Event] = WeakValueDictionary()

    def subscribe(
        self,
        instance_id: int,
        types: frozenset[str] | None,
        since: int | None,
        may: Callable[[], int | None],
        alive: Callable[[], bool] = lambda: True,
    ) -> Listener:
        """Register a listener: from now on it hears everything.

        Args:
            instance_id: whose events.
            types: which types; None: all.
            since: the id after which the client wants to resume; None: it begins now.
            may: asked after each change that could end it: None, or the close code with which to end; StoreError if
                that cannot be told now.
            alive: asked each second: whether the init is there through which it may listen.

        Raises:
            TooManyListenersError: the instance has as many as it may.
            StoreError: the log cannot be read.
        """
        others = self._listeners.get(instance_id, set())
        if len(others) >= self._limit:
            raise TooManyListenersError
        after = self.log.latest()
        if not self._listeners:
            # Nobody has listened, so nobody has missed what was not read.
            self._position = after
            self._replaced = self.log.replaced
        listener = Listener(self, instance_id, types, since, after, may, alive)
        self._listeners.setdefault(instance_id, others).add(listener)
        return listener

    def forget(self, listener: Listener) -> None:
        """Take a listener away; once more does no harm."""
        others = self._listeners.get(listener.instance_id)
        if others is not None:
            others.discard(listener)
            if not others:
                del self._listeners[listener.instance_id]

    def look(self) -> bool:
        """Read one batch of what was committed since the last look, and hand it on; whether there may be more.

        Raises:
            StoreError: the log cannot be read; nothing was handed on, and the next look begins at the same place.
        """
        if not self._listeners:
            return False
        entries = self.log.entries(self._position, BATCH)
        if self.log.replaced != self._replaced or (not entries.found and self.log.latest() < self._position):
            # Another store lies there, or this one begins anew: its ids mean nothing to anybody who listens.
            self._replaced = self.log.replaced
            self._position = self.log.latest()
            self.end_all(CloseCode.TRY_AGAIN_LATER)
            return False
        if entries.oldest > self._position + 1 and self._position:
            # The log was trimmed faster than this worker has read it: nobody may believe to have heard everything.
            self.end_all(CloseCode.TRY_AGAIN_LATER)
        for entry in entries.found:
            listeners = self._listeners.get(entry.instance_id)
            if listeners:
                event = self.event(entry)
                for listener in tuple(listeners):
                    listener.hear(event)
            self._position = entry.id
        return entries.more

    def event(self, entry: Notification) -> Event:
        """The event of an entry of the log; the same one for all who have it to send at the same time."""
        key = (self.log.replaced, entry.id)
        event = self._events.get(key)
        if event is None:
            self._events[key] = event = Event(entry)
        return event

    def check_all(self) -> None:
        """Have every listener end that may not listen any more, though there was no entry in the log."""
        for listeners in tuple(self._listeners.values()):
            for listener in tuple(listeners):
                listener.check()

    def end_all(self, code: int) -> None:
        """Have all streams ended."""
        for listeners in tuple(self._listeners.values()):
            for listener in tuple(listeners):
                listener.close(code)

    def __len__(self) -> int:
        return sum(map(len, self._listeners.values()))


def _nobody() -> None:
    """Wakes nobody: the listener is not served yet."""
