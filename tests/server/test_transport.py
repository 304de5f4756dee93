"""How a transport waits for its client."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import gevent
import pytest

from guestapi.server.scheduler import FairScheduler, InstanceQueue
from guestapi.server.transport import DeadlineError, LateLooks, Transport


@contextmanager
def serving(task: Callable[[Transport, InstanceQueue], None]) -> Iterator[tuple[socket.socket, InstanceQueue]]:
    """Run a task in a greenlet of its own with one end of a connection; yield the other end, and the queue."""
    ours, theirs = socket.socketpair()
    transport = Transport(ours, 5.0)
    queue = FairScheduler().enter(1)

    def serve() -> None:
        transport.attach(queue)
        task(transport, queue)

    with gevent.Timeout(10), theirs:
        greenlet = gevent.spawn(serve)
        yield theirs, queue
        greenlet.get()
    transport.close()


def test_client_that_closes_at_once_needs_no_place() -> None:
    """Who has closed when the loop's iteration ends was never in the epoll set."""
    seen: list[tuple[int, bool]] = []
    looks = LateLooks()

    def task(transport: Transport, queue: InstanceQueue) -> None:
        transport.set_deadline(5)
        seen.append((transport.receive_late(looks), bool(queue._resume)))

    with serving(task) as (theirs, _queue):
        theirs.close()
    assert seen == [(0, False)]


def test_client_that_goes_on_waits_for_its_turn() -> None:
    """What has come by then is received, after others have had their turn."""
    seen: list[object] = []
    looks = LateLooks()

    def task(transport: Transport, queue: InstanceQueue) -> None:
        transport.set_deadline(5)
        queue.requeue(lambda: seen.append("another"))
        seen.append(transport.receive_late(looks))
        seen.append(transport.received)

    with serving(task) as (theirs, _queue):
        theirs.sendall(b"more")
    assert seen == ["another", 4, b"more"]


@pytest.mark.parametrize("later", [b"later", b""])
def test_client_that_waits(later: bytes) -> None:
    """Who does nothing meanwhile is waited for, as with `receive`."""
    seen: list[int] = []
    looks = LateLooks()

    def task(transport: Transport, _queue: InstanceQueue) -> None:
        transport.set_deadline(5)
        seen.append(transport.receive_late(looks))

    with serving(task) as (theirs, queue):
        while not queue._resume:
            gevent.sleep(0.001)
        assert seen == []
        if later:
            theirs.sendall(later)
        else:
            theirs.close()
    assert seen == [len(later)]


@pytest.mark.parametrize("late", [True, False])
def test_deadline(late: bool) -> None:
    """A deadline that was set before a wait ends it, in both ways to receive."""
    looks = LateLooks()

    def task(transport: Transport, _queue: InstanceQueue) -> None:
        receive = partial(transport.receive_late, looks) if late else transport.receive
        transport.set_deadline(0.01)
        with pytest.raises(DeadlineError):
            receive()

    with serving(task):
        pass


def test_no_timer_without_a_wait() -> None:
    """A deadline costs no timer until something is waited for, and one timer for all waits with later deadlines."""
    timers: list[object] = []

    def task(transport: Transport, _queue: InstanceQueue) -> None:
        for _time in range(3):
            transport.set_deadline(5)
        timers.append(transport._timer)
        for seconds in (5, 6, 7):
            transport.set_deadline(seconds)
            transport.receive()
            timers.append(transport._timer)

    with serving(task) as (theirs, _queue):
        for number in range(3):
            theirs.sendall(b"x")
            while len(timers) < 2 + number:
                gevent.sleep(0.001)
    assert timers[0] is None
    assert timers[1] is not None
    assert timers[1] is timers[2] is timers[3]


def test_wait_without_a_deadline_forgets_the_last_one() -> None:
    """A stream that waits for events has no deadline, even if there was one before."""
    seen: list[bool] = []

    def task(transport: Transport, _queue: InstanceQueue) -> None:
        transport.set_deadline(0.01)
        seen.append(transport.wait_readable())

    with serving(task) as (theirs, _queue):
        gevent.sleep(0.1)
        theirs.sendall(b"x")
    assert seen == [True]
