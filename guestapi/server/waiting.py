"""A caller whose instance is not known yet: on a host with a mirror, it may be known in a moment.

A container runs before its daemon tells of it, and its first program may call at once. So a caller from a container
that is in no known instance is looked at again, for a while, before it is told that it is unknown.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import gevent

from guestapi.callers.identify import Caller, Identifier
from guestapi.settings import Callers

#: Seconds between two looks.
_AGAIN_SECONDS = 0.05


class Patience:
    """Waits for the mirror if a caller may be of an instance that has just started."""

    def __init__(
        self, identifier: Identifier, mirrored: Callable[[], bool], version: Callable[[], object], settings: Callers
    ) -> None:
        """Args:
        identifier: who is at the other end of a socket now.
        mirrored: whether there is a mirror to wait for.
        version: of the store: the same as long as nobody has committed.
        settings: for how long, and how many may wait at a time.
        """
        self._identifier = identifier
        self._mirrored = mirrored
        self._version = version
        self._seconds = settings.wait_seconds
        self._most = settings.waiting
        self._waiting = 0

    def wait(self, connection: socket.SocketType, caller: Caller) -> Caller:
        """Who has connected, known if that is only a matter of time; blocks the calling greenlet alone.

        Args:
            connection: the caller's.
            caller: as the identifier has it.

        Raises:
            StoreError: the instances cannot be looked up now.
        """
        if caller.instance_id is None and caller.contained and self._waiting < self._most and self._mirrored():
            self._waiting += 1
            try:
                until = time.monotonic() + self._seconds
                seen: object = None
                while caller.instance_id is None and caller.contained and time.monotonic() < until:
                    gevent.sleep(_AGAIN_SECONDS)
                    # A look costs the more the deeper a guest nests its namespaces.
                    if (version := self._version()) != seen:
                        seen = version
                        caller = self._identifier.identify(connection, caller.credentials)
            finally:
                self._waiting -= 1
        return caller
