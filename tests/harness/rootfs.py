"""A root file system for containers: busybox, curl with its libraries, and little else.

Runs on the system's Python alone, also as a program (``rootfs.py DIRECTORY``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

_DIRECTORIES = ["bin", "dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp", "usr/bin", "usr/lib", "var"]
_APPLETS = ["cat", "ln", "ls", "mkdir", "poweroff", "reboot", "sh", "sleep", "true"]
#: Container runtimes write to these files, or check that they exist.
_FILES = {
    "etc/group": "root:x:0:\n",
    "etc/hostname": "",
    "etc/hosts": "",
    "etc/os-release": "ID=busybox\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/resolv.conf": "",
}
#: systemd-nspawn halts an init with SIGRTMIN+3, which is 37 (systemd(1)), LXC with SIGPWR, which is 30
#: (lxc.container.conf(5)). busybox's own init handles neither.
_INIT = """#!/bin/sh
trap 'exit 0' 30 37
while :; do
    sleep 1000 &
    wait
done
"""


def make(directory: Path) -> None:
    """Fill `directory`, which need not exist; Debian's ``busybox-static`` and ``curl`` must be installed."""
    for name in _DIRECTORIES:
        (directory / name).mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        (directory / name).write_text(text)
    shutil.copy("/bin/busybox", directory / "bin/busybox")
    for applet in _APPLETS:
        (directory / "bin" / applet).symlink_to("busybox")
    (directory / "sbin/init").write_text(_INIT)
    (directory / "sbin/init").chmod(0o755)
    shutil.copy("/usr/bin/curl", directory / "usr/bin/curl")
    for library in re.findall(r"(/\S+) \(0x", subprocess.check_output(["ldd", "/usr/bin/curl"], text=True)):
        (directory / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.realpath(library), directory / library[1:])


if __name__ == "__main__":
    make(Path(sys.argv[1]))
