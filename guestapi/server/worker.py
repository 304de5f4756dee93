"""A worker process: accepts connections and serves them until it is told to stop."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import gevent
import gevent.socket
from gevent.event import Event
from gevent.hub import get_hub
from gunicorn.workers.ggevent import GeventWorker

from guestapi.callers.credentials import refuse_descriptors
from guestapi.callers.identify import Identifier
from guestapi.server.answer import Answer
from guestapi.server.connection import Connection
from guestapi.server.logs import RequestLog
from guestapi.server.offload import OffloadedStore
from guestapi.server.service import Service
from guestapi.server.shares import Shares
from guestapi.server.waiting import Patience
from guestapi.store.errors import StoreError

log = logging.getLogger(__name__)

#: How long a stopping worker lets clients send their next request on a connection that they have open. It answers
#: that one with ``Connection: close``, so a client that is at work notices nothing.
_LAST_REQUESTS_SECONDS = 1.0
#: After so many halves of ``graceful_timeout``, by the clock, a stopping worker ends whatever is still there: after two
#: the master kills it.
_LATEST = 1.7
#: How often a stopping worker looks at the connections that are left.
_ROUND_SECONDS = 0.02
#: Seconds between two signs of life.
_HEARTBEAT_SECONDS = 1.0
#: How long a worker waits for its own answer before it takes itself for dead.
_PATIENCE_SECONDS = 3.0
#: PERF: plain numbers, or the constructor converts them from enumerations and back.
_UNIX, _STREAM = int(socket.AF_UNIX), int(socket.SOCK_STREAM)
#: How many connections are accepted in one turn of the loop: one if there are other workers to share with.
_ACCEPT_ALONE = 4
#: After so many turns of the loop in each of which there was something to accept, it is so many.
_FLOOD_ROUNDS, _ACCEPT_MANY = 64, 64
#: Seconds after which the change log is looked at though the doorbell did not ring.
_LOOK_SECONDS = 1.0
#: How long the ping timer sleeps at most, so that a stream that was just opened is seen in time.
_PING_CHECK_SECONDS = 1.0
#: Seconds without accepting after the process has run out of descriptors.
_PAUSE_SECONDS = 0.1
#: Seconds between two complaints about that.
_TELL_SECONDS = 10.0


class GuestWorker(GeventWorker):
    """gunicorn's gevent worker with its own connection loop. Signals, heartbeat, hooks and stop are as gunicorn's."""

    alive: bool

    def patch(self) -> None:
        """Make sockets non-blocking. Nothing is monkey-patched, unlike in the class above: see the room's rules."""
        for listener in self.sockets:
            listener.sock.setblocking(False)
            refuse_descriptors(listener.sock)

    def init_process(self) -> None:
        """As gunicorn's Worker: set up, then run until told to stop."""
        self._wake = Event()
        super().init_process()

    def init_signals(self) -> None:
        """As gunicorn's Worker, but a signal wakes the main loop at once instead of within a second."""
        super().init_signals()
        self._wake_watcher = get_hub().loop.io(self.PIPE[0], 1)
        self._wake_watcher.start(self._on_signal)
        # Those that the master has held back (`master.Master.spawn_worker`).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def run(self) -> None:
        """Serve until `alive` is False, then let requests that are under way end."""
        application = self.app
        store = application.open_store()
        requests = RequestLog(application.settings.log, store.instance)
        limits = application.settings.limits
        identifier = Identifier(store, pidfd=application.settings.callers.pidfd)
        self._hooks = _Hooks(self)
        self._requests = requests
        self._service = Service(
            self.wsgi,
            identifier,
            limits,
            store.instance,
            self._answered,
            requests.refused,
            Shares(limits.connections_per_instance, self.cfg.worker_connections, self._made_room),
            descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            multiprocess=self.cfg.workers > 1,
            patience=Patience(identifier, store.mirrored, store.version, application.settings.callers),
            account_from=0 if self._hooks.wanted or self.cfg.max_requests else requests.tells_from,
        )
        listeners = [
            _Listener(listener.sock, dialect, self._service, alone=self.cfg.workers == 1)
            for listener, dialect in zip(self.sockets, application.dialects, strict=True)
        ]
        gevent.spawn(_follow_log, store)
        gevent.spawn(_send_pings, self._service)
        while self.alive:
            if self._answers():
                self.notify()
            self._wake.wait(_HEARTBEAT_SECONDS)
            self._wake.clear()
            application.excesses.add(requests.excesses.tell())
        for listener in listeners:
            listener.close()
        self._finish()

    def _finish(self) -> None:
        """Let each connection end after its next answer; those that are idle, a little later, at once."""
        self._service.stopping = True
        # The master kills the worker when the whole of it is over.
        patience = self.cfg.graceful_timeout / 2
        # Seconds in which this process could serve clients: while a busy machine lets it wait, they wait too. But not
        # until the master kills it, which goes by the clock.
        worked, began = 0.0, time.monotonic()
        before = began
        while self._service.connections and worked < patience and before < began + _LATEST * patience:
            self.notify()
            over = worked >= min(_LAST_REQUESTS_SECONDS, patience / 2) or before > began + patience
            for connection in list(self._service.connections):
                connection.finish(after_last_requests=over)
            gevent.sleep(_ROUND_SECONDS)
            now = time.monotonic()
            worked += min(now - before, 2 * _ROUND_SECONDS)
            before = now
        for connection in list(self._service.connections):
            connection.abort()
        gevent.sleep(0)

    def _answers(self) -> bool:
        """Whether a request, sent through a connection like any other, is answered in time."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            # Out of descriptors. It cannot be seen, and killing the worker would cut all that it serves.
            log.warning("the worker cannot look at itself: %s", error.strerror)
            return True
        Connection(self._service, ours, "incus", None).start()
        with gevent.socket.socket(fileno=theirs.detach()) as probe:
            probe.settimeout(_PATIENCE_SECONDS)
            try:
                probe.sendall(b"OPTIONS * HTTP/1.0\r\n\r\n")
                return bool(probe.recv(4096).startswith(b"HTTP/1.0 200"))
            except OSError as error:
                log.error("the worker did not answer itself: %s", error or f"not within {_PATIENCE_SECONDS:.0f} s")
                return False

    def _on_signal(self) -> None:
        try:
            os.read(self.PIPE[0], 4096)
        except BlockingIOError:
            pass
        self._wake.set()

    def _made_room(self, instance_id: int | None) -> None:
        self._requests.excesses.count(instance_id, "worker_connections")

    def _answered(self, answer: Answer) -> None:
        if answer.environ["RAW_PATH"] == "*":
            return
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive = False
            self._wake.set()
        self._requests.answered(answer)
        if self._hooks.wanted:
            self._hooks.call(answer)


def _follow_log(store: OffloadedStore) -> None:
    """Have events delivered as soon as the doorbell rings, and look once a second in case a ring was missed."""
    rung = Event()
    watcher = get_hub().loop.io(store.doorbell.fileno(), 1)

    def ring() -> None:
        # At once, whatever the greenlet is at: the loop would call this again and again.
        store.doorbell.heard()
        rung.set()

    watcher.start(ring)
    ask_at = 0.0
    while True:
        rung.wait(_LOOK_SECONDS)
        rung.clear()
        try:
            if time.monotonic() >= ask_at:
                ask_at = time.monotonic() + _LOOK_SECONDS
                store.broker.check_all()
            while store.broker.poll():
                gevent.sleep(0)
        except StoreError as error:
            log.error("events are delayed: %s", error)
            gevent.sleep(_LOOK_SECONDS)
        except Exception:
            # Whatever it was: without this greenlet, no listener would ever hear anything again.
            log.exception("events are delayed")
            gevent.sleep(_LOOK_SECONDS)


def _send_pings(service: Service) -> None:
    """One timer for all streams of the worker."""
    while True:
        gevent.sleep(min(service.pings.run(), _PING_CHECK_SECONDS))


class _Listener:
    """Accepts connections on one listening socket."""

    def __init__(self, sock: socket.socket, dialect: str, service: Service, *, alone: bool) -> None:
        self._socket = sock
        self._dialect = dialect
        self._service = service
        self._each_turn = _ACCEPT_ALONE if alone else 1
        self._loop = get_hub().loop
        self._readable = self._loop.io(sock.fileno(), 1)
        self._readable.start(self._accept)
        self._timer: Any = None
        self._told = -_TELL_SECONDS
        self._round = self._rounds = 0

    def close(self) -> None:
        """Accept no more. What waits in the kernel's queue is for the workers that come after."""
        if self._timer is not None:
            self._timer.close()
        self._readable.close()

    def _accept(self) -> None:
        # Of what waits, some is for the other workers; unless they cannot keep up with it any more than this one.
        flood = self._is_flood()
        for _turn in range(_ACCEPT_MANY if flood else self._each_turn):
            try:
                # PERF: as gevent does; accept() asks the listening socket twice what it is (4 µs instead of 2).
                descriptor, _address = self._socket._accept()  # type: ignore[attr-defined]  # typeshed leaves it out
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                if time.monotonic() >= self._told + _TELL_SECONDS:
                    self._told = time.monotonic()
                    log.error("cannot accept: %s; raise LimitNOFILE= of the unit", error.strerror)
                # Whoever has most has one less when it goes on.
                self._service.shares.make_room(least=1)
                self._pause()
                return
            # PERF: the class beneath socket.socket, which it takes 0.6 µs more to make and to close.
            accepted = socket.SocketType(_UNIX, _STREAM, 0, descriptor)
            who = self._service.let_in(accepted, self._dialect, flood=flood)
            if who is not None:
                Connection(self._service, accepted, self._dialect, who).start()

    def _is_flood(self) -> bool:
        """Whether there has been something to accept in every turn of the loop for a while."""
        last, self._round = self._round, self._loop.iteration
        self._rounds = self._rounds + 1 if self._round == last + 1 else 0
        return self._rounds >= _FLOOD_ROUNDS

    def _pause(self) -> None:
        self._readable.stop()
        self._timer = self._loop.timer(_PAUSE_SECONDS)
        self._timer.start(partial(self._readable.start, self._accept))


