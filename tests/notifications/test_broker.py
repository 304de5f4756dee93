"""In any sequence of changes, killed workers and reconnections, a client misses no event without a gap."""

from __future__ import annotations

import gc
import json
import sqlite3
import tempfile
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from guestapi import settings
from guestapi.callers.namespaces import boot_id
from guestapi.model import Init
from guestapi.notifications import broker as broker_module
from guestapi.notifications import subscription as subscription_module
from guestapi.notifications.broker import CHECKED_AT_ONCE, Broker, TooManySubscriptionsError
from guestapi.notifications.events import EventFormat
from guestapi.notifications.subscription import BATCH, MISSED_BYTES, QUEUE_BYTES, Subscription
from guestapi.settings import Settings
from guestapi.store import steps
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.lookup import get_instance
from guestapi.store.reading import Reader
from guestapi.store.tables import BEGINNING_BYTES, PART_BYTES
from guestapi.store.writing import Writer


class ResumingClient:
    """A client that stores the last id, and resumes after it."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.last = first
        self.received: list[int] = []
        self.gaps: list[tuple[int, int]] = []
        self.subscription: Subscription | None = None
        self.broker: Broker | None = None

    def receive(self, data: bytes) -> None:
        """Take over events in the line-delimited form with ids."""
        for line in data.splitlines():
            event = json.loads(line)
            if event["type"] == "gap":
                self.gaps.append((event["metadata"]["since"], event["metadata"]["oldest"]))
            else:
                self.received.append(event["id"])
            self.last = event["id"]


class Queue(RuleBasedStateMachine):
    """Two instances, up to three workers that start and are killed, and clients that reconnect."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        url = f"sqlite:///{self.directory.name}/store.db"
        # Short, so that it is trimmed often.
        self.settings = Settings(store=settings.StoreSettings(url=url), events=settings.EventSettings(keep_entries=12))
        self.writer = Writer(self.settings, create=True)
        self.log = Reader(url)
        self.truth: dict[int, int] = {}
        self.brokers: list[Broker] = []
        self.clients: list[ResumingClient] = []
        self.value = 0

    def teardown(self) -> None:
        """Remove the store."""
        self.log.close()
        self.directory.cleanup()

    @initialize()
    def begin(self) -> None:
        """Start two instances."""
        with self.writer.change() as change:
            self.ids = []
            for number, name in enumerate(("a", "b"), 1):
                instance = steps.add(change, "default", name)
                steps.start(change, instance, Init(number, 1, boot_id(), number))
                self.ids.append(instance.id)
        self.note()

    def note(self) -> None:
        """Record the owner of each new entry before it can be trimmed."""
        for entry in self.log.entries(0, 1000).found:
            if entry.for_guest:
                self.truth[entry.id] = entry.instance_id

    @rule(which=st.integers(0, 1), keys=st.integers(1, 5))
    def change(self, which: int, keys: int) -> None:
        """Set some keys of an instance in one change."""
        self.value += 1
        with self.writer.change() as change:
            instance = get_instance(change, "default", "ab"[which])
            steps.configure(change, instance, {f"user.k{number}": str(self.value) for number in range(keys)})
        self.note()

    @rule()
    def abandoned_change(self) -> None:
        """Abort a change before it commits."""
        try:
            with self.writer.change() as change:
                steps.configure(change, get_instance(change, "default", "a"), {"user.never": "x"})
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass

    @precondition(lambda self: len(self.brokers) < 3)
    @rule()
    def worker_starts(self) -> None:
        """Start a worker."""
        self.brokers.append(Broker(Reader(self.settings.store.url), queue_limit=1000, subscriptions_per_instance=8))

    @precondition(lambda self: self.brokers)
    @rule(which=st.integers(0, 2))
    def worker_is_killed(self, which: int) -> None:
        """Kill a worker, with all its subscriptions and their queues."""
        broker = self.brokers.pop(which % len(self.brokers))
        for client in self.clients:
            if client.broker is broker:
                client.subscription = client.broker = None

    @precondition(lambda self: self.brokers)
    @rule(which=st.integers(0, 2), back=st.integers(0, 30))
    def client_comes(self, which: int, back: int) -> None:
        """Connect a new client that resumes after an older id."""
        broker = self.brokers[which % len(self.brokers)]
        client = ResumingClient(max(0, max(self.truth, default=0) - back))
        self.clients.append(client)
        self.connect(client, broker)

    @precondition(lambda self: self.brokers and self.clients)
    @rule(which=st.integers(0, 2), who=st.integers(0, 100))
    def client_reconnects(self, which: int, who: int) -> None:
        """Reconnect a client that has lost its worker."""
        client = self.clients[who % len(self.clients)]
        if client.subscription is None:
            self.connect(client, self.brokers[which % len(self.brokers)])

    def connect(self, client: ResumingClient, broker: Broker) -> None:
        """Subscribe, then send the missed events, as a stream does."""
        try:
            client.subscription = broker.subscribe(self.ids[0], None, client.last, lambda: None)
        except TooManySubscriptionsError:
            return
        client.broker = broker
        for events in client.subscription.missed():
            client.receive(b"".join(event.encode(EventFormat.LINES, with_id=True) for event in events))

    @precondition(lambda self: self.brokers)
    @rule(which=st.integers(0, 2))
    def worker_looks(self, which: int) -> None:
        """Ring the doorbell for one worker."""
        broker = self.brokers[which % len(self.brokers)]
        while broker.poll():
            pass
        for client in self.clients:
            if client.broker is broker and client.subscription is not None:
                events = client.subscription.pop()
                client.receive(b"".join(event.encode(EventFormat.LINES, with_id=True) for event in events))
                if client.subscription.closing is not None:
                    client.subscription.cancel()
                    client.subscription = client.broker = None

    @invariant()
    def each_event_once_in_order_or_a_gap(self) -> None:
        """Between its first and last id, a client has received each event of its instance once, or a gap."""
        for client in self.clients:
            assert client.received == sorted(set(client.received)), "a duplicate, or out of order"
            own = [number for number, owner in self.truth.items() if owner == self.ids[0]]
            for number in own:
                if client.first < number <= client.last and number not in client.received:
                    assert any(since < number < oldest for since, oldest in client.gaps), f"{number} is lost"
            assert set(client.received) <= set(own), "another instance's"


