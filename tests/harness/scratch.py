"""Where tests make directories that every user can enter, and whose programs can be run."""

from __future__ import annotations

import os

#: /run, which is in memory. But Debian's initramfs mounts it so that no program in it can be run (noexec), which a root
#: file system of a container needs: on a machine that has booted so, it is on the disk.
SCRATCH = "/var/tmp" if os.statvfs("/run").f_flag & os.ST_NOEXEC else "/run"
