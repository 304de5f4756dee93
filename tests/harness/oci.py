"""crun and runc without an engine: bundles made by hand, and state directories of the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.harness import rootfs
from tests.harness.containers import BASE
from tests.harness.daemon import packages
from tests.harness.kept_namespaces import KeptNamespaces
from tests.harness.scratch import SCRATCH
from tests.harness.waiting import TIMEOUT, until

#: runc needs a system with only version 2 of cgroups.
_PREPARE = """
set -e
mount --make-rprivate /
umount -R /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo ready
exec sleep infinity
"""
_MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
    {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
]
_CAPABILITIES = ["CAP_SETUID", "CAP_SETGID", "CAP_KILL"]


class OciRuntime:
    """crun or runc, with a state directory and a root file system of its own."""

    def __init__(self, kind: str) -> None:
        """Find the runtime.

        Args:
            kind: ``crun`` or ``runc``.
        """
        self.kind = kind
        self._program = "crun" if kind == "crun" else str(packages("docker") / "usr/sbin/runc")

    def __enter__(self) -> OciRuntime:
        self.path = Path(tempfile.mkdtemp(prefix="guestapi-oci-", dir=SCRATCH))
        self.path.chmod(0o755)
        self.root = self.path / "state"
        self.rootfs = self.path / "rootfs"
        rootfs.make(self.rootfs)
        for path in [self.rootfs, *self.rootfs.rglob("*")]:
            os.chown(path, BASE, BASE, follow_symlinks=False)
        self._namespaces = KeptNamespaces(_PREPARE, unshare=["--mount"])
        self._enter = self._namespaces.enter("-m")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.root.is_dir():
            for one in self.root.iterdir():
                self("delete", "--force", one.name, check=False)
        # runc does not wait until the last process has left the cgroup.
        until(lambda: not self._cgroups(), "the end of its cgroups", pause=0.05)
        self._namespaces.kill()
        shutil.rmtree(self.path, ignore_errors=True)

    def _cgroups(self) -> bool:
        """Remove the cgroups of ended containers; return whether some are left."""
        script = f"find /sys/fs/cgroup -maxdepth 1 -name '{self.path.name}-*' -exec rmdir {{}} + 2>/dev/null"
        subprocess.run([*self._enter, "sh", "-c", script], check=False)
        left = f"find /sys/fs/cgroup -maxdepth 1 -name '{self.path.name}-*'"
        return bool(subprocess.run([*self._enter, "sh", "-c", left], check=True, capture_output=True).stdout)

    def __call__(self, *words: str, check: bool = True) -> str:
        """Run a command of the runtime; return its output."""
        options = ["--cgroup-manager=disabled"] if self.kind == "crun" else []
        done = subprocess.run(
            # With --detach, the container keeps standard output open.
            [*self._enter, self._program, f"--root={self.root}", *options, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if words[0] in ("state", "list") else subprocess.DEVNULL,
            stderr=(self.path / "log").open("ab"),
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
        assert not check or done.returncode == 0, (self.path / "log").read_text()
        return done.stdout or ""

    def bundle(
        self,
        name: str,
        mounts: Sequence[tuple[Path | str, str]],
        *,
        arguments: Sequence[str] = ("sleep", "1000"),
        hook: Sequence[str] = (),
        annotations: Mapping[str, str] | None = None,
        pid_namespace: str | None = None,
    ) -> Path:
        """Make a bundle; return its directory.

        Args:
            name: the name of its directory.
            mounts: paths on the host and their mount points.
            arguments: the container's program and arguments.
            hook: path and arguments of a hook for createRuntime.
            annotations: the annotations of the bundle.
            pid_namespace: path of the PID namespace to join.
        """
        directory = self.path / name
        directory.mkdir()
        document = write_bundle(self.rootfs, mounts, arguments, pid_namespace)
        document["hostname"] = f"inside-{name}"
        document["annotations"] = dict(annotations or {})
        document["hooks"] = {"createRuntime": [{"path": hook[0], "args": list(hook)}]} if hook else {}
        document["linux"]["cgroupsPath"] = f"/{self.path.name}-{name}"
        (directory / "config.json").write_text(json.dumps(document))
        return directory

    def start(self, key: str, bundle: Path) -> str:
        """Run a container in the background; return the directory of its state."""
        self("run", "--detach", f"--bundle={bundle}", key)
        return f"{self.root}/{key}"

    def pid(self, key: str) -> int:
        """Return the PID of its init."""
        return int(json.loads(self("state", key))["pid"])

    def execute(self, key: str, *argv: str) -> str:
        """Run a program in the container; return its output."""
        words = ["nsenter", "-t", str(self.pid(key)), "-a", "--setuid", "0", "--setgid", "0", *argv]
        return subprocess.run(words, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout


def write_bundle(
    rootfs: Path | str,
    mounts: Sequence[tuple[Path | str, str]],
    arguments: Sequence[str] = ("sleep", "1000"),
    pid_namespace: str | None = None,
) -> dict[str, Any]:
    """Return the config.json of a bundle, for a container with an ID map.

    Args:
        rootfs: its root file system.
        mounts: paths on the host and their mount points.
        arguments: the container's program and arguments.
        pid_namespace: path of the PID namespace to join.
    """
    pid = {"type": "pid", **({"path": pid_namespace} if pid_namespace else {})}
    mapping = [{"containerID": 0, "hostID": BASE, "size": 65536}]
    return {
        "ociVersion": "1.0.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(arguments),
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
        },
        "root": {"path": str(rootfs)},
        "mounts": [
            # proc cannot be mounted for a PID namespace that another user namespace owns.
            *([{"destination": "/proc", "source": "/proc", "options": ["rbind"]}] if pid_namespace else []),
            *(_MOUNTS[1:] if pid_namespace else _MOUNTS),
            *({"destination": inside, "source": str(path), "options": ["rbind"]} for path, inside in mounts),
        ],
        "linux": {
            "namespaces": [pid, *({"type": one} for one in ("network", "ipc", "uts", "mount", "user"))],
            "uidMappings": mapping,
            "gidMappings": mapping,
        },
    }