@pytest.fixture
def store(tmp_path: Path) -> Settings:
    """A store with one running instance, a, with id 1."""
    made = Settings(store=settings.StoreSettings(url=f"sqlite:///{tmp_path}/store.db"))
    with Writer(made, create=True).change() as change:
        steps.start(change, steps.add(change, "default", "a"), Init(1, 1, boot_id(), 1))
    return made


def set_key(store: Settings, value: str) -> None:
    """Change a key once."""
    with Writer(store).change() as change:
        steps.configure(change, get_instance(change, "default", "a"), {"user.k": value})


def values(subscription: Subscription) -> list[str]:
    """Return the values that the subscription received since the last call."""
    lines = [event.encode(EventFormat.LINES, with_id=subscription.with_id) for event in subscription.pop()]
    return [json.loads(line)["metadata"]["value"] for line in lines]


def test_registered_before_answered(store: Settings) -> None:
    """A subscription receives the changes committed after it was made, and none committed before."""
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    set_key(store, "before any")
    first = broker.subscribe(1, None, None, lambda: None)
    set_key(store, "between")
    second = broker.subscribe(1, None, None, lambda: None)
    set_key(store, "after")
    broker.poll()
    assert values(first) == ["between", "after"]
    assert values(second) == ["after"]


def test_types_are_filtered(store: Settings) -> None:
    """A subscription receives the requested types; an unknown type matches no event."""
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=9)
    wanted = [frozenset({"device"}), frozenset({"x"}), None]
    listeners = [broker.subscribe(1, types, None, lambda: None) for types in wanted]
    with Writer(store).change() as change:
        instance = steps.configure(change, get_instance(change, "default", "a"), {"user.k": "1"})
        steps.replace_devices(change, instance, {"d": {"type": "none"}})
    broker.poll()
    assert [[event.type for event in subscription.pop()] for subscription in listeners] == [
        ["device"],
        [],
        ["config", "device"],
    ]


def test_event_is_encoded_once(store: Settings) -> None:
    """Two subscriptions with the same format get the same bytes object."""
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    one, two = (broker.subscribe(1, None, None, lambda: None) for _number in range(2))
    set_key(store, "x")
    broker.poll()
    (first,), (second,) = one.pop(), two.pop()
    assert first.encode(EventFormat.WEBSOCKET, with_id=False) is second.encode(EventFormat.WEBSOCKET, with_id=False)


def test_missed_event_is_encoded_once(store: Settings) -> None:
    """Clients that resume at the same time, and one that receives the event live, get the same bytes object."""
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=3)
    live = broker.subscribe(1, None, 0, lambda: None)
    set_key(store, "x")
    broker.poll()
    (event,) = live.pop()
    written = event.encode(EventFormat.WEBSOCKET, with_id=True)
    for _number in range(2):
        late = broker.subscribe(1, None, event.id - 1, lambda: None)
        ((missed,),) = late.missed()
        assert missed.encode(EventFormat.WEBSOCKET, with_id=True) is written