class _Hooks:
    """gunicorn's pre_request, post_request and access log, for those who have set them."""

    def __init__(self, worker: GuestWorker) -> None:
        self._worker = worker
        self._pre = self._unless_default("pre_request")
        self._post = self._unless_default("post_request")
        self.wanted = bool(self._pre or self._post or worker.log.access_log_enabled)

    def _unless_default(self, name: str) -> Callable[..., object] | None:
        setting = self._worker.cfg.settings[name]
        return None if setting.get() is type(setting).default else setting.get()

    def call(self, answer: Answer) -> None:
        """Tell them of one answer. Both hooks run after it: the answer is already on its way."""
        request = _Request(answer)
        try:
            if self._pre:
                self._pre(self._worker, request)
            self._worker.log.access(answer, request, answer.environ, timedelta(seconds=answer.seconds))
            if self._post:
                self._post(self._worker, request, answer.environ, answer)
        except Exception:
            log.exception("a hook of gunicorn.conf.py failed")


class _Request:
    """What gunicorn's hooks and access log want to know of a request."""

    def __init__(self, answer: Answer) -> None:
        environ = answer.environ
        self.method = environ["REQUEST_METHOD"]
        self.uri = environ["RAW_URI"]
        self.path = environ["RAW_PATH"]
        self.query = environ["QUERY_STRING"]
        self.version = (1, int(environ["SERVER_PROTOCOL"][-1]))
        self.headers = [
            (name.removeprefix("HTTP_").replace("_", "-"), value)
            for name, value in environ.items()
            if name.startswith("HTTP_") or name in ("CONTENT_TYPE", "CONTENT_LENGTH")
        ]
