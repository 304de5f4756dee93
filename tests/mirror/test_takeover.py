"""guestapi's socket in the place of the daemon's: it always returns there, and listens without interruption."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from guestapi.mirror.takeover import Takeover
from tests.harness.scratch import SCRATCH
from tests.harness.waiting import TIMEOUT


@pytest.fixture
def place() -> Iterator[Path]:
    """The path of a daemon's guest socket, in a directory of its own; short enough for a socket's address."""
    directory = Path(tempfile.mkdtemp(prefix="guestapi-takeover-", dir=SCRATCH))
    yield directory / "sock"
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def bind(path: Path) -> socket.socket:
    """Return a socket that listens at `path`, bound as the daemons do it: after the removal of an existing one."""
    listening = socket.socket(socket.AF_UNIX)
    end = time.monotonic() + TIMEOUT
    while True:
        path.unlink(missing_ok=True)
        try:
            listening.bind(str(path))
            break
        except OSError:
            # On a busy machine the takeover may put guestapi's socket there in between, as if the daemon had stopped.
            assert time.monotonic() < end
    listening.listen()
    return listening


def reaches(path: Path, listening: socket.socket) -> bool:
    """Return whether a connection to `path` arrives at this socket."""
    with closing(socket.socket(socket.AF_UNIX)) as guest:
        try:
            guest.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        listening.settimeout(0.05)
        try:
            listening.accept()[0].close()
        except TimeoutError:
            return False
        return True


def until(path: Path, listening: socket.socket) -> None:
    """Wait until connections to `path` arrive at this socket."""
    end = time.monotonic() + TIMEOUT
    while not reaches(path, listening):
        assert time.monotonic() < end, "our socket did not come back"


def start(own_socket: Path, path: Path) -> None:
    """Start a takeover without a function that opens sockets again."""
    threading.Thread(target=Takeover(own_socket, path, lambda: False).run, daemon=True).start()


@pytest.fixture
def own_socket(place: Path) -> Iterator[socket.socket]:
    """guestapi's listening socket, which a running takeover keeps in the daemon's place."""
    path = place.with_name("guestapi.sock")
    with bind(path) as listening:
        start(path, place)
        yield listening


def test_socket_replaces_the_daemons(place: Path, own_socket: socket.socket) -> None:
    """Whether the daemon was first, starts again or was killed: connections soon arrive at guestapi's socket."""
    for _start in range(3):
        with bind(place):
            until(place, own_socket)


def test_socket_returns_when_the_daemon_stops(place: Path, own_socket: socket.socket) -> None:
    """A daemon that stops removes the socket at its path, also guestapi's; the takeover puts it there again."""
    until(place, own_socket)
    place.unlink()
    until(place, own_socket)


def test_daemons_socket_stays_until_guestapis_exists(place: Path) -> None:
    """Without guestapi's socket the daemon's stays in place, until guestapi's exists."""
    path = place.with_name("guestapi.sock")
    with bind(place) as daemons:
        start(path, place)
        assert reaches(place, daemons)
        with bind(path) as own_socket:
            until(place, own_socket)


def test_takeover_leaves_no_files(place: Path, own_socket: socket.socket) -> None:
    """After any number of takeovers the directory has only the two sockets."""
    for _turn in range(5):
        bind(place).close()
        until(place, own_socket)
    assert sorted(path.name for path in place.parent.iterdir()) == ["guestapi.sock", "sock"]


def test_socket_is_reopened_once_in_a_new_directory(place: Path) -> None:
    """In a replaced directory, guestapi's socket is reopened once, after the daemon's own appears."""
    path = place.with_name("guestapi.sock")
    opened: list[socket.socket] = []

    def reopen() -> bool:
        assert place.exists(), "before the daemon"
        opened.append(bind(path))
        return True

    takeover = Takeover(path, place, reopen)
    assert not takeover.put()
    assert opened == []
    with bind(place):
        assert not takeover.put()
        (own_socket,) = opened
        assert takeover.put()
        assert reaches(place, own_socket)
    with own_socket:
        for lost in (path, place):
            lost.unlink()
    with bind(place):
        # It was reopened a moment ago; another reopening would end the connections again.
        assert not takeover.put()
    assert len(opened) == 1
