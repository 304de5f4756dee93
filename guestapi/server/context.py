"""What the connections of a worker share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

from gevent.threadpool import ThreadPool
from msgspec.structs import replace

from guestapi.callers.identify import Caller, Identifier
from guestapi.dialects import DIALECTS
from guestapi.http.request import KnownFields, KnownHeads
from guestapi.model import Instance
from guestapi.server.admission import Admission
from guestapi.server.arrivals import ArrivalQueue
from guestapi.server.event_stream import PingTimer
from guestapi.server.exchange import Exchange
from guestapi.server.greenlets import GreenletPool
from guestapi.server.identification_retry import IdentificationRetry
from guestapi.server.response_cache import ResponseCache
from guestapi.server.scheduler import FairScheduler
from guestapi.server.sendfile import DISK_THREADS
from guestapi.server.transport import LateLooks
from guestapi.settings import LimitSettings
from guestapi.wsgi import Application, Environ


class OpenConnection(Protocol):
    """A connection that the worker can end. `connection.Connection` implements it."""

    def finish(self, *, after_last_requests: bool) -> None:
        """End the connection in an orderly way."""
        ...

    def abort(self) -> None:
        """End the connection at once."""
        ...


class WorkerContext:
    """What the connections of a worker share. `worker.GuestWorker` makes one.

    Attributes:
        application: the WSGI application.
        identifier: identifies callers.
        limits: sizes and times.
        limits_of: as `limits`, with the times that the clients of a dialect have, by its name.
        on_exchange: called after each response of the application.
        on_refusal: called with caller, dialect, status, text and exceeded limit, if there is one, of what the server
            itself refuses.
        admission: which connections and requests are admitted.
        retry: for callers that may be registered in a moment; None for none.
        connections: all connections that are open.
        known_fields, known_heads: header fields and heads that came lately.
        scheduler: decides who is served next.
        arrivals: decides which new connection is identified next.
        greenlets: serve the connections.
        cache: responses that may be sent again.
        late_looks: looks whether clients have closed that were just answered.
        pings: tells streams when to send a ping.
        disk: threads that read image files.
        environ: what is the same in the environ of every request.
        stopping: whether the worker ends. Then each connection ends after its next response.
    """

    def __init__(
        self,
        application: Application,
        identifier: Identifier,
        limits: LimitSettings,
        get_instance: Callable[[int], Instance | None],
        on_exchange: Callable[[Exchange], None],
        on_refusal: Callable[[Caller | None, str, int, str, str | None], None],
        admission: Admission,
        *,
        multiprocess: bool,
        get_seen: Callable[[int], Instance | None] | None = None,
        retry: IdentificationRetry | None = None,
        logged_from: int = 0,
    ) -> None:
        """Make the context of a worker without connections.

        Args:
            application: as the attribute.
            identifier: as the attribute.
            limits: as the attribute.
            get_instance: returns what the store has under an instance's id now.
            on_exchange: as the attribute.
            on_refusal: as the attribute.
            admission: as the attribute.
            multiprocess: whether there are other workers (``wsgi.multiprocess``).
            get_seen: as `get_instance`, as of the last identification; None if nothing knows that.
            retry: as the attribute.
            logged_from: `on_exchange` is not called for a cached response with a smaller status.
        """
        self.application = application
        self.identifier = identifier
        self.limits = limits
        self.limits_of = {name: _lengthen(limits, dialect.deadline_factor) for name, dialect in DIALECTS.items()}
        self.on_exchange = on_exchange
        self.on_refusal = on_refusal
        self.admission = admission
        self.retry = retry
        self.connections: set[OpenConnection] = set()
        self.known_fields, self.known_heads = KnownFields(), KnownHeads()
        self.arrivals = ArrivalQueue()
        self.scheduler = FairScheduler(self.arrivals.start_those_that_came)
        self.greenlets = GreenletPool()
        self.cache = ResponseCache(get_instance, logged_from, get_seen)
        self.late_looks = LateLooks()
        self.pings = PingTimer()
        self.disk = ThreadPool(DISK_THREADS)
        self.stopping = False
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


def _lengthen(limits: LimitSettings, times: float) -> LimitSettings:
    """The limits of clients that may take so many times as long for a head, and between requests."""
    return replace(limits, head_seconds=limits.head_seconds * times, idle_seconds=limits.idle_seconds * times)
