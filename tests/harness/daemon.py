"""A real Incus or LXD, in namespaces of its own, with an overlay over this machine's root.

It shares the PID namespace of the test and /run, so its containers reach a service of the tests. All its processes are
in one cgroup, which is killed at the end.

Packages of this machine's release of Debian use its libraries. Those of a newer release bring their own C library, so
they are laid over /usr: an older program runs with a newer C library, but not the other way round.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.harness import rootfs
from tests.harness.cgroups import remove_cgroup
from tests.harness.containers import Response, parse
from tests.harness.fast import forbid
from tests.harness.kept_namespaces import KeptNamespaces
from tests.harness.waiting import TIMEOUT, until

#: The directory into which tools/unpack-daemon unpacks the packages.
PACKAGES = Path(sys.executable).parent.parent
#: The packages of a newer release of Debian than this machine's.
_NEWER = frozenset({"incus-7"})

#: Run by /bin/sh in new mount and network namespaces; liblxc has sockets in the latter. Its last process keeps them.
#: $3: the daemon's directory. $4: its cgroup. $5: a directory to lay over /usr, or nothing.
_PREPARE = """
set -e
mount --make-rprivate /
[ -z "$5" ] || mount -t overlay overlay -o "lowerdir=$5:/usr" /usr
mount -t tmpfs -o mode=0755 tmpfs "$1"
mkdir "$1/var" "$1/work" "$1/cgroup"
mount -t overlay overlay -o "lowerdir=/var,upperdir=$1/var,workdir=$1/work" /var
mkdir -p "$3" "/run/$2" /run/lxc
mount -t tmpfs -o mode=0711 tmpfs "$3"
for place in "/run/$2" /run/lxc /var/log /var/cache; do mount -t tmpfs -o mode=0755 tmpfs "$place"; done
mkdir "/var/log/$2"
printf 'root:1000000:65536000\\n' >"$1/ids"
mount --bind "$1/ids" /etc/subuid
mount --bind "$1/ids" /etc/subgid
mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/$4"
echo $$ >"$1/cgroup/$4/cgroup.procs"
exec unshare --cgroup /bin/sh -c 'umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup; echo ready
exec sleep infinity'
"""

#: Runs a command in the cgroup.
_JOIN = 'echo $$ >/sys/fs/cgroup/cgroup.procs; exec "$@"'


def packages(release: str) -> Path:
    """Return the directory of a daemon's packages; skip the test if there is none."""
    found = PACKAGES / release
    if not found.is_dir():
        pytest.skip(f"the package of {release} could not be had: 'make test' unpacks it to {found}")
    return found


