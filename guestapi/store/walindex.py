"""Tells whether anything was committed, from memory that SQLite's connections share: no statement, no system call.

The file ``store.db-shm`` begins with the header of the write-ahead log's index (sqlite.org/walformat.html, 2.1). A
commit is what changes it: after the log is on the disk, and before the commit returns to its caller, the writer
increments ``iChange`` there and puts down the log's new end and checksum. A connection that begins to read compares
these 48 bytes with those that it saw last, and takes its whole cache for current if they are the same (walTryBeginRead
in wal.c): that is what ``PRAGMA data_version`` tells. Here the same bytes are compared in the same memory.

Why they cannot be stale, whatever happens to the files:

- A checkpoint leaves the header alone, since it changes no content. A log that begins anew has another salt in it.
- The file is neither shortened, deleted nor made anew as long as a connection is open, for that needs a lock which each
  of them holds a share of. So these bytes mean something only beside an open connection (`store.reading.Reader`).
- The memory is that of the very file that SQLite has open here, found by descriptor. If it was deleted by
  force, SQLite itself goes by the deleted one; that the database was replaced, the reader notices by its inode.
- A header that is just being written differs from what was kept, which is all that is asked.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

#: walformat.html: bytes 0 to 47 are the header, 48 to 95 its second copy. A writer puts down the second one first.
_HEADER = slice(0, 48)

#: By device and inode. Never unmapped: mmap has a descriptor of its own, and closing any descriptor of a file takes all
#: of the process's locks on it away (fcntl_locking(2)), SQLite's too. So one is left for each database that was put in
#: the place of another, no more.
_mapped: dict[tuple[int, int], mmap.mmap] = {}


def map_index(database: Path) -> mmap.mmap | None:
    """The memory whose `header` tells of commits to `database`; None if it has no write-ahead log.

    Args:
        database: a database that this process has a connection to, which has read something already.
    """
    path = os.path.realpath(database) + "-shm"
    for name in os.listdir("/proc/self/fd"):
        try:
            # A file that is gone has " (deleted)" behind its name (proc(5)).
            if os.readlink(f"/proc/self/fd/{name}") == path:
                return _map(int(name))
        except OSError:
            continue  # Closed meanwhile: the listing's own, or another thread's.
    return None


def _map(descriptor: int) -> mmap.mmap | None:
    status = os.fstat(descriptor)
    key = (status.st_dev, status.st_ino)
    if key not in _mapped:
        if status.st_size < mmap.PAGESIZE:
            return None
        _mapped[key] = mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    return _mapped[key]


def header(index: mmap.mmap) -> bytes:
    """The bytes that every commit changes."""
    return index[_HEADER]
