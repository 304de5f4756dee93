"""The real service for tests: `guestapi serve` as an unprivileged user with CAP_SYS_PTRACE alone, as in its unit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from guestapi import settings
from guestapi.callers.namespaces import examine
from guestapi.dialects import DIALECTS
from guestapi.model import Device, Instance
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.harness.containers import BASE, Container
from tests.harness.fast import forbid
from tests.harness.scratch import SCRATCH

#: A user that nobody is. The service needs no entry in /etc/passwd.
USER = 64_042
COMMAND = Path(sys.executable).with_name("guestapi")

#: As guestapi.service has it: one capability, of which no program that is started can get more.
UNPRIVILEGED = [
    "setpriv",
    f"--reuid={USER}",
    f"--regid={USER}",
    "--clear-groups",
    "--inh-caps=-all,+sys_ptrace",
    "--ambient-caps=-all,+sys_ptrace",
    "--bounding-set=-all,+sys_ptrace",
    "--no-new-privs",
]


class Service:
    """A running service, its store, and its sockets: one directory for each dialect."""

    def __init__(
        self,
        *,
        workers: int = 2,
        toml: str = "",
        gunicorn: str = "",
        dialects: Sequence[str] = tuple(DIALECTS),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare a service that is not started yet.

        Args:
            workers: how many.
            toml: more of guestapi.toml; no [store] and no [[listener]].
            gunicorn: gunicorn.conf.py.
            dialects: which to listen for.
            environment: more of it, for the service alone.
        """
        forbid()
        # Not below pytest's own directory, which is root's alone.
        self.root = Path(tempfile.mkdtemp(prefix="guestapi-", dir=SCRATCH))
        self.root.chmod(0o755)
        self.state = self.root / "state"
        self.state.mkdir(mode=0o750)
        self.sockets = {dialect: self.root / dialect / "sock" for dialect in dialects}
        for path in (self.state, *(socket_path.parent for socket_path in self.sockets.values())):
            path.mkdir(mode=0o755, exist_ok=True)
            os.chown(path, USER, USER)
        self.config = self.root / "guestapi.toml"
        self.write_config(toml)
        (self.root / "gunicorn.conf.py").write_text(gunicorn)
        self.settings = settings.load(self.config)
        # Made by root, as by an operator's first command; used by the service as another user.
        self.writer = Writer(self.settings, create=True)
        self.log = self.root / "log"
        self._workers = workers
        # After the change of user: a library that is loaded before it might make things that are root's.
        self._environment = ["env", *(f"{name}={value}" for name, value in (environment or {}).items())]
        self._process: subprocess.Popen[bytes] | None = None

    def write_config(self, toml: str) -> None:
        """Write guestapi.toml anew."""
        listeners = "".join(
            f'[[listener]]\npath = "{path}"\ndialect = "{name}"\n' for name, path in self.sockets.items()
        )
        self.config.write_text(f'{listeners}[store]\nurl = "sqlite:///{self.state}/store.db"\n{toml}')

    def start(self) -> Service:
        """Start it, and wait until it answers and all of its workers are there."""
        self._process = self.launch("--workers", str(self._workers))
        until = time.monotonic() + 60
        for path in self.sockets.values():
            while not _answers(path) or len(self.workers) < self._workers:
                assert self._process.poll() is None, self.log.read_text()
                assert time.monotonic() < until, self.log.read_text()
                time.sleep(0.02)
        return self

    def launch(self, *words: str) -> subprocess.Popen[bytes]:
        """`guestapi serve` with these words, in a session of its own: who signals us does not mean it."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*UNPRIVILEGED, *self._environment, COMMAND, "--config", self.config, "serve", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The master's PID."""
        assert self._process is not None
        return self._process.pid

    @property
    def workers(self) -> list[int]:
        """The workers' PIDs."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def stop(self) -> float:
        """SIGTERM and wait; the seconds that it took."""
        assert self._process is not None
        began = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(30) == 0, self.log.read_text()
        return time.monotonic() - began

    def __enter__(self) -> Service:
        try:
            return self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            # How it ends is for those tests to see that call stop(); for all others that second would add up.
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.root)

    @property
    def socket(self) -> Path:
        """The incus dialect's."""
        return self.sockets["incus"]

    @property
    def binds(self) -> list[tuple[Path, str]]:
        """What to mount into a container: each dialect's directory at /dev/DIALECT."""
        return [(path.parent, f"/dev/{dialect}") for dialect, path in self.sockets.items()]

    def add(
        self,
        name: str,
        container: Container | None = None,
        config: Mapping[str, str] | None = None,
        devices: Mapping[str, Device] | None = None,
        project: str = "default",
        **options: Any,
    ) -> Instance:
        """Register an instance, running if there is a container."""
        with self.writer.change() as change:
            instance = steps.add(change, project, name, config=config, devices=devices, **options)
            return steps.start(change, instance, examine(container.pid)) if container else instance

    def remove(self, name: str, project: str = "default") -> None:
        """Remove an instance."""
        with self.writer.change() as change:
            steps.remove(change, get_instance(change, project, name))

    def configure(self, name: str, **config: str) -> None:
        """Set keys; ``user_foo`` means ``user.foo``."""
        with self.writer.change() as change:
            named = {key.replace("_", "."): value for key, value in config.items()}
            steps.configure(change, get_instance(change, "default", name), named)

    def instance(self, name: str, project: str = "default") -> Instance:
        """What the store holds."""
        with view(self.settings.store.url) as store:
            return get_instance(store, project, name)

    @contextmanager
    def container(
        self,
        name: str,
        config: Mapping[str, str] | None = None,
        devices: Mapping[str, Device] | None = None,
        *,
        base: int | None = BASE,
        project: str = "default",
        **options: Any,
    ) -> Iterator[Container]:
        """A container that runs as the instance `name`, for a while."""
        with Container(self.binds, base=base, hostname=name) as container:
            self.add(name, container, config, devices, project, **options)
            try:
                yield container
            finally:
                self.remove(name, project)

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the operator's command."""
        done = subprocess.run([COMMAND, "--config", self.config, *words], capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    def listed(self) -> list[dict[str, Any]]:
        """What `guestapi instance list` says."""
        found: list[dict[str, Any]] = json.loads(self.command("instance", "list", "--format", "json").stdout)
        return found


def _answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(path))
            connection.sendall(b"OPTIONS * HTTP/1.0\r\n\r\n")
            return connection.recv(100).startswith(b"HTTP/1.0 200")
    except OSError:
        return False
