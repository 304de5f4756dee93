"""The signer for tests, as a user of its own, at a socket that is the service's alone, as its units have it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType

from tests.harness.fast import forbid
from tests.harness.service import COMMAND, USER
from tests.harness.waiting import TIMEOUT

#: An unused user ID, as of `USER`.
SIGNER_USER = USER + 1
TRUST_DOMAIN = "test.example.org"

#: Passes the socket as systemd does, which names the process (sd_listen_fds(3)).
_ACTIVATE = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 0</dev/null'
_UNPRIVILEGED = [
    "setpriv",
    f"--reuid={SIGNER_USER}",
    f"--regid={SIGNER_USER}",
    "--clear-groups",
    "--inh-caps=-all",
    "--bounding-set=-all",
    "--no-new-privs",
]


class SigningProcess:
    """``guestapi identity signer``, its directory and its socket."""

    def __init__(self, root: Path, audiences: tuple[str, ...]) -> None:
        """Prepare it, without starting it.

        Args:
            root: a directory that every user can enter.
            audiences: those that instances may have tokens for.
        """
        forbid()
        self.root = root
        self.keys = root / "keys"
        self.keys.mkdir(mode=0o700)
        os.chown(self.keys, SIGNER_USER, SIGNER_USER)
        self.path = root / "signer.sock"
        self.log = root / "signer.log"
        listed = ", ".join(f'"{one}"' for one in audiences)
        self.toml = (
            f'[identity]\ntrust_domain = "{TRUST_DOMAIN}"\naudiences = [{listed}]\nkeys = "{self.keys}"\n'
            f'socket = "{self.path}"\n'
        )
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen(1024)
        os.chown(self.path, USER, USER)
        self.path.chmod(0o600)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, config: Path) -> None:
        """Start it with that guestapi.toml. Who connects before it listens waits, as with systemd."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_UNPRIVILEGED, "sh", "-c", _ACTIVATE, "sh", COMMAND, "--config", config, "identity", "signer"],
                stdin=self._listener.fileno(),
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        """Its PID."""
        assert self._process is not None
        return self._process.pid

    def reload(self) -> None:
        """Have it read its settings again."""
        os.kill(self.pid, signal.SIGHUP)

    def stop(self) -> int:
        """End it as systemd does; return the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(TIMEOUT)

    def kill(self) -> None:
        """End it without a word."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> SigningProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self._listener.close()
