"""Which mounts are the guest API's own socket directories: the operator's will that a container is to be served.

Rules: device and inode decide, or device and path within it, never what a path is called. A path is text that a
container may choose; the device number and what the kernel says lies below it are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from guestapi.settings import ListenSocket
from guestapi.sources import mountinfo


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
        key = _key(source)
        # A place that is away at the moment, because its socket unit is, is known by its name alone.
        return key in self.keys if key is not None else os.path.normpath(source) in self.paths

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
