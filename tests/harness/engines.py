"""Real podman and Docker, each with its own storage and namespaces, and with its API on a socket."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from guestapi.sources.docker_api import Engine as Api
from guestapi.sources.docker_api import EngineError
from tests.harness import rootfs
from tests.harness.containers import BASE
from tests.harness.daemon import packages
from tests.harness.images import ContainerImage
from tests.harness.kept_namespaces import KeptNamespaces
from tests.harness.scratch import SCRATCH
from tests.harness.waiting import TIMEOUT, until

#: Run by sh: makes a mount namespace with only version 2 of cgroups, as both engines need it, and with a state
#: directory of the OCI runtimes that is separate from other tests.
_PREPARE = """
set -e
mount --make-rprivate /
umount -R /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for place in /run/crun /run/runc /run/docker /run/containerd; do mkdir -p "$place"; mount -t tmpfs tmpfs "$place"; done
echo ready
exec sleep infinity
"""

#: Options without which podman needs cgroup controllers and limits that a development machine may lack.
MODEST = ("--pids-limit=0", "--ulimit=nofile=1024:4096", "--ulimit=nproc=1000:1000", "--network=none")
UNPRIVILEGED = (f"--uidmap=0:{BASE}:65536", f"--gidmap=0:{BASE}:65536")
CURL = ("curl", "-sS", "--max-time", "10", "--unix-socket", "/dev/incus/sock")


class RealEngine(ABC):
    """The common parts of podman and Docker. `path` is the engine's own directory, `socket` its API socket."""

    #: Options of ``run`` that are needed on this machine.
    modest: Sequence[str] = ()
    #: The command that removes a running container.
    remove: Sequence[str] = ("rm", "--force")

    def __enter__(self) -> RealEngine:
        # podman derives an image's name from its path, so not every path is possible.
        self.path = Path(f"{SCRATCH}/guestapi-engine-{secrets.token_hex(6)}")
        self.path.mkdir(mode=0o755)
        self.rootfs = self.path / "rootfs"
        rootfs.make(self.rootfs)
        self.socket = self.path / "sock"
        self.log = self.path / "log"
        self._namespaces = KeptNamespaces(_PREPARE)
        #: A prefix that runs a command in the engine's namespaces.
        self.enter = self._namespaces.enter("-m", "-n")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._process is not None and self._process.poll() is None:
                self.remove_all()
                self.stop()
        finally:
            # Remove the containers' cgroups; those of other tests are in use, so they stay.
            clean = "find /sys/fs/cgroup/libpod_parent /sys/fs/cgroup/docker -depth -type d -exec rmdir {} +"
            subprocess.run([*self.enter, "sh", "-c", clean], check=False, capture_output=True)
            self._namespaces.kill()
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    @abstractmethod
    def plain(self) -> Sequence[str]:
        """The arguments of ``run`` for a container without special properties."""

    @abstractmethod
    def load(self, image: ContainerImage, tag: str) -> Sequence[str]:
        """Load an image; return the arguments of ``run`` for a container of it."""

    @abstractmethod
    def serve(self) -> list[str]:
        """Return the command that serves the API."""

    @abstractmethod
    def command(self, *words: str) -> list[str]:
        """Return a command of the engine's client."""

    def environment(self) -> dict[str, str]:
        """Return the environment of the server and the client."""
        return dict(os.environ)

    def start(self) -> None:
        """Serve the API, and wait until it responds."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.enter, *self.serve()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                start_new_session=True,
            )
        until(self._answers, self.log.read_text, pause=0.05)

    def _answers(self) -> bool:
        assert self._process is not None
        try:
            Api(str(self.socket)).containers()
        except EngineError:
            assert self._process.poll() is None, self.log.read_text()
            return False
        return True

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the API server with this signal."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(TIMEOUT)

    def __call__(self, *words: str, check: bool = True) -> str:
        """Run a command of the client; return its output, with standard error if it may fail."""
        done = self._execute(*words)
        names = [word.removeprefix("--name=") for word in words if word.startswith("--name=")]
        if "OCI permission denied" in done.stderr and names:
            # Seen once in some hundred starts: podman 4.3 had closed its own directory to ID-mapped containers for a
            # moment, while another podman started.
            self._execute("rm", "--force", *names)
            done = self._execute(*words)
        assert not check or done.returncode == 0, done.stderr
        return (done.stdout if check else done.stdout + done.stderr).strip()

    def _execute(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT,
            env=self.environment(),
        )

    def remove_all(self) -> None:
        """Remove all containers. podman needs a second try for one whose conmon was killed."""
        said = ""

        def has_none() -> bool:
            nonlocal said
            keys = [one.id for one in Api(str(self.socket)).containers()]
            if keys:
                said = self(*self.remove, *keys, check=False)
            return not keys

        until(has_none, lambda: said)

    def run(self, name: str, image: Sequence[str], *options: str, check: bool = True) -> str:
        """Start a sleeping container with ``run --detach``; return its id.

        Args:
            name: its name.
            image: the arguments that name its image or root file system.
            options: options of ``run``.
            check: fail if the command does.
        """
        named = [f"--name={name}"] if name else []
        words = ["run", "--detach", *named, *self.modest, *options, *image, "sleep", "1000"]
        return self(*words, check=check)

    def once(self, image: Sequence[str], url: str, *options: str) -> str:
        """Run a container whose first program requests `url`; return the output."""
        return self("run", "--rm", *self.modest, *options, *image, *CURL, url)

    def ask(self, container: str, path: str) -> str:
        """Send a request from inside a running container; return the output."""
        return self("exec", container, *CURL, f"http://x{path}")

    def inspect(self, container: str) -> dict[str, Any]:
        """Return the output of the client's inspect."""
        found: dict[str, Any] = json.loads(self("container", "inspect", container))[0]
        return found

    def pid(self, container: str) -> int:
        """Return the PID of a container's init."""
        return int(self.inspect(container)["State"]["Pid"])


