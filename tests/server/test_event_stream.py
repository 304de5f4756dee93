"""A stream over a connection that a test plays: how much is sent at a time, who has a turn in between, how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestapi.callers.namespaces import boot_id
from guestapi.http.websocket import CloseCode, close_frame
from guestapi.model import Init
from guestapi.notifications.broker import Broker
from guestapi.notifications.events import EventFormat
from guestapi.notifications.subscription import Subscription
from guestapi.server.event_stream import EventStream, PingTimer
from guestapi.server.transport import DeadlineError
from guestapi.settings import Settings, StoreSettings
from guestapi.store import steps
from guestapi.store.errors import StoreError
from guestapi.store.lookup import get_instance
from guestapi.store.reading import Reader
from guestapi.store.tables import PART_BYTES
from guestapi.store.writing import Writer
from guestapi.wsgi import Handover

KIB = 1024
#: JSON writes a control character as six bytes: 24 MiB in an event that has this as old and new value.
LARGEST = ["\x01" * (1 << 21), "\x02" * (1 << 21)]


class Played:
    """A connection whose client takes everything at once, and ends when it has heard `until`."""

    def __init__(self, until: bytes) -> None:
        self.sent: list[bytes] = []
        #: What was done, in order: "send" or "turn".
        self.steps: list[str] = []
        #: Called at each turn with their number.
        self.on_turn: Callable[[int], None] = lambda _number: None
        self._until = until

    def send(self, head: bytes, content: bytes = b"", seconds: float | None = None) -> None:
        """Take it."""
        self.steps.append("send")
        self.sent.append(head + content)

    def give_way(self) -> None:
        """Let others have their turn."""
        self.steps.append("turn")
        self.on_turn(self.steps.count("turn"))

    def wait_readable(self) -> bool:
        """There is the client's end, as far as anybody can know before it is read."""
        return True

    def wake(self) -> None:
        """It never waits."""

    def read_available(self, size: int) -> bytes | None:
        """The end, once all was heard."""
        return b"" if any(self._until in data[-len(self._until) - 300 :] for data in self.sent[-2:]) else None

    def receive_within(self, seconds: float, size: int) -> bytes:
        """The end."""
        return b""

    def hurry(self, seconds: float) -> None:
        """It takes everything at once."""

    def abort(self) -> None:
        """It is never blocked."""
        raise AssertionError("it takes everything")


class Fixture:
    """A store with one instance that listens, and entries of its log."""

    def __init__(self, directory: Path) -> None:
        self.settings = Settings(store=StoreSettings(url=f"sqlite:///{directory}/store.db"))
        self.writer = Writer(self.settings, create=True)
        with self.writer.change() as change:
            steps.start(change, steps.add(change, "default", "a"), Init(1, 1, boot_id(), 1))
        self.log = Reader(self.settings.store.url)
        self.broker = Broker(self.log, queue_limit=100, subscriptions_per_instance=9)

    def change(self, **values: str) -> None:
        """Set keys of namespace ``user``, in one transaction."""
        with self.writer.change() as change:
            config = {f"user.{name}": value for name, value in values.items()}
            steps.configure(change, get_instance(change, "default", "a"), config)

    def subscribe(self, since: int | None = None) -> Subscription:
        """Listen."""
        return self.broker.subscribe(1, None, since, lambda: None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Fixture]:
    """A store of its own."""
    made = Fixture(tmp_path)
    yield made
    made.log.close()


def run(played: Played, subscription: Subscription, form: EventFormat = EventFormat.LINES) -> bytes:
    """Serve the stream until it ends; all that was sent after the head."""
    EventStream(played, Handover("200 OK", (), form, subscription), PingTimer(), 5.0).run()
    return b"".join(played.sent[1:])


def test_largest_events_are_sent_in_pieces(store: Fixture) -> None:
    """Of 24 MiB, at most 64 KiB are sent in a turn, to those who listen and to those who resume; all of it arrives."""
    live = store.subscribe()
    store.change(a=LARGEST[0])
    store.change(a=LARGEST[1], end="1")
    while store.broker.poll():
        pass
    assert not live.overrun
    for subscription in (live, store.subscribe(0)):
        played = Played(b"user.end")
        first, second, _end = run(played, subscription).splitlines()
        assert json.loads(first)["metadata"]["value"] == LARGEST[0]
        assert json.loads(second)["metadata"] == {"key": "user.a", "old_value": LARGEST[0], "value": LARGEST[1]}
        assert max(map(len, played.sent)) < PART_BYTES + 300
        assert played.steps.count("turn") >= (len(first) + len(second)) / PART_BYTES
        large = [number for number, data in enumerate(played.sent) if len(data) > PART_BYTES / 2]
        order = [number for number, step in enumerate(played.steps) if step == "send"]
        assert all("turn" in played.steps[order[one - 1] : order[one]] for one in large)