def test_overrun_subscription(store: Settings) -> None:
    """A subscription with more waiting events than permitted is overrun; others are not."""
    broker = Broker(Reader(store.store.url), queue_limit=3, subscriptions_per_instance=2)
    slow, quick = (broker.subscribe(1, None, None, lambda: None) for _number in range(2))
    for number in range(4):
        assert not slow.overrun
        set_key(store, str(number))
        broker.poll()
        quick.pop()
    assert slow.overrun
    assert not quick.overrun


def test_limit_of_subscriptions(store: Settings) -> None:
    """A subscription beyond an instance's limit is refused until one is cancelled; each instance has its own limit."""
    broker = Broker(Reader(store.store.url), queue_limit=3, subscriptions_per_instance=2)
    first = broker.subscribe(1, None, None, lambda: None)
    broker.subscribe(1, None, None, lambda: None)
    with pytest.raises(TooManySubscriptionsError):
        broker.subscribe(1, None, None, lambda: None)
    broker.subscribe(2, None, None, lambda: None)
    first.cancel()
    first.cancel()
    broker.subscribe(1, None, None, lambda: None)
    assert len(broker) == 3


def test_authorization_is_repeated_after_a_change_of_state(store: Settings) -> None:
    """An entry that is not for the guest causes a new authorization; events before it are still delivered."""
    answers: list[int | None] = [None]
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    subscription = broker.subscribe(1, None, None, lambda: answers[0])
    set_key(store, "before")
    with Writer(store).change() as change:
        steps.configure(change, get_instance(change, "default", "a"), {"security.guestapi": "false"})
    set_key(store, "after")
    answers[0] = 1008
    broker.poll()
    assert subscription.closing == 1008
    assert values(subscription) == ["before"]


def test_worker_behind_a_trimmed_log(store: Settings) -> None:
    """A log that was trimmed beyond what a worker has read ends its streams, because they would miss events."""
    short = Settings(store=store.store, events=settings.EventSettings(keep_entries=5))
    broker = Broker(Reader(store.store.url), queue_limit=100, subscriptions_per_instance=2)
    subscription = broker.subscribe(1, None, None, lambda: None)
    for number in range(20):
        with Writer(short).change() as change:
            steps.configure(change, get_instance(change, "default", "a"), {"user.k": str(number)})
    broker.poll()
    assert subscription.closing == 1013


@pytest.mark.parametrize(("lost", "ended"), [(0, None), (1, 1013)])
def test_log_trimmed_up_to_the_position(store: Settings, lost: int, ended: int | None) -> None:
    """A worker that has read all trimmed entries keeps its streams; with one unread entry it ends them."""
    broker = Broker(Reader(store.store.url), queue_limit=100, subscriptions_per_instance=2)
    listener = broker.subscribe(1, None, None, lambda: None)
    set_key(store, "read")
    broker.poll()
    position = Reader(store.store.url).latest()
    for number in range(3):
        set_key(store, str(number))
    with closing(sqlite3.connect(database_file(store.store.url))) as connection, connection:
        connection.execute("DELETE FROM notifications WHERE id <= ?", (position + lost,))
    broker.poll()
    assert listener.closing == ended


@pytest.mark.parametrize(("short", "overrun"), [(0, False), (1, True)])
def test_bytes_that_may_wait(store: Settings, monkeypatch: pytest.MonkeyPatch, short: int, overrun: bool) -> None:
    """Exactly the permitted number of bytes may wait for a client, and not one more."""
    first, second = (Broker(Reader(store.store.url), queue_limit=100, subscriptions_per_instance=2) for _time in "ab")
    quick, slow = (broker.subscribe(1, None, None, lambda: None) for broker in (first, second))
    for number in range(3):
        set_key(store, str(number))
    first.poll()
    # The size of an event depends on the digits of its timestamp, so it is measured.
    waiting = sum(event.size for event in quick.pop())
    monkeypatch.setattr(subscription_module, "QUEUE_BYTES", waiting - short)
    second.poll()
    assert slow.overrun == overrun


