"""Which mounts are the guest API's own socket directories: the operator's will that a container is to be served.

Rules: device and inode decide, or device and path within it, never what a path is called. A path is text that a
container may choose; the device number and what the kernel says lies below it are not.
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

#: Seconds that stat(2) has for a path of somebody else's, and how many may hang at a time.
_STAT_SECONDS, _STUCK = 1.0, 64
#: By path: who hangs. Threads of a follower share them.
_stuck: dict[str, Thread] = {}
_lock = Lock()


@dataclass(frozen=True, slots=True)
class Places:
    """The directories in which our sockets are, and the sockets themselves.

    Attributes:
        paths: where they are supposed to be; they need not exist.
    """

    paths: tuple[str, ...]

    @classmethod
    def of(cls, listeners: Iterable[ListenSocket]) -> Places:
        """The places of the sockets that the configuration names."""
        found: dict[str, None] = {}
        for listener in listeners:
            found[str(Path(listener.path).parent)] = None
            found[listener.path] = None
        return cls(tuple(found))

    def look(self) -> Look:
        """See where the places are now: a socket unit that is started anew makes them anew."""
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
        """Whether `source`, a path on the host that an operator gave, is one of the places."""
        if not source:
            return False
        # Also a place that is away at the moment, because its socket unit is.
        return os.path.normpath(source) in self.paths or _key_within(source) in self.keys

    def mounted_in(self, pid: int) -> bool:
        """Whether one of the places is mounted where process `pid` is, by device and path within it.

        Raises:
            MountsError: there is no such process, or too much is mounted there.
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
    """The same, or None if that takes too long: a container may have a network file system that hangs."""
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
