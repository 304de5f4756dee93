"""Connections that a process in a container opens and a test uses.

The kernel reports the process that called connect(2), and the service requires it to be alive. So a process in the
container connects, passes the sockets to the test (SCM_RIGHTS) and stays until the test ends it.
"""

from __future__ import annotations

import fcntl
import socket
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.harness.agent import complete
from tests.harness.containers import Container, Response, parse
from tests.harness.waiting import TIMEOUT

_CONNECT = """
import socket, sys
made = []
for path in sys.argv[2:]:
    made.append(socket.socket(socket.AF_UNIX))
    made[-1].connect(path)
with socket.socket(fileno=int(sys.argv[1])) as pipe:
    for connection in made:
        socket.send_fds(pipe, [b"x"], [connection.fileno()])
sys.stdin.read()
"""

GUEST_PATH = "/dev/incus/sock"


class Talk:
    """A connection, with methods to send requests and receive responses."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(TIMEOUT)
        self.socket = connection
        self._received = b""

    def send(self, data: bytes) -> None:
        """Send all the data."""
        self.socket.sendall(data)

    def wait_read(self) -> None:
        """Wait until the server has read all sent bytes (unix(7), SIOCOUTQ)."""
        until = time.monotonic() + TIMEOUT
        while fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)) != bytes(4):
            assert time.monotonic() < until, "the server reads nothing"
            time.sleep(0.001)

    def receive(self, count: int = 1, method: str = "GET") -> list[Response]:
        """Receive `count` complete responses, and check that nothing follows."""
        while not complete(self._received, count, method):
            more = self.socket.recv(1 << 20)
            assert more, f"closed after {self._received!r}"
            self._received += more
        data, self._received = self._received, b""
        found = parse(data, method)
        assert len(found) == count
        return found

    def ask(self, path: str, *lines: str, method: str = "GET", body: bytes = b"") -> Response:
        """Send one request with these header lines and return its response."""
        self.send(asking(path, *lines, method=method, body=body))
        return self.receive(1, method)[0]

    def end(self) -> bytes:
        """Receive until the server closes the connection."""
        data, self._received = self._received, b""
        try:
            while more := self.socket.recv(1 << 20):
                data += more
        except ConnectionResetError:
            pass
        return data

    def end_or_answer(self) -> bytes:
        """Receive one response, or what there is of it until the server closes the connection."""
        data, self._received = self._received, b""
        try:
            while not complete(data, 1, "GET") and (more := self.socket.recv(1 << 20)):
                data += more
        except ConnectionResetError:
            pass
        return data

    def last(self, method: str = "GET") -> Response:
        """Receive the one response that comes before the server closes."""
        (response,) = parse(self.end(), method)
        return response


def asking(path: str, *lines: str, method: str = "GET", body: bytes = b"", version: str = "HTTP/1.1") -> bytes:
    """Return the bytes of a request."""
    fields = ["Host: x", *lines, *([f"Content-Length: {len(body)}"] if body else [])]
    return "\r\n".join([f"{method} {path} {version}", *fields, "", ""]).encode() + body


@contextmanager
def talks(container: Container, count: int, paths: Sequence[str] = (), user: int = 0) -> Iterator[list[Talk]]:
    """Open `count` connections from inside a container, as one of its users."""
    ours, theirs = socket.socketpair()
    enter = ["nsenter", "-t", str(container.pid), "-U", "-m", "-p", "--setuid", str(user), "--setgid", str(user)]
    with ours, theirs:
        process = subprocess.Popen(
            [
                *enter,
                "/usr/bin/python3",
                "-I",
                "-S",
                "-c",
                _CONNECT,
                str(theirs.fileno()),
                *(paths or [GUEST_PATH] * count),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE,
        )
        theirs.close()
        made: list[Talk] = []
        try:
            ours.settimeout(TIMEOUT)
            while len(made) < count:
                data, descriptors, _flags, _address = socket.recv_fds(ours, 1, 1)
                assert data, "the process inside could not connect"
                made.extend(Talk(socket.socket(fileno=number)) for number in descriptors)
            yield made
        finally:
            for talk in made:
                talk.socket.close()
            process.communicate()


@contextmanager
def talk(container: Container) -> Iterator[Talk]:
    """Open one connection from inside a container."""
    with talks(container, 1) as (made,):
        yield made
