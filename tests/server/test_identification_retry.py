"""A caller whose instance is not known yet: who waits, for how long, and how many at a time."""

from __future__ import annotations

import itertools
import select
import socket
import threading
from collections.abc import Iterator

import gevent
import pytest
from gevent.event import Event

from guestapi.callers.credentials import Credentials
from guestapi.callers.identify import Caller, Identifier
from guestapi.model import Init, SourceStatus
from guestapi.server.acceptor import admit
from guestapi.server.admission import Admission, ConnectionQuota
from guestapi.server.connection import Connection
from guestapi.server.context import WorkerContext
from guestapi.server.identification_retry import IdentificationRetry
from guestapi.settings import CallerSettings, LimitSettings
from guestapi.store.statuses import forget_source, record_status
from tests.harness.containers import Container, Ran, from_host, receive, request, send
from tests.harness.service import Service
from tests.server.inside import asking, talk

#: Seconds; long enough to see who waits, and for whom it was not necessary.
WAIT = 1.5


@pytest.fixture(scope="module")
def patient() -> Iterator[Service]:
    """A service on a host with a mirror, with one worker, where two may wait."""
    toml = f"[callers]\nwait_seconds = {WAIT}\nwaiting = 2\n"
    with Service(workers=1, toml=toml, dialects=["incus"]) as running:
        with running.writer.change() as change:
            record_status(change, SourceStatus("incus", "/s", True, 0.0, 0.0, ""))
        yield running


def test_first_call_waits_to_be_known(patient: Service) -> None:
    """A container that calls before anybody has told of it gets its answer as soon as somebody has."""
    with Container(patient.binds) as container, talk(container) as guest:
        guest.send(asking("/1.0/config/user.foo"))
        # It is not told anything yet.
        assert not select.select([guest.socket], [], [], 0.3)[0]
        patient.add("late", container, {"user.foo": "bar"})
        (response,) = guest.receive()
    assert (response.status, response.text) == (200, "bar")


def test_unknown_caller_is_told_in_the_end(patient: Service) -> None:
    """A container that nobody tells of gets 500, on which cloud-init tries again, when its time is up."""
    with Container(patient.binds) as container:
        exchanged = container.exchange(send(request("/1.0")), receive())
    assert [(one.status, one.text) for one in exchanged.responses] == [(500, "pid not in container?\n")]
    assert exchanged.seconds >= WAIT


def test_host_does_not_wait(patient: Service) -> None:
    """A process of the host itself will never be in an instance, and is told so at once."""
    exchanged = from_host(patient.socket, send(request("/1.0")), receive())
    assert exchanged.responses[0].status == 500
    assert exchanged.seconds < WAIT


def test_waiting_is_bounded(patient: Service) -> None:
    """Of more callers than may wait, the others get 500 at once; who is known is served meanwhile."""
    with patient.container("known", {"user.foo": "bar"}) as known, Container(patient.binds) as container:
        connections = 5
        call = "curl -s -o /dev/null -w '%{http_code} %{time_total}\\n' --unix-socket /dev/incus/sock http://x/1.0"
        told: list[Ran] = []
        calls = threading.Thread(
            target=lambda: told.append(
                container.run("/bin/sh", "-c", f"for i in $(seq {connections}); do {call} & done; wait")
            )
        )
        calls.start()
        while calls.is_alive():
            assert known.ask("/1.0/config/user.foo").text == "bar"
        calls.join()
    results = [line.split() for line in told[0].out.splitlines()]
    assert [code for code, _seconds in results] == ["500"] * connections
    assert sum(float(seconds) >= WAIT for _code, seconds in results) == 2


def test_without_a_mirror_nobody_waits(patient: Service) -> None:
    """Where containers are registered before they start, an unknown one is told at once."""
    with patient.writer.change() as change:
        forget_source(change, "incus")
    with Container(patient.binds) as container:
        exchanged = container.exchange(send(request("/1.0")), receive())
    assert exchanged.responses[0].status == 500
    assert exchanged.seconds < WAIT


class Nobody:
    """Registrations of no instance."""

    def running_in(self, _namespace: int) -> list[tuple[int, int, Init]]:
        """None."""
        return []


class Endless(IdentificationRetry):
    """Waits for as long as it is let."""

    def __init__(self, identifier: Identifier) -> None:
        super().__init__(identifier, lambda: True, lambda: 0, CallerSettings())
        self.waiting, self.over = Event(), Event()

    def wait(self, _connection: socket.SocketType, caller: Caller) -> Caller:
        """As IdentificationRetry."""
        self.waiting.set()
        self.over.wait()
        return caller


def test_who_waits_is_not_pending() -> None:
    """A process of which so many connections as may come at a time wait to be known can make another one."""
    identifier = Identifier(Nobody())
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
        who = admit(pairs[0][0], "incus", context, flood=False)
        assert who is not None
        assert admit(pairs[1][0], "incus", context, flood=False) is None
        Connection(context, pairs[0][0], "incus", who).start()
        retry.waiting.wait()
        assert admit(pairs[2][0], "incus", context, flood=False) == who
        for _ours, theirs in pairs:
            theirs.close()
        retry.over.set()
        while context.connections:
            gevent.sleep(0.001)
        pairs[2][0].close()


class Counting(Identifier):
    """Counts how often it looks at a caller, who is in a container that nobody knows."""

    def __init__(self) -> None:
        super().__init__(Nobody())
        self.looks = 0

    def identify(self, connection: socket.SocketType, who: Credentials) -> Caller:
        """As Identifier."""
        self.looks += 1
        return Caller(who, contained=True)


@pytest.mark.parametrize(("commits", "looks"), [(False, range(1, 2)), (True, range(4, 20))])
def test_identified_again_only_after_a_commit(commits: bool, looks: range) -> None:
    """A look is dear for a caller deep in namespaces, so there is another one only when somebody has committed."""
    versions = itertools.count() if commits else itertools.repeat(0)
    identifier = Counting()
    retry = IdentificationRetry(identifier, lambda: True, lambda: next(versions), CallerSettings(wait_seconds=0.5))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        retry.wait(ours, Caller(Credentials(1, 0, 0), contained=True))
    assert identifier.looks in looks
