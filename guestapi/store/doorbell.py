"""A file beside the database that is touched after each commit, so that processes that follow the log read it at once.

The bell only saves time. A ring is missing if a writer was killed before it could ring; then a process that follows the
log finds the change at its next regular look.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from inotify_simple import INotify, flags

from guestapi.store.files import create

log = logging.getLogger(__name__)


#: Bytes of events that are read at a time; one has 16 and its name (inotify(7)).
_READ = 65536


def bell(database: Path) -> Path:
    """The bell of a database."""
    return database.with_name(database.name + "-bell")


def ring(database: Path) -> None:
    """Notify all listening processes that something was committed. A failure is logged, and is no error of the commit.

    Root does this in a directory of the service's user, so links are not followed.
    """
    path = bell(database)
    try:
        os.utime(path, follow_symlinks=False)
    except FileNotFoundError:
        _hang(path)
    except OSError as error:
        log.warning("%s: cannot be rung: %s", path, error.strerror)


def _hang(path: Path) -> None:
    try:
        create(path)
    except FileExistsError:
        pass  # Another writer was quicker, and making it rings it.
    except OSError as error:
        log.warning("%s: cannot be made: %s", path, error.strerror)


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
