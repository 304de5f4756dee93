"""The parent directory for tests' directories that every user can enter, and whose programs can be run."""

from __future__ import annotations

import os

# /run, which is in memory. But Debian's initramfs mounts it with noexec, and a container's root file system has
# programs; on a machine that has booted so, it is a directory on the disk.
SCRATCH = "/var/tmp" if os.statvfs("/run").f_flag & os.ST_NOEXEC else "/run"
