"""Callers from unregistered containers: which connections wait, for how long, and how many at a time."""

from __future__ import annotations

import itertools
import select
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import gevent
import pytest
from gevent.event import Event
from hypothesis import given
from hypothesis import strategies as st

from guestapi.callers.credentials import Credentials, credentials
from guestapi.callers.identify import Caller, Identifier
from guestapi.model import SourceStatus
from guestapi.server import identification_retry
from guestapi.server.acceptor import admit
from guestapi.server.admission import Admission, ConnectionQuota
from guestapi.server.context import WorkerContext
from guestapi.server.identification_retry import IdentificationRetry, WaitingPlaces, _Waiting
from guestapi.settings import CallerSettings, LimitSettings
from guestapi.store.statuses import forget_source, record_status
from tests.harness.containers import Container, from_host, receive, request, send
from tests.harness.service import Service
from tests.harness.waiting import until
from tests.server.fakes import EmptyStore
from tests.server.inside import Talk, asking, talk, talks

#: The longest wait in seconds. LONG tells an immediate refusal from one after the wait on any machine.
LONG, SHORT = 10, 0.5


@contextmanager
def waits(seconds: float, places: int) -> Iterator[Service]:
    """A service of one worker on a host with a mirror, where this many callers may wait this long."""
    toml = f"[callers]\nwait_seconds = {seconds}\nwaiting = {places}\n"
    with Service(workers=1, toml=toml, dialects=["incus"]) as running:
        with running.writer.change() as change:
            record_status(change, SourceStatus("incus", "/s", True, 0.0, 0.0, ""))
        yield running


@pytest.fixture(scope="module")
def patient() -> Iterator[Service]:
    """A service where two callers may wait for `LONG` seconds."""
    with waits(LONG, 2) as running:
        yield running


def test_first_request_waits_for_registration(patient: Service) -> None:
    """A container that connects before its registration is answered as soon as it is registered."""
    with Container(patient.binds) as container, talk(container) as guest:
        guest.send(asking("/1.0/config/user.foo"))
        # There is no answer yet.
        assert not select.select([guest.socket], [], [], 0.3)[0]
        patient.add("late", container, {"user.foo": "bar"})
        (response,) = guest.receive()
    assert (response.status, response.text) == (200, "bar")


@pytest.mark.root
def test_unregistered_caller_is_refused_after_the_wait() -> None:
    """A container that is not registered in time gets 500, after which cloud-init tries again."""
    with waits(SHORT, 2) as hasty, Container(hasty.binds) as container:
        exchanged = container.exchange(send(request("/1.0")), receive())
    assert [(one.status, one.text) for one in exchanged.responses] == [(500, "pid not in container?\n")]
    assert exchanged.seconds >= SHORT


def test_host_does_not_wait(patient: Service) -> None:
    """A process of the host itself is refused at once, because it can never belong to an instance."""
    exchanged = from_host(patient.socket, send(request("/1.0")), receive())
    assert exchanged.responses[0].status == 500
    assert exchanged.seconds < LONG


def test_waiting_is_bounded(patient: Service) -> None:
    """Callers beyond the limit of waiting callers get 500 at once; registered callers are served meanwhile."""
    with (
        patient.container("known", {"user.foo": "bar"}) as known,
        Container(patient.binds) as container,
        talks(container, 5) as guests,
    ):
        for guest in guests:
            guest.send(asking("/1.0"))
        until(lambda: count_answered(guests) == 3, "three are refused at once")
        assert known.ask("/1.0/config/user.foo").text == "bar"
        assert count_answered(guests) == 3
        patient.add("known in the end", container)
        assert sorted(guest.receive()[0].status for guest in guests) == [200, 200, 500, 500, 500]
        patient.remove("known in the end")


def count_answered(guests: list[Talk]) -> int:
    """Return the number of connections with something to read."""
    return sum(bool(select.select([guest.socket], [], [], 0)[0]) for guest in guests)


def test_without_a_source_no_caller_waits(patient: Service) -> None:
    """Without a source that registers containers, an unregistered one is refused at once."""
    with patient.writer.change() as change:
        forget_source(change, "incus")
    with Container(patient.binds) as container:
        exchanged = container.exchange(send(request("/1.0")), receive())
    assert exchanged.responses[0].status == 500
    assert exchanged.seconds < LONG


class Place(NamedTuple):
    """A container and one of its waiting callers."""

    container: int
    waiting: _Waiting