def test_taken_events_wait_no_more(store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that a client has taken do not count any more; it takes what it can, and one event beyond that."""
    broker = Broker(Reader(store.store.url), queue_limit=100, subscriptions_per_instance=2)
    listener = broker.subscribe(1, None, None, lambda: None)
    monkeypatch.setattr(subscription_module, "QUEUE_BYTES", 8_000)
    for _time in range(2):
        for number in range(3):
            set_key(store, f"{number}" * 800)
        broker.poll()
        assert not listener.overrun
        events = [*listener.pop(0), *listener.pop()]
        assert 4_000 < sum(event.size for event in events) < 8_000
    for less, count in ((0, 2), (1, 1)):
        for number in range(3):
            set_key(store, f"{number}" * 800)
        broker.poll()
        size = listener._queue[0].size
        assert len(listener.pop(size - less)) == count
        listener.pop()


@pytest.mark.parametrize("how", ["replaced", "trimmed"])
def test_waiting_requests_after_a_break_of_the_log(store: Settings, how: str) -> None:
    """When the log is another one, or has lost entries that were not read, every waiting request looks again."""
    log = Reader(store.store.url)
    broker = Broker(log, queue_limit=10, subscriptions_per_instance=9)
    waiters = [
        broker.wait(number, key, lambda: None, lambda: True, was_set=True, seconds=100.0, after=log.latest())
        for number, key in ((1, "user.k"), (2, None))
    ]
    if how == "replaced":
        put_another(store, "foreign")
    else:
        for number in range(3):
            set_key(store, str(number))
        with closing(sqlite3.connect(database_file(store.store.url))) as connection, connection:
            connection.execute("DELETE FROM notifications")
        set_key(store, "last")
    broker.poll()
    assert all(waiter.due for waiter in waiters)


def test_instance_counts_as_alive(store: Settings) -> None:
    """Without a way to tell whether the init runs, it counts as running: nothing is decided again each second."""
    asked: list[int] = []
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=9)
    broker.subscribe(1, None, None, lambda: asked.append(1))
    assert list(broker.check_all()) == []
    assert asked == []


def test_event_larger_than_a_queue(store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that keeps up receives events larger than the limit of waiting bytes; one that does not is dropped."""
    monkeypatch.setattr(subscription_module, "QUEUE_BYTES", 1000)
    broker = Broker(Reader(store.store.url), queue_limit=100, subscriptions_per_instance=2)
    quick, slow = (broker.subscribe(1, None, None, lambda: None) for _number in range(2))
    for number in range(3):
        set_key(store, str(number) * 2000)
        broker.poll()
        (event,) = quick.pop()
        assert event.size > 2000
        assert not quick.overrun
        assert slow.overrun == (number > 0)


def test_large_events_wait_in_the_log(store: Settings) -> None:
    """What waits for a client of events that are larger than its queue may be is small: they stay in the log."""
    broker = Broker(Reader(store.store.url), queue_limit=100, subscriptions_per_instance=2)
    slow = broker.subscribe(1, None, 0, lambda: None)
    largest = ["\x01" * (1 << 21), "\x02" * (1 << 21)]
    for number in range(3):
        set_key(store, largest[number % 2])
        broker.poll()
    assert not slow.overrun
    events = slow.pop()
    assert sum(event.left_out for event in events) > QUEUE_BYTES
    assert sum(event.size for event in events) < 3 * (BEGINNING_BYTES + 1000)
    for event_format in EventFormat:
        before, after = events[2].around(event_format, with_id=True)
        content = b""
        while part := slow.read_part(events[2], len(content)):
            content += part
        text = before + content + after
        document = json.loads(text[text.index(b'{"type"') :])
        assert document["metadata"] == {"key": "user.k", "old_value": largest[1], "value": largest[0]}
        assert document["id"] == events[2].id
        if event_format is EventFormat.WEBSOCKET:
            # RFC 6455, section 5.2: a length of 64 bits.
            assert text[:2] == b"\x81\x7f"
            assert int.from_bytes(text[2:10]) == len(text) - 10


def test_events_are_taken_as_they_can_be_sent(store: Settings) -> None:
    """Who takes a part of the events leaves the others waiting, where they count."""
    broker = Broker(Reader(store.store.url), queue_limit=5, subscriptions_per_instance=1)
    listener = broker.subscribe(1, None, None, lambda: None)
    for number in range(5):
        set_key(store, str(number))
    broker.poll()
    first = listener.pop(1)
    assert [json.loads(event.encode(EventFormat.LINES, with_id=False))["metadata"]["value"] for event in first] == ["0"]
    for number in range(5, 7):
        set_key(store, str(number))
    broker.poll()
    assert listener.overrun
    assert values(listener) == ["1", "2", "3", "4", "5", "6"]


def test_what_a_resuming_client_missed_comes_in_small_batches(store: Settings) -> None:
    """A client that resumes over many entries of some size gets them as it takes them, not all at once."""
    for number in range(6):
        set_key(store, str(number) * 20_000)
    broker = Broker(Reader(store.store.url), queue_limit=5, subscriptions_per_instance=1)
    resumed = broker.subscribe(1, None, 0, lambda: None)
    sizes = [sum(event.size for event in batch) for batch in resumed.missed()]
    assert len(sizes) >= 3
    assert max(sizes) < MISSED_BYTES + PART_BYTES + 1000


def test_stream_is_woken(store: Settings) -> None:
    """A subscription wakes its stream at each event of its types, and once when it is closed."""
    broker = Broker(Reader(store.store.url), queue_limit=100, subscriptions_per_instance=2)
    woken: list[str] = []
    for kind in ("config", "device"):
        listener = broker.subscribe(1, frozenset({kind}), None, lambda: None)
        listener.wake = partial(woken.append, kind)
    set_key(store, "1")
    broker.poll()
    assert woken == ["config"]
    for _time in range(2):
        broker.close_all(1001)
    assert sorted(woken) == ["config", "config", "device"]


def test_log_that_begins_again(store: Settings) -> None:
    """A log with lower ids than before, in the same file, ends the streams, because their ids are invalid."""
    broker = Broker(Reader(store.store.url), queue_limit=100, subscriptions_per_instance=2)
    subscription = broker.subscribe(1, None, None, lambda: None)
    set_key(store, "before")
    broker.poll()
    with closing(sqlite3.connect(database_file(store.store.url))) as connection, connection:
        connection.execute("DELETE FROM notifications")
        connection.execute("DELETE FROM sqlite_sequence")
    broker.poll()
    assert subscription.closing == 1013


def heard_after(broker: Broker, store: Settings, name: str) -> list[str]:
    """Return the values that a new subscription receives after one change of this instance; it must stay open."""
    late = broker.subscribe(1, None, None, lambda: None)
    with Writer(store).change() as change:
        steps.configure(change, get_instance(change, "default", name), {"user.late": "late"})
    assert not broker.poll()
    assert late.closing is None
    return values(late)


@pytest.mark.parametrize("length", [1, 3 * BATCH])
def test_new_subscriptions_to_a_replaced_log(store: Settings, length: int) -> None:
    """A subscription that is made after the store was replaced receives the new log's events."""
    with Writer(store).change() as change:
        keys = {f"user.{number}": "1" for number in range(length)}
        steps.configure(change, get_instance(change, "default", "a"), keys)
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=9)
    ended = broker.subscribe(1, None, None, lambda: None)
    put_another(store, "foreign")
    assert not broker.poll()
    assert ended.closing == 1013
    assert heard_after(broker, store, "other") == ["late"]
    assert ended.pop() == []


