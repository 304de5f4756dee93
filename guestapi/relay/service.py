"""The relay as a process: its sockets from systemd or its own, its signals and its watchdog."""

from __future__ import annotations

import logging
import signal
import socket
import time

from guestapi import systemd
from guestapi.dialects import DIALECTS
from guestapi.errors import OperatorError
from guestapi.relay.loop import Relay, SocketListener

log = logging.getLogger(__name__)

#: How many connections may wait in the kernel, as of the socket unit.
_BACKLOG = 1024


def serve(path: str) -> None:
    """Relay until SIGTERM or SIGINT.

    Args:
        path: of the handover socket.

    Raises:
        OperatorError: vsock is not available, or its ports are in use.
    """
    activated = systemd.activated()
    if activated:
        sockets = [socket.socket(fileno=number) for number in systemd.descriptors(activated)]
        for number, one in zip(systemd.descriptors(activated), sockets, strict=True):
            if one.family not in (socket.AF_VSOCK, socket.AF_UNIX):
                raise OperatorError(f"descriptor {number} from systemd is neither a vsock socket nor a Unix socket")
    else:
        sockets = [_bind(dialect.vsock_port) for dialect in DIALECTS.values() if dialect.vsock_port is not None]
    by_port = {dialect.vsock_port: dialect.name for dialect in DIALECTS.values()}
    listeners = []
    for one in sockets:
        one.setblocking(False)
        listeners.append((SocketListener(one), by_port.get(_port(one), "incus")))
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stopping.append(received))
    relay = Relay(listeners, path)
    ports = ", ".join(f"{_port(one)} ({by_port.get(_port(one), 'incus')})" for one in sockets)
    systemd.notify("READY=1", f"STATUS=relays vsock ports {ports}")
    fed = time.monotonic()

    def is_stopped() -> bool:
        nonlocal fed
        if systemd.watchdog_seconds() and time.monotonic() > fed + 1:
            fed = time.monotonic()
            systemd.notify("WATCHDOG=1")
        return bool(stopping)

    try:
        relay.run(is_stopped)
    finally:
        relay.close()


def _port(listening: socket.socket) -> int | None:
    """The port of vsock at which a socket is reached: hybrid vsock has it behind the last ``_`` of the path."""
    if listening.family == socket.AF_VSOCK:
        port: int = listening.getsockname()[1]
        return port
    _path, _, word = str(listening.getsockname()).rpartition("_")
    return int(word) if word.isdecimal() else None


def _bind(port: int) -> socket.socket:
    try:
        listening = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        raise OperatorError(f"vsock is not available: {error.strerror}", "'modprobe vhost_vsock' loads it") from None
    try:
        listening.bind((socket.VMADDR_CID_ANY, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise OperatorError(
            f"vsock port {port} cannot be bound: {error.strerror}", "is another relay running?"
        ) from None
    return listening
