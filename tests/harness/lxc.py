"""Real LXC containers, unprivileged, with the shipped configuration snippet."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import TracebackType

from tests.harness.containers import BASE, Ran

SNIPPET = Path(__file__).parents[2] / "conf" / "lxc-guestapi.conf"

#: The container's init requests a key at once.
INIT = """#!/bin/sh
/usr/bin/curl -s --unix-socket /dev/incus/sock http://x/1.0/config/user.foo >/tmp/first 2>&1
echo " $?" >>/tmp/first
mv /tmp/first /tmp/answer
exec sleep 1000
"""

#: Runs a command with other contents of /etc/subuid and /etc/subgid, which let root map IDs.
_WITH_IDS = 'mount --make-rprivate /; mount --bind "$0" /etc/subuid; mount --bind "$0" /etc/subgid; exec "$@"'


class Lxc:
    """An LXC container, made of busybox and the host's /usr."""

    def __init__(
        self,
        directory: Path,
        name: str,
        hook: str,
        socket: Path,
        base: int | None = BASE,
        *,
        config: str = "",
        snippet: str | None = None,
    ) -> None:
        """Describe a container, without starting it.

        Args:
            directory: its lxcpath, which every user must be able to enter.
            name: the container's name.
            hook: the hook program, with options.
            socket: the directory of the socket.
            base: the host UID of root in the container; None: no ID map, a privileged container.
            config: more of its configuration; ``ROOTFS`` in it is replaced by its root file system.
            snippet: the file that it includes; None: the shipped one.
        """
        self.name = name
        self.path = directory
        root = self.path / name / "rootfs"
        for part in ("bin", "dev", "proc", "srv", "sys", "tmp", "usr", "lib", "lib64"):
            (root / part).mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "bin" / "busybox")
        for applet in ("sh", "sleep", "cat"):
            (root / "bin" / applet).symlink_to("busybox")
        (root / "init").write_text(INIT)
        (root / "init").chmod(0o755)
        owner = base or 0
        subprocess.run(["chown", "-R", f"{owner}:{owner}", root], check=True)
        command = self.path / name / "guestapi-hook"
        command.write_text(f'#!/bin/sh\nexec {hook} "$@"\n')
        command.chmod(0o755)
        text = SNIPPET.read_text() if snippet is None else snippet
        text = text.replace("/opt/guestapi/bin/guestapi-hook", str(command))
        text = text.replace("/var/lib/incus/guestapi", str(socket))
        (self.path / name / "guestapi.conf").write_text(text)
        ids = f"lxc.idmap = u 0 {base} 65536\nlxc.idmap = g 0 {base} 65536\n" if base is not None else ""
        self._config = (
            f"lxc.rootfs.path = dir:{root}\nlxc.init.cmd = /init\nlxc.mount.auto = proc:rw\n{ids}lxc.autodev = 1\n"
            "lxc.mount.entry = /usr usr none bind,ro 0 0\nlxc.mount.entry = /lib lib none bind,ro 0 0\n"
            f"lxc.mount.entry = /lib64 lib64 none bind,ro,optional 0 0\n"
            f"lxc.include = {self.path / name / 'guestapi.conf'}\n"
        )
        self.configure(config)
        self._ids = self.path / name / "ids"
        self._ids.write_text(f"root:{owner or BASE}:65536\n")

    def configure(self, config: str) -> None:
        """Write its configuration, with this added."""
        text = self._config + config.replace("ROOTFS", str(self.path / self.name / "rootfs"))
        if "lxc.uts.name" not in config:
            text += f"lxc.uts.name = {self.name}\n"
        if "lxc.net." not in config:
            text += "lxc.net.0.type = empty\n"
        (self.path / self.name / "config").write_text(text)

    def __enter__(self) -> Lxc:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(check=False)

    def command(self, program: str, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of LXC's programs on the container."""
        words = [program, "-P", str(self.path), "-n", self.name, *argv]
        done = subprocess.run(
            [*self.enter, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    @property
    def enter(self) -> list[str]:
        """A prefix that lets root map IDs."""
        return ["unshare", "--mount", "sh", "-c", _WITH_IDS, str(self._ids)]

    def start(self) -> None:
        """Start the container with lxc-start."""
        self.command("lxc-start")

    def stop(self, *, check: bool = True) -> None:
        """Kill the container with lxc-stop."""
        self.command("lxc-stop", "-k", check=check)

    def run(self, *argv: str) -> Ran:
        """Run a program in the container."""
        done = self.command("lxc-attach", "--clear-env", "--", *argv, check=False)
        return Ran(done.returncode, done.stdout, done.stderr)

    def ask(self, path: str) -> str:
        """Send a request with curl from inside the container; return the output."""
        return self.run("/usr/bin/curl", "-s", "--unix-socket", "/dev/incus/sock", f"http://x{path}").out

    @property
    def pid(self) -> int:
        """The PID of its init, from lxc-info."""
        return int(self.command("lxc-info", "--pid", "--no-humanize").stdout)