def test_new_subscriptions_to_a_log_that_begins_again(store: Settings) -> None:
    """A subscription that is made after a log began again, in the same file, receives its events."""
    set_key(store, "before")
    broker = Broker(Reader(store.store.url), queue_limit=100, subscriptions_per_instance=9)
    ended = broker.subscribe(1, None, None, lambda: None)
    with closing(sqlite3.connect(database_file(store.store.url))) as connection, connection:
        connection.execute("DELETE FROM notifications")
        connection.execute("DELETE FROM sqlite_sequence")
    broker.poll()
    assert ended.closing == 1013
    assert heard_after(broker, store, "a") == ["late"]


def test_cancelling_twice(store: Settings) -> None:
    """A subscription can be cancelled twice, and frees one place."""
    broker = Broker(Reader(store.store.url), queue_limit=3, subscriptions_per_instance=1)
    only = broker.subscribe(1, None, None, lambda: None)
    only.cancel()
    only.cancel()
    assert len(broker) == 0
    assert not broker.poll()
    broker.subscribe(1, None, None, lambda: None)
    only.cancel()
    with pytest.raises(TooManySubscriptionsError):
        broker.subscribe(1, None, None, lambda: None)


def test_poll_without_new_entries(store: Settings) -> None:
    """A poll without new entries closes no subscription."""
    broker = Broker(Reader(store.store.url), queue_limit=3, subscriptions_per_instance=1)
    listener = broker.subscribe(1, None, None, lambda: None)
    for number in range(3):
        for _time in range(2):
            assert not broker.poll()
            assert (listener.closing, listener.pop()) == (None, [])
        set_key(store, str(number))
        broker.poll()
        assert (listener.closing, values(listener)) == (None, [str(number)])


