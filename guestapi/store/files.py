"""Files of the store, which belong to the service although the operator, who is root, may be the first to make them.

Whoever is in the service's group may write to them too: that is the mirror of a daemon, which has a user of its own so
that no worker can reach into it.
"""

from __future__ import annotations

import os
from pathlib import Path


def create(path: Path) -> None:
    """Make an empty file that belongs to owner and group of its directory, and that nobody else can read.

    Root does this in a directory of the service's user, so no link is followed, whoever has put it there.

    Raises:
        FileExistsError: it is there already.
        OSError: it cannot be made.
    """
    parent = path.parent.stat()
    # Not readable by others: user-data holds passwords.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        give(descriptor, parent, 0o660)
    finally:
        os.close(descriptor)


def give(descriptor: int, owner: os.stat_result, mode: int) -> None:
    """Make an open file, or directory, somebody's, if we are root; and give it this mode whatever the umask was.

    Raises:
        OSError: it cannot be done.
    """
    if os.geteuid() == 0:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    os.fchmod(descriptor, mode)