def places(most: int, *containers: int) -> tuple[WaitingPlaces, list[Place]]:
    """Return places, and the ones that callers of these containers have taken, in this order."""
    made = WaitingPlaces(most)
    taken = []
    for container in containers:
        waiting = made.add(container)
        assert waiting is not None
        taken.append(Place(container, waiting))
    return made, taken


def evicted(taken: list[Place]) -> list[int]:
    """Return the indexes of the places that were evicted."""
    return [number for number, place in enumerate(taken) if place.waiting.evicted]


def test_one_container_may_take_all_places() -> None:
    """One container may take all places while no other needs one; a released place can be taken again."""
    made, taken = places(3, 1, 1, 1)
    assert made.add(1) is None
    made.remove(*taken[1])
    made.remove(*taken[1])
    assert len(made) == 2
    assert made.add(1) is not None
    assert made.add(1) is None
    assert evicted(taken) == []


def test_container_with_few_evicts_from_one_with_most() -> None:
    """A container evicts the longest waiting caller of the container with most, if that has at least two more."""
    made, taken = places(5, 1, 2, 1, 2, 1)
    assert made.add(3) is not None
    assert evicted(taken) == [0]
    # Now 1 and 2 have two places each and 3 has one: if they could evict, they would evict each other for ever.
    for container in (1, 2, 3):
        assert made.add(container) is None
    assert evicted(taken) == [0]
    assert made.add(4) is not None
    assert len(evicted(taken)) == 2
    # Removing an evicted place does not free another one.
    for place in taken:
        made.remove(*place)
    assert len(made) == 2


def test_containers_that_have_gone() -> None:
    """Of a container without a waiting caller nothing is kept, whether its callers left or were evicted."""
    made, taken = places(3, 1, 1, 2)
    assert made.add(3) is not None
    assert evicted(taken) == [0]
    for place in taken:
        made.remove(*place)
    assert list(vars(made)["_waiting"]) == [3]


def test_no_places() -> None:
    """With a limit of zero, no caller waits."""
    made, _taken = places(0)
    assert made.add(1) is None
    assert len(made) == 0


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=60), st.integers(0, 6))
def test_places_are_shared_out(steps: list[tuple[int, bool]], most: int) -> None:
    """The limit is never exceeded, and a container without a place is refused only if no container has two."""
    made = WaitingPlaces(most)
    taken: list[Place] = []
    for container, comes in steps:
        counts = Counter(place.container for place in taken)
        if comes:
            waiting = made.add(container)
            if waiting is None:
                assert len(taken) == most
                assert all(counts[other] <= counts[container] + 1 for other in counts)
            else:
                taken.append(Place(container, waiting))
        elif counts[container]:
            place = next(place for place in taken if place.container == container)
            made.remove(*place)
            taken.remove(place)
        taken = [place for place in taken if not place.waiting.evicted]
        assert len(made) == len(taken) <= most


@pytest.mark.root
def test_one_container_cannot_take_all_places() -> None:
    """A container that is never registered cannot keep others from waiting: each new container gets a place."""
    with waits(LONG, 8) as own, Container(own.binds) as greedy, ExitStack() as stack:
        fresh = [stack.enter_context(Container(own.binds)) for _number in range(6)]
        filling = stack.enter_context(talks(greedy, 40))
        for guest in filling:
            guest.send(asking("/1.0"))
        until(lambda: count_answered(filling) == 32, "eight wait, and the others are refused at once")
        steps = [send(request("/1.0/config/user.foo")), receive()]
        with ThreadPoolExecutor(6) as pool:
            exchanges = [pool.submit(container.exchange, *steps) for container in fresh]
            until(lambda: count_answered(filling) == 38, "each fresh container has taken one of the places")
            for number, container in enumerate(fresh):
                own.add(f"fresh{number}", container, {"user.foo": str(number)})
            answers = [exchange.result().responses[0] for exchange in exchanges]
        assert [(one.status, one.text) for one in answers] == [(200, str(number)) for number in range(6)]
        answered = [guest for guest in filling if count_answered([guest])]
        assert {guest.receive()[0].status for guest in answered} == {500}


class Endless(IdentificationRetry):
    """A retry that waits until the test ends it."""

    def __init__(self, identifier: Identifier) -> None:
        super().__init__(identifier, lambda: True, lambda: 0, CallerSettings())
        self.waiting, self.over = Event(), Event()

    def wait(self, _connection: socket.SocketType, caller: Caller) -> Caller:
        """Wait for the test."""
        self.waiting.set()
        self.over.wait()
        return caller