def test_gap_of_a_foreign_id(store: Settings) -> None:
    """An id that the log has not reached is answered with a gap, then with all entries of the log."""
    set_key(store, "kept")
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    subscription = broker.subscribe(1, None, 10**9, lambda: None)
    events = [json.loads(e.encode(EventFormat.LINES, with_id=True)) for batch in subscription.missed() for e in batch]
    assert [event["type"] for event in events] == ["gap", "config"]
    assert events[0]["metadata"] == {"since": 10**9, "oldest": 1}
    assert events[0]["id"] == 0


def test_gap_of_a_foreign_id_in_a_trimmed_log(store: Settings) -> None:
    """A client with an id that the log has not reached is told of one gap, and then what the log still has."""
    for value in ("1", "2", "3"):
        set_key(store, value)
    last = Reader(store.store.url).latest()
    with closing(sqlite3.connect(database_file(store.store.url))) as connection, connection:
        connection.execute("DELETE FROM notifications WHERE id < ?", (last - 1,))
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    resumed = broker.subscribe(1, None, 10**9, lambda: None)
    found = [(event.id, event.type) for batch in resumed.missed() for event in batch]
    assert found == [(last - 2, "gap"), (last - 1, "config"), (last, "config")]


def test_gap_before_the_first_entry(store: Settings) -> None:
    """A client with an id that the log has not reached is told the log's very first entry, too."""
    with closing(sqlite3.connect(database_file(store.store.url))) as connection, connection:
        connection.execute("DELETE FROM notifications")
        connection.execute("DELETE FROM sqlite_sequence WHERE name = 'notifications'")
    set_key(store, "first")
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    resumed = broker.subscribe(1, None, 10**9, lambda: None)
    assert [(event.id, event.type) for batch in resumed.missed() for event in batch] == [(0, "gap"), (1, "config")]


def put_another(store: Settings, value: str) -> None:
    """Replace the store by another database, whose instance 1 is another one, with entries for some batches."""
    file = database_file(store.store.url)
    other = Settings(store=settings.StoreSettings(url=f"sqlite:///{file.with_name('other.db')}"))
    with Writer(other, create=True).change() as change:
        steps.start(change, steps.add(change, "default", "other"), Init(1001, 2, boot_id(), 2))
    with Writer(other).change() as change:
        keys = {f"user.{value}{number}": "1" for number in range(2 * BATCH)}
        steps.configure(change, get_instance(change, "default", "other"), keys)
    with closing(sqlite3.connect(file.with_name("other.db"))) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for suffix in ("-wal", "-shm"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)
    file.with_name("other.db").rename(file)


def test_missed_events_end_with_their_store(store: Settings) -> None:
    """A client that is still reading missed events when the store is replaced receives none of the new store."""
    with Writer(store).change() as change:
        steps.configure(
            change, get_instance(change, "default", "a"), {f"user.{number}": "1" for number in range(2 * BATCH)}
        )
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    subscription = broker.subscribe(1, None, 0, lambda: None)
    batches = subscription.missed()
    assert len(next(batches)) > 0
    put_another(store, "foreign")
    assert [event for batch in batches for event in batch] == []
    assert subscription.closing == 1013


def test_foreign_id_when_the_store_is_replaced(store: Settings) -> None:
    """A client with an id beyond the log's end receives nothing of a store that replaces the old one."""
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    listener = broker.subscribe(1, None, 10**9, lambda: None)
    put_another(store, "foreign")
    assert list(listener.missed()) == []
    assert listener.closing == 1013


def test_events_of_two_stores_are_distinct(store: Settings) -> None:
    """An event of the old store is not sent to others in place of one with the same id in the new store."""
    set_key(store, "first")
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    held = [event for batch in broker.subscribe(1, None, 0, lambda: None).missed() for event in batch]
    put_another(store, "foreign")
    again = [event for batch in broker.subscribe(1, None, 0, lambda: None).missed() for event in batch]
    assert {event.id for event in held} & {event.id for event in again}
    texts = [event.encode(EventFormat.LINES, with_id=True) for event in again]
    assert len(texts) == 2 * BATCH
    assert all(b"foreign" in text for text in texts)