def test_what_a_stream_holds(store: Fixture) -> None:
    """While a client takes nothing, its stream holds no more than any connection may."""
    for number in range(40):
        store.change(a=str(number % 10) * (30 * KIB))
    held: list[int] = []

    class Stuck(Played):
        def send(self, head: bytes, content: bytes = b"", seconds: float | None = None) -> None:
            super().send(head, content)
            if len(self.sent) == 3:
                # What is in memory is what this is about.
                batch = store.broker._events.values()
                held.append(len(content) + sum(event.size for event in batch))
                raise DeadlineError

    run(Stuck(b"never"), store.subscribe(0))
    limits = store.settings.limits
    assert 0 < held[0] <= limits.head + 2 * limits.body


def test_event_that_is_gone_from_the_log(store: Fixture) -> None:
    """A client is told to come again if an event is gone before any of it was sent, else the connection just ends."""
    for turns, told, sent in ((1, True, 2), (3, False, 3)):
        store.change(a=LARGEST[told])
        subscription = store.subscribe(store.log.latest() - 1)
        played = Played(b"never")

        def forget(number: int, turns: int = turns) -> None:
            if number == turns:
                with store.writer.change() as change:
                    change.connection.execute("DELETE FROM notifications")

        played.on_turn = forget
        run(played, subscription, EventFormat.WEBSOCKET)
        assert played.sent[-1].endswith(close_frame(CloseCode.TRY_AGAIN_LATER)) is told
        assert len(played.sent) == sent


def test_store_that_fails_within_an_event(store: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is put into the middle of an event: no close frame, which would be taken for a part of it."""
    store.change(a=LARGEST[0])
    read = store.log.entry_part
    calls: list[int] = []

    def fail_later(entry: object, start: int) -> bytes | None:
        calls.append(start)
        if len(calls) == 3:
            raise StoreError("cannot be read")
        return read(entry, start)  # type: ignore[arg-type]  # handed on

    monkeypatch.setattr(store.log, "entry_part", fail_later)
    played = Played(b"never")
    run(played, store.subscribe(0), EventFormat.WEBSOCKET)
    assert len(played.sent) == 3
    assert b"\x88" not in played.sent[-1]


def test_end_within_a_large_event(store: Fixture) -> None:
    """A stream that must end does not send the rest of a large event for ever."""
    store.change(a=LARGEST[0])
    subscription = store.subscribe(0)
    played = Played(b"never")
    played.on_turn = lambda number: subscription.close(CloseCode.GOING_AWAY) if number == 2 else None
    clock = iter(range(1000))

    class ScriptedTime:
        @staticmethod
        def monotonic() -> float:
            return next(clock)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guestapi.server.event_stream.time", ScriptedTime)
        run(played, subscription)
    assert len(played.sent) <= 4


def test_client_that_is_too_slow_for_its_queue(store: Fixture) -> None:
    """Who is overrun while a large event is sent gets no more of it."""
    store.change(a=LARGEST[0])
    subscription = store.subscribe(0)
    played = Played(b"never")
    played.on_turn = lambda number: setattr(subscription, "overrun", number == 2)
    run(played, subscription)
    assert len(played.sent) == 2


def test_input_is_read_when_there_is_some(store: Fixture) -> None:
    """An event costs no look for input. A stream that never waits looks all the same, and so notices the end."""
    subscription = store.subscribe()
    changes = iter(range(20))

    class Slow(Played):
        reads = 0

        def wait_readable(self) -> bool:
            number = next(changes, None)
            if number is None:
                return True
            store.change(a=str(number))
            store.broker.poll()
            return False

        def read_available(self, size: int) -> bytes | None:
            self.reads += 1
            return b""

    slow = Slow(b"never")
    assert run(slow, subscription).count(b"user.a") == 20
    assert slow.reads == 1
    subscription.cancel()

    busy = store.subscribe()

    class Busy(Slow):
        def send(self, head: bytes, content: bytes = b"", seconds: float | None = None) -> None:
            super().send(head, content)
            assert len(self.sent) < 5, "its client has gone"
            store.change(a=f"busy {len(self.sent)}")
            store.broker.poll()

    run(Busy(b"never"), busy)
