"""The client of LXC's monitors, and monitors that lie, hang, trickle, flood or are somebody else."""

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

ANSWER = struct.Struct("@iiQ")
PATH = f"/run/guestapi-test-{os.getpid()}"

pytestmark = pytest.mark.root


@contextmanager
def played(name: str, answer: Callable[[socket.socket, int, bytes], None]) -> Iterator[bytes]:
    """A monitor that answers so: called with a connection, the command's number, and what comes behind it."""
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
                        pass  # It has heard enough.

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield where
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(20)


def say(result: int, data: bytes = b"", word: int = 0, length: int | None = None) -> Callable[..., None]:
    """An answer."""

    def answer(connection: socket.socket, command: int, payload: bytes) -> None:
        connection.sendall(ANSWER.pack(result, len(data) if length is None else length, word) + data)

    return answer


def test_answers() -> None:
    """What a monitor says, in one piece or in many, of any length that is possible."""
    with played("web", say(0, word=4711)) as where:
        assert Monitor(where).init_pid() == 4711
    with played("web", say(0, b"a\nb\0")) as where:
        assert Monitor(where).config_item("lxc.net") == "a\nb"
    # liblxc's own client takes this one for none.
    with played("web", say(0, b"x" * 100_000)) as where:
        assert Monitor(where).config_item("lxc.mount.entry") == "x" * 100_000
    for nothing in (say(-2), say(0), say(0, b"\0")):
        with played("web", nothing) as where:
            assert Monitor(where).config_item("lxc.net.0.name") is None

    def slowly(connection: socket.socket, command: int, payload: bytes) -> None:
        assert (command, payload) == (7, b"lxc.uts.name\0")
        for byte in ANSWER.pack(0, 4, 0) + b"web\0":
            connection.sendall(bytes([byte]))

    with played("web", slowly) as where:
        assert Monitor(where).config_item("lxc.uts.name") == "web"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (say(0, word=0), "process 0"),
        (say(0, word=1 << 63), "process 9223372036854775808"),
        (say(-1), "refuses: Operation not permitted"),
        (say(-2147483648), "refuses"),
        (say(0, length=2147483647), "an answer of 2147483647 bytes"),
        (say(0, length=-1), "an answer of -1 bytes"),
        (say(0, b"x", length=100), "in the middle of an answer"),
        (lambda connection, *_: None, "in the middle of an answer"),
        (lambda connection, *_: connection.sendall(b"HTTP/1.1 200 OK\r\n"), "refuses|bytes"),
    ],
)
def test_lies(answer: Callable[..., None], sentence: str) -> None:
    """What cannot be is one sentence, whatever is announced."""
    with played("web", answer) as where, pytest.raises(MonitorError, match=sentence):
        Monitor(where).init_pid()


def test_name_of_nobody() -> None:
    """A monitor that does not know its name is none."""
    with played("web", say(0, b"\0")) as where, pytest.raises(MonitorError, match="does not say its name"):
        Monitor(where).name()


def test_one_deadline() -> None:
    """A monitor that hangs, or sends a byte each moment, costs the time that it is given, in all that it is asked."""
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
        # It would take fifty seconds to hear all of it.
        assert time.monotonic() - began < 20
        ended.set()


def test_flood() -> None:
    """Of more than was announced, what was announced is read."""

    def flood(connection: socket.socket, command: int, payload: bytes) -> None:
        connection.sendall(ANSWER.pack(0, 3, 0) + b"web" + b"x" * (1 << 26))

    with played("web", flood) as where:
        assert Monitor(where).name() == "web"


def test_nobody() -> None:
    """Where nobody listens, there is no container that runs."""
    with pytest.raises(NoMonitorError):
        Monitor(address(PATH, "nobody")).init_pid()


def test_somebody_else() -> None:
    """Anybody may listen at such an address; only root is a monitor."""
    where = address(PATH, "fake")
    bound = repr(b"\0" + where)
    listen = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({bound}); s.listen(); print(flush=True)"
    program = ["setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c", f"{listen}; input()"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert where in listening()
        with pytest.raises(MonitorError, match="user 65534 listens"):
            Monitor(where).init_pid()
        process.kill()


def test_addresses() -> None:
    """A name that is too long for a socket's is hashed, as LXC does it; what listens is found among all sockets."""
    assert address("/var/lib/lxc", "web") == b"/var/lib/lxc/web/command"
    assert len(address("/var/lib/lxc", "w" * 85)) == 106
    # The reference values of FNV-1a with 64 bits: of nothing, and of "foobar" (draft-eastlake-fnv, appendix C).
    assert monitor._hash(b"") == 0xCBF29CE484222325
    assert monitor._hash(b"foobar") == 0x85944171F73967E8
    long = address("/var/lib/lxc", "w" * 86)
    assert len(long) == len("lxc/0123456789abcdef/command")
    with played("web", say(0)) as where:
        assert where in listening()
        assert listening().count(where) == 1
    assert where not in listening()
