"""What the kernel keeps with a connected Unix socket about the process that called connect(2)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import NamedTuple

#: include/uapi/asm-generic/socket.h, since Linux 6.5. Not in Python's socket module before 3.14.
SO_PEERPIDFD = 77

#: struct ucred (unix(7)): pid, uid, gid.
_UCRED = struct.Struct("iII")


class Credentials(NamedTuple):
    """Who connected, as seen in the namespaces of the service. ``pid`` is 0 if it cannot be seen from there."""

    pid: int
    uid: int
    gid: int


def credentials(connection: socket.socket) -> Credentials:
    """Process, user and group at the time of connect(2): unix(7), SO_PEERCRED."""
    return Credentials(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def peer_pidfd(connection: socket.socket) -> int | None:
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
        # ESRCH, and EINVAL and ENODATA from some versions, all say that nobody is there any more.
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
