"""A real libvirtd, in namespaces of its own, with QEMU's domains by TCG.

Its packages are unpacked and laid over /usr, /etc and /var; /run is its own. This machine has no /dev/vhost-vsock, so
no domain with a vsock device can be started here: tests/machine has those.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.harness.daemon import packages
from tests.harness.fast import forbid
from tests.harness.kept_namespaces import KeptNamespaces
from tests.harness.scratch import SCRATCH
from tests.harness.service import USER
from tests.harness.waiting import TIMEOUT, until

#: Run by /bin/sh in new mount and network namespaces, which its last process keeps. $1: the packages; $2: a directory;
#: $3: the service's group; $4: `_REAPER`.
_PREPARE = """
set -e
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$1/usr:/usr" /usr
mount -t tmpfs tmpfs "$2"
for place in etc var; do
    mkdir "$2/$place" "$2/work-$place"
    mount -t overlay overlay -o "lowerdir=$1/$place:/$place,upperdir=$2/$place,workdir=$2/work-$place" "/$place"
done
mount -t tmpfs -o mode=0755 tmpfs /run
# What libvirt's packages do when they are installed.
echo 'libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin' >>/etc/passwd
echo 'libvirt-qemu:x:64055:' >>/etc/group
# What guestapi's do: virsh asks for the name of its group.
echo "guestapi:x:$3:" >>/etc/group
# Nothing of systemd's, and no security module, is here.
cat >/etc/libvirt/qemu.conf <<END
security_driver = "none"
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
remember_owner = 0
END
cat >/etc/libvirt/libvirtd.conf <<END
unix_sock_group = "root"
auth_unix_ro = "none"
auth_unix_rw = "none"
END
exec python3 -I -S -c "$4"
"""

#: Starts a libvirtd for each line, and reaps what libvirtd leaves behind: libvirt waits until a QEMU that it has ended
#: is gone, and PID 1 need not be an init here.
_REAPER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
signal.signal(signal.SIGCHLD, reap)
print("ready", flush=True)
log = [(os.POSIX_SPAWN_OPEN, 1, "/run/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), (os.POSIX_SPAWN_DUP2, 1, 2)]
for line in sys.stdin:
    print(os.posix_spawn("/usr/sbin/libvirtd", ["libvirtd"], os.environ, file_actions=log), flush=True)
"""

#: Without disks: it boots no further than its firmware.
_DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>
<os><type arch='x86_64' machine='q35'>hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{devices}</devices></domain>"""


class Libvirt:
    """A running libvirtd."""

    def __enter__(self) -> Libvirt:
        forbid()
        place = packages("libvirt")
        self._directory = tempfile.mkdtemp(prefix="guestapi-libvirt-", dir=SCRATCH)
        self._namespaces = KeptNamespaces(_PREPARE, place, self._directory, str(USER), _REAPER)
        self.root = self._namespaces.root
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in (self.root / "run/libvirt/qemu").glob("*.pid"):
            if file.stem != "driver":
                os.kill(int(file.read_text()), signal.SIGKILL)
        self.stop()
        self._namespaces.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def enter(self) -> Sequence[str]:
        """The beginning of a command that runs where libvirt is."""
        return self._namespaces.enter("-m")

    def start(self) -> None:
        """Start libvirtd, and wait until it answers."""
        self._pid = int(self._namespaces.ask("start"))

        def answers() -> bool:
            assert self._runs, (self.root / "run/log").read_text()
            return self.attempt("list").returncode == 0

        until(answers, "an answer of libvirtd")

    @property
    def _runs(self) -> bool:
        return Path(f"/proc/{self._pid}").exists()

    def stop(self) -> None:
        """End libvirtd; its domains go on."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        until(lambda: not self._runs, "the end of libvirtd")

    def attempt(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run virsh; return what came of it."""
        command = [*self.enter, "virsh", "--quiet", "--connect", "qemu:///system", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)

    def virsh(self, *words: str) -> str:
        """Run virsh; return its output."""
        done = self.attempt(*words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def define(self, name: str, devices: str = "") -> str:
        """Define a domain with more devices; return its UUID."""
        file = self.root / "var/tmp" / f"{name}.xml"
        file.write_text(_DOMAIN.format(name=name, devices=devices))
        self.virsh("define", f"/var/tmp/{name}.xml")
        return self.virsh("domuuid", name)
