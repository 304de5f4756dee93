"""Our socket in the place of the daemon's: always there again, without a moment in which ours does not listen."""

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

#: Seconds until what must happen is given up.
PATIENCE = 10.0


@pytest.fixture
def place() -> Iterator[Path]:
    """The path of a daemon's guest socket, in a directory of its own; short enough for a socket's name."""
    directory = Path(tempfile.mkdtemp(prefix="guestapi-takeover-", dir="/tmp"))
    yield directory / "sock"
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def bind(path: Path) -> socket.socket:
    """A socket that listens at `path`, bound as the daemons do it: what is there is taken away first."""
    listening = socket.socket(socket.AF_UNIX)
    end = time.monotonic() + PATIENCE
    while True:
        path.unlink(missing_ok=True)
        try:
            listening.bind(str(path))
            break
        except OSError:
            # Ours came in between: this machine was so busy that we were taken for a daemon that has stopped.
            assert time.monotonic() < end
    listening.listen()
    return listening


def reaches(path: Path, listening: socket.socket) -> bool:
    """Whether who connects to `path` reaches this socket."""
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
    """Wait until it does."""
    end = time.monotonic() + PATIENCE
    while not reaches(path, listening):
        assert time.monotonic() < end, "our socket did not come back"


def start(ours: Path, path: Path) -> None:
    """Start a takeover; here nobody opens sockets anew."""
    threading.Thread(target=Takeover(ours, path, lambda: False).run, daemon=True).start()


@pytest.fixture
def ours(place: Path) -> Iterator[socket.socket]:
    """Our listening socket, which a running takeover keeps at the daemon's place."""
    path = place.with_name("guestapi.sock")
    with bind(path) as listening:
        start(path, place)
        yield listening


def test_ours_takes_the_place_of_the_daemons(place: Path, ours: socket.socket) -> None:
    """Whether the daemon was there first, starts again, or was killed: soon who connects reaches us."""
    for _start in range(3):
        with bind(place):
            until(place, ours)


def test_ours_comes_back_when_the_daemon_stops(place: Path, ours: socket.socket) -> None:
    """A daemon that stops takes away what lies at its path, though it is ours; it is put there again."""
    until(place, ours)
    place.unlink()
    until(place, ours)


def test_ours_waits_for_its_socket(place: Path) -> None:
    """Started before our socket is there, it leaves the daemon's alone, and puts ours in place when that comes."""
    path = place.with_name("guestapi.sock")
    with bind(place) as daemons:
        start(path, place)
        assert reaches(place, daemons)
        with bind(path) as ours:
            until(place, ours)


def test_nothing_of_it_is_left_behind(place: Path, ours: socket.socket) -> None:
    """After any number of turns there are two names in the directory: the daemon's and ours."""
    for _turn in range(5):
        bind(place).close()
        until(place, ours)
    assert sorted(path.name for path in place.parent.iterdir()) == ["guestapi.sock", "sock"]


def test_ours_is_opened_anew_once_its_directory_is_another(place: Path) -> None:
    """Ours is lost with the directory's file system: it is opened anew, when the daemon has its own there, and once."""
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
        (ours,) = opened
        assert takeover.put()
        assert reaches(place, ours)
    with ours:
        for lost in (path, place):
            lost.unlink()
    with bind(place):
        # It has helped a moment ago; to do it all the time would end everybody's connections all the time.
        assert not takeover.put()
    assert len(opened) == 1
