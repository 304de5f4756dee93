"""A follower of a runtime that the test simulates, with real hooks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import TracebackType

from guestapi.callers.namespaces import examine
from guestapi.errors import SourceError
from guestapi.model import Init
from guestapi.sources import hook
from guestapi.sources.doorbell import Ring
from guestapi.sources.follower import Follower
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.recorder import Ledger
from guestapi.sources.source import Changes, Found
from tests.harness.service import COMMAND, USER, Service
from tests.harness.waiting import TIMEOUT, until

#: The command of the hook as it is installed: without the package, with built-in modules only.
HOOK = ["/usr/bin/python3", "-I", "-S", hook.__file__]


def processor_milliseconds(command: Sequence[str | Path], environ: Mapping[str, str]) -> float:
    """Run a command to its end; return the processor time that it took."""
    process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL)
    _pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return (usage.ru_utime + usage.ru_stime) * 1000


class RunningFollower:
    """`guestapi follow SOURCE` as its unit runs it: root in the store's group, with two capabilities of root's."""

    def __init__(self, service: Service, source: str = "lxc", sources: str = "", *, start: bool = True) -> None:
        """Start a follower.

        Args:
            service: the service whose store it writes; its guestapi.toml names the doorbells from here on.
            source: the source that it follows.
            sources: more settings of guestapi.toml, below ``[sources]``.
            start: start it, and wait until it listens.
        """
        self._service = service
        self._source = source
        self.doorbells = service.root / "sources"
        self.log = service.root / f"follow-{source}.log"
        text = service.config.read_text()
        if "[sources]" not in text:
            service.config.write_text(f'{text}\n[sources]\ndoorbells = "{self.doorbells}"\n{sources}')
        # As StateDirectoryMode= of guestapi.service sets it.
        service.state.chmod(0o770)
        for file in service.state.iterdir():
            file.chmod(0o660)
        self._process: subprocess.Popen[bytes] | None = None
        if start:
            self.start()

    def __enter__(self) -> RunningFollower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The PID of the follower."""
        assert self._process is not None
        return self._process.pid

    def launch(self) -> None:
        """Start the follower without waiting."""
        group = ["nice", "-n", "-20", "setpriv", f"--regid={USER}", "--clear-groups", "--no-new-privs"]
        with self.log.open("ab") as log:
            capabilities = ["--bounding-set=-all,+net_admin,+sys_ptrace", "--inh-caps=-all"]
            self._process = subprocess.Popen(
                [*group, *capabilities, COMMAND, "--config", self._service.config, "follow", self._source],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0o007,
            )

    def start(self) -> None:
        """Start the follower, and wait until it listens."""
        self.launch()
        until(self.listens, "the follower")

    def listens(self) -> bool:
        """Return whether the follower listens at its doorbell."""
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self.doorbells / f"{self._source}.sock"))
            except OSError:
                assert self._process is not None
                assert self._process.poll() is None, self.log.read_text()
                return False
            return True

    def is_alive(self) -> bool:
        """Return whether the follower runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Kill the follower with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> int:
        """Stop the follower as systemctl stop does; return its exit status."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(TIMEOUT)
        self._process = None
        return status


def install_hook(directory: Path) -> Path:
    """Install the hook as `make install` does, as a program of its own; return its path."""
    path = directory / "guestapi-hook"
    if not path.exists():
        shutil.copy(hook.__file__, path)
        path.chmod(0o755)
    return path


class Inits:
    """Sleeping processes that are PID 1 of a PID namespace each."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Inits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pid in list(self._processes):
            self.end(pid)

    def start(self, number: int = 1) -> list[int]:
        """Start this many; return their PIDs."""
        unshare = ["unshare", "--pid", "--fork", "--kill-child", "sleep", "1000"]
        started = [subprocess.Popen(unshare) for _ in range(number)]
        found = []
        for process in started:
            pid = _init_below(process.pid)
            self._processes[pid] = process
            found.append(pid)
        return found

    def end(self, pid: int) -> None:
        """End one, and wait for its end."""
        process = self._processes.pop(pid)
        os.kill(pid, 9)
        process.wait()


def _init_below(pid: int) -> int:
    """Return the PID of the init that ``unshare`` with that PID has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    until(children.read_text, "an init")
    init = int(children.read_text())
    # Between fork and exec it is still unshare.
    until(lambda: Path(f"/proc/{init}/comm").read_text() == "sleep\n", "an init")
    return init


class PlayedChanges:
    """The event stream of a `PlayedSource`: each line is a key; an empty one stands for all keys."""

    def __init__(self, readable: socket.socket) -> None:
        self._readable = readable

    def fileno(self) -> int:
        """As `Changes.fileno`."""
        return self._readable.fileno()

    def read(self) -> set[str] | None:
        """As `Changes.read`."""
        lines = self._readable.recv(4096).decode().splitlines()
        if not lines:
            raise SourceError("the stream of events has ended")
        return None if "" in lines else set(lines)

    def close(self) -> None:
        """As `Changes.close`."""
        self._readable.close()


class PlayedSource:
    """A runtime whose containers the test sets. A hook's arguments are a container's name and the PID of its init."""

    name = "lxc"

    def __init__(self) -> None:
        self.there: dict[str, Found | None] = {}
        self.fault: str | None = None
        self.looks = 0
        self._writable: socket.socket | None = None

    def observed(self, name: str, pid: int | None, **more: str) -> Observed:
        """Return an observation of a container with that init."""
        init = examine(pid) if pid is not None else None
        return Observed(key=f"key of {name}", project="default", name=name, init=init, config=more)

    def run(self, name: str, pid: int | None, **more: str) -> None:
        """Make the container exist, with that init."""
        one = self.observed(name, pid, **more)
        self.there[one.key] = one

    def announce(self, line: str) -> None:
        """Send a change to the follower."""
        until(lambda: self._writable, "a reader of the changes")
        assert self._writable is not None
        self._writable.send(f"{line}\n".encode())

    def hang_up(self) -> None:
        """End the stream of changes."""
        until(lambda: self._writable, "a reader of the changes")
        assert self._writable is not None
        self._writable.close()
        self._writable = None

    def observe(self, known: Mapping[str, Init | None]) -> Iterable[Found]:
        """As `Source.observe`."""
        self.looks += 1
        if self.fault is not None:
            raise SourceError(self.fault)
        return [one for one in self.there.values() if one is not None]

    def observe_one(self, key: str, known: Init | None) -> Found | None:
        """As `Source.observe_one`."""
        if self.fault is not None:
            raise SourceError(self.fault)
        return self.there.get(key)

    def at_doorbell(self, ring: Ring) -> Observed | Problem | None:
        """As `Source.at_doorbell`."""
        name, pid = ring.arguments
        if name == "of another":
            return None
        if name == "broken":
            raise RuntimeError(name)
        if name == "wrong":
            raise SourceError("this one is wrong", "make it right")
        self.run(name, int(pid))
        return self.observed(name, int(pid))

    def changes(self) -> Changes:
        """As `Source.changes`."""
        self._writable, readable = socket.socketpair()
        return PlayedChanges(readable)


@contextmanager
def following(source: PlayedSource, ledger: Ledger, doorbells: Path) -> Iterator[list[str]]:
    """Run a follower for the length of the block; yield what it has sent to systemd."""
    notified: list[str] = []
    follower = Follower(source, ledger, doorbells / "lxc.sock", lambda *fields: notified.extend(fields))
    thread = Thread(target=follower.run)
    thread.start()
    try:
        until(lambda: "READY=1" in notified, "the follower")
        yield notified
    finally:
        follower.stop()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
