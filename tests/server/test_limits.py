"""Limits of each instance in the real service: the guest gets 429, the operator a log line, others no disturbance."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.harness.containers import Container
from tests.harness.service import Service
from tests.harness.waiting import until
from tests.server.inside import Talk, asking, talk, talks

LARGE = 1 << 21


@pytest.fixture(scope="module")
def strict() -> Iterator[Service]:
    """A service of one worker with low limits for requests in a second and for unread responses."""
    toml = "[limits]\nrequests_per_second = 1\nrequests_burst = 30\nunsent_per_instance = 5000000\n"
    with Service(workers=1, toml=toml, dialects=["incus"]) as running:
        yield running


@pytest.fixture(scope="module")
def full() -> Iterator[Service]:
    """A service of one worker with twelve connections, eight for each instance."""
    toml = "[limits]\nconnections_per_instance = 8\n"
    with Service(workers=1, toml=toml, gunicorn="worker_connections = 12\n", dialects=["incus"]) as running:
        yield running


def is_open(guest: Talk) -> bool:
    """Return whether the server has neither sent anything nor closed the connection."""
    return not select.select([guest.socket], [], [], 0)[0]


def test_requests_per_second(strict: Service) -> None:
    """After its burst an instance gets 429 with Retry-After on any connection; another instance is answered."""
    with strict.container("often", {"user.foo": "bar"}) as often, strict.container("seldom") as seldom:
        statuses = [often.ask("/1.0/nowhere").status for _time in range(3)]
        with talk(often) as guest:
            for _time in range(27):
                statuses.append(guest.ask("/1.0/config/user.foo").status)
            # The same request again comes from the response cache; the bucket may have got a token meanwhile.
            again = (guest.ask("/1.0/config/user.foo") for _time in range(100))
            refused = next(response for response in again if response.status != 200)
        assert statuses == [404] * 3 + [200] * 27
        assert (refused.status, refused.text) == (429, "too many requests of this instance\n")
        assert refused.headers["retry-after"] == "1"
        assert often.ask("/").status == 429
        assert seldom.ask("/").status == 200
        until(lambda: "default/often: limit requests_per_second exceeded " in strict.log.read_text(), "a line")
        until(lambda: often.ask("/").status == 200, "a token")


def test_unread_answers(strict: Service) -> None:
    """An instance with megabytes of unread responses gets 429 until it reads them; another instance is answered."""
    with (
        strict.container("lazy", {"user.large": "x" * LARGE, "user.foo": "bar"}) as lazy,
        strict.container("eager", {"user.large": "x" * LARGE}) as eager,
        talks(lazy, 5) as guests,
    ):
        # From here on this response is in the cache.
        assert guests[3].ask("/1.0/config/user.foo").text == "bar"
        for guest in guests[:3]:
            guest.send(asking("/1.0/config/user.large"))
            # Wait for the first bytes, without reading them.
            guest.socket.recv(1, socket.MSG_PEEK)
        refused = guests[3]
        refused.send(asking("/1.0/config/user.foo"))
        assert refused.receive()[0].status == 429
        assert len(eager.ask("/1.0/config/user.large").body) == LARGE
        for guest in guests[:3]:
            assert len(guest.receive()[0].body) == LARGE
        assert guests[4].ask("/1.0/config/user.foo").text == "bar"


def test_unread_answers_of_another_user(strict: Service) -> None:
    """What a user whom a policy lets read a large key leaves unread keeps that user from answers, and root not."""
    with (
        strict.container("shared", {"user.large": "x" * LARGE, "user.foo": "bar"}) as shared,
        talks(shared, 4, user=1000) as others,
        talks(shared, 1) as (root,),
    ):
        strict.command("policy", "add", "user.large", "--instance", "shared", "--uid", "1000")
        for guest in others[:3]:
            guest.send(asking("/1.0/config/user.large"))
            guest.socket.recv(1, socket.MSG_PEEK)
        refused = others[3].ask("/1.0/config/user.large")
        assert (refused.status, refused.text) == (429, "this instance leaves too many answers unread\n")
        assert root.ask("/1.0/config/user.foo").text == "bar"
        assert len(root.ask("/1.0/config/user.large").body) == LARGE
        for guest in others[:3]:
            assert len(guest.receive()[0].body) == LARGE


def test_full_worker_admits_another_instance(full: Service) -> None:
    """When two instances hold all connections of a worker, a third is served; the greediest loses idle connections."""
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(full.container(name)) for name in ("one", "two", "three"))
        greedy = stack.enter_context(talks(first, 8))
        other = stack.enter_context(talks(second, 4))
        for guest in (*greedy, *other):
            assert guest.ask("/").status == 200
        # One of its connections is in the middle of a request.
        greedy[0].send(b"GET / HTTP/1.1\r\n")
        modest = stack.enter_context(talks(third, 2))
        for guest in modest:
            for _time in range(3):
                assert guest.ask("/").status == 200
        until(lambda: sum(is_open(guest) for guest in greedy) == 6, "two were ended")
        assert all(is_open(guest) for guest in other)
        greedy[0].send(b"Host: x\r\n\r\n")
        assert greedy[0].receive()[0].status == 200
        # The greediest instance itself gets no further connection.
        assert first.ask("/").status == 500
        until(lambda: "default/one: limit worker_connections exceeded " in full.log.read_text(), "a line")


@pytest.fixture
def short() -> Iterator[Service]:
    """A service of one worker with 150 descriptors."""
    running = Service(workers=1, dialects=["incus"], before=["prlimit", "--nofile=150:"])
    with running:
        yield running


def test_no_descriptors_left(short: Service) -> None:
    """When instances hold as many connections as the process has descriptors, another instance is still served."""
    before = short.workers
    with ExitStack() as stack:
        holding = [stack.enter_context(short.container(f"hold{number}")) for number in range(2)]
        other = stack.enter_context(short.container("other", {"user.foo": "bar"}))
        for one in holding:
            stack.enter_context(talks(one, 100))
        for _time in range(5):
            assert other.ask("/1.0/config/user.foo").text == "bar"
    assert short.workers == before
    assert "Traceback" not in short.log.read_text()


def test_descriptors_cannot_be_sent(c1: Container) -> None:
    """A kernel that can refuse it keeps a client from sending descriptors; its requests are answered."""
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    with talk(c1) as guest:
        if release >= (6, 16):
            with pytest.raises(PermissionError):
                socket.send_fds(guest.socket, [asking("/")], [0])
        assert guest.ask("/1.0/config/user.foo").text == "bar"
