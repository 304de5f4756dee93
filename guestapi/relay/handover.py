"""How the relay hands a connection over to a worker: one message with one descriptor, and an answer of one byte.

The relay connects to the handover socket once for each connection. It keeps the connection until the worker has said
that it has it, so a worker that ends before that loses none.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

from guestapi.errors import GuestapiError

#: In the place of a CID: the VMM has connected to a Unix socket, and the kernel knows which process that was.
HYBRID = 0xFFFFFFFF
#: What a worker sends when it has taken a connection over.
TAKEN = b"\x01"

#: A version, the CID, and the name of the dialect, padded with zeros.
_MESSAGE = struct.Struct("!4sI16s")
_VERSION = b"gav1"


class HandoverError(GuestapiError):
    """A message is not one of the relay of this version."""


class HandedOver(NamedTuple):
    """A connection that was handed over. The receiver owns its socket.

    Attributes:
        connection: the socket.
        cid: the context ID of the virtual machine that connected, or `HYBRID`.
        dialect: name of the dialect that it connected to.
    """

    connection: socket.socket
    cid: int
    dialect: str


def send(worker: socket.socket, descriptor: int, cid: int, dialect: str) -> None:
    """Send a connection to a worker. The sender keeps its own descriptor of it.

    Raises:
        OSError: the worker is gone, or cannot take a message now.
    """
    socket.send_fds(worker, [_MESSAGE.pack(_VERSION, cid, dialect.encode())], [descriptor])


def receive(relay: socket.socket) -> HandedOver:
    """Receive a connection.

    Raises:
        BlockingIOError: the message has not arrived yet.
        HandoverError: something else was sent, or the kernel says that the connection is of another CID.
        OSError: the relay is gone.
    """
    data, descriptors, _flags, _address = socket.recv_fds(relay, _MESSAGE.size, 1)
    if len(descriptors) != 1:
        raise HandoverError(f"a message with {len(descriptors)} descriptors")
    # recv_fds ignores its flags, MSG_CMSG_CLOEXEC among them.
    os.set_inheritable(descriptors[0], False)
    if len(data) != _MESSAGE.size or not data.startswith(_VERSION):
        os.close(descriptors[0])
        raise HandoverError("a message of another version; restart guestapi-vsock.service")
    try:
        connection = socket.socket(fileno=descriptors[0])
    except OSError as error:
        os.close(descriptors[0])
        raise HandoverError("a descriptor that is not a socket") from error
    _version, cid, dialect = _MESSAGE.unpack(data)
    if cid == HYBRID and connection.family != socket.AF_UNIX:
        connection.close()
        raise HandoverError("a connection of a VMM that is not a Unix socket")
    if connection.family == socket.AF_VSOCK:
        try:
            seen: int = connection.getpeername()[0]
        except OSError:
            # It was reset meanwhile: nothing can be received from it, nor sent.
            seen = cid
        if seen != cid:
            connection.close()
            raise HandoverError(f"a connection of CID {seen} as one of CID {cid}")
    return HandedOver(connection, cid, dialect.rstrip(b"\0").decode(errors="replace"))
