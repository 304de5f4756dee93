"""One connection, from accept to close: identify the caller, read a head, call the application, send the response.

Fair: before every read but the first, a connection waits for its turn (`server.scheduler`), even if more input is there
already. So no connection is served twice while others wait. Bounded: every wait has a deadline.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from enum import Enum
from functools import partial

from guestapi.callers.credentials import Credentials, credentials
from guestapi.callers.identify import Caller, ContainerLook, LiveMachine
from guestapi.dialects import DIALECTS
from guestapi.http.errors import ProtocolError
from guestapi.http.request import Head, ends_head, is_too_large, parse_head, refuse_cut_line
from guestapi.http.websocket import CloseCode
from guestapi.metrics.counters import MEASURED
from guestapi.notifications.events import EventFormat
from guestapi.notifications.waiting import Waiter
from guestapi.server.answer import answer
from guestapi.server.context import WorkerContext
from guestapi.server.event_stream import EventStream
from guestapi.server.long_poll import wait_for_change
from guestapi.server.refusal import refuse, refuse_uncounted
from guestapi.server.response_cache import CallerCache
from guestapi.server.transport import DeadlineError, Transport
from guestapi.store.errors import StoreError
from guestapi.wsgi import JUST_IDENTIFIED, WAITED, Handover

log = logging.getLogger(__name__)

#: The scheduler's id for the worker's own probes. No instance has it.
_PROBE_ID = 0


class ConnectionState(Enum):
    """What a connection does."""

    #: Its caller is not known yet.
    IDENTIFYING = "identifying"
    #: It waits for the first byte of a request.
    IDLE = "idle"
    #: A part of a head was received.
    READING = "reading"
    #: A request is being answered.
    RESPONDING = "responding"
    #: A request waits for a change.
    WAITING = "waiting"
    #: It is a stream of events.
    STREAMING = "streaming"


#: PERF: the members by names of the module, because an enumeration looks its members up slowly (0.1 µs each).
_IDENTIFYING, _IDLE, _READING = ConnectionState.IDENTIFYING, ConnectionState.IDLE, ConnectionState.READING
_RESPONDING, _STREAMING = ConnectionState.RESPONDING, ConnectionState.STREAMING
_WAITING = ConnectionState.WAITING


class Connection:
    """A connected socket and its conversation."""

    __slots__ = (
        "_cache",
        "_caller",
        "_context",
        "_credentials",
        "_dialect",
        "_find_container",
        "_scheduled",
        "_state",
        "_stream",
        "_transport",
        "_waiter",
    )

    def __init__(
        self,
        context: WorkerContext,
        sock: socket.SocketType,
        dialect: str,
        peer: Credentials | None,
        find_container: Callable[[], int] | None = None,
    ) -> None:
        """Take ownership of an accepted socket.

        Args:
            context: the worker's.
            sock: as accepted.
            dialect: name of the listening socket's dialect.
            peer: the process that connected, counted as pending. None for the worker's own probe, to which no limit
                applies.
            find_container: returns the number of the peer's container; None: it is looked for.
        """
        self._context = context
        self._transport = Transport(sock, context.limits.send_seconds)
        self._dialect = dialect
        self._credentials = peer
        self._find_container = find_container
        self._state: ConnectionState = _IDENTIFYING
        self._caller: Caller | None = None
        self._cache: CallerCache | None = None
        self._stream: EventStream | None = None
        self._waiter: Waiter | None = None
        #: The id under which it has entered the scheduler.
        self._scheduled: int | None = None

    @property
    def idle(self) -> bool:
        """Whether it has no unanswered request, not even a part of one (`admission.EvictableConnection`)."""
        return self._state is _IDLE

    def start(self) -> None:
        """Serve the connection in a greenlet, when it is its container's turn to be identified."""
        context, peer = self._context, self._credentials
        context.connections.add(self)
        if peer is None:
            context.greenlets.run(self._run)
            return
        find_container = self._find_container or ContainerLook(context.identifier, self._transport.sock, peer)
        context.arrivals.add(peer.pid, peer.uid, find_container, partial(context.greenlets.run_now, self._run))

    def finish(self, *, after_last_requests: bool) -> None:
        """End the connection because the worker stops. A stream or a wait ends at once, a response is completed.

        Args:
            after_last_requests: whether clients have had their time to send a last request. Then input that has arrived
                is still read, but no more: a client that sends later gets EPIPE, so it knows that nobody read it.
        """
        if self._stream is not None:
            self._stream.close(CloseCode.GOING_AWAY)
        elif self._waiter is not None:
            self._waiter.finish()
        elif after_last_requests and self._state is not _RESPONDING:
            self._transport.shut_down(socket.SHUT_RD)

    def abort(self) -> None:
        """End the connection at once."""
        self._transport.abort()

    def _run(self) -> None:
        context, transport = self._context, self._transport
        try:
            self._caller = caller = self._identify()
            if caller is None:
                return
            if isinstance(caller.init, LiveMachine):
                transport.guard = caller.init.check
            transport.on_backlog = partial(context.admission.add_unsent, caller.instance_id, root=caller.is_root)
            if self._credentials is None:
                self._enter_scheduler(_PROBE_ID)
                self._serve(caller)
                return
            self._enter_scheduler(caller.instance_id)
            root = caller.is_root or caller.instance_id is None
            rejection = context.admission.add(caller.instance_id, self, transport.fileno(), root=root)
            if rejection is not None:
                refuse_uncounted(
                    context, transport, caller, self._dialect, rejection.status, rejection.text, rejection.limit
                )
                return
            try:
                self._serve(caller)
            finally:
                context.admission.quota.remove(caller.instance_id, self)
        except DeadlineError:
            pass  # A client that is slow to send does not wait for an answer.
        except OSError as error:
            log.debug("connection lost: %s", error)
        except StoreError as error:
            log.error("%s", error)
            if not transport.attached:
                self._enter_scheduler(None)
            refuse_uncounted(context, transport, self._caller, self._dialect, 500, "temporarily unavailable, try again")
        except Exception:
            log.exception("unexpected error on a connection")
        finally:
            context.connections.discard(self)
            transport.close()
            if transport.attached:
                context.scheduler.leave(self._scheduled)

    def _identify(self) -> Caller | None:
        """Identify the caller; None if it has gone without a request."""
        context, peer, sock = self._context, self._credentials, self._transport.sock
        if peer is None:
            return context.identifier.identify(sock, credentials(sock))
        caller: Caller | None = None
        try:
            # A request that is here already is answered in this very turn.
            if self._transport.receive_now() == 0:
                return None
            caller = context.identifier.identify(sock, peer)
        finally:
            context.admission.pending.remove(peer.pid, caller)
        # A caller that waits to be registered is not pending any more, so it keeps no other connection out.
        return context.retry.wait(sock, caller) if context.retry else caller

    def _enter_scheduler(self, instance_id: int | None) -> None:
        self._transport.attach(self._context.scheduler.enter(instance_id))
        self._scheduled = instance_id

    def _serve(self, caller: Caller) -> None:
        context, transport = self._context, self._transport
        limits = context.limits_of[self._dialect]
        idle_seconds = limits.idle_seconds
        admission = None if self._credentials is None else context.admission
        self._cache = context.cache.of(caller, self._dialect)
        # Whether the process that connected was seen alive after a whole request had come.
        confirmed = False
        root = caller.is_root
        just_identified = late = bool(transport.received)
        transport.set_deadline(limits.head_seconds)
        if just_identified:
            self._state = _READING
        else:
            self._wait_for_request()
        while True:
            try:
                if not transport.received:
                    return
                # PERF: mostly there is nothing to check.
                if admission is not None and (admission.counts_requests or admission.unsent):
                    admission.check_request(caller.instance_id, root=root)
                if self._send_cached(caller, confirmed, just_identified=just_identified and not confirmed):
                    confirmed = True
                    transport.set_deadline(idle_seconds)
                    self._wait_for_request(late=late)
                    late = False
                    continue
                head, has_waited = self._read_head()
                if not confirmed:
                    confirmed = True
                    # PERF: who was identified after the head had come needs no second look.
                    if has_waited or not just_identified:
                        self._caller = caller = context.identifier.confirm(transport.sock, caller)
                        if caller.instance_id is None:
                            self._cache = None
                    else:
                        head.environ[JUST_IDENTIFIED] = True
                outcome = self._answer(head, caller)
                if isinstance(outcome, Waiter):
                    raw = head.raw
                    # Free what else belongs to the request: it may wait for a minute.
                    del head
                    outcome = self._wait(outcome, raw, caller)
            except ProtocolError as error:
                # Its traceback refers to the frames below, and so to a large response that is not sent after all. The
                # refused client may stay for a while.
                error.__traceback__ = None
                refuse(context, transport, self._caller, self._dialect, error.status, str(error), error.limit)
                return
            if isinstance(outcome, Handover):
                # Free what belongs to the request: the stream may last for days.
                del head
                self._run_stream(outcome)
                return
            if not outcome:
                return
            transport.set_deadline(idle_seconds)
            self._wait_for_request(late=late)
            late = False

    def _wait_for_request(self, *, late: bool = False) -> None:
        """Wait for the begin of the next request, or for the end of the input.

        Args:
            late: whether the client is expected to close the connection.
        """
        transport = self._transport
        if transport.received:
            # A pipelined request waits for its turn as if it came only now.
            self._state = _READING
            transport.give_way()
            return
        self._state = _IDLE
        if late:
            transport.receive_late(self._context.late_looks)
        else:
            transport.receive()
        self._state = _READING

    def _send_cached(self, caller: Caller, confirmed: bool, *, just_identified: bool) -> bool:
        """Answer the request in `received` from the cache; return False if that is not possible.

        Args:
            caller: who asks.
            confirmed: whether the process that connected was there when the request came. If not, it is confirmed now.
            just_identified: whether it was identified after the request had come, in this very turn.
        """
        cache = self._cache
        if cache is None or caller.init is None:
            return False
        context, transport = self._context, self._transport
        cached = cache.get(transport.received, caller.init, just_identified=just_identified)
        if cached is None or context.stopping:
            return False
        if not (confirmed or just_identified) and context.identifier.confirm(transport.sock, caller) is not caller:
            return False
        transport.discard()
        self._state = _RESPONDING
        exchange = cached.exchange
        cached.hits = hits = cached.hits + 1
        measured = not hits % MEASURED
        if exchange is None and not measured:
            # PERF: as a rule. Reading the clock twice takes as long as all else that counts a response.
            transport.send(cached.to_bytes())
            return True
        # Another caller may get the same response while this client is slow to accept it.
        instance = None if exchange is None else cache.instance
        began = time.monotonic()
        transport.send(cached.to_bytes())
        seconds = time.monotonic() - began
        if measured:
            cached.durations.measure(seconds, MEASURED)
        if exchange is not None:
            exchange.repeat(caller, instance, seconds)
            context.on_exchange(exchange)
            exchange.detach()
        return True

    def _read_head(self) -> tuple[Head, bool]:
        """Read the next request's head, of which a part was received.

        Returns:
            The head, and whether a part of it had to be waited for.

        Raises:
            ProtocolError: it is not a request, or a part of one that will not be completed.
            DeadlineError: it is not complete in time.
        """
        context, transport = self._context, self._transport
        # PERF: what most guests send is known.
        head = context.known_heads.get(transport.received)
        if head is not None:
            received = transport.discard()
            head.alone = received if head.length == 0 else None
            self._state = _RESPONDING
            return head, False
        limits, known = context.limits_of[self._dialect], context.known_fields
        asterisk = DIALECTS[self._dialect].redirect.covers_all
        head = parse_head(transport.received, limits, asterisk=asterisk, known=known)
        has_waited = head is None
        if head is None:
            # From the first bytes on, the client has a limited time for the rest.
            transport.set_deadline(limits.head_seconds)
            while head is None:
                seen = len(transport.received)
                try:
                    size = transport.receive()
                except DeadlineError:
                    if (refusal := refuse_cut_line(transport.received)) is not None:
                        raise refusal from None
                    raise
                if not size:
                    raise refuse_cut_line(transport.received) or ProtocolError(400, "the head is not complete")
                received = transport.received
                # Parse again only when the head may be complete. Otherwise it would be parsed once for each byte.
                if ends_head(received, seen) or is_too_large(received, limits):
                    head = parse_head(received, limits, asterisk=asterisk, known=known)
        # Only a request that was received alone can be compared with what is received later.
        head.alone = transport.received if len(transport.received) == head.size and head.length == 0 else None
        transport.consume(head.size)
        context.known_heads.add(head)
        self._state = _RESPONDING
        return head, has_waited

    def _run_stream(self, handover: Handover) -> None:
        transport = self._transport
        early = transport.discard()
        self._stream = EventStream(transport, handover, self._context.pings, self._context.limits.stream_send_seconds)
        self._state = _STREAMING
        try:
            # RFC 6455, section 4.1: a client sends no frame before it has the response. As Incus, end without a word.
            if not (early and handover.event_format is EventFormat.WEBSOCKET):
                self._stream.run()
        finally:
            handover.subscription.cancel()

    def _answer(self, head: Head, caller: Caller, began: float | None = None) -> bool | Handover | Waiter:
        """As `answer.answer`."""
        limited = self._credentials is not None
        return answer(
            self._context, self._transport, head, caller, self._dialect, self._cache, limited=limited, began=began
        )

    def _wait(self, waiter: Waiter, raw: bytes, caller: Caller) -> bool:
        """Answer a request when there is something to answer; return whether another one may follow."""
        self._waiter = waiter
        began = time.monotonic()
        try:
            while True:
                self._state = _WAITING
                if not wait_for_change(self._transport, waiter):
                    return False
                self._state = _RESPONDING
                head = parse_head(raw, self._context.limits)
                assert head is not None, "parsed before"
                head.environ[WAITED] = waiter
                outcome = self._answer(head, caller, began)
                del head
                if not isinstance(outcome, Waiter):
                    return outcome is True
        finally:
            self._waiter = None
            waiter.cancel()
