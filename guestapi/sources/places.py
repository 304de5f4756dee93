"""Which mounts are the guest API's own socket directories: the operator's will that a container is to be served.

Rules: device and inode decide, or device and path within it, never what a path is called. A path is text that a
container may choose; the device number and what the kernel says lies below it are not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from guestapi.settings import ListenSocket

#: Bytes of an init's mountinfo that are read, and of ours. A harmless container has about 4 KiB. A hostile root inside
#: can make it megabytes long, of which the kernel takes 0.25 s for the first 64 KiB.
_THEIR_BYTES, _OUR_BYTES = 1 << 16, 1 << 20
#: What the kernel escapes in mountinfo (proc_pid_mountinfo(5)): blank, tab, line feed and backslash, as octal digits.
_ESCAPED = re.compile(rb"\\([0-7]{3})")


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
            ProcessLookupError: there is no such process.
        """
        wanted = self._roots()
        return any(root in wanted for root, _target in _mounts(f"/proc/{pid}/mountinfo", _THEIR_BYTES))

    def _roots(self) -> frozenset[tuple[bytes, bytes]]:
        """Device and path within it of each place that exists."""
        mounts = list(_mounts("/proc/self/mountinfo", _OUR_BYTES))
        found = set()
        for path in self.paths:
            if _key(path) is None:
                continue
            real = os.fsencode(os.path.realpath(path))
            # The last of the longest: a later mount covers an earlier one at the same place.
            best: tuple[bytes, bytes, bytes] | None = None
            for (device, root), target in mounts:
                if (real == target or real.startswith(target.rstrip(b"/") + b"/")) and (
                    best is None or len(target) >= len(best[2])
                ):
                    best = device, root, target
            if best is not None:
                below = real[len(best[2].rstrip(b"/")) :]
                found.add((best[0], (best[1].rstrip(b"/") + below) or b"/"))
        return frozenset(found)


def _key(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        # ValueError: a path with a NUL in it.
        return None
    return status.st_dev, status.st_ino


def _mounts(file: str, limit: int) -> Iterable[tuple[tuple[bytes, bytes], bytes]]:
    """Device and root, and target, of each whole line within the first `limit` bytes."""
    try:
        with open(file, "rb", buffering=0) as opened:
            text = bytearray()
            while len(text) < limit and (part := opened.read(limit - len(text))):
                text += part
    except FileNotFoundError:
        raise ProcessLookupError(file) from None
    for line in bytes(text).split(b"\n")[:-1]:
        fields = line.split(b" ")
        if len(fields) > 4:
            yield (fields[2], _plain(fields[3])), _plain(fields[4])


def _plain(field: bytes) -> bytes:
    return _ESCAPED.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field)
