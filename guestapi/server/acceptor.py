"""Accepts connections on a listening socket, and turns those away of which their process has too many."""

from __future__ import annotations

import errno
import logging
import socket
from functools import partial
from typing import Any

from gevent.hub import get_hub

from guestapi.callers.credentials import Credentials, credentials, is_closed
from guestapi.callers.identify import Caller
from guestapi.http.response import error_response
from guestapi.journal import LogThrottle
from guestapi.server.connection import Connection
from guestapi.server.context import WorkerContext

log = logging.getLogger(__name__)

#: PERF: plain numbers, because the constructor of a socket converts enumerations.
_UNIX, _STREAM = int(socket.AF_UNIX), int(socket.SOCK_STREAM)
#: How many connections are accepted in an iteration of the event loop by the only worker. With several workers it is
#: one, so that each gets its share.
_ACCEPTED_ALONE = 4
#: After this many iterations in a row with a connection to accept, there is a flood.
_FLOOD_ITERATIONS = 64
#: How many connections are accepted in an iteration during a flood.
_ACCEPTED_IN_FLOOD = 64
#: Seconds without accepting after the process has run out of descriptors.
_PAUSE_SECONDS = 0.1


class Acceptor:
    """Accepts the connections of one listening socket."""

    def __init__(self, sock: socket.socket, dialect: str, context: WorkerContext, *, alone: bool) -> None:
        """Begin to accept.

        Args:
            sock: listening and non-blocking.
            dialect: name of its dialect.
            context: the worker's.
            alone: whether there is no other worker.
        """
        self._socket = sock
        self._dialect = dialect
        self._context = context
        self._per_iteration = _ACCEPTED_ALONE if alone else 1
        self._loop = get_hub().loop
        self._readable = self._loop.io(sock.fileno(), 1)
        self._readable.start(self._accept)
        self._timer: Any = None
        self._throttle = LogThrottle()
        self._iteration = self._busy_iterations = 0

    def close(self) -> None:
        """Accept no more. Connections in the kernel's queue are left to other workers."""
        if self._timer is not None:
            self._timer.close()
        self._readable.close()

    def _accept(self) -> None:
        # Other workers get their share of the queue, unless they cannot keep up with it either.
        flood = self._is_flood()
        for _connection in range(_ACCEPTED_IN_FLOOD if flood else self._per_iteration):
            try:
                # PERF: as gevent does. accept() asks the listening socket twice for its type (4 µs instead of 2).
                descriptor, _address = self._socket._accept()  # type: ignore[attr-defined]  # missing in typeshed
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                if self._throttle.admit() is not None:
                    log.error("cannot accept: %s; raise LimitNOFILE= of the unit", error.strerror)
                self._pause()
                return
            if self.serve(descriptor, flood=flood) and self._context.admission.must_pause(descriptor):
                self._pause()
                return

    def serve(self, descriptor: int, *, flood: bool) -> bool:
        """Serve a connection, or turn it away.

        Args:
            descriptor: as accepted.
            flood: whether connections of clients that have gone are dropped.

        Returns:
            Whether it is served.
        """
        # PERF: the base class of socket.socket, which takes 0.6 µs more to make and to close.
        accepted = socket.SocketType(_UNIX, _STREAM, 0, descriptor)
        peer = admit(accepted, self._dialect, self._context, flood=flood)
        if peer is None:
            return False
        Connection(self._context, accepted, self._dialect, peer).start()
        return True

    def _is_flood(self) -> bool:
        """Tell whether there was a connection to accept in every iteration for a while."""
        last, self._iteration = self._iteration, self._loop.iteration
        self._busy_iterations = self._busy_iterations + 1 if self._iteration == last + 1 else 0
        return self._busy_iterations >= _FLOOD_ITERATIONS

    def _pause(self) -> None:
        """Accept nothing for a moment, because the process runs out of descriptors."""
        # The instance with most connections has one less when accepting goes on.
        self._context.admission.quota.evict(least=1)
        self._readable.stop()
        self._timer = self._loop.timer(_PAUSE_SECONDS)
        self._timer.start(partial(self._readable.start, self._accept))


def admit(accepted: socket.SocketType, dialect: str, context: WorkerContext, *, flood: bool) -> Credentials | None:
    """Count the connection as pending, or close it.

    Args:
        accepted: the connection.
        dialect: name of the listening socket's dialect.
        context: the worker's.
        flood: whether connections of clients that have gone are dropped.

    Returns:
        The process that connected; None if the connection was closed.
    """
    if flood and is_closed(accepted):
        accepted.close()
        return None
    peer = credentials(accepted)
    return peer if admit_peer(accepted, peer, dialect, context) else None


def admit_peer(accepted: socket.SocketType, peer: Credentials, dialect: str, context: WorkerContext) -> bool:
    """As `admit`, of a connection of which it is known who connected; return False if it was closed."""
    pending = context.admission.pending
    if pending.add(peer.pid, partial(context.identifier.find_container, accepted, peer)):
        return True
    instance_id, rejection = pending.rejection(peer.pid)
    caller = Caller(peer, instance_id)
    context.on_refusal(caller, dialect, rejection.status, rejection.text, rejection.limit)
    try:
        accepted.setblocking(False)
        accepted.send(error_response(rejection.status, rejection.text, retry_after=rejection.status == 429))
    except OSError:
        pass  # The client does not wait for the response.
    finally:
        accepted.close()
    return False
