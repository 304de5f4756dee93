"""The message by which a connection is handed over."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from guestapi.relay import handover


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Relay and worker."""
    relay, worker = socket.socketpair()
    with relay, worker:
        worker.setblocking(False)
        yield relay, worker


def test_a_connection_arrives(pair: tuple[socket.socket, socket.socket]) -> None:
    """The worker has the same connection, with CID and dialect, and no other process inherits it."""
    relay, worker = pair
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(BlockingIOError):
            handover.receive(worker)
        handover.send(relay, theirs.fileno(), (1 << 32) - 2, "lxd")
        handed = handover.receive(worker)
    with handed.connection:
        assert (handed.cid, handed.dialect) == ((1 << 32) - 2, "lxd")
        assert not os.get_inheritable(handed.connection.fileno())


@pytest.mark.parametrize(
    ("message", "count", "reason"),
    [
        (b"x" * 24, 1, "another version"),
        (struct.pack("!4sI16s", b"gav1", 42, b"incus"), 0, "0 descriptors"),
        (struct.pack("!4sI16s", b"gav1", 42, b"incus")[:-1], 1, "another version"),
        (b"", 0, "0 descriptors"),
    ],
)
def test_what_is_no_message(pair: tuple[socket.socket, socket.socket], message: bytes, count: int, reason: str) -> None:
    """Anything else is refused, and its descriptors are closed."""
    relay, worker = pair
    ours, theirs = socket.socketpair()
    with ours:
        if message:
            socket.send_fds(relay, [message], [theirs.fileno()] * count)
        else:
            relay.close()
        theirs.close()
        with pytest.raises(handover.HandoverError, match=reason):
            handover.receive(worker)
        ours.settimeout(5)
        assert ours.recv(1) == b""


def test_a_descriptor_of_a_file(pair: tuple[socket.socket, socket.socket]) -> None:
    """What is not a socket is refused."""
    relay, worker = pair
    with open("/dev/null", "rb") as file:
        socket.send_fds(relay, [struct.pack("!4sI16s", b"gav1", 42, b"incus")], [file.fileno()])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(handover.HandoverError, match="is not a socket"):
        handover.receive(worker)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("peer", "cid"), [(42, 42), (43, None), (1, None)])
def test_the_kernel_says_which_cid(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, peer: int, cid: int | None
) -> None:
    """A connection is taken with the CID that the kernel names, and refused and closed with another one.

    A connected socket of vsock(7) needs a virtual machine, so a Unix socket stands in for it.
    """
    relay, worker = pair
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(socket, "AF_VSOCK", socket.AF_UNIX)
    monkeypatch.setattr(socket.socket, "getpeername", lambda _connection: (peer, 1234))
    with ours:
        handover.send(relay, theirs.fileno(), 42, "incus")
        theirs.close()
        if cid is not None:
            with handover.receive(worker).connection as connection:
                assert connection.family == socket.AF_UNIX
            return
        with pytest.raises(handover.HandoverError, match=f"of CID {peer} as one of CID 42"):
            handover.receive(worker)
        assert ours.recv(1) == b""
