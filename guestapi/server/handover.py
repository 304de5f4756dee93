"""Takes connections of virtual machines over from the relay (`relay.handover`).

The handover socket is root's alone, by its mode. A worker looks at the user of its client all the same: the socket may
have been opened without systemd, and who hands a connection over says whose it is.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

from gevent.hub import get_hub

from guestapi.callers.credentials import credentials, machine_credentials
from guestapi.dialects import DIALECTS, HANDOVER
from guestapi.journal import LogThrottle
from guestapi.model import hybrid_number
from guestapi.relay import handover
from guestapi.server.acceptor import Acceptor, admit
from guestapi.server.context import WorkerContext

log = logging.getLogger(__name__)

#: Seconds that the relay has to send its message. It sends it at once.
_MESSAGE_SECONDS = 2.0


class HandoverAcceptor(Acceptor):
    """Accepts the relay's connections, and serves those that it hands over."""

    def __init__(self, sock: socket.socket, context: WorkerContext) -> None:
        """Begin to accept. Arguments as of `Acceptor`."""
        super().__init__(sock, HANDOVER, context)
        self._refused = LogThrottle()

    def serve(self, descriptor: int, *, flood: bool) -> bool:
        """As `Acceptor.serve`; a flood is the relay's to end."""
        relay = socket.socket(fileno=descriptor)
        user = credentials(relay).uid
        if user != 0:
            relay.close()
            if self._refused.admit() is not None:
                log.error("user %d may not hand over connections, only root may", user)
            return False
        relay.setblocking(False)
        _Receiving(relay, self._take).receive()
        return True

    def _take(self, handed: handover.HandedOver) -> None:
        connection, cid, dialect = handed
        if dialect not in DIALECTS:
            connection.close()
            log.error("a connection of the unknown dialect %r was handed over", dialect)
            return
        if cid == handover.HYBRID:
            cid = hybrid_number(credentials(connection).pid)
        peer = machine_credentials(cid)
        admit(connection, peer, dialect, self._context)


class _Receiving:
    """A connection of the relay, until its message is here."""

    def __init__(self, relay: socket.socket, take: Callable[[handover.HandedOver], None]) -> None:
        self._relay = relay
        self._take = take
        self._readable: Any = None
        self._timer: Any = None

    def receive(self) -> None:
        """Take the connection over if it is here, else when it comes."""
        try:
            handed = handover.receive(self._relay)
        except BlockingIOError:
            self._wait()
            return
        except handover.HandoverError as error:
            log.error("nothing was handed over: %s", error)
            self._close()
            return
        except OSError:
            self._close()
            return
        try:
            self._relay.send(handover.TAKEN)
        except OSError:
            pass  # The relay has ended, and with it its own descriptor of the connection.
        self._close()
        self._take(handed)

    def _wait(self) -> None:
        if self._readable is None:
            loop = get_hub().loop
            self._readable = loop.io(self._relay.fileno(), 1)
            self._readable.start(self.receive)
            self._timer = loop.timer(_MESSAGE_SECONDS)
            self._timer.start(self._close)

    def _close(self) -> None:
        for watcher in (self._readable, self._timer):
            if watcher is not None:
                watcher.close()
        self._relay.close()
