"""The parent directory for tests' directories that every user can enter, and whose programs can be run.

It is in memory if there is enough of it: a commit to a store on a disk waits until the disk has written it, and the
tests make tens of thousands of commits. What a power cut does to a store is tested in tests/machine.
"""

from __future__ import annotations

import os
import tempfile

#: Bytes that must be free in /dev/shm: several times what the largest tests write, which are those of images.
_ENOUGH = 3 << 30


def _find() -> str:
    """Return /dev/shm if it is large enough; else /run, which systemd mounts in memory; else one on the disk."""
    for place in ("/dev/shm", "/run"):
        status = os.statvfs(place)
        # Debian's initramfs mounts /run with noexec, and a container's root file system has programs.
        usable = os.access(place, os.W_OK) and not status.f_flag & os.ST_NOEXEC
        if usable and (place != "/dev/shm" or status.f_bavail * status.f_frsize >= _ENOUGH):
            return place
    return "/var/tmp"


SCRATCH = _find()


def use() -> None:
    """Let temporary directories of this process and its children lie in `SCRATCH`, unless ``TMPDIR`` is set."""
    tempfile.tempdir = os.environ.setdefault("TMPDIR", SCRATCH)
