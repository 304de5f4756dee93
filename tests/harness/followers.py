"""`guestapi follow` as a process, for a service of the tests."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.harness.service import COMMAND, USER, Service
from tests.harness.waiting import until

#: As in the units: root in the store's group, with one capability of root's.
_CONFINED = (
    *("setpriv", f"--regid={USER}", "--clear-groups", "--no-new-privs"),
    *("--bounding-set=-all,+sys_ptrace", "--inh-caps=-all"),
)


class RealFollower:
    """A follower of one source, with the rights from its unit."""

    def __init__(self, service: Service, source: str, enter: Sequence[str] = ()) -> None:
        """Describe a follower, without starting it.

        Args:
            service: the service whose store it writes; its guestapi.toml has ``sources.doorbells``.
            source: the source that it follows.
            enter: a prefix of the command, to run it in the runtime's namespaces.
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
        """Start the follower, and wait until its doorbell exists."""
        # As StateDirectoryMode= of guestapi.service sets it.
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
        """Kill the follower with SIGKILL; it has no state to save."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.doorbell.unlink(missing_ok=True)


def instances(service: Service) -> dict[str, dict[str, Any]]:
    """Return the output of `guestapi instance list`, by name."""
    return {one["name"]: one for one in service.listed()}


def status(service: Service, name: str) -> str:
    """Return the status of an instance; empty: there is none with that name."""
    return str(instances(service).get(name, {}).get("status", ""))


def hook_program() -> Path:
    """Return the path of the hook program."""
    from guestapi.sources import hook

    return Path(hook.__file__)
