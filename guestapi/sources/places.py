"""Recognises mounts of the guest API's own socket directories, by which an operator has a container served.

Rules: device and inode decide, or device and path within the file system, never a path's text. A container may choose
the text, but not the device number or the path within the file system that the kernel reports.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread

from guestapi.settings import ListenSocket
from guestapi.sources import mountinfo

log = logging.getLogger(__name__)

#: Seconds for stat(2) of a foreign path, and how many calls may hang at a time.
_STAT_SECONDS, _STUCK = 1.0, 64
#: The hanging calls by path. The threads of a follower share them.
_stuck: dict[str, Thread] = {}
_lock = Lock()


@dataclass(frozen=True, slots=True)
class Places:
    """The directories in which our sockets are, and the sockets themselves.

    Attributes:
        paths: their configured paths, which need not exist.
    """

    paths: tuple[str, ...]

    @classmethod
    def of(cls, listeners: Iterable[ListenSocket]) -> Places:
        """Return the places of the configured sockets."""
        found: dict[str, None] = {}
        for listener in listeners:
            found[str(Path(listener.path).parent)] = None
            found[listener.path] = None
        return cls(tuple(found))

    def look(self) -> Look:
        """Read device and inode of the places: a socket unit that is restarted makes new directories."""
        return Look(frozenset(key for path in self.paths if (key := _key(path)) is not None), self.paths)


@dataclass(frozen=True, slots=True)
class Look:
    """The places as they were at one moment.

    Attributes:
        keys: device and inode of each that exists.
        paths: see `Places`.
    """

    keys: frozenset[tuple[int, int]]
    paths: tuple[str, ...]

    def has(self, source: str) -> bool:
        """Whether `source`, a host path that an operator gave, is one of the places."""
        if not source:
            return False
        # Also a place that is missing now, because its socket unit is stopped.
        return os.path.normpath(source) in self.paths or _key_within(source) in self.keys

    def mounted_in(self, pid: int) -> bool:
        """Whether one of the places is mounted for process `pid`, by device and path within the file system.

        Raises:
            MountsError: there is no such process, or it has too many mounts.
        """
        ours = mountinfo.read(os.getpid(), mountinfo.HOST_BYTES)
        real = [os.path.realpath(path) for path in self.paths if _key(path) is not None]
        wanted = {place for path in real if (place := mountinfo.place_of(path, ours)) is not None}
        return any(mount.place in wanted for mount in mountinfo.read(pid))


def _key(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        # ValueError: a path with a NUL in it.
        return None
    return status.st_dev, status.st_ino


def _key_within(path: str) -> tuple[int, int] | None:
    """Call stat(2); None if it takes too long: the path may be on a network file system that hangs."""
    with _lock:
        for other, thread in list(_stuck.items()):
            if not thread.is_alive():
                del _stuck[other]
        if path in _stuck or len(_stuck) >= _STUCK:
            return None
    found: list[tuple[int, int] | None] = []
    thread = Thread(target=lambda: found.append(_key(path)), daemon=True)
    thread.start()
    thread.join(_STAT_SECONDS)
    if not found:
        with _lock:
            _stuck[path] = thread
        log.warning("%r cannot be looked at: its file system does not answer", path)
        return None
    return found[0]
