"""A real systemd as PID 1, with journald and systemctl, in namespaces over an overlay of this machine's own root."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from tests.harness.cgroups import remove_cgroup
from tests.harness.fast import forbid
from tests.harness.waiting import TIMEOUT, until

CHECKOUT = Path(__file__).resolve().parents[2]

#: Run by /bin/sh as PID 1 of new mount, PID, UTS and IPC namespaces, with a directory, the checkout, the name of a
#: cgroup and BECOME_SYSTEMD.
BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root" "$1/cgroup"
# The root of its cgroup namespace is a cgroup of its own.
mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/$3"
echo 0 >"$1/cgroup/$3/cgroup.procs"
exec unshare --cgroup /bin/sh -c "$4" boot "$1" "$2"
"""
BECOME_SYSTEMD = """
set -e
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mkdir sys/fs/cgroup/entered
mount --rbind /dev dev
mount -t tmpfs -o mode=0755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir -p ".$2"
mount --bind "$2" ".$2"
mkdir -p .old
pivot_root . .old
umount -l /.old
# As systemd does it on a host, though not in what it takes for a container (mount-setup.c): units see later mounts.
mount --make-rshared /
hostname machine
# What the host's own units would do is not wanted here: no udev, no network, no consoles.
for unit in systemd-udevd.service systemd-udev-trigger.service systemd-modules-load.service dev-hugepages.mount \\
    dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount systemd-sysctl.service networking.service \\
    e2scrub_reap.service console-setup.service keyboard-setup.service apparmor.service systemd-random-seed.service \\
    systemd-resolved.service systemd-timesyncd.service systemd-networkd.service lxc.service lxc-net.service; do
    ln -sf /dev/null "/etc/systemd/system/$unit"
done
# Nor what makes units of fstab, partitions, consoles and old init scripts, a dozen programs at each daemon-reload.
mkdir -p /etc/systemd/system-generators
for generator in /lib/systemd/system-generators/*; do
    ln -sf /dev/null "/etc/systemd/system-generators/${generator##*/}"
done
rm -f /etc/fstab
mkdir -p /var/log/journal-unused
exec env -i container=guestapi-test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system \\
    --unit=basic.target --log-target=null --show-status=no
"""


#: Whatever is run on the machine from outside is in a cgroup of the machine too.
JOIN = 'echo 0 >/sys/fs/cgroup/entered/cgroup.procs && exec "$@"'


@contextmanager
def building() -> Iterator[None]:
    """Let nobody else build in the checkout meanwhile, which ``make install`` and ``tools/build_deb.py`` do."""
    with (CHECKOUT / "Makefile").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