def test_authorization_is_repeated_without_an_entry(store: Settings) -> None:
    """Each second, subscriptions whose init has ended or whose authorization failed are authorized again; no others."""
    asked: list[str] = []
    living = {"a": True, "b": True}
    faulty = [False]

    def may(name: str) -> int | None:
        asked.append(name)
        if faulty[0]:
            raise StoreError("cannot be read")
        return None if living[name] else 1001

    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    one, two = (broker.subscribe(1, None, None, partial(may, name), partial(living.__getitem__, name)) for name in "ab")
    assert list(broker.check_all()) == []
    assert asked == []
    living["a"] = False
    assert list(broker.check_all()) == []
    assert (asked, one.closing, two.closing) == (["a"], 1001, None)
    one.cancel()
    faulty[0] = True
    two.authorize()
    assert list(broker.check_all()) == []
    faulty[0] = False
    assert list(broker.check_all()) == []
    assert list(broker.check_all()) == []
    assert asked == ["a", "b", "b", "b"]


def test_regular_check_is_cut_into_slices(store: Settings) -> None:
    """The check of many streams and waiting requests pauses between instances, and leaves none out."""
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=CHECKED_AT_ONCE)
    asked: list[int] = []

    def is_alive(instance_id: int) -> bool:
        asked.append(instance_id)
        return True

    def hold(instance_id: int, count: int) -> None:
        for _one in range(count):
            broker.subscribe(instance_id, None, None, lambda: None, partial(is_alive, instance_id))

    for instance_id in range(1, 7):
        hold(instance_id, CHECKED_AT_ONCE // 2)
    for _slice in broker.check_all():
        assert len(asked) % CHECKED_AT_ONCE == 0, "instances are checked as a whole"
    assert Counter(asked) == dict.fromkeys(range(1, 7), CHECKED_AT_ONCE // 2)
    asked.clear()
    checking = broker.check_all()
    next(checking)
    assert len(asked) == CHECKED_AT_ONCE
    # What is added or cancelled meanwhile disturbs nothing.
    hold(7, 1)
    for subscription in list(vars(broker)["_subscriptions"][6]):
        subscription.cancel()
    for _slice in checking:
        pass
    assert set(asked) <= set(range(1, 7))
    assert {1, 2, 3, 4, 5} <= set(asked)


@pytest.mark.parametrize(
    ("kinds", "expected"), [({"stream"}, [3, 6]), ({"request"}, [3, 6]), ({"stream", "request"}, [4, 8, 12])]
)
def test_slice_of_the_regular_check(
    store: Settings, monkeypatch: pytest.MonkeyPatch, kinds: set[str], expected: list[int]
) -> None:
    """The check pauses when it has asked of so many, streams and waiting requests together, and asks of each once."""
    monkeypatch.setattr(broker_module, "CHECKED_AT_ONCE", 3)
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=9)
    checked: list[str] = []

    def is_alive(what: str) -> bool:
        checked.append(what)
        return True

    for number in range(1, 7):
        if "stream" in kinds:
            broker.subscribe(number, None, None, lambda: None, partial(is_alive, "stream"))
        if "request" in kinds:
            alive = partial(is_alive, "request")
            broker.wait(number, None, lambda: None, alive, was_set=False, seconds=100.0, after=broker.log.latest())
    assert [len(checked) for _slice in broker.check_all()] == expected
    assert Counter(checked) == dict.fromkeys(kinds, 6)


def test_documented_limits() -> None:
    """What waits for one client and what a resuming one is read at a time are as security.md states."""
    assert QUEUE_BYTES == 16 << 20
    assert MISSED_BYTES == 32 << 10
    assert (BATCH, CHECKED_AT_ONCE) == (64, 512)


def test_client_that_has_missed_nothing(store: Settings) -> None:
    """A client that resumes after the last entry of the log is sent neither a gap nor an event."""
    log = Reader(store.store.url)
    broker = Broker(log, queue_limit=10, subscriptions_per_instance=2)
    assert list(broker.subscribe(1, None, log.latest(), lambda: None).missed()) == []


@pytest.mark.parametrize(("lost", "kinds"), [(0, ["config"]), (1, ["gap"])])
def test_gap_begins_with_the_first_lost_entry(store: Settings, lost: int, kinds: list[str]) -> None:
    """A resuming client is sent a gap if one entry after its own was trimmed, and none if its own was the last one."""
    since = Reader(store.store.url).latest()
    set_key(store, "0")
    set_key(store, "1")
    with closing(sqlite3.connect(database_file(store.store.url))) as connection, connection:
        connection.execute("DELETE FROM notifications WHERE id <= ?", (since + lost,))
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    first = next(broker.subscribe(1, None, since, lambda: None).missed())
    assert [json.loads(event.encode(EventFormat.LINES, with_id=True))["type"] for event in first][:1] == kinds


def test_log_that_was_trimmed_to_nothing(store: Settings) -> None:
    """A stream that begins while the log is empty misses nothing, whatever the id of the next entry."""
    with closing(sqlite3.connect(database_file(store.store.url))) as connection, connection:
        connection.execute("DELETE FROM notifications")
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    listener = broker.subscribe(1, None, None, lambda: None)
    set_key(store, "next")
    broker.poll()
    assert (listener.closing, values(listener)) == (None, ["next"])


def test_first_close_code_counts(store: Settings) -> None:
    """A stream ends with the first code, wakes once, and receives nothing more."""
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    listener = broker.subscribe(1, None, None, lambda: None)
    woken: list[int | None] = []
    listener.wake = lambda: woken.append(listener.closing)
    listener.close(1008)
    listener.close(1013)
    set_key(store, "later")
    broker.poll()
    assert (listener.closing, woken, listener.pop()) == (1008, [1008], [])


def test_cancelled_subscriptions_leave_nothing(store: Settings) -> None:
    """Subscriptions are counted by instance; after the last one is cancelled, the instance has none."""
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    one, two, other = (broker.subscribe(number, None, None, lambda: None) for number in (1, 1, 2))
    assert (broker.sizes(), len(broker)) == ({1: 2, 2: 1}, 3)
    one.cancel()
    assert broker.sizes() == {1: 1, 2: 1}
    two.cancel()
    other.cancel()
    assert (broker.sizes(), len(broker)) == ({}, 0)


def test_deliveries_are_counted(store: Settings) -> None:
    """The broker counts an event once for each subscription, and has the time of the oldest entry read last."""
    log = Reader(store.store.url)
    broker = Broker(log, queue_limit=10, subscriptions_per_instance=2)
    for _number in range(2):
        broker.subscribe(1, None, None, lambda: None)

    def read() -> tuple[int, str | None]:
        broker.poll()
        return broker.delivered, broker.oldest_read

    before = log.latest()
    set_key(store, "1")
    set_key(store, "2")
    assert read() == (4, log.entries(before, 1).found[0].timestamp)
    assert read() == (4, None)


@pytest.mark.parametrize(("limit", "others"), [(16, 14), (24, 21), (4, 3)])
def test_root_has_places_of_its_own(store: Settings, limit: int, others: int) -> None:
    """Users other than root, if they are named as such, leave an eighth of an instance's places, but one at least."""
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=limit)

    def wait(**who: bool) -> None:
        broker.wait(1, None, lambda: None, lambda: True, was_set=False, seconds=1.0, after=0, **who)

    for _number in range(others):
        wait(root=False)
    with pytest.raises(TooManySubscriptionsError):
        wait(root=False)
    for _number in range(limit - others):
        wait()
    with pytest.raises(TooManySubscriptionsError):
        wait(root=True)


