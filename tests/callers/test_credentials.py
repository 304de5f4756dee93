"""What the kernel keeps with a connected socket, and the listening socket that takes no descriptors."""

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
    """A connection to it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(listening.getsockname())
    return connection


def test_credentials_of_who_connected(listening: socket.socket) -> None:
    """Process, user and group of the process that called connect(2)."""
    with connect(listening), listening.accept()[0] as accepted:
        found = credentials.credentials(accepted)
        assert found == (os.getpid(), os.geteuid(), os.getegid())


def test_closed_and_shut_are_told_apart(listening: socket.socket) -> None:
    """An end that is shut for writing still reads; only a closed one is gone."""
    with connect(listening) as connection, listening.accept()[0] as accepted:
        assert not credentials.is_closed(accepted)
        connection.shutdown(socket.SHUT_WR)
        assert not credentials.is_closed(accepted)
        connection.close()
        assert credentials.is_closed(accepted)


class Refusing:
    """A socket of which this kernel tells nothing, for one reason or the other."""

    def __init__(self, number: int) -> None:
        self._number = number

    def refuse(self, *_arguments: object) -> int:
        """As getsockopt(2) and setsockopt(2)."""
        raise OSError(self._number, os.strerror(self._number))

    getsockopt = setsockopt = refuse


def refusing(number: int) -> Any:
    """A socket that fails so."""
    return Refusing(number)


def test_kernel_without_pidfds_of_peers() -> None:
    """Before Linux 6.5 there is no pidfd, which is no failure."""
    assert credentials.peer_pidfd(refusing(errno.ENOPROTOOPT)) is None


@pytest.mark.parametrize("number", [errno.ESRCH, errno.EINVAL, errno.ENODATA])
def test_peer_that_is_gone(number: int) -> None:
    """Kernels say in several ways that the process has ended; it is one error here."""
    with pytest.raises(ProcessLookupError):
        credentials.peer_pidfd(refusing(number))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_no_descriptor_for_a_pidfd(number: int) -> None:
    """That there are no descriptors left says nothing about the process: it is not taken for one that is gone."""
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        credentials.peer_pidfd(refusing(number))
    assert not isinstance(raised.value, ProcessLookupError)


def kernel() -> tuple[int, ...]:
    """The version of the running kernel, as (6, 16)."""
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def test_pidfd_is_of_who_connected(listening: socket.socket) -> None:
    """From Linux 6.5 on there is a pidfd of the process that connected."""
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
    """Send a descriptor along with a byte."""
    connection.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection.fileno()]))])


def test_descriptors_are_refused(listening: socket.socket) -> None:
    """From Linux 6.16 on nobody can pass a descriptor along; before, it is said that this kernel cannot refuse them."""
    with connect(listening) as connection:
        pass_descriptor(connection)
    assert credentials.refuse_descriptors(listening) == (kernel() >= (6, 16))
    with connect(listening) as connection:
        if kernel() >= (6, 16):
            with pytest.raises(PermissionError):
                pass_descriptor(connection)
        connection.send(b"x")


def test_kernel_that_cannot_refuse_descriptors() -> None:
    """A kernel without the option is no failure; anything else is."""
    assert credentials.refuse_descriptors(refusing(errno.ENOPROTOOPT)) is False
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        credentials.refuse_descriptors(refusing(errno.EBADF))
