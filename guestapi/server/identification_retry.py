"""Identifies a caller again whose instance is not registered yet.

On a host with a mirror, a container runs before its daemon reports it, and its first program may connect at once. So a
caller from an unregistered container is identified again, up to ``callers.wait_seconds``, before it is refused.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import gevent

from guestapi.callers.identify import Caller, Identifier
from guestapi.settings import CallerSettings

#: Seconds between two attempts.
_INTERVAL_SECONDS = 0.05


class IdentificationRetry:
    """Waits for the mirror to register the instance of a caller."""

    def __init__(
        self,
        identifier: Identifier,
        mirrored: Callable[[], bool],
        version: Callable[[], object],
        settings: CallerSettings,
    ) -> None:
        """Wait for nobody yet.

        Args:
            identifier: identifies callers.
            mirrored: whether the host has a mirror.
            version: of the store: equal as long as nobody has committed.
            settings: how long a caller waits, and how many may wait at a time.
        """
        self._identifier = identifier
        self._mirrored = mirrored
        self._version = version
        self._seconds = settings.wait_seconds
        self._most = settings.waiting
        self._waiting = 0

    def wait(self, connection: socket.SocketType, caller: Caller) -> Caller:
        """Wait until the caller's instance is registered, but not for long. Blocks the calling greenlet alone.

        Args:
            connection: the caller's.
            caller: as identified.

        Returns:
            The caller as it was identified last.

        Raises:
            StoreError: the store cannot be read.
        """
        if caller.instance_id is None and caller.contained and self._waiting < self._most and self._mirrored():
            self._waiting += 1
            try:
                until = time.monotonic() + self._seconds
                seen: object = None
                while caller.instance_id is None and caller.contained and time.monotonic() < until:
                    gevent.sleep(_INTERVAL_SECONDS)
                    # The deeper a guest nests its namespaces, the more an attempt costs.
                    if (version := self._version()) != seen:
                        seen = version
                        caller = self._identifier.identify(connection, caller.credentials)
            finally:
                self._waiting -= 1
        return caller
