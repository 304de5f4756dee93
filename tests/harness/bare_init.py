"""The smallest container: PID 1 of a PID namespace, which shares everything else with the host."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

from tests.harness.agent import CLONE_NEWPID, unshare


class BareInit:
    """PID 1 of a PID namespace, which connects to a socket when it receives a byte."""

    def __init__(self, path: Path, pid: int | None = None) -> None:
        """Start an init.

        Args:
            path: the socket to connect to.
            pid: its PID on the host, set by /proc/sys/kernel/ns_last_pid; None: any.
        """
        self._ours, theirs = socket.socketpair()
        self._parent = os.fork()
        if self._parent == 0:
            self._ours.close()
            try:
                self._become(path, theirs, pid)
            finally:
                os._exit(1)
        theirs.close()
        self.pid = int(self._ours.recv(20))

    def _become(self, path: Path, control: socket.socket, pid: int | None) -> None:
        unshare(CLONE_NEWPID)
        if pid is not None:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        child = os.fork()
        if child:
            control.send(str(child).encode())
            os.waitpid(child, 0)
            os._exit(0)
        if control.recv(1):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
            connection.send(b"x")
            connection.recv(100)
        os._exit(0)

    def connect(self) -> None:
        """Let the init connect."""
        self._ours.send(b"x")

    def end(self) -> None:
        """End the init, and wait until its parent has reaped it."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # It has connected, and then ended by itself.
        os.waitpid(self._parent, 0)
        self._ours.close()
