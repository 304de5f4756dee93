"""Puts our socket in the place of the daemon's guest socket, and again whenever the daemon has made its own.

The daemon unlinks the path and binds again when it starts, and unlinks it when it stops (Incus 6.0, LXD 5.0). Instances
have the directory mounted, so they use the socket that is there. A hard link to a listening socket is the same socket
(unix(7) finds it by its inode), and rename(2) replaces it without a gap. So our listening socket, in the same directory
under another name, stays open whatever the daemon does.

There is one exception: a daemon that stops while none of its instances runs unmounts its directory, and mounts an empty
one when it starts. Then our socket has no name, and must be opened again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from inotify_simple import INotify, flags

from guestapi.journal import StateLog

log = logging.getLogger(__name__)

#: Seconds without a socket after which the daemon counts as stopped. A starting daemon binds right after it has
#: unlinked the path, and a socket that was put there between would make that fail.
_RESTART_SECONDS = 0.5
#: Seconds between two looks at the path without an event: its directory may be a new one.
_LOOK_SECONDS = 5.0
#: Seconds between two attempts to open our socket again: more attempts would not help more.
_REOPEN_SECONDS = 60.0


class Takeover:
    """Keeps our socket at the path of the daemon's guest socket."""

    def __init__(self, ours: Path, path: Path, reopen: Callable[[], bool]) -> None:
        """Change nothing yet.

        Args:
            ours: our listening socket, in the directory of `path`.
            path: the daemon's guest socket.
            reopen: has systemd open our socket again at its path; returns whether that was tried.
        """
        self._ours = ours
        self._path = path
        self._reopen = reopen
        self._reopen_after = 0.0
        self._log = StateLog(log)

    def run(self) -> None:
        """Keep our socket there until the process ends."""
        while True:
            try:
                with INotify() as inotify:
                    inotify.add_watch(
                        self._path.parent, flags.CREATE | flags.DELETE | flags.MOVED_TO | flags.DELETE_SELF
                    )
                    while self.put():
                        inotify.read(timeout=int(_LOOK_SECONDS * 1000))
            except OSError as error:
                self._log.log(self._path, f"{self._path}: {error.strerror}")
            time.sleep(_RESTART_SECONDS)

    def put(self) -> bool:
        """Put our socket in its place unless it is there; return False if that must be tried again soon.

        Raises:
            OSError: it cannot be done.
        """
        try:
            ours = self._ours.stat()
        except FileNotFoundError:
            self._log.log(self._path, f"{self._ours} is not there: is its socket unit started?")
            # Not before the daemon has its own socket: another directory may be about to be mounted over this one.
            if self._path.exists() and time.monotonic() > self._reopen_after:
                tried = self._reopen()
                self._reopen_after = time.monotonic() + (_REOPEN_SECONDS if tried else _LOOK_SECONDS)
            return False
        try:
            there = self._path.lstat()
        except FileNotFoundError:
            time.sleep(_RESTART_SECONDS)
            if self._path.exists():
                return self.put()
        else:
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return True
        self._replace()
        self._log.log(self._path, f"{self._path} is guestapi's socket now")
        # The next failure is logged again.
        self._log.forget(self._path)
        return True

    def _replace(self) -> None:
        link = self._path.with_name(f".{self._path.name}.new")
        link.unlink(missing_ok=True)
        os.link(self._ours, link)
        os.rename(link, self._path)
