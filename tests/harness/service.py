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
import threading
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
from tests.harness.waiting import TIMEOUT, until

#: An unused user ID. The service needs no entry in /etc/passwd.
USER = 64_042
COMMAND = Path(sys.executable).with_name("guestapi")

#: As in guestapi.service: one capability, and no program that it starts can gain more.
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


#: One command runs in this process at a time.
_ONE_COMMAND = threading.Lock()


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
        before: Sequence[str] = (),
    ) -> None:
        """Prepare a service, without starting it.

        Args:
            workers: the number of workers.
            toml: more settings of guestapi.toml; no [store] and no [[listener]].
            gunicorn: the contents of gunicorn.conf.py.
            dialects: the dialects to listen for.
            environment: environment variables of the service in addition.
            before: words before its command.
        """
        forbid()
        # Not below pytest's own directory, which only root can enter.
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
        # Created by root, as with an operator's first command; the service uses it as another user.
        self.writer = Writer(self.settings, create=True)
        self.log = self.root / "log"
        self._workers = workers
        # Set after the change of user: a library that is loaded before it might make files that belong to root.
        self._environment = ["env", *(f"{name}={value}" for name, value in (environment or {}).items())]
        self._before = list(before)
        self._process: subprocess.Popen[bytes] | None = None

    def write_config(self, toml: str) -> None:
        """Write guestapi.toml again."""
        listeners = "".join(
            f'[[listener]]\npath = "{path}"\ndialect = "{name}"\n' for name, path in self.sockets.items()
        )
        self.config.write_text(f'{listeners}[store]\nurl = "sqlite:///{self.state}/store.db"\n{toml}')

    def start(self) -> Service:
        """Start the service, and wait until it answers and all its workers run."""
        self._process = self.launch("--workers", str(self._workers))
        until(self._is_up, self.log.read_text, pause=0.02)
        return self

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        return all(map(_answers, self.sockets.values())) and len(self.workers) >= self._workers

    def launch(self, *words: str) -> subprocess.Popen[bytes]:
        """Run `guestapi serve` with these arguments, in a session of its own, which the test's signals do not reach."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*self._before, *UNPRIVILEGED, *self._environment, COMMAND, "--config", self.config, "serve", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The PID of the arbiter."""
        assert self._process is not None
        return self._process.pid

    @property
    def workers(self) -> list[int]:
        """The PIDs of the workers."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def stop(self) -> float:
        """Stop the service with SIGTERM; return the seconds that it took."""
        assert self._process is not None
        began = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(TIMEOUT) == 0, self.log.read_text()
        return time.monotonic() - began

    def kill(self) -> None:
        """Kill the service and its workers with SIGKILL, all at once."""
        assert self._process is not None
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

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
            # Only the tests of stop() need a graceful end; it would take every other test a second.
            self.kill()
        shutil.rmtree(self.root)

    @property
    def socket(self) -> Path:
        """The socket of the incus dialect."""
        return self.sockets["incus"]

    @property
    def binds(self) -> list[tuple[Path, str]]:
        """The mounts of a container: each dialect's directory at /dev/DIALECT."""
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
        """Register an instance; it runs if there is a container."""
        with self.writer.change() as change:
            instance = steps.add(change, project, name, config=config, devices=devices, **options)
            return steps.start(change, instance, examine(container.pid)) if container else instance

    def remove(self, name: str, project: str = "default") -> None:
        """Remove an instance."""
        with self.writer.change() as change:
            steps.remove(change, get_instance(change, project, name))

    def configure(self, name: str, **config: str) -> None:
        """Set keys; ``user_foo`` stands for ``user.foo``."""
        with self.writer.change() as change:
            named = {key.replace("_", "."): value for key, value in config.items()}
            steps.configure(change, get_instance(change, "default", name), named)

    def instance(self, name: str, project: str = "default") -> Instance:
        """Return the stored instance."""
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
        """Run a container as the instance `name` for the length of the block."""
        with Container(self.binds, base=base, hostname=name) as container:
            self.add(name, container, config, devices, project, **options)
            try:
                yield container
            finally:
                self.remove(name, project)

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the operator's command in this process: it takes a tenth of the time of `program`."""
        # Imported here, because containers and walks use this module without any command.
        from click.testing import CliRunner

        from guestapi.cli.main import main

        # The runner replaces the standard streams of the whole process.
        with _ONE_COMMAND:
            ran = CliRunner().invoke(main, ["--config", str(self.config), *words], prog_name="guestapi")
        if ran.exception is not None and not isinstance(ran.exception, SystemExit):
            raise ran.exception
        assert not check or ran.exit_code == 0, ran.stderr
        return subprocess.CompletedProcess(words, ran.exit_code, ran.stdout, ran.stderr)

    def program(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the operator's command in a process of its own."""
        done = subprocess.run([COMMAND, "--config", self.config, *words], capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    def listed(self) -> list[dict[str, Any]]:
        """Return the output of `guestapi instance list`."""
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
