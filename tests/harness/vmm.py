"""Stand-ins for what a machine without /dev/vhost-vsock does not have: a VMM that holds a CID, and a vsock listener."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from guestapi.callers import machines
from guestapi.relay.loop import Relay, SocketListener
from tests.harness.scratch import SCRATCH

#: Opens the device node so that nobody needs its driver (open(2), O_PATH), and closes it on request.
_VMM = """
import os, sys
held = os.open(sys.argv[1], os.O_PATH)
print("ready", flush=True)
for line in sys.stdin:
    os.close(held)
    print("closed", flush=True)
"""
#: A user without rights, as libvirt-qemu is.
_USER = 64_055


class Vmm:
    """A process that has /dev/vhost-vsock open, like QEMU."""

    def __init__(self, *words: str, held: bool = True, user: int = _USER) -> None:
        """Start it.

        Args:
            words: more words of its command line.
            held: whether it has the device open.
            user: whose process it is.
        """
        self._directory = Path(tempfile.mkdtemp(prefix="guestapi-vmm-", dir=SCRATCH))
        self._directory.chmod(0o755)
        #: The device node that it has open.
        self.node = self._directory / "vhost-vsock"
        os.mknod(self.node, stat.S_IFCHR | 0o666, machines.DEVICE if held else os.makedev(1, 3))
        setpriv = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        self._process = subprocess.Popen(
            [*setpriv, sys.executable, "-I", "-S", "-c", _VMM, self.node, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    @property
    def pid(self) -> int:
        """Its PID."""
        return self._process.pid

    def close_device(self) -> None:
        """Close the device, as the kernel does while the process ends; the process goes on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"close\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == b"closed\n"

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Vmm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        for path in self._directory.iterdir():
            path.unlink()
        self._directory.rmdir()


class FakeVsock:
    """A listening socket at which any CID can connect."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[socket.socket, int]] = deque()
        self._readable = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)

    def fileno(self) -> int:
        """As of a socket."""
        return self._readable

    def accept(self) -> tuple[int, tuple[int, int]]:
        """As of a socket of AF_VSOCK."""
        os.eventfd_read(self._readable)
        connection, cid = self._arrived.popleft()
        return connection.detach(), (cid, 1024)

    def connect(self, cid: int) -> socket.socket:
        """Connect as the virtual machine with a CID; return its end."""
        ours, theirs = socket.socketpair()
        self._arrived.append((theirs, cid))
        os.eventfd_write(self._readable, 1)
        return ours

    def close(self) -> None:
        """As of a socket."""
        os.close(self._readable)


class UnixVsock:
    """A Unix socket in the place of a listening one of AF_VSOCK: all CIDs share the kernel's queue, as there.

    A client names its CID in the abstract address that it binds to: ``cid/42/`` and anything. Between processes, too.
    """

    def __init__(self, path: Path, backlog: int) -> None:
        """Listen.

        Args:
            path: of the socket.
            backlog: how many connections may wait in the kernel.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(backlog)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """As of a socket."""
        return self._socket.fileno()

    def accept(self) -> tuple[int, tuple[int, int]]:
        """As of a socket of AF_VSOCK."""
        descriptor, address = SocketListener(self._socket).accept()
        return descriptor, (int(address.split(b"/")[1]), 1024)

    def close(self) -> None:
        """As of a socket."""
        self._socket.close()


@contextmanager
def relaying(path: Path, dialect: str = "incus") -> Iterator[FakeVsock]:
    """Run a relay in a thread, from a listener to the handover socket `path`."""
    listener = FakeVsock()
    relay = Relay([(listener, dialect)], str(path))
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            relay.step(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener
    finally:
        stopped.set()
        thread.join()
        relay.close()
        listener.close()
