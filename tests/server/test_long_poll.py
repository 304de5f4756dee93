"""Waiting requests in one process, without containers: which ones a change wakes, and their limits."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import gevent
import gevent.socket
import pytest

from guestapi.api.app import create
from guestapi.callers.credentials import Credentials
from guestapi.callers.identify import Caller, Identifier
from guestapi.model import KeyPolicy
from guestapi.notifications.waiting import WOKEN_AT_ONCE
from guestapi.server.admission import Admission, ConnectionQuota
from guestapi.server.connection import Connection
from guestapi.server.context import WorkerContext
from guestapi.server.store_thread import OffloadedStore
from guestapi.server.worker import _deliver
from guestapi.settings import LimitSettings, Settings, StoreSettings
from guestapi.store import policies, steps
from guestapi.store.lookup import get_instance
from guestapi.store.writing import Writer
from guestapi.wsgi import CALLER, Environ, StartResponse
from tests.api.fakes import INIT, ROOT, Mapped, StandIn
from tests.harness.agent import complete
from tests.harness.containers import Response, parse

KEY = "/1.0/guestapi/tree/config/user.a?wait=60"
TREE = "/1.0/guestapi/tree"


def settle(iterations: int = 10) -> None:
    """Let the worker do all that is ready. It takes some iterations of the event loop, however long each of them is."""
    for _ in range(iterations):
        gevent.sleep(0.0005)


class NextCaller(Identifier):
    """An identifier that identifies every caller as `next`."""

    def __init__(self, store: OffloadedStore) -> None:
        super().__init__(store)
        self.next: Caller

    def identify(self, connection: socket.SocketType, who: Credentials) -> Caller:
        """Return the caller."""
        return self.next

    def confirm(self, connection: socket.SocketType, caller: Caller) -> Caller:
        """Confirm the caller."""
        return caller


class PollingGuest:
    """A client of an instance."""

    def __init__(self, connection: gevent.socket.socket) -> None:
        self.socket = connection

    def send(self, path: str, *lines: str) -> None:
        """Send a request, and let the worker process it."""
        self.socket.sendall("\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode())
        settle()

    def receive(self) -> Response:
        """Receive one response."""
        data = b""
        with gevent.Timeout(10):
            while not complete(data, 1, "GET"):
                more = self.socket.recv(1 << 20)
                assert more, f"closed after {data!r}"
                data += more
        return parse(data)[0]

    def ask(self, path: str, *lines: str) -> Response:
        """Send a request and receive its response."""
        self.send(path, *lines)
        return self.receive()

    def has_answer(self) -> bool:
        """Return whether a response has arrived."""
        self.socket.setblocking(False)
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        finally:
            self.socket.setblocking(True)


class WorkerParts:
    """The parts of a worker; it delivers entries of the change log only when the test calls `deliver`."""

    def __init__(self, directory: Path) -> None:
        self.settings = Settings(
            store=StoreSettings(url=f"sqlite:///{directory}/store.db"), limits=LimitSettings(streams_per_instance=3)
        )
        self.writer = Writer(self.settings, create=True)
        self.store = OffloadedStore(self.settings)
        self.application = create(self.store, self.store.broker, self.settings.limits)
        #: The number of calls of the application, by instance.
        self.calls: Counter[int | None] = Counter()
        self.identifier = NextCaller(self.store)
        limits = replace_limits()
        self.context = WorkerContext(
            self._call,
            self.identifier,
            limits,
            self.store.instance,
            lambda _exchange: None,
            lambda *_what: None,
            Admission(limits, ConnectionQuota(5000, 5000, lambda _id: None), descriptors=20_000),
            multiprocess=False,
        )
        self.open = ExitStack()

    def _call(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        self.calls[environ[CALLER].instance_id] += 1
        return self.application(environ, start_response)

    def add(self, name: str, number: int = 0) -> Caller:
        """Add a running instance; return its root as a caller."""
        init = StandIn()
        init.init = replace(INIT, pid=INIT.pid + number)
        with self.writer.change() as change:
            added = steps.add(change, "default", name, init=init.init)
        return Caller(Credentials(1, ROOT, ROOT), added.id, added.run, init)

    def configure(self, name: str, **config: str) -> None:
        """Set keys below ``user.``."""
        with self.writer.change() as change:
            wanted = {f"user.{key}": value for key, value in config.items()}
            steps.configure(change, get_instance(change, "default", name), wanted)

    def connect(self, caller: Caller) -> PollingGuest:
        """Connect as this caller."""
        ours, theirs = socket.socketpair()
        self.identifier.next = caller
        Connection(self.context, ours, "incus", None).start()
        settle(3)
        return PollingGuest(self.open.enter_context(gevent.socket.socket(fileno=theirs.detach())))

    def deliver(self) -> bool:
        """Deliver one part of the change log, and let the woken requests be answered."""
        more = _deliver(self.store.broker)
        settle()
        return more

    def deliver_all(self) -> None:
        """Deliver the rest of the change log."""
        while self.deliver():
            pass


def replace_limits() -> LimitSettings:
    """Return limits with times that no test reaches."""
    return LimitSettings(idle_seconds=600, head_seconds=600, streams_per_instance=3)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerParts]:
    """A worker with a store of its own."""
    made = WorkerParts(tmp_path)
    with made.open:
        yield made
    with gevent.Timeout(10):
        while made.context.connections:
            gevent.sleep(0.001)
    assert len(made.store.broker.waiting) == 0, "an ended wait is still counted"


def test_change_wakes_only_its_requests(worker: WorkerParts) -> None:
    """A change of a key calls the application only for the requests that wait for this key or for the tree."""
    caller, stranger = worker.add("c1"), worker.add("c2", 1)
    key, other, tree, foreign = (worker.connect(one) for one in (caller, caller, caller, stranger))
    tag = tree.ask(TREE).headers["etag"]
    key.send(KEY)
    other.send(KEY.replace("user.a", "user.b"))
    tree.send(f"{TREE}?wait=60", f"If-None-Match: {tag}")
    foreign.send(KEY)
    worker.calls.clear()
    with worker.writer.change() as change:
        steps.configure(change, get_instance(change, "default", "c1"), {"limits.memory": "1GiB"})
    worker.deliver_all()
    assert not worker.calls, "no guest reads it"
    worker.configure("c1", a="1")
    worker.deliver_all()
    assert worker.calls == {caller.instance_id: 2}
    assert key.receive().text == "1"
    assert b'"user.a":"1"' in tree.receive().body
    assert not other.has_answer()
    assert not foreign.has_answer()
    worker.configure("c1", a="2")
    worker.deliver_all()
    assert worker.calls == {caller.instance_id: 2}


def test_change_back_to_the_same_content(worker: WorkerParts) -> None:
    """A request that is woken by a change back to its content keeps waiting until the next change."""
    caller = worker.add("c1")
    worker.configure("c1", a="1")
    guest = worker.connect(caller)
    tag = guest.ask(KEY).headers["etag"]
    guest.send(KEY, f"If-None-Match: {tag}")
    worker.configure("c1", a="2")
    worker.configure("c1", a="1")
    worker.deliver_all()
    assert not guest.has_answer()
    worker.configure("c1", a="3")
    worker.deliver_all()
    assert guest.receive().text == "3"


def test_mass_change_wakes_small_groups(worker: WorkerParts) -> None:
    """After one change for 300 waiting instances, another instance is answered between small groups of them."""
    callers = [worker.add(f"c{number}", number) for number in range(300)]
    guests = [worker.connect(caller) for caller in callers]
    bystander = worker.connect(worker.add("bystander", 1000))
    for guest in guests:
        guest.socket.sendall(f"GET {KEY} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    with gevent.Timeout(10):
        while len(worker.store.broker.waiting) < len(guests):
            gevent.sleep(0.001)
    with worker.writer.change() as change:
        for number in range(300):
            steps.configure(change, get_instance(change, "default", f"c{number}"), {"user.a": "1"})
    worker.calls.clear()
    rounds, more = 0, True
    while more:
        before = worker.calls.total()
        more = worker.deliver()
        assert worker.calls.total() - before <= WOKEN_AT_ONCE
        assert bystander.ask("/1.0").status == 200
        worker.calls[None] -= 1
        rounds += 1
    assert rounds >= 300 // WOKEN_AT_ONCE
    assert {guest.receive().text for guest in guests} == {"1"}


def test_limit_is_per_instance(worker: WorkerParts) -> None:
    """The limit of waiting requests is per instance; a request that ends frees its place."""
    caller, stranger = worker.add("c1"), worker.add("c2", 1)
    guests = [worker.connect(caller) for _number in range(4)]
    for guest in guests[:3]:
        guest.send(KEY)
    refused = guests[3].ask(KEY)
    assert (refused.status, refused.headers["retry-after"]) == (429, "10")
    worker.connect(stranger).send(KEY)
    assert len(worker.store.broker.waiting) == 4
    guests[0].socket.close()
    settle()
    guests[3].send(KEY)
    assert not guests[3].has_answer()
    assert len(worker.store.broker.waiting) == 4


def test_switched_off(worker: WorkerParts) -> None:
    """A wait ends with 403 if its instance is switched off, and with 500 if it stops."""
    first, second = worker.add("c1"), worker.add("c2", 1)
    one, other = worker.connect(first), worker.connect(second)
    one.send(KEY)
    other.send(KEY)
    with worker.writer.change() as change:
        steps.configure(change, get_instance(change, "default", "c1"), {"security.guestapi": "false"})
        steps.stop(change, get_instance(change, "default", "c2"))
    worker.deliver_all()
    assert (one.receive().status, other.receive().status) == (403, 500)


def test_dead_init(worker: WorkerParts) -> None:
    """A wait of an instance whose init has ended without notice ends at the next regular check."""
    caller = worker.add("c1")
    guest = worker.connect(caller)
    guest.send(KEY)
    assert isinstance(caller.init, StandIn)
    caller.init.living = False
    for _slice in worker.store.broker.check_all():
        pass
    worker.deliver_all()
    assert guest.receive().status == 500


def test_stop_answers_at_once(worker: WorkerParts) -> None:
    """A stopping worker answers each wait as after its time, and closes the connection."""
    caller = worker.add("c1")
    worker.configure("c1", a="1")
    known, unset = worker.connect(caller), worker.connect(caller)
    tag = known.ask(KEY).headers["etag"]
    known.send(KEY, f"If-None-Match: {tag}")
    unset.send(KEY.replace("user.a", "user.b"))
    worker.context.stopping = True
    for connection in list(worker.context.connections):
        connection.finish(after_last_requests=False)
    first, second = known.receive(), unset.receive()
    assert (first.status, second.status) == (304, 404)
    assert first.headers["connection"] == second.headers["connection"] == "close"


def test_waits_with_a_replaced_store(worker: WorkerParts, tmp_path: Path) -> None:
    """If another store replaces this one, waiting requests are answered from the new one."""
    caller = worker.add("c1")
    guest = worker.connect(caller)
    guest.send(KEY)
    (tmp_path / "other").mkdir()
    other = WorkerParts(tmp_path / "other")
    other.add("c1")
    other.configure("c1", a="from the other")
    for suffix in ("-wal", "-shm", ""):
        (tmp_path / f"store.db{suffix}").unlink(missing_ok=True)
    for suffix in ("-wal", ""):
        file = tmp_path / "other" / f"store.db{suffix}"
        if file.exists():
            file.rename(tmp_path / f"store.db{suffix}")
    worker.deliver_all()
    assert guest.receive().text == "from the other"


def put(worker: WorkerParts, policy: KeyPolicy, name: str | None = "c1") -> None:
    """Add a policy for an instance, or for the project."""
    with worker.writer.change() as change:
        found = None if name is None else get_instance(change, "default", name)
        policies.put(change, "default", found, policy)


@pytest.mark.parametrize("name", ["c1", None])
def test_policy_that_comes(worker: WorkerParts, name: str | None) -> None:
    """A new policy of an instance or its project applies to a cached response and to a waiting request."""
    caller = worker.add("c1")
    worker.configure("c1", a="hush")
    reader, waiting = worker.connect(caller), worker.connect(caller)
    tag = waiting.ask(KEY).headers["etag"]
    waiting.send(KEY, f"If-None-Match: {tag}")
    for _time in range(3):
        assert reader.ask("/1.0/config/user.a").text == "hush"
    put(worker, KeyPolicy("user.a", hidden=True), name)
    assert reader.ask("/1.0/config/user.a").status == 404
    worker.deliver_all()
    assert waiting.receive().status == 404


def test_one_waiting_request_gets_the_value(worker: WorkerParts) -> None:
    """Of three requests that wait for a key that is given once, one gets each value; the others continue to wait."""
    caller = worker.add("c1")
    put(worker, KeyPolicy("user.a", once=True))
    guests = [worker.connect(caller) for _number in range(3)]
    for guest in guests:
        guest.send(KEY)
    for value in ("hush", "again"):
        worker.configure("c1", a=value)
        with gevent.Timeout(10):
            while not (answered := [guest for guest in guests if guest.has_answer()]):
                worker.deliver_all()
        worker.deliver_all()
        assert [guest.receive().text for guest in answered] == [value]
        guests = [guest for guest in guests if guest not in answered]
        assert len(worker.store.broker.waiting) == len(guests)
    assert len(guests) == 1


def test_closed_connection_spends_nothing(worker: WorkerParts) -> None:
    """A client that closed its connection while it waited does not get the value of a key that is given once."""
    caller = worker.add("c1")
    put(worker, KeyPolicy("user.a", once=True))
    gone, other = worker.connect(caller), worker.connect(caller)
    gone.send(KEY)
    # Both happen before the worker looks.
    gone.socket.shutdown(socket.SHUT_RDWR)
    worker.configure("c1", a="hush")
    worker.deliver_all()
    assert other.ask("/1.0/config/user.a").text == "hush"


def test_other_users_leave_root_a_place(worker: WorkerParts) -> None:
    """A user that a policy names cannot take all places of an instance's waiting requests; root gets the last one."""
    root = worker.add("c1")
    put(worker, KeyPolicy("user.a", uids=frozenset({1000})))
    assert isinstance(root.init, StandIn)
    init = Mapped()
    init.init = root.init.init
    other = root._replace(credentials=Credentials(2, ROOT + 1000, ROOT + 1000), init=init)
    guests = [worker.connect(other) for _number in range(3)]
    for guest in guests[:2]:
        guest.send(KEY)
        assert not guest.has_answer()
    assert guests[2].ask(KEY).status == 429
    last = worker.connect(root)
    last.send(KEY)
    assert not last.has_answer()
