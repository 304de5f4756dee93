"""A worker process: it accepts connections and serves them until it is told to stop.

Its design:

- One thread runs gevent's event loop. Writes of the store and reads of cold image files run in threads beside it.
- An `acceptor` for each listening socket accepts connections; `admission` limits them by process, then by instance.
- Each connection has a greenlet, which identifies the caller, parses requests and calls the WSGI application.
- Before each request the greenlet waits for its turn: `scheduler` lets instances, then their connections, take turns.
- A greenlet follows the change log and delivers events; those that serve streams are woken and send them.
- Each second the worker sends itself a request, and tells the arbiter that it is alive only if that is answered.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import time
from datetime import datetime

import gevent
import gevent.socket
from gevent.event import Event
from gevent.hub import get_hub
from greenlet import getcurrent
from gunicorn.workers.ggevent import GeventWorker

from guestapi.callers.credentials import refuse_descriptors
from guestapi.callers.identify import Caller, Identifier
from guestapi.dialects import HANDOVER
from guestapi.metrics.counters import OTHER, REFUSED, WorkerCounters
from guestapi.notifications.broker import Broker
from guestapi.server.acceptor import Acceptor
from guestapi.server.access_log import RequestLog
from guestapi.server.admission import Admission, ConnectionQuota
from guestapi.server.allocator import give_back_large_blocks
from guestapi.server.connection import Connection
from guestapi.server.context import WorkerContext
from guestapi.server.event_stream import PingTimer
from guestapi.server.exchange import Exchange
from guestapi.server.gunicorn_hooks import GunicornHooks
from guestapi.server.handover import HandoverAcceptor
from guestapi.server.identification_retry import IdentificationRetry
from guestapi.server.store_thread import OffloadedStore
from guestapi.server.worker_reports import WorkerReports
from guestapi.store.doorbell import Doorbell
from guestapi.store.errors import StoreError
from guestapi.wsgi import RAW_PATH, ROUTE

log = logging.getLogger(__name__)

#: Seconds in which clients may send a last request to a stopping worker on connections that they have open. Its
#: response has ``Connection: close``, so a busy client notices nothing.
_LAST_REQUESTS_SECONDS = 1.0
#: After this many halves of ``graceful_timeout`` of wall-clock time, a stopping worker ends all connections. After two
#: halves the arbiter kills it.
_LATEST = 1.7
#: Seconds between two looks of a stopping worker at the connections that are left.
_FINISH_INTERVAL = 0.02
#: Seconds between two heartbeats.
_HEARTBEAT_SECONDS = 1.0
#: Seconds after which a thread that reads a large value lets the event loop run, if that waits. The loop lets go of the
#: interpreter at each system call, several times for a request, and would wait for Python's 5 ms each time.
_SWITCH_SECONDS = 0.0005
#: Seconds that a worker waits for its own response before it considers itself hung.
_PROBE_SECONDS = 3.0
#: Seconds after which the change log is polled although the doorbell did not ring.
_POLL_SECONDS = 1.0
#: Seconds between two batches of the change log.
_BETWEEN_BATCHES = 0.001
#: The longest sleep of the ping timer, in seconds, so that it sees a new stream in time.
_PING_CHECK_SECONDS = 1.0


class GuestWorker(GeventWorker):
    """gunicorn's gevent worker with a connection loop of its own. Signals, heartbeat and stop are gunicorn's."""

    alive: bool

    def patch(self) -> None:
        """Make the listening sockets non-blocking. Unlike gunicorn's class, this monkey-patches nothing."""
        for listener, dialect in zip(self.sockets, self.app.dialects, strict=True):
            listener.sock.setblocking(False)
            if dialect != HANDOVER:
                refuse_descriptors(listener.sock)

    def init_process(self) -> None:
        """Set up, then run until told to stop, as gunicorn's class."""
        give_back_large_blocks()
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._wake = Event()
        super().init_process()

    def init_signals(self) -> None:
        """Install handlers as gunicorn's class, but let a signal wake the main loop at once, not within a second."""
        super().init_signals()
        self._wake_watcher = get_hub().loop.io(self.PIPE[0], 1)
        self._wake_watcher.start(self._on_signal)
        # The arbiter has blocked them until now (`arbiter.Arbiter.spawn_worker`).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def run(self) -> None:
        """Serve until `alive` is False, then let requests that are being answered finish."""
        application = self.app
        store = application.open_store()
        self._counters = WorkerCounters()
        self._reports = WorkerReports(application.settings.metrics, self.age, self._counters)
        self._requests = requests = RequestLog(application.settings.log, store.instance, counters=self._counters)
        self._hooks = GunicornHooks(self.cfg, self.log, self)
        self._context = self._make_context(store)
        acceptors = [
            HandoverAcceptor(listener.sock, self._context)
            if dialect == HANDOVER
            else Acceptor(listener.sock, dialect, self._context)
            for listener, dialect in zip(self.sockets, application.dialects, strict=True)
        ]
        gevent.spawn(_follow_log, store, self._counters)
        gevent.spawn(_send_pings, self._context.pings)
        while self.alive:
            answers = self._answers()
            if answers:
                self.notify()
            self._wake.wait(_HEARTBEAT_SECONDS)
            self._wake.clear()
            application.excesses.add(requests.flush())
            self._reports.write(self._context, store.broker, answers=answers)
        for acceptor in acceptors:
            acceptor.close()
        self._finish()
        self._reports.write(self._context, store.broker, answers=False)

    def _make_context(self, store: OffloadedStore) -> WorkerContext:
        settings, requests = self.app.settings, self._requests
        limits = settings.limits
        identifier = Identifier(store, pidfd=settings.callers.pidfd)
        quota = ConnectionQuota(limits.connections_per_instance, self.cfg.worker_connections, self._on_eviction)
        return WorkerContext(
            self.wsgi,
            identifier,
            limits,
            store.instance,
            self._on_exchange,
            self._on_refusal,
            Admission(limits, quota, descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
            multiprocess=self.cfg.workers > 1,
            get_seen=store.seen,
            retry=IdentificationRetry(identifier, store.has_sources, store.version, settings.callers),
            logged_from=0 if self._hooks.wanted or self.cfg.max_requests else requests.logged_from,
        )

    def _finish(self) -> None:
        """Let each connection end after its next response, and idle ones a little later."""
        context = self._context
        context.stopping = True
        # When all of graceful_timeout has passed, the arbiter kills the worker.
        most = self.cfg.graceful_timeout / 2
        # Seconds in which this process could run. While a busy machine does not let it run, its clients wait too. But
        # the arbiter goes by the clock.
        worked, began = 0.0, time.monotonic()
        before = began
        while context.connections and worked < most and before < began + _LATEST * most:
            self.notify()
            after_last_requests = worked >= min(_LAST_REQUESTS_SECONDS, most / 2) or before > began + most
            for connection in list(context.connections):
                connection.finish(after_last_requests=after_last_requests)
            gevent.sleep(_FINISH_INTERVAL)
            now = time.monotonic()
            worked += min(now - before, 2 * _FINISH_INTERVAL)
            before = now
        for connection in list(context.connections):
            connection.abort()
        gevent.sleep(0)

    def _answers(self) -> bool:
        """Send a request through a connection like any other; return whether it is answered in time."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            # Out of descriptors. The worker may be well, and killing it would end all connections.
            log.warning("the worker cannot probe itself: %s", error.strerror)
            return True
        Connection(self._context, ours, "incus", None).start()
        with gevent.socket.socket(fileno=theirs.detach()) as probe:
            probe.settimeout(_PROBE_SECONDS)
            try:
                probe.sendall(b"OPTIONS * HTTP/1.0\r\n\r\n")
                return bool(probe.recv(4096).startswith(b"HTTP/1.0 200"))
            except OSError as error:
                log.error("the worker did not answer itself: %s", error or f"not within {_PROBE_SECONDS:.0f} s")
                return False

    def _on_signal(self) -> None:
        try:
            os.read(self.PIPE[0], 4096)
        except BlockingIOError:
            pass
        self._wake.set()

    def _on_eviction(self, instance_id: int | None) -> None:
        self._requests.excesses.count(instance_id, "worker_connections")

    def _on_refusal(self, caller: Caller | None, dialect: str, status: int, text: str, limit: str | None) -> None:
        self._counters.requests(dialect, REFUSED, status).add(0.0)
        self._counters.count_instance(caller and caller.instance_id, requests=1)
        self._requests.log_refusal(caller, dialect, status, text, limit)

    def _on_exchange(self, exchange: Exchange) -> None:
        if exchange.environ[RAW_PATH] == "*":
            return
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive = False
            self._wake.set()
        if exchange.durations is None:
            # A response that is sent again is counted where it is.
            exchange.durations = self._counters.requests(
                exchange.dialect, exchange.environ.get(ROUTE, OTHER), exchange.code
            )
            exchange.durations.add(exchange.seconds)
            self._counters.count_instance(exchange.caller and exchange.caller.instance_id, requests=1)
        self._requests.log_exchange(exchange)
        if self._hooks.wanted:
            self._hooks.call(exchange)


class _Alarm:
    """Resumes one greenlet when the doorbell rings, and once a second in case a ring was missed.

    PERF: the loop switches to the greenlet itself; with an event of gevent it would do so in its next iteration.
    """

    def __init__(self, doorbell: Doorbell) -> None:
        hub = get_hub()
        self._hub = hub
        self._doorbell = doorbell
        self._greenlet = getcurrent()
        self._waits = self._due = False
        self._watcher = hub.loop.io(doorbell.fileno(), 1)
        self._watcher.start(self._on_ring)
        self._timer = hub.loop.timer(_POLL_SECONDS, _POLL_SECONDS)
        self._timer.start(self._resume)

    def wait(self) -> None:
        """Wait until it is due: at once if it was since the last call."""
        if not self._due:
            self._waits = True
            self._hub.switch()
        self._due = False

    def _on_ring(self) -> None:
        # Read the doorbell now, whatever the greenlet does: otherwise the loop would call this again and again.
        self._doorbell.heard()
        self._resume()

    def _resume(self) -> None:
        self._due = True
        if self._waits:
            self._waits = False
            self._greenlet.switch()


def _follow_log(store: OffloadedStore, counters: WorkerCounters) -> None:
    """Deliver events as soon as the doorbell rings, and once a second in case a ring was missed."""
    alarm = _Alarm(store.doorbell)
    check_at = 0.0
    while True:
        alarm.wait()
        try:
            if time.monotonic() >= check_at:
                check_at = time.monotonic() + _POLL_SECONDS
                for _slice in store.broker.check_all():
                    gevent.sleep(_BETWEEN_BATCHES)
            while _deliver_counted(store.broker, counters):
                # Streams take what they have, so that no client is behind for what it could not take yet.
                gevent.sleep(_BETWEEN_BATCHES)
        except StoreError as error:
            log.error("events are delayed: %s", error)
            gevent.sleep(_POLL_SECONDS)
        except Exception:
            # Without this greenlet no client would receive events any more.
            log.exception("events are delayed")
            gevent.sleep(_POLL_SECONDS)


def _deliver(broker: Broker) -> bool:
    """Deliver a batch of entries, and wake some of the requests that wait; return whether there is more to do."""
    more = broker.poll()
    return broker.waiting.wake_some() or more


def _deliver_counted(broker: Broker, counters: WorkerCounters) -> bool:
    """As `_deliver`, and count what was delivered."""
    more = _deliver(broker)
    if broker.oldest_read is not None:
        written = datetime.fromisoformat(broker.oldest_read).timestamp()
        counters.event_ages.add(max(0.0, time.time() - written))
        broker.oldest_read = None
    counters.events = broker.delivered
    return more


def _send_pings(pings: PingTimer) -> None:
    """Send the pings of all streams."""
    while True:
        gevent.sleep(min(pings.run(), _PING_CHECK_SECONDS))