class Machine:
    """A booted systemd, with an overlay that is removed at the end. It shares the network with its host."""

    def __enter__(self) -> Machine:
        forbid()
        self._directory = tempfile.mkdtemp(prefix="guestapi-machine-", dir="/var/tmp")
        self._cgroup = Path(self._directory).name
        unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            [*unshare, "/bin/sh", "-c", BOOT, "boot", self._directory, CHECKOUT, self._cgroup, BECOME_SYSTEMD],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        until(children.read_text, "PID 1")
        self.pid = int(children.read_text().split()[0])
        until(self._is_up, "systemd")
        return self

    def _is_up(self) -> bool:
        assert self._process.poll() is None, "systemd did not start"
        return self.run("systemctl", "is-active", "--quiet", "basic.target", check=False).returncode == 0

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The end of PID 1 ends all processes of its namespace.
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
        remove_cgroup(self._cgroup)

    def run(self, *argv: str, check: bool = True, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
        """Run a program on the machine."""
        done = subprocess.run(
            [*self.enter, *argv], capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}{self._journal(argv)}"
        return done

    def put(self, staged: Path) -> None:
        """Install guestapi from a directory into which `stage` has installed it."""
        self.unpack(staged)
        # The users, and what else is there on no stage.
        self.run("/usr/bin/python3", str(CHECKOUT / "tools/installation.py"), "install")

    def unpack(self, staged: Path, name: str = ".") -> None:
        """Copy a directory of those that `stage` has made to the same place on the machine; default: all."""
        with subprocess.Popen(["tar", "-C", staged, "-c", name], stdout=subprocess.PIPE) as packing:
            subprocess.run(
                [*self.enter, "tar", "-C", "/", "-x", "--no-overwrite-dir"], stdin=packing.stdout, check=True
            )

    def _journal(self, argv: Sequence[str]) -> str:
        """What the journal says of a job of systemd that has failed."""
        if argv[0] != "systemctl":
            return ""
        return self.run("journalctl", "--no-pager", "--lines", "60", check=False).stdout

    @property
    def enter(self) -> list[str]:
        """A prefix that runs a command on the machine."""
        return ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-C", "/bin/sh", "-c", JOIN, "enter"]


def stage(directory: Path) -> Path:
    """Have ``make install`` install into a directory (DESTDIR), once for all processes that name it; return it."""
    with building():
        # Renamed when it is complete: `install` changes nothing after the last file.
        if not directory.exists():
            unfinished = directory.with_name(f"{directory.name}-{os.getpid()}")
            words = ["make", "-C", str(CHECKOUT), "install", f"DESTDIR={unfinished}"]
            # The one extension that pip compiles need not be fast here.
            environment = {**os.environ, "CFLAGS": "-O0 -g0"}
            subprocess.run(words, check=True, capture_output=True, env=environment)
            unfinished.rename(directory)
    return directory


class Installed(Machine):
    """A machine with guestapi and both sockets enabled."""

    def __init__(self, staged: Path) -> None:
        """Boot nothing yet.

        Args:
            staged: what `stage` has installed. That ``make install`` does the same on a machine is what
                tests/docs/test_guides.py shows.
        """
        self._staged = staged

    def __enter__(self) -> Installed:
        super().__enter__()
        try:
            self.put(self._staged)
            self.run("systemctl", "enable", "--now", "guestapi.socket", "guestapi-lxd.socket")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def property_of(self, name: str) -> str:
        """Return a property of the service's unit."""
        return self.run("systemctl", "show", "--value", "-p", name, "guestapi.service").stdout.strip()

    def wait_for(self, name: str, value: str) -> None:
        """Wait until a property has a value."""
        until(lambda: self.property_of(name) == value, f"{name} is {value}")

    def wait_for_workers(self, count: int) -> None:
        """Wait until this many workers answer."""
        self.wait_for("StatusText", f"{count} of {count} workers answer on 2 sockets")

    def ask(self) -> None:
        """Send a request, which waits behind earlier connections in the socket's queue, and wait for its response."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(f"/proc/{self.pid}/root/var/lib/incus/guestapi/sock")
            connection.sendall(b"OPTIONS * HTTP/1.0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.0 200")

    def workers(self) -> list[int]:
        """Return the PIDs of the workers, as seen on the machine."""
        return [int(pid) for pid in self.run("pgrep", "-P", self.property_of("MainPID")).stdout.split()]

    def write(self, path: str, content: str) -> None:
        """Write a file on the machine."""
        self.run("sh", "-c", 'printf %s "$1" >"$2"', "write", content, path)

    def set_workers(self, count: int, more: str = "") -> None:
        """Write gunicorn.conf.py."""
        self.write("/etc/guestapi/gunicorn.conf.py", f"workers = {count}\n{more}")

    @contextmanager
    def drop_in(self, content: str) -> Iterator[None]:
        """Add a drop-in to the service's unit for the length of the block. The caller restarts the service."""
        directory = "/run/systemd/system/guestapi.service.d"
        self.run("mkdir", "-p", directory)
        self.write(f"{directory}/test.conf", content)
        self.run("systemctl", "daemon-reload")
        try:
            yield
        finally:
            self.run("rm", "-r", directory)
            self.run("systemctl", "daemon-reload")
