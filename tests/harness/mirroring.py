"""The real mirror for tests: `guestapi mirror` as its unit runs it, as a user of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType

from tests.harness.daemon import Daemon
from tests.harness.service import COMMAND, USER, Service
from tests.harness.waiting import TIMEOUT

#: The directory of guestapi's socket in each container, from a device of the default profile. The daemon's own socket
#: is in its usual place.
OURS = "/dev/guestapi/sock"

#: A user without an entry in /etc/passwd, in the store's group.
MIRROR_USER = USER + 1


class MirrorProcess:
    """A running mirror of a daemon."""

    def __init__(self, service: Service, kind: str, daemon: Path | None, enter: Sequence[str] = ()) -> None:
        """Describe a mirror, without starting it.

        Args:
            service: the service whose store it fills.
            kind: ``incus`` or ``lxd``.
            daemon: the daemon's socket, which must be of group root; None: that of LXD's snap.
            enter: the beginning of the command, if the mirror runs in other namespaces.
        """
        self._service = service
        self._command = [
            *enter,
            *("setpriv", f"--reuid={MIRROR_USER}", f"--regid={USER}", "--groups=0", "--no-new-privs"),
            *("--inh-caps=-all,+sys_ptrace", "--ambient-caps=-all,+sys_ptrace", "--bounding-set=-all,+sys_ptrace"),
            *(str(COMMAND), "--config", str(service.config), "mirror", kind),
            *(["--snap"] if daemon is None else ["--socket", str(daemon)]),
        ]

    def __enter__(self) -> MirrorProcess:
        # As in its unit (StateDirectoryMode=0770): the group may write, too.
        self._service.state.chmod(0o770)
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._path = self._service.root / "notify"
        self._notified.bind(str(self._path))
        self._path.chmod(0o666)
        self._said: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._receive, args=(self._notified,), daemon=True).start()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        # The last message: it ends the thread that receives.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self._path))
        self._path.unlink()

    def start(self) -> None:
        """Start the mirror, and wait until it is ready."""
        with self._service.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0o007,
                env={**os.environ, "NOTIFY_SOCKET": str(self._path)},
            )
        self.status()

    @property
    def pid(self) -> int:
        """The PID of the mirror."""
        return self._process.pid

    def kill(self) -> None:
        """Kill the mirror with SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(TIMEOUT)

    def status(self, wanted: str = "", timeout: float = TIMEOUT) -> str:
        """Return the next status text sent to systemd that contains `wanted`."""
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            try:
                message = self._said.get(timeout=left)
            except Empty:
                break
            assert "READY=1" in message
            status = message.partition("STATUS=")[2].partition("\n")[0]
            if wanted in status:
                return status
        raise AssertionError(f"it did not say {wanted!r}: {self._service.log.read_text()}")

    def _receive(self, notified: socket.socket) -> None:
        """Receive all that systemd would be told."""
        with notified:
            while message := notified.recv(4096):
                self._said.put(message.decode())


@contextmanager
def beside(release: str, toml: str = "") -> Iterator[tuple[Daemon, Service, MirrorProcess]]:
    """Run a daemon, a service that its containers reach at `OURS`, and the mirror between them.

    Args:
        release: ``incus``, ``incus-7`` or ``lxd``.
        toml: more settings of guestapi.toml.
    """
    daemon = Daemon(release)
    kind = daemon.kind
    with ExitStack() as stack:
        service = stack.enter_context(Service(workers=2, dialects=[kind], toml=toml))
        stack.enter_context(daemon)
        device = [f"source={service.sockets[kind].parent}", f"path={Path(OURS).parent}"]
        daemon.client("profile", "device", "add", "default", "guestapi", "disk", *device)
        yield daemon, service, stack.enter_context(MirrorProcess(service, kind, daemon.socket))
