"""How a process hears that something was committed: the bell beside the database (`bell`) was rung."""

from __future__ import annotations

import os
import time
from pathlib import Path

from inotify_simple import INotify, flags

from guestapi.store.bell import bell

#: Bytes of events that are read at a time; one has 16 and its name (inotify(7)).
_READ = 65536


class Doorbell:
    """Hears the rings. `fileno` becomes readable when there was one."""

    def __init__(self, database: Path) -> None:
        self._name = bell(database).name
        self._inotify = INotify(nonblocking=True)
        # The directory is watched, not the file: that may come later, or be made anew.
        self._inotify.add_watch(database.parent, flags.ATTRIB | flags.CREATE)

    def fileno(self) -> int:
        """For select and its like."""
        number: int = self._inotify.fileno()
        return number

    def heard(self) -> bool:
        """Whether it has rung since the last call; does not wait."""
        try:
            # PERF: whether the name stands there is all that is asked; to take events apart would take 70 µs.
            return os.fsencode(self._name) in os.read(self.fileno(), _READ)
        except BlockingIOError:
            return False

    def wait(self, seconds: float) -> bool:
        """Wait for a ring, at most so long; whether there was one."""
        until = time.monotonic() + seconds
        # SQLite makes files in the same directory.
        while not (rung := self._read(max(0.0, until - time.monotonic()))) and time.monotonic() < until:
            pass
        return rung

    def _read(self, seconds: float) -> bool:
        return any(event.name == self._name for event in self._inotify.read(timeout=int(seconds * 1000)))

    def close(self) -> None:
        """Hear no more."""
        self._inotify.close()
