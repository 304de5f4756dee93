"""The client of LXC's monitors, with monitors that answer falsely, slowly, endlessly or not at all."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from guestapi.sources.lxc import monitor
from guestapi.sources.lxc.monitor import Monitor, MonitorError, NoMonitorError, address, listening
from tests.harness.waiting import TIMEOUT

ANSWER = struct.Struct("@iiQ")
PATH = f"/run/guestapi-test-{os.getpid()}"

pytestmark = pytest.mark.root


@contextmanager
def played(name: str, answer: Callable[[socket.socket, int, bytes], None]) -> Iterator[bytes]:
    """Run a monitor that answers with a function of the connection, the command's number, and its payload."""
    where = address(PATH, name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(b"\0" + where)
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _address = listener.accept()
            except OSError:
                return
            with connection:
                head = connection.recv(16)
                if len(head) == 16:
                    command, length, _pointer = struct.unpack("@iiQ", head)
                    try:
                        answer(connection, command, connection.recv(length) if length else b"")
                    except (BrokenPipeError, ConnectionResetError):
                        pass  # The client has read enough.

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield where
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(TIMEOUT)


def reply(result: int, data: bytes = b"", word: int = 0, length: int | None = None) -> Callable[..., None]:
    """Return a function that sends this answer."""

    def answer(connection: socket.socket, command: int, payload: bytes) -> None:
        connection.sendall(ANSWER.pack(result, len(data) if length is None else length, word) + data)

    return answer


def test_messages_of_the_hook() -> None:
    """Answers of any valid length, in one piece or in many, are read."""
    with played("web", reply(0, word=4711)) as where:
        assert Monitor(where, TIMEOUT).init_pid() == 4711
    with played("web", reply(0, b"a\nb\0")) as where:
        assert Monitor(where, TIMEOUT).config_item("lxc.net") == "a\nb"
    # liblxc's own client refuses this length.
    with played("web", reply(0, b"x" * 100_000)) as where:
        assert Monitor(where, TIMEOUT).config_item("lxc.mount.entry") == "x" * 100_000
    for nothing in (reply(-2), reply(0), reply(0, b"\0")):
        with played("web", nothing) as where:
            assert Monitor(where, TIMEOUT).config_item("lxc.net.0.name") is None

    def slowly(connection: socket.socket, command: int, payload: bytes) -> None:
        assert (command, payload) == (7, b"lxc.uts.name\0")
        for byte in ANSWER.pack(0, 4, 0) + b"web\0":
            connection.sendall(bytes([byte]))

    with played("web", slowly) as where:
        assert Monitor(where, TIMEOUT).config_item("lxc.uts.name") == "web"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (reply(0, word=0), "process 0"),
        (reply(0, word=1 << 63), "process 9223372036854775808"),
        (reply(-1), "refuses: Operation not permitted"),
        (reply(-2147483648), "refuses"),
        (reply(0, length=2147483647), "an answer of 2147483647 bytes"),
        (reply(0, length=-1), "an answer of -1 bytes"),
        (reply(0, b"x", length=100), "in the middle of an answer"),
        (lambda connection, *_: None, "in the middle of an answer"),
        (lambda connection, *_: connection.sendall(b"HTTP/1.1 200 OK\r\n"), "refuses|bytes"),
    ],
)
def test_impossible_answers(answer: Callable[..., None], sentence: str) -> None:
    """An impossible answer is an error, whatever length it announces."""
    with played("web", answer) as where, pytest.raises(MonitorError, match=sentence):
        Monitor(where, TIMEOUT).init_pid()


def test_monitor_without_a_name() -> None:
    """A monitor that does not report its name is an error."""
    with played("web", reply(0, b"\0")) as where, pytest.raises(MonitorError, match="does not say its name"):
        Monitor(where, TIMEOUT).name()


def test_one_deadline() -> None:
    """All requests to a monitor share one deadline, also if it hangs or sends single bytes."""
    ended = threading.Event()

    def trickle(connection: socket.socket, command: int, payload: bytes) -> None:
        connection.sendall(ANSWER.pack(0, 1000, 0))
        while not ended.wait(0.05):
            connection.sendall(b"x")

    with played("web", trickle) as where:
        asked = Monitor(where, 0.4)
        began = time.monotonic()
        for _ in range(3):
            with pytest.raises(MonitorError, match=r"within 0\.4 s; it waits for a hook, or hangs"):
                asked.config_item("lxc.net")
        # The complete answers would take fifty seconds.
        assert time.monotonic() - began < 20
        ended.set()


def test_flood() -> None:
    """Only the announced length of an answer is read."""

    def flood(connection: socket.socket, command: int, payload: bytes) -> None:
        connection.sendall(ANSWER.pack(0, 3, 0) + b"web" + b"x" * (1 << 26))

    with played("web", flood) as where:
        assert Monitor(where, TIMEOUT).name() == "web"


def test_no_monitor() -> None:
    """Without a listening monitor, the container does not run."""
    with pytest.raises(NoMonitorError):
        Monitor(address(PATH, "nobody")).init_pid()


def test_monitor_of_another_user() -> None:
    """A monitor of another user than root is not trusted."""
    where = address(PATH, "fake")
    bound = repr(b"\0" + where)
    listen = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({bound}); s.listen(); print(flush=True)"
    program = ["setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c", f"{listen}; input()"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert where in listening()
        with pytest.raises(MonitorError, match="user 65534 listens"):
            Monitor(where, TIMEOUT).init_pid()
        process.kill()


def test_addresses() -> None:
    """A name too long for a socket's address is hashed as LXC does it; listening sockets are found by address."""
    assert address("/var/lib/lxc", "web") == b"/var/lib/lxc/web/command"
    assert len(address("/var/lib/lxc", "w" * 85)) == 106
    # The reference values of 64-bit FNV-1a for "" and "foobar" (draft-eastlake-fnv, appendix C).
    assert monitor._hash(b"") == 0xCBF29CE484222325
    assert monitor._hash(b"foobar") == 0x85944171F73967E8
    long = address("/var/lib/lxc", "w" * 86)
    assert len(long) == len("lxc/0123456789abcdef/command")
    with played("web", reply(0)) as where:
        assert where in listening()
        assert listening().count(where) == 1
    assert where not in listening()
