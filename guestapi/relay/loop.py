"""The relay: accepts connections of virtual machines, and hands them over to the workers of the service.

Virtual machines take turns, by their CID. A machine that connects faster than workers take its connections has some of
them wait here, and more of them are closed. When very many wait, the machine with most of them loses its newest.

All machines share the kernel's queue of a listening socket, in the order in which they come. Nobody but the relay can
shorten it, so most of the relay's time goes to that: it accepts until the queue is empty, and then each machine has one
connection handed over.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from guestapi.journal import ThrottledLog
from guestapi.relay import handover

log = logging.getLogger(__name__)

#: The most connections that wait for a worker: of a virtual machine, and of all.
MOST_OF_ONE = 256
MOST = 4096
#: The most connections that are being handed over at a time: of a virtual machine, and of all.
HANDED_OF_ONE = 8
HANDED = 64
#: Seconds that a connection may wait for a worker, before it is closed.
WAIT_SECONDS = 10.0
#: How often a connection is handed over to another worker when one has ended before it took it.
_ATTEMPTS = 5
#: Seconds for which connections are accepted before each machine has one handed over: about a hundred times as long as
#: a handover takes. A machine can connect about as fast as others are accepted.
_ACCEPT_SECONDS = 0.005
#: Seconds until the handover socket, or the accepting, is tried again.
_PAUSE_SECONDS = 0.05


class Listener(Protocol):
    """Where virtual machines connect."""

    def accept(self) -> tuple[int, Any]:
        """Return the descriptor of a connection, and the CID and port that it is from; no tuple of a Unix socket."""
        ...

    def fileno(self) -> int:
        """Return the descriptor."""
        ...


class SocketListener:
    """A listening socket of AF_VSOCK, or a Unix socket of hybrid vsock."""

    def __init__(self, sock: socket.socket) -> None:
        """Accept connections of a socket that does not block."""
        self.fileno = sock.fileno
        # PERF: what socket.accept() calls to make an object, which takes as long as the rest.
        self.accept: Callable[[], tuple[int, Any]] = sock._accept  # type: ignore[attr-defined]  # missing in typeshed


@dataclass(eq=False, slots=True)
class _Arrival:
    descriptor: int
    cid: int
    dialect: str
    until: float
    attempts: int = 0


class Relay:
    """Brings connections from listening sockets to the handover socket."""

    def __init__(
        self, listeners: Sequence[tuple[Listener, str]], path: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Accept nothing yet.

        Args:
            listeners: listening sockets that do not block, each with the name of its dialect.
            path: of the handover socket.
            clock: returns seconds.
        """
        self._listeners = {listener.fileno(): (listener, dialect) for listener, dialect in listeners}
        self._path = path
        self._clock = clock
        #: By CID, in the order of their turns; of each the oldest first.
        self._waiting: dict[int, deque[_Arrival]] = {}
        self._count = 0
        #: What was sent to a worker and is not taken yet, by the descriptor of the connection to the worker.
        self._handed: dict[int, tuple[socket.socket, _Arrival]] = {}
        self._handed_of: dict[int, int] = {}
        self._poll = select.epoll()
        self._accepting = False
        self._accept_again = 0.0
        self._hand_again = 0.0
        #: Whether more of what waits may be handed over at once, or is to be tried again at `_hand_again`.
        self._ready = False
        self._warnings = ThrottledLog(log, logging.WARNING)
        self._resume()

    def close(self) -> None:
        """Close everything but the listening sockets."""
        for worker, arrival in self._handed.values():
            worker.close()
            os.close(arrival.descriptor)
        for waiting in self._waiting.values():
            for arrival in waiting:
                os.close(arrival.descriptor)
        self._handed.clear()
        self._waiting.clear()
        self._poll.close()

    def run(self, stopped: Callable[[], bool]) -> None:
        """Relay until `stopped`, which is asked after each wait of at most a second."""
        while not stopped():
            self.step(1.0)

    def step(self, seconds: float) -> None:
        """Wait at most `seconds` for something to do, and do it."""
        now = self._clock()
        if not self._accepting:
            seconds = min(seconds, max(0.0, self._accept_again - now))
        if self._ready:
            seconds = min(seconds, max(0.0, self._hand_again - now))
        for descriptor, _events in self._poll.poll(seconds):
            if descriptor in self._listeners:
                self._accept(*self._listeners[descriptor])
            elif descriptor in self._handed:
                self._finish(descriptor)
        if not self._accepting and self._clock() >= self._accept_again:
            self._resume()
        self._expire()
        if self._clock() >= self._hand_again:
            self._hand_over()

    def __len__(self) -> int:
        """How many connections wait."""
        return self._count

    # Accepting.

    def _resume(self) -> None:
        for descriptor in self._listeners:
            self._poll.register(descriptor, select.EPOLLIN)
        self._accepting = True

    def _pause(self) -> None:
        if self._accepting:
            for descriptor in self._listeners:
                self._poll.unregister(descriptor)
            self._accepting = False
            self._accept_again = self._clock() + _PAUSE_SECONDS

    def _accept(self, listener: Listener, dialect: str) -> None:
        clock = self._clock
        until = clock() + _ACCEPT_SECONDS
        closed: dict[int, int] = {}
        now = 0.0
        while now < until:
            try:
                descriptor, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                self._warnings.log(f"cannot accept: {error.strerror}; raise LimitNOFILE= of the unit")
                self._evict()
                self._pause()
                break
            now = clock()
            cid = address[0] if isinstance(address, tuple) else handover.HYBRID
            waiting = self._waiting.get(cid)
            if waiting is not None and len(waiting) >= MOST_OF_ONE:
                os.close(descriptor)
                closed[cid] = closed.get(cid, 0) + 1
                continue
            if self._count >= MOST:
                self._evict()
            self._add(_Arrival(descriptor, cid, dialect, now + WAIT_SECONDS))
        for cid in closed:
            self._warnings.log(f"CID {cid} has {MOST_OF_ONE} connections that wait; more of them are closed", cid)

    def _add(self, arrival: _Arrival, *, first: bool = False) -> None:
        waiting = self._waiting.setdefault(arrival.cid, deque())
        if first:
            waiting.appendleft(arrival)
        else:
            waiting.append(arrival)
        self._count += 1

    def _take(self, cid: int, *, newest: bool = False) -> _Arrival:
        waiting = self._waiting[cid]
        arrival = waiting.pop() if newest else waiting.popleft()
        if not waiting:
            del self._waiting[cid]
        self._count -= 1
        return arrival

    def _evict(self) -> None:
        """Close the newest connection of the virtual machine that has most."""
        greediest = max(self._waiting, key=lambda cid: len(self._waiting[cid]), default=None)
        if greediest is not None:
            os.close(self._take(greediest, newest=True).descriptor)
            self._warnings.log(f"too many connections wait; those of CID {greediest} are closed first", greediest)

    def _expire(self) -> None:
        now = self._clock()
        for cid, waiting in list(self._waiting.items()):
            while waiting and waiting[0].until <= now:
                os.close(self._take(cid).descriptor)
                self._warnings.log("no worker takes connections; 'systemctl status guestapi' may say why", "late")
        for descriptor, (_worker, arrival) in list(self._handed.items()):
            if arrival.until <= now:
                os.close(self._release(descriptor).descriptor)
                self._warnings.log("no worker takes connections; 'systemctl status guestapi' may say why", "late")

    # Handing over.

    def _hand_over(self) -> None:
        """Let each virtual machine have one connection handed over, as far as there is room."""
        self._ready = False
        for cid in list(self._waiting):
            if len(self._handed) >= HANDED:
                return
            if self._handed_of.get(cid, 0) >= HANDED_OF_ONE:
                continue
            self._ready = True
            arrival = self._take(cid)
            if not self._send(arrival):
                self._add(arrival, first=True)
                self._hand_again = self._clock() + _PAUSE_SECONDS
                return
            # The next turn of this one comes after all others.
            if (waiting := self._waiting.pop(cid, None)) is not None:
                self._waiting[cid] = waiting

    def _send(self, arrival: _Arrival) -> bool:
        """Send a connection to whichever worker accepts it; return False if none can be reached now."""
        try:
            worker = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._warnings.log(f"cannot hand over: {error.strerror}")
            return False
        try:
            worker.connect(self._path)
            handover.send(worker, arrival.descriptor, arrival.cid, arrival.dialect)
        except OSError as error:
            worker.close()
            if not isinstance(error, BlockingIOError):
                self._warnings.log(
                    f"{self._path}: {error.strerror}; is guestapi-handover.socket active?", "unreachable"
                )
            return False
        self._handed[worker.fileno()] = (worker, arrival)
        self._handed_of[arrival.cid] = self._handed_of.get(arrival.cid, 0) + 1
        self._poll.register(worker.fileno(), select.EPOLLIN)
        return True

    def _finish(self, descriptor: int) -> None:
        worker, _arrival = self._handed[descriptor]
        try:
            answer = worker.recv(1)
        except BlockingIOError:
            return
        except OSError:
            answer = b""
        arrival = self._release(descriptor)
        arrival.attempts += 1
        if answer == handover.TAKEN or arrival.attempts >= _ATTEMPTS:
            os.close(arrival.descriptor)
        else:
            # That worker has ended; it has read nothing from the connection.
            self._add(arrival, first=True)

    def _release(self, descriptor: int) -> _Arrival:
        worker, arrival = self._handed.pop(descriptor)
        self._poll.unregister(descriptor)
        worker.close()
        self._handed_of[arrival.cid] -= 1
        if not self._handed_of[arrival.cid]:
            del self._handed_of[arrival.cid]
        return arrival
