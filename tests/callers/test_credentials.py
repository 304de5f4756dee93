"""Peer credentials and pidfds of connected sockets, and the refusal of passed descriptors on a listening socket."""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestapi.callers import credentials


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    """A listening socket."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "sock"))
        opened.listen()
        yield opened


def connect(listening: socket.socket) -> socket.socket:
    """Return a connection to the listening socket."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(listening.getsockname())
    return connection


def test_credentials_of_the_connecting_process(listening: socket.socket) -> None:
    """The credentials are process, user and group of the process that called connect(2)."""
    with connect(listening), listening.accept()[0] as accepted:
        found = credentials.credentials(accepted)
        assert found == (os.getpid(), os.geteuid(), os.getegid())


def test_shutdown_is_not_a_close(listening: socket.socket) -> None:
    """A connection whose peer has only shut down writing is not closed."""
    with connect(listening) as connection, listening.accept()[0] as accepted:
        assert not credentials.is_closed(accepted)
        connection.shutdown(socket.SHUT_WR)
        assert not credentials.is_closed(accepted)
        connection.close()
        assert credentials.is_closed(accepted)


class Refusing:
    """A stand-in for a socket whose options fail with this error number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def refuse(self, *_arguments: object) -> int:
        """As getsockopt(2) and setsockopt(2): fail."""
        raise OSError(self._number, os.strerror(self._number))

    getsockopt = setsockopt = refuse


def refusing(number: int) -> Any:
    """Return a socket whose options fail with this error number."""
    return Refusing(number)


def test_kernel_without_pidfds_of_peers() -> None:
    """A kernel before Linux 6.5 has no pidfd of the peer: the result is None, not an error."""
    assert credentials.peer_pidfd(refusing(errno.ENOPROTOOPT)) is None


@pytest.mark.parametrize("number", [errno.ESRCH, errno.EINVAL, errno.ENODATA])
def test_ended_peer(number: int) -> None:
    """Kernels report an ended process with several errors; each becomes ProcessLookupError."""
    with pytest.raises(ProcessLookupError):
        credentials.peer_pidfd(refusing(number))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_no_descriptor_for_a_pidfd(number: int) -> None:
    """A lack of descriptors or memory is not reported as an ended process."""
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        credentials.peer_pidfd(refusing(number))
    assert not isinstance(raised.value, ProcessLookupError)


def kernel() -> tuple[int, ...]:
    """Return the version of the running kernel, such as (6, 16)."""
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def test_pidfd_of_the_connecting_process(listening: socket.socket) -> None:
    """From Linux 6.5 on, the kernel has a pidfd of the process that connected."""
    with connect(listening), listening.accept()[0] as accepted:
        pidfd = credentials.peer_pidfd(accepted)
        if kernel() < (6, 5):
            assert pidfd is None
            return
        assert pidfd is not None
        lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
        os.close(pidfd)
        assert f"Pid:\t{os.getpid()}" in lines


def pass_descriptor(connection: socket.socket) -> None:
    """Send a byte with a descriptor."""
    connection.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection.fileno()]))])


def test_descriptors_are_refused(listening: socket.socket) -> None:
    """From Linux 6.16 on a client cannot pass a descriptor; on an older kernel the return value is False."""
    with connect(listening) as connection:
        pass_descriptor(connection)
    assert credentials.refuse_descriptors(listening) == (kernel() >= (6, 16))
    with connect(listening) as connection:
        if kernel() >= (6, 16):
            with pytest.raises(PermissionError):
                pass_descriptor(connection)
        connection.send(b"x")


def test_kernel_that_cannot_refuse_descriptors() -> None:
    """A kernel without the option is no error; any other failure is."""
    assert credentials.refuse_descriptors(refusing(errno.ENOPROTOOPT)) is False
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        credentials.refuse_descriptors(refusing(errno.EBADF))


@pytest.mark.parametrize(("pid", "cid"), [(1, None), (0, None), (-1, 1), (-42, 42)])
def test_cid_of_credentials(pid: int, cid: int | None) -> None:
    """A negative number stands for a virtual machine; zero, a process that is not visible here, does not."""
    found = credentials.Credentials(pid, 0, 0)
    assert found.cid == cid
    if cid is not None:
        assert credentials.machine_credentials(cid) == found
