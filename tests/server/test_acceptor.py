"""`Acceptor`: how many connections it takes from the kernel's queue in an iteration of the event loop."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.hub import get_hub

from guestapi.server.acceptor import ACCEPTED_IN_FLOOD, Acceptor
from tests.harness.waiting import TIMEOUT


class RecordingAcceptor(Acceptor):
    """An acceptor that closes what it accepts, and records in which iteration it did."""

    def __init__(self, sock: socket.socket) -> None:
        context: Any = None
        super().__init__(sock, "incus", context)
        self.iterations: list[int] = []

    def serve(self, descriptor: int, *, flood: bool) -> bool:
        """Record the iteration."""
        os.close(descriptor)
        self.iterations.append(get_hub().loop.iteration)
        return False

    def wait(self, count: int) -> list[int]:
        """Wait until so many were accepted; return how many in each iteration that had any, and forget them."""
        with gevent.Timeout(TIMEOUT):
            while len(self.iterations) < count:
                gevent.sleep(0)
        found, self.iterations = self.iterations, []
        return list(Counter(found).values())


@contextmanager
def waiting(path: Path, count: int) -> Iterator[None]:
    """Let so many connections be in the kernel's queue."""
    with ExitStack() as stack:
        for _one in range(count):
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        yield


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[socket.socket, Path]]:
    """A listening socket, and its path."""
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(1000)
        sock.setblocking(False)
        yield sock, path


def test_a_long_queue_is_emptied_soon(listening: tuple[socket.socket, Path]) -> None:
    """Twice as many are accepted in each iteration, up to a bound: a queue of 500 is gone after a dozen iterations."""
    sock, path = listening
    acceptor = RecordingAcceptor(sock)
    with waiting(path, 500):
        accepted = acceptor.wait(500)
    assert accepted[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert max(accepted) == ACCEPTED_IN_FLOOD
    assert len(accepted) == 13
    acceptor.close()


def test_workers_share_what_comes_after_it(listening: tuple[socket.socket, Path]) -> None:
    """When the queue has been empty for some iterations, a worker takes one again, so that others get their share."""
    sock, path = listening
    acceptor = RecordingAcceptor(sock)
    with waiting(path, 200):
        acceptor.wait(200)
    until = get_hub().loop.iteration + 10
    while get_hub().loop.iteration < until:
        gevent.sleep(0)
    with waiting(path, 3):
        assert acceptor.wait(3) == [1, 2]
    acceptor.close()


def test_the_number_stays_near_what_comes(listening: tuple[socket.socket, Path]) -> None:
    """While sixteen come in each iteration, none of them is accepted more than some iterations later."""
    sock, path = listening
    acceptor = RecordingAcceptor(sock)
    most = 0
    with ExitStack() as stack:
        for iteration in range(1, 41):
            stack.enter_context(waiting(path, 16))
            # A timer: gevent runs callbacks in a row, without a look at sockets.
            gevent.sleep(1e-6)
            most = max(most, 16 * iteration - len(acceptor.iterations))
    assert most <= 16 * 6
    acceptor.close()
