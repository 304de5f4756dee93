"""The doorbell's socket: truncated, malformed or oversized rings get an error in time, and delay no other ring."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from selectors import DefaultSelector

import pytest

from guestapi.sources import doorbell
from guestapi.sources.doorbell import DoorbellCaller, DoorbellServer, Ring, RingError, parse
from tests.harness.waiting import TIMEOUT


class RunningServer:
    """A doorbell server in a thread, which records each ring and answers it with ok."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rings: list[Ring] = []
        self._selector = DefaultSelector()
        self.spoilt = 0
        self.server = DoorbellServer(self._selector, path, self._rung, self._spoil)
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _rung(self, ring: Ring, caller: DoorbellCaller) -> None:
        self.rings.append(ring)
        caller.answer()

    def _spoil(self) -> None:
        self.spoilt += 1

    def _run(self) -> None:
        while not self._ended:
            for key, _events in self._selector.select(0.05):
                key.data()
            self.server.tidy()

    def close(self) -> None:
        """Stop the server."""
        self._ended = True
        self._thread.join()
        self.server.close()

    def send(self, *parts: bytes, hang_up: bool = True) -> bytes:
        """Send these parts on a connection; return the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(str(self.path))
            for part in parts:
                try:
                    connection.sendall(part)
                except BrokenPipeError:
                    break  # The server has read enough.
            if hang_up:
                try:
                    connection.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # The server has closed the connection already.
            answer = b""
            try:
                while part := connection.recv(4096):
                    answer += part
            except ConnectionResetError:
                pass  # The server has not read everything.
            return answer


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningServer]:
    """A running doorbell server."""
    one = RunningServer(tmp_path / "doorbells" / "lxc.sock")
    yield one
    one.close()


GOOD = b"1\0lxc\0aweb\0eLXC_PID=5\0eLXC_NAME=web\0hinside.example\0\0"


@pytest.mark.root
def test_ring(running: RunningServer) -> None:
    """A ring that arrives in pieces of any size is one ring; only root can connect to the socket."""
    assert running.send(*(GOOD[at : at + 1] for at in range(len(GOOD)))) == b"ok\n"
    assert running.rings == [Ring("lxc", ("web",), {"LXC_PID": "5", "LXC_NAME": "web"}, b"", "inside.example")]
    assert running.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.root
@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (GOOD[:-1], "cut off"),
        (GOOD[:20], "cut off"),
        (b"GET / HTTP/1.1\r\n\r\n", "cut off"),
        (b"\0\0", "version 1"),
        (b"2\0lxc\0\0", "version 1"),
        (b"1\0podman\0\0", "'podman' has rung"),
        (b"1\0lxc\0zwhat\0\0", "no known kind"),
        (b"\xff" * 100 + b"\0\0", "version 1"),
    ],
)
def test_garbage(running: RunningServer, said: bytes, sentence: str, caplog: pytest.LogCaptureFixture) -> None:
    """A malformed ring gets one sentence, which is also in the journal; the next ring works."""
    assert sentence.encode() in running.send(said)
    assert sentence in caplog.text
    assert running.rings == []
    assert running.send(GOOD) == b"ok\n"
    assert running.spoilt == 1


@pytest.mark.root
def test_probe(running: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that only tests whether the follower listens is not logged."""
    assert running.send() == b"no the message is empty\n"
    assert caplog.text == ""


@pytest.mark.root
def test_endless_ring(running: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """Of an endless ring only a megabyte is read."""
    answer = running.send(b"1\0lxc\0i", *(b"x" * (1 << 20) for _ in range(64)))
    assert answer in (b"", b"no a hook has said more than %d bytes\n" % doorbell.RING_BYTES)
    assert "has said more than" in caplog.text
    assert running.send(GOOD) == b"ok\n"


@pytest.mark.root
def test_hook_that_hangs(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook that hangs is disconnected after a time, and delays no other one."""
    monkeypatch.setattr(doorbell, "RING_SECONDS", 0.3)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.settimeout(TIMEOUT)
        hanging.connect(str(running.path))
        hanging.sendall(GOOD[:10])
        assert running.send(GOOD) == b"ok\n"
        assert b"within 0.3 s" in hanging.recv(4096)
    assert "within 0.3 s" in caplog.text


@pytest.mark.root
def test_more_connections_than_places(running: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all places are taken, further connections wait in the kernel's queue, and are answered."""
    monkeypatch.setattr(doorbell, "CONNECTIONS", 4)
    waiting = []
    for _ in range(12):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT)
        connection.connect(str(running.path))
        waiting.append(connection)
    for connection in waiting:
        with connection:
            connection.sendall(GOOD)
            assert connection.recv(100) == b"ok\n"


@pytest.mark.root
def test_ring_from_another_user(running: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """A ring from another user than root is ignored, whatever the socket's mode."""
    running.path.chmod(0o666)
    for directory in (running.path.parent, *running.path.parent.parents):
        if directory.stat().st_mode & 0o001 == 0:
            directory.chmod(0o711)
    ring = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(running.path)!r}); print(s.recv(9))"
    program = ["setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c", ring]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert done.stdout == "b''\n"
    assert "user 65534 has rung" in caplog.text
    assert running.rings == []


def test_parse() -> None:
    """A state may contain any byte but NUL; names that are not valid UTF-8 keep their bytes."""
    assert parse(b"1\0oci\0i{}\0\0") == Ring("oci", state=b"{}")
    assert os.fsencode(parse(b"1\0lxc\0eLXC_NAME=\xff\0\0").environ["LXC_NAME"]) == b"\xff"
    with pytest.raises(RingError):
        parse(b"1\0\0")