class Podman(RealEngine):
    """podman, as root, with hooks in `hooks`."""

    modest = MODEST
    remove = ("rm", "--force", "--time=0")

    def __enter__(self) -> Podman:
        super().__enter__()
        return self

    def _options(self) -> list[str]:
        self.hooks = self.path / "hooks"
        self.hooks.mkdir(exist_ok=True)
        places = {name: str(self.path / name) for name in ("root", "runroot", "tmpdir")}
        return [
            *("podman", "--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--events-backend=file"),
            *(f"--hooks-dir={self.hooks}", *(f"--{name}={path}" for name, path in places.items())),
        ]

    def serve(self) -> list[str]:
        """As Engine."""
        return [*self._options(), "system", "service", "--time=0", f"unix://{self.socket}"]

    def command(self, *words: str) -> list[str]:
        """As Engine."""
        return [*self.enter, *self._options(), *words]

    @property
    def plain(self) -> tuple[str, ...]:
        """The arguments for a container without an image: a directory that its root user owns."""
        if self.rootfs.stat().st_uid != BASE:
            for path in [self.rootfs, *self.rootfs.rglob("*")]:
                os.chown(path, BASE, BASE, follow_symlinks=False)
        return (*UNPRIVILEGED, "--rootfs", str(self.rootfs))

    def load(self, image: ContainerImage, tag: str) -> tuple[str, ...]:
        """Load an image; return the arguments of ``run`` for a container of it."""
        place = self.path / f"image-{tag}"
        image.write_layout(place)
        self("tag", self("pull", "--quiet", f"oci:{place}").splitlines()[-1], tag)
        return (*UNPRIVILEGED, f"localhost/{tag}")


class Docker(RealEngine):
    """Docker's engine from unpacked packages, without networks."""

    modest = ("--network=none",)

    def __enter__(self) -> Docker:
        self._packages = packages("docker")
        super().__enter__()
        return self

    def environment(self) -> dict[str, str]:
        """As Engine: with the engine's own programs first in PATH."""
        paths = f"{self._packages}/usr/bin:{self._packages}/usr/sbin:{os.environ['PATH']}"
        return {**os.environ, "PATH": paths}

    def serve(self) -> list[str]:
        """As Engine."""
        return [
            *("dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs"),
            *(f"--data-root={self.path}/data", "--exec-root=/run/docker", f"--pidfile={self.path}/pid"),
            f"--host=unix://{self.socket}",
        ]

    def command(self, *words: str) -> list[str]:
        """As Engine."""
        return [str(self._packages / "usr/bin/docker"), f"--host=unix://{self.socket}", *words]

    def load(self, image: ContainerImage, tag: str) -> tuple[str, ...]:
        """Load an image; return the arguments of ``run`` for a container of it."""
        place = self.path / f"{tag}.tar"
        image.write_archive(place, f"{tag}:latest")
        self("load", "--input", str(place))
        return (tag,)

    @property
    def plain(self) -> tuple[str, ...]:
        """The arguments for a container of an image without labels, annotations and volumes."""
        if not getattr(self, "_plain", None):
            self._plain = self.load(ContainerImage(self.rootfs), "plain")
        return self._plain
