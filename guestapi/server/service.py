"""What the connections of a worker have in common, and what becomes of a request."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from gevent.threadpool import ThreadPool

from guestapi.callers.identify import Caller, Identifier
from guestapi.model import Instance
from guestapi.server.answer import Answer
from guestapi.server.crew import Crew
from guestapi.server.repeats import Repeats
from guestapi.server.stream import Pings
from guestapi.server.transfer import DISK_THREADS
from guestapi.server.turns import Places
from guestapi.server.waiting import PatientIdentifier
from guestapi.settings import Limits

if TYPE_CHECKING:
    from guestapi.server.connection import Connection


class Service:
    """What all connections of a worker share. `worker.GuestWorker` makes one."""

    def __init__(
        self,
        application: Callable[..., Iterable[bytes]],
        identifier: Identifier | PatientIdentifier,
        limits: Limits,
        look: Callable[[int], Instance | None],
        answered: Callable[[Answer], None],
        refused: Callable[[Caller | None, str, int, str], None],
        *,
        multiprocess: bool,
    ) -> None:
        """Args:
        application: the WSGI application.
        identifier: who is at the other end of a socket.
        limits: sizes and times.
        look: what the store holds under an instance's id now.
        answered: called after each response of the application.
        refused: called with caller, dialect, status and text of what the server itself refuses.
        multiprocess: there are other workers (``wsgi.multiprocess``).
        """
        self.application = application
        self.identifier = identifier
        self.limits = limits
        self.answered = answered
        self.refused = refused
        self.connections: set[Connection] = set()
        self.repeats = Repeats(look)
        self.places = Places()
        self.crew = Crew()
        self.pings = Pings()
        self.disk = ThreadPool(DISK_THREADS)
        self.stopping = False
        self.environ = {
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