def test_waiter_that_comes_late(store: Settings) -> None:
    """A request that read the store before entries that are delivered already is due at once; others are not."""
    log = Reader(store.store.url)
    broker = Broker(log, queue_limit=10, subscriptions_per_instance=9)
    before = log.latest()
    broker.subscribe(1, None, None, lambda: None)
    set_key(store, "1")
    broker.poll()

    def due(after: int) -> bool:
        return broker.wait(1, None, lambda: None, lambda: True, was_set=False, seconds=1.0, after=after).due

    assert due(before)
    assert not due(before + 1)


def test_log_is_read_for_waiting_requests(store: Settings) -> None:
    """The log is read while only a request waits, from where it has read the store."""
    log = Reader(store.store.url)
    broker = Broker(log, queue_limit=10, subscriptions_per_instance=9)
    set_key(store, "1")
    waiter = broker.wait(1, "user.k", lambda: None, lambda: True, was_set=True, seconds=1.0, after=log.latest())
    broker.poll()
    assert not waiter.due
    set_key(store, "2")
    broker.poll()
    assert waiter.due


def test_missed_entries_are_freed_one_by_one(store: Settings) -> None:
    """A stream that sends what its client missed holds each entry by its event alone."""
    since = Reader(store.store.url).latest()
    set_key(store, "1" * 2 * PART_BYTES)
    broker = Broker(Reader(store.store.url), queue_limit=10, subscriptions_per_instance=2)
    (event,) = next(batches := broker.subscribe(1, None, since, lambda: None).missed())
    assert event.entry is not None
    assert not [holder for holder in gc.get_referrers(event.entry) if isinstance(holder, list)]
    assert list(batches) == []


# At the end, because it takes longest.
Queue.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
TestQueue = Queue.TestCase