class Daemon:
    """A running daemon with one image, ``busybox``, which has curl, and one profile with its root disk."""

    def __init__(self, release: str, directory: str | None = None) -> None:
        """Describe a daemon, without starting it.

        Args:
            release: ``incus``, ``incus-7`` or ``lxd``, as tools/unpack-daemon names them.
            directory: of its state; None: as in Debian.
        """
        forbid()
        self.release = release
        self.kind = release.partition("-")[0]
        self._state = directory or f"/var/lib/{self.kind}"
        unpacked = packages(release)
        self._over_usr = unpacked / "usr" if release in _NEWER else None
        self._place = Path("/") if self._over_usr else unpacked
        self._program = self._place / {"incus": "usr/libexec/incus/incusd", "lxd": "usr/bin/lxd"}[self.kind]
        self._client = self._place / {"incus": "usr/bin/incus", "lxd": "usr/bin/lxc"}[self.kind]

    def __enter__(self) -> Daemon:
        self._directory = Path(tempfile.mkdtemp(prefix="guestapi-daemon-", dir="/run"))
        self._cgroup = self._directory.name
        self._namespaces = KeptNamespaces(
            _PREPARE, self._directory, self.kind, self._state, self._cgroup, self._over_usr or ""
        )
        self.root = self._namespaces.root
        self.socket = self.root / self._state[1:] / "unix.socket"
        try:
            self.start()
            self._set_up()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The cgroup has the daemon's processes and containers, and no others (cgroups(7)).
        cgroup = self.root / str(self._directory)[1:] / "cgroup" / self._cgroup
        (cgroup / "cgroup.kill").write_text("1")
        self._namespaces.wait()
        remove_cgroup(self._cgroup)
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self) -> None:
        """Start the daemon, and wait until its API responds."""
        # Inside, another file system covers this directory.
        self._log = self._directory / "log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._enter, self._program, "--group", "root"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(self._answers, "an answer of the daemon")

    @property
    def pid(self) -> int:
        """The PID of the daemon."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the daemon runs."""
        return self._process.poll() is None

    def send(self, signal: int) -> None:
        """Send the daemon a signal."""
        self._process.send_signal(signal)

    def kill(self, signal: int) -> None:
        """End the daemon with this signal; its containers stay."""
        self._process.send_signal(signal)
        self._process.wait()

    def client(self, *words: str, check: bool = True, stdin: str = "") -> str:
        """Run the daemon's client; return its output."""
        command = [*self._enter, self._client, "--quiet", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT, input=stdin)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def query(self, path: str, method: str = "GET", document: object = None) -> Any:
        """Send a request to the daemon's API, and wait for the end of its operation."""
        # Without TLS: reading the certificates of all authorities takes a hundred times as long as the client itself.
        transport = httpx.HTTPTransport(uds=str(self.socket), verify=False)
        with httpx.Client(transport=transport, base_url="http://daemon", trust_env=False) as client:
            answer = client.request(method, path, json=document, timeout=TIMEOUT).json()
            if answer["type"] == "async":
                answer = client.get(f"{answer['operation']}/wait", timeout=TIMEOUT).json()
        assert answer["type"] == "sync", answer
        return answer["metadata"]

    def init(self, name: str, project: str = "default") -> int:
        """Return the PID of a running instance's init."""
        pid: int = self.query(f"/1.0/instances/{name}/state?project={quote(project)}")["pid"]
        assert pid > 0, f"{name} does not run"
        return pid

    def run(self, name: str, *argv: str, project: str = "default") -> str:
        """Run a program in an instance by an exec session; return its output."""
        return self.client("--project", project, "exec", name, "--", *argv)

    def ask(
        self,
        name: str,
        path: str,
        socket: str,
        *,
        method: str = "GET",
        body: str = "",
        project: str = "default",
        entered: bool = False,
    ) -> Response:
        """Send one request with curl from inside an instance; return its response.

        Args:
            name: the instance.
            path: the target of the request.
            socket: the socket's path in the instance.
            method: the method.
            body: the body.
            project: the instance's project.
            entered: run curl by nsenter, instead of an exec session of the daemon, which takes ten times as long.
        """
        words = ["curl", "-s", "-i", "--max-time", str(TIMEOUT), "-X", method, "--unix-socket", socket]
        words += ["-d", body] if body else []
        if entered:
            target = str(self.init(name, project))
            command = ["nsenter", "-t", target, "-a", "--setuid", "0", "--setgid", "0", "--", *words]
        else:
            command = [*map(str, self._enter), str(self._client), "--project", project, "exec", name, "--", *words]
        done = subprocess.run(
            [*command, f"http://x{path}"], capture_output=True, check=False, timeout=TIMEOUT, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done
        (response,) = parse(done.stdout)
        return response

    def listen(self, name: str, socket: str, path: str = "/1.0/events") -> subprocess.Popen[str]:
        """Start a program in an instance that prints events, one a line. The caller kills it."""
        command = [*self._enter, self._client, "exec", name, "--", "curl", "-sN"]
        return subprocess.Popen(
            [*command, "--unix-socket", socket, f"http://x{path}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    @contextmanager
    def running_in(self, name: str, *argv: str) -> Iterator[Iterator[str]]:
        """Run a program in an instance, by an exec session, until the end of the block; yield its lines."""
        command = [*self._enter, self._client, "exec", name, "--", *argv]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                yield process.stdout
            finally:
                process.stdin.close()
                process.kill()

    @property
    def enter_mounts(self) -> Sequence[str]:
        """The beginning of a command that runs where the daemon's files are."""
        return self._namespaces.enter("-m")

    @property
    def _enter(self) -> Sequence[str | Path]:
        libraries = ":".join(str(self._place / directory / "x86_64-linux-gnu") for directory in ("usr/lib", "lib"))
        programs = ":".join(str(self._place / directory) for directory in ("usr/libexec/incus", "usr/bin"))
        return [
            *(*self.enter_mounts, "-C", "-n"),
            *("env", "-i", f"HOME={self._directory}", f"PATH={programs}:/usr/sbin:/usr/bin:/sbin:/bin"),
            f"{self.kind.upper()}_DIR={self._state}",
            *(f"LD_LIBRARY_PATH={libraries}", "/bin/sh", "-c", _JOIN, "sh"),
        ]

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            self.query("/1.0")
        except (httpx.HTTPError, ValueError):
            return False
        return True

    def _set_up(self) -> None:
        self.client("storage", "create", "default", "dir")
        # Below the cgroup of this daemon, not below that of PID 1.
        self.client("profile", "set", "default", "raw.lxc", "lxc.cgroup.relative=1")
        self.client("profile", "device", "add", "default", "root", "disk", "path=/", "pool=default")
        image = self._directory / "image.tar"
        with tempfile.TemporaryDirectory() as place:
            rootfs.make(Path(place) / "rootfs")
            with tarfile.open(image, "w") as tar:
                metadata = json.dumps({"architecture": os.uname().machine, "creation_date": 1}).encode()
                member = tarfile.TarInfo("metadata.yaml")
                member.size = len(metadata)
                tar.addfile(member, io.BytesIO(metadata))
                tar.add(Path(place) / "rootfs", "rootfs")
        self.import_image("busybox", image)

    def import_image(self, alias: str, *files: Path) -> str:
        """Import an image of one file, or of metadata and root file system; return its fingerprint."""
        for file in files:
            # The daemon's namespaces have other temporary directories.
            shutil.move(file, self.root / "var/cache" / file.name)
        self.client("image", "import", *(f"/var/cache/{file.name}" for file in files), "--alias", alias)
        fingerprint: str = self.query(f"/1.0/images/aliases/{alias}")["target"]
        return fingerprint
