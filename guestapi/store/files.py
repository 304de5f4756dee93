"""Files of the store. They belong to the service's user, even if root creates them.

Members of the service's group may write to them too: a mirror has a user of its own, so that no worker can reach into
its process, and is in that group.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def create(path: Path | str) -> None:
    """Create an empty file that belongs to owner and group of its directory, and that others cannot read.

    Root does this in a directory of the service's user, so links are not followed.

    Raises:
        FileExistsError: it is there already.
        OSError: it cannot be made.
    """
    parent = os.stat(os.path.dirname(path) or ".")
    # Not readable by others: user-data holds passwords.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        give(descriptor, parent, 0o660)
    finally:
        os.close(descriptor)


def give(descriptor: int, owner: os.stat_result, mode: int) -> None:
    """Give an open file or directory this mode, whatever the umask is, and, if this process is root, this owner.

    Raises:
        OSError: it cannot be done.
    """
    if os.geteuid() == 0:
        try:
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        except PermissionError:
            # Root without CAP_CHOWN, as a follower is. In that group, it has made the file for whoever is in it.
            if os.fstat(descriptor).st_gid != owner.st_gid:
                raise
    os.fchmod(descriptor, mode)


#: Device and inode: no two files have the same at the same time.
Identity = tuple[int, int]


def identity(file: Path) -> tuple[Identity | None, int]:
    """Which file lies there, and its size; None and 0 if none does."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None, 0
    return (status.st_dev, status.st_ino), status.st_size


class Held:
    """Holds a file without having it open: as long as this exists, no other gets its identity.

    A descriptor that can read would do harm: closing any of a file's ends all locks that SQLite has on it in this
    process (sqlite.org/howtocorrupt.html, section 2.2).
    """

    def __init__(self, file: Path) -> None:
        """Hold `file`, if that can be."""
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(file, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            pass  # Gone by now, or no descriptor is left: its number may change hands, which hardly ever matters.

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
