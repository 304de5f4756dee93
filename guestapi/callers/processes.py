"""Remembers which PID namespace a process is in, so that the next connection of the same process costs less.

A process stays in its PID namespace: unshare(2) and setns(2) change only that of its children. As long as it lives, the
namespace exists, and nothing else has its number. So what is remembered of a process holds if the process is alive
*after* everything else was looked at.

The process is known by the inode number of its pidfd. Since Linux 6.9 pidfds have a file system of their own, in which
a number stands for one process and is not used again (pidfd_open(2)); before, all pidfds shared one inode.
"""

from __future__ import annotations

import os
import sys
from functools import cache

#: How many processes are remembered. A guest can make any number of them, and so have others forgotten: their next
#: connection costs what the first one did.
MOST_PROCESSES = 4096


@cache
def has_numbers() -> bool:
    """Whether a pidfd's inode number stands for its process alone."""
    if sys.maxsize < 1 << 32:
        # Of a number with 64 bits, a kernel with 32 shows a part.
        return False
    pidfd, other = os.pidfd_open(os.getpid()), os.eventfd(0)
    try:
        return os.fstat(pidfd).st_dev != os.fstat(other).st_dev
    finally:
        os.close(pidfd)
        os.close(other)


class KnownProcesses:
    """The PID namespaces of the processes that connected last."""

    def __init__(self) -> None:
        self._namespaces: dict[int, int] = {}

    def get(self, pidfd: int) -> int | None:
        """Return the inode number of a process's PID namespace, if it is remembered.

        The number is worth something only if the process is seen alive afterwards.
        """
        return self._namespaces.get(os.fstat(pidfd).st_ino)

    def add(self, pidfd: int, namespace: int) -> None:
        """Remember that a process is in the PID namespace with this inode number, if processes can be told apart."""
        if not has_numbers():
            return
        self._namespaces[os.fstat(pidfd).st_ino] = namespace
        if len(self._namespaces) > MOST_PROCESSES:
            # The oldest.
            del self._namespaces[next(iter(self._namespaces))]

    def __len__(self) -> int:
        """How many processes are remembered."""
        return len(self._namespaces)