def test_waiting_connection_is_not_pending() -> None:
    """A connection that waits for registration is no longer pending, so its process can connect again."""
    identifier = Identifier(EmptyStore())
    retry = Endless(identifier)
    limits = LimitSettings(connections_per_instance=1)
    context = WorkerContext(
        lambda _environ, _start_response: [b""],
        identifier,
        limits,
        lambda _number: None,
        lambda _answer: None,
        lambda *_what: None,
        Admission(limits, ConnectionQuota(1, 2, lambda _instance_id: None), descriptors=20_000),
        multiprocess=False,
        retry=retry,
    )
    pairs = [socket.socketpair() for _number in range(3)]
    with gevent.Timeout(10):
        who = credentials(pairs[0][0])
        assert admit(pairs[0][0], who, "incus", context)
        assert not admit(pairs[1][0], who, "incus", context)
        retry.waiting.wait()
        assert admit(pairs[2][0], who, "incus", context)
        for _ours, theirs in pairs:
            theirs.close()
        retry.over.set()
        while context.connections:
            gevent.sleep(0.001)


class CountingIdentifier(Identifier):
    """An identifier that counts its calls, and finds an unregistered container."""

    def __init__(self) -> None:
        super().__init__(EmptyStore())
        self.looks = 0

    def identify(self, connection: socket.SocketType, who: Credentials) -> Caller:
        """Count the call."""
        self.looks += 1
        return Caller(who, container=1)


@pytest.mark.parametrize(("commits", "looks"), [(False, range(1, 2)), (True, range(4, 20))])
def test_identified_again_only_after_a_commit(commits: bool, looks: range) -> None:
    """A caller is identified again only after a commit, because that is expensive in nested namespaces."""
    versions = itertools.count() if commits else itertools.repeat(0)
    identifier = CountingIdentifier()
    retry = IdentificationRetry(identifier, lambda: True, lambda: next(versions), CallerSettings(wait_seconds=0.5))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        retry.wait(ours, Caller(Credentials(1, 0, 0), container=1))
    assert identifier.looks in looks


class _Stub(Identifier):
    """Gives one result after another, the last one again and again; counts how often it is asked."""

    def __init__(self, *results: Caller) -> None:
        self.results = results
        self.asked = 0

    def identify(self, connection: socket.SocketType, who: Credentials) -> Caller:
        """Return the next result."""
        self.asked += 1
        return self.results[min(self.asked, len(self.results)) - 1]


@pytest.mark.parametrize(
    ("results", "asked"),
    [
        (["unregistered", "unregistered", "registered"], 3),
        (["ended"], 1),
        (["unregistered", "ended"], 2),
        (["registered"], 1),
    ],
)
def test_waiting_ends_with_the_first_answer(results: list[str], asked: int) -> None:
    """Waiting ends as soon as the caller's instance is registered, or the caller has ended."""
    who = Credentials(1, 0, 0)
    callers = {
        "unregistered": Caller(who, container=5),
        "ended": Caller(who),
        "registered": Caller(who, instance_id=7, container=5),
    }
    stub, commits = _Stub(*(callers[name] for name in results)), itertools.count()
    retry = IdentificationRetry(stub, lambda: True, lambda: next(commits), CallerSettings(wait_seconds=60.0, waiting=1))
    with socket.socket() as connection:
        assert retry.wait(connection, callers["unregistered"]) is callers[results[-1]]
        assert stub.asked == asked
        # Its place is free again.
        assert retry.wait(connection, callers["unregistered"]) is callers[results[-1]]


def test_unchanged_store_is_not_asked_again() -> None:
    """As long as nobody commits, a waiting caller is not identified again."""
    who = Credentials(1, 0, 0)
    stub = _Stub(Caller(who, container=5))
    retry = IdentificationRetry(stub, lambda: True, lambda: 1, CallerSettings(wait_seconds=SHORT, waiting=1))
    with socket.socket() as connection:
        assert retry.wait(connection, Caller(who, container=5)).instance_id is None
    assert stub.asked == 1


def test_waiting_ends_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last look, at the very end of the time, there is none."""
    slept: list[float] = []
    monkeypatch.setattr(identification_retry, "time", SimpleNamespace(monotonic=lambda: len(slept)))
    monkeypatch.setattr(identification_retry, "gevent", SimpleNamespace(sleep=slept.append))
    who = Credentials(1, 0, 0)
    stub = _Stub(*[Caller(who, container=5)] * 4, Caller(who, instance_id=7, container=5))
    retry = IdentificationRetry(stub, lambda: True, lambda: len(slept), CallerSettings(wait_seconds=3.0, waiting=1))
    with socket.socket() as connection:
        assert retry.wait(connection, Caller(who, container=5)).instance_id is None
    assert stub.asked == len(slept) == 3
