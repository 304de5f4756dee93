"""What the kernel keeps with a connected socket about who called connect(2): a process, or a virtual machine."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from typing import NamedTuple

#: include/uapi/asm-generic/socket.h, since Linux 6.5. Not in Python's socket module before 3.14.
SO_PEERPIDFD = 77
#: Same header, since Linux 6.16. An accepted socket inherits the value of its listening socket.
_SO_PASSRIGHTS = 83

#: struct ucred (unix(7)): pid, uid, gid.
_UCRED = struct.Struct("iII")


class Credentials(NamedTuple):
    """The process that connected, as seen in the namespaces of the service. ``pid`` is 0 if it is not visible there.

    Of a virtual machine whose VMM is not known, ``pid`` is its CID, or `model.hybrid_number`, with a minus sign. Its
    users are its own: whoever connects from it speaks for its root.
    """

    pid: int
    uid: int
    gid: int

    @property
    def cid(self) -> int | None:
        """The context ID, or `hybrid_number`, of a virtual machine whose VMM is not known; None of any other."""
        return -self.pid if self.pid < 0 else None


def machine_credentials(cid: int) -> Credentials:
    """Return what stands for a virtual machine that connected, by its CID or `hybrid_number`."""
    return Credentials(-cid, 0, 0)


def credentials(connection: socket.SocketType) -> Credentials:
    """Process, user and group at the time of connect(2): unix(7), SO_PEERCRED."""
    return Credentials(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def is_closed(connection: socket.SocketType) -> bool:
    """Whether the other end is closed, not only shut for writing (poll(2), POLLHUP)."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def peer_pidfd(connection: socket.SocketType) -> int | None:
    """A pidfd of the process that connected, to be closed by the caller; None if this kernel gives none.

    Unlike its PID it can never come to mean another process.

    Raises:
        ProcessLookupError: that process is gone.
        OSError: there are no descriptors left.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return None
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        # ESRCH, or EINVAL or ENODATA in some kernel versions: the process has ended.
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None


def refuse_descriptors(listening: socket.socket) -> bool:
    """Refuse descriptors from clients (unix(7), SCM_RIGHTS): their sendmsg(2) fails with EPERM.

    The service never uses passed descriptors, but it closes them when it reads the bytes beside them. The sender can
    make that slow: close(2) of a TCP socket with SO_LINGER waits while the peer does not read.

    Returns:
        False if this kernel cannot.
    """
    try:
        listening.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return False
    return True
