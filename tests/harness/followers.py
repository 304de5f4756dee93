"""`guestapi follow` as a process, for a service of the tests."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.harness.following import until
from tests.harness.service import COMMAND, USER, Service

#: As the units have it: root in the store's group, with one capability of root's.
_CONFINED = (
    *("setpriv", f"--regid={USER}", "--clear-groups", "--no-new-privs"),
    *("--bounding-set=-all,+sys_ptrace", "--inh-caps=-all"),
)


class RealFollower:
    """A follower of one source, with the rights that its unit gives it."""

    def __init__(self, service: Service, source: str, enter: Sequence[str] = ()) -> None:
        """Describe a follower that is not started yet.

        Args:
            service: whose store it writes; its guestapi.toml has ``sources.doorbells``.
            source: which.
            enter: words before the command, to run it where the runtime runs.
        """
        self.service = service
        self.doorbell = service.root / f"doorbells/{source}.sock"
        self.log = service.root / f"follow-{source}.log"
        self._command = [*enter, *_CONFINED, str(COMMAND), "--config", str(service.config), "follow", source]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RealFollower:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until hooks can ring."""
        # As StateDirectoryMode= of guestapi.service has it.
        self.service.state.chmod(0o770)
        for file in self.service.state.iterdir():
            file.chmod(0o660)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, umask=0o007
            )
        process = self._process
        until(lambda: self.doorbell.exists() or process.poll() is not None, f"no doorbell: {self.log.read_text()}")
        assert process.poll() is None, self.log.read_text()

    def kill(self) -> None:
        """SIGKILL: a follower keeps nothing that it would have to save."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.doorbell.unlink(missing_ok=True)


def instances(service: Service) -> dict[str, dict[str, Any]]:
    """What `guestapi instance list` says, by name."""
    return {one["name"]: one for one in service.listed()}


def status(service: Service, name: str) -> str:
    """Whether an instance runs; empty: there is none of that name."""
    return str(instances(service).get(name, {}).get("status", ""))


def hook_program() -> Path:
    """The hook as it is installed."""
    from guestapi.sources import hook

    return Path(hook.__file__)
