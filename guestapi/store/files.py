"""Files of the store, which belong to the service although the operator, who is root, may be the first to make them."""

from __future__ import annotations

import os
from pathlib import Path


def create(path: Path) -> None:
    """Make an empty file that belongs to the owner of its directory, and that nobody else can read.

    Root does this in a directory of the service's user, so no link is followed, whoever has put it there.

    Raises:
        FileExistsError: it is there already.
        OSError: it cannot be made.
    """
    parent = path.parent.stat()
    # Readable by the service alone: user-data holds passwords.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if os.geteuid() == 0:
            os.fchown(descriptor, parent.st_uid, parent.st_gid)
    finally:
        os.close(descriptor)
