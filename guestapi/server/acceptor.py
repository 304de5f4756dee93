"""Accepts connections on a listening socket, and turns those away of which their process has too many."""

from __future__ import annotations

import errno
import logging
import socket
from functools import partial
from typing import Any

from gevent.hub import get_hub

from guestapi.callers.credentials import Credentials, credentials, is_closed
from guestapi.callers.identify import Caller, ContainerLook
from guestapi.http.response import error_response
from guestapi.journal import LogThrottle
from guestapi.server.connection import Connection
from guestapi.server.context import WorkerContext

log = logging.getLogger(__name__)

#: PERF: plain numbers, because the constructor of a socket converts enumerations.
_UNIX, _STREAM = int(socket.AF_UNIX), int(socket.SOCK_STREAM)
#: How many connections are accepted in an iteration of the event loop at the most. It begins with one, so that other
#: workers get their share. The number is doubled as long as some are left in the kernel's queue, which is first come,
#: first served for all instances, and halved when none are.
ACCEPTED_IN_FLOOD = 64
#: Seconds without accepting after the process has run out of descriptors.
_PAUSE_SECONDS = 0.1


class Acceptor:
    """Accepts the connections of one listening socket."""

    def __init__(self, sock: socket.socket, dialect: str, context: WorkerContext) -> None:
        """Begin to accept.

        Args:
            sock: listening and non-blocking.
            dialect: name of its dialect.
            context: the worker's.
        """
        self._socket = sock
        self._dialect = dialect
        self._context = context
        self._loop = get_hub().loop
        self._readable = self._loop.io(sock.fileno(), 1)
        self._readable.start(self._accept)
        self._timer: Any = None
        self._throttle = LogThrottle()
        self._iteration = 0
        #: How many are accepted in the next iteration at the most.
        self._most = 1

    def close(self) -> None:
        """Accept no more. Connections in the kernel's queue are left to other workers."""
        if self._timer is not None:
            self._timer.close()
        self._readable.close()

    def _accept(self) -> None:
        last, self._iteration = self._iteration, self._loop.iteration
        most = max(self._most >> max(self._iteration - last - 1, 0), 1)
        flood = most == ACCEPTED_IN_FLOOD
        self._most = min(2 * most, ACCEPTED_IN_FLOOD)
        for _connection in range(most):
            try:
                # PERF: as gevent does. accept() asks the listening socket twice for its type (4 µs instead of 2).
                descriptor, _address = self._socket._accept()  # type: ignore[attr-defined]  # missing in typeshed
            except (BlockingIOError, ConnectionAbortedError):
                self._most = max(most // 2, 1)
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
        if flood and is_closed(accepted):
            accepted.close()
            return False
        return admit(accepted, credentials(accepted), self._dialect, self._context)

    def _pause(self) -> None:
        """Accept nothing for a moment, because the process runs out of descriptors."""
        # The instance with most connections has one less when accepting goes on.
        self._context.admission.quota.evict(least=1)
        # Several at a time would leave no descriptors for identifying any of them.
        self._most = 1
        self._readable.stop()
        self._timer = self._loop.timer(_PAUSE_SECONDS)
        self._timer.start(partial(self._readable.start, self._accept))


def admit(accepted: socket.SocketType, peer: Credentials, dialect: str, context: WorkerContext) -> bool:
    """Count a connection as pending and serve it, or refuse and close it.

    Args:
        accepted: the connection.
        peer: who connected.
        dialect: name of the listening socket's dialect.
        context: the worker's.

    Returns:
        Whether it is served.
    """
    pending = context.admission.pending
    find_container = ContainerLook(context.identifier, accepted, peer)
    if pending.add(peer.pid, find_container):
        Connection(context, accepted, dialect, peer, find_container).start()
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
