"""What the connections of a worker have in common, and what becomes of a request."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from gevent.threadpool import ThreadPool

from guestapi.callers.credentials import Credentials, credentials, is_closed
from guestapi.callers.identify import Caller, Identifier
from guestapi.http.errors import ProtocolError
from guestapi.http.response import error_response
from guestapi.model import Instance
from guestapi.rate_limit import RateLimit
from guestapi.server.answer import Answer
from guestapi.server.crew import Crew
from guestapi.server.door import Door
from guestapi.server.repeats import Repeats
from guestapi.server.rounds import Rounds
from guestapi.server.shares import Excess, Shares
from guestapi.server.stream import Pings
from guestapi.server.transfer import DISK_THREADS
from guestapi.server.turns import Places
from guestapi.server.waiting import Patience
from guestapi.settings import Limits
from guestapi.wsgi import Application, Environ

if TYPE_CHECKING:
    from guestapi.server.connection import Connection


#: Descriptors that are kept back, for what a worker opens besides connections: namespaces and processes it looks at,
#: image files, the store.
_SPARE = 64
#: How many new connections of a process are looked at in a round of the event loop. Few: all others wait for them.
_NEW_EACH = 2


class Service:
    """What all connections of a worker share. `worker.GuestWorker` makes one."""

    def __init__(
        self,
        application: Application,
        identifier: Identifier,
        limits: Limits,
        look: Callable[[int], Instance | None],
        answered: Callable[[Answer], None],
        refused: Callable[[Caller | None, str, int, str, str | None], None],
        shares: Shares,
        *,
        descriptors: int,
        multiprocess: bool,
        patience: Patience | None = None,
        account_from: int = 0,
    ) -> None:
        """Args:
        application: the WSGI application.
        identifier: who is at the other end of a socket.
        limits: sizes and times.
        look: what the store holds under an instance's id now.
        answered: called after each response of the application.
        refused: called with caller, dialect, status and text of what the server itself refuses, and the limit that
            was exceeded, if one was.
        shares: who may have how many connections.
        descriptors: how many the process may have.
        multiprocess: there are other workers (``wsgi.multiprocess``).
        patience: for callers whose instance may be known in a moment.
        account_from: of answers that are given again, those with a smaller status are not told to `answered`.
        """
        self.application = application
        self.identifier = identifier
        self.limits = limits
        self.answered = answered
        self.refused = refused
        self.connections: set[Connection] = set()
        self.repeats = Repeats(look, account_from)
        self.patience = patience
        self.places = Places()
        self.crew = Crew()
        self.pings = Pings()
        self.disk = ThreadPool(DISK_THREADS)
        self.stopping = False
        self.shares = shares
        self.door = Door(limits.connections_per_instance)
        self.newcomers = Rounds(_NEW_EACH, self.door.of_one)
        each_second = limits.requests_per_second
        #: How often each instance may ask; None if any number of times.
        self.requests = RateLimit(each_second, limits.requests_burst) if each_second else None
        #: Bytes of answers that the clients of an instance have not taken yet, for those instances that have any.
        self.unsent: dict[int | None, int] = {}
        self._spare_from = descriptors - _SPARE
        self.environ: Environ = {
            "wsgi.version": (1, 0),
            "wsgi.multithread": True,
            "wsgi.multiprocess": multiprocess,
            "wsgi.run_once": False,
            "wsgi.errors": sys.stderr,
            "SCRIPT_NAME": "",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "0",
            "REMOTE_ADDR": "",
        }

    def enter(self, instance_id: int | None, connection: Connection) -> Excess | None:
        """As `Shares.enter`; full is also who has no more descriptors than are needed to look who is calling."""
        # The kernel gives out the lowest number that is free (open(2)): this many descriptors are in use.
        return self.shares.enter(instance_id, connection, full=connection.fileno() >= self._spare_from)

    def wait_for(self, instance_id: int | None, size: int) -> None:
        """So many bytes more, or less if it is negative, wait for a client of the instance to take them."""
        left = self.unsent.get(instance_id, 0) + size
        if left:
            self.unsent[instance_id] = left
        else:
            self.unsent.pop(instance_id, None)

    def let_in(self, accepted: socket.SocketType, dialect: str, *, flood: bool) -> Credentials | None:
        """Of the process that has connected, which waits to be recognised; None if it was turned away.

        Args:
            accepted: what it has connected.
            dialect: of the listening socket.
            flood: more connections come than can be accepted: those whose clients are gone again are dropped.
        """
        if flood and is_closed(accepted):
            accepted.close()
            return None
        who = credentials(accepted)
        if self.door.come(who.pid):
            return who
        instance_id, excess = self.door.why_not(who.pid)
        self.refused(Caller(who, instance_id), dialect, excess.status, excess.text, excess.limit)
        try:
            accepted.setblocking(False)
            accepted.send(error_response(excess.status, excess.text, retry_after=excess.status == 429))
        except OSError:
            pass  # It does not wait for the answer.
        finally:
            accepted.close()
        return None

    def ask_limits(self, instance_id: int | None) -> None:
        """An instance asks for something, and may ask.

        PERF: called only if one of ``requests`` and ``unsent`` is not empty.

        Raises:
            ProtocolError: it asks too often, or has left too much of earlier answers in our memory.
        """
        # Whoever is in no known instance hears the same in any case.
        if self.requests is not None and instance_id is not None and not self.requests.take(instance_id):
            raise ProtocolError(429, "too many requests of this instance", "requests_per_second")
        if self.unsent.get(instance_id, 0) >= self.limits.unsent_per_instance:
            raise ProtocolError(429, "this instance leaves too many answers unread", "unsent_per_instance")
