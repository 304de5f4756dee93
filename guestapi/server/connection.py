"""One connection, from accept to close: read a head, call the application, send the answer, and again.

Fair: before every read but its first a connection waits for its turn (`server/turns.py`), even if it knows that there
is more to read, so nobody is served twice while others are not served once. Bounded: every wait has a deadline.
"""

from __future__ import annotations

import io
import logging
import socket
import time
from typing import Any, cast

from guestapi.callers.credentials import Credentials, credentials
from guestapi.callers.identify import Caller
from guestapi.http.body import Body
from guestapi.http.errors import ProtocolError
from guestapi.http.request import Head, ends_head, is_too_large, parse_head, refuse_cut_line
from guestapi.http.response import date_line, error_response, response_end, response_fields
from guestapi.http.websocket import CloseCode
from guestapi.notifications.events import EventFormat
from guestapi.server.answer import Answer
from guestapi.server.channel import READ, Channel
from guestapi.server.repeats import Shelf
from guestapi.server.service import Service
from guestapi.server.stream import LateError, Stream
from guestapi.server.transfer import send_content
from guestapi.server.turns import LARGE
from guestapi.store.errors import StoreError
from guestapi.wsgi import (
    CALLER,
    DIALECT,
    HANDOVER,
    RAW_PATH,
    ChangedFileError,
    Content,
    Environ,
    Handover,
)

log = logging.getLogger(__name__)

#: How long, and how often, more is read from a client that is being refused (Go's net/http: 500 ms).
_LINGER_SECONDS, _LINGER_READS = 0.5, 32

_NOTHING = io.BytesIO()
#: The place among the turns of the worker's own connections: no instance has this id.
_OWN = 0


class Connection(Channel):
    """A connected socket and the greenlet that serves it."""

    __slots__ = ("_caller", "_dialect", "_in_head", "_place", "_service", "_shelf", "_stream", "_who")

    def __init__(self, service: Service, sock: socket.SocketType, dialect: str, who: Credentials | None) -> None:
        """Args:
        service: the worker's.
        sock: as accepted; belongs to this object from now on.
        dialect: of the listening socket.
        who: as `Service.let_in` says; None if the worker itself is at the other end, to see whether it answers: no
            guest's limit is its own.
        """
        super().__init__(sock, service.limits.send_seconds)
        self._who = who
        self._service = service
        self._dialect = dialect
        self._in_head = False
        self._place: int | None = None
        self._caller: Caller | None = None
        self._shelf: Shelf | None = None
        self._stream: Stream | None = None

    @property
    def idle(self) -> bool:
        """No part of a request has come that is not answered (`shares.Holder`)."""
        return self._in_head and not self._buffer

    def start(self) -> None:
        """Serve the connection in a greenlet of its own."""
        self._service.connections.add(self)
        self._service.crew.run(self._run)

    def finish(self, *, after_last_requests: bool) -> None:
        """The worker stops: a stream ends at once.

        A connection on which no whole request has come is left alone as long as clients may send their last one. After
        that, what may have arrived already is taken, and no more: who sends later gets EPIPE, so knows that it was
        not even read.
        """
        if self._stream is not None:
            self._stream.close(CloseCode.GOING_AWAY)
        elif self._in_head and after_last_requests:
            self.shut_down(socket.SHUT_RD)

    def _run(self) -> None:
        service = self._service
        self._in_head = True
        try:
            self._caller = caller = self._recognise()
            if caller is None:
                return
            self._enter(_OWN if self._who is None else caller.instance_id)
            excess = service.enter(caller.instance_id, self) if self._who is not None else None
            if excess is None:
                try:
                    self._serve(caller)
                finally:
                    service.shares.leave(caller.instance_id, self)
            else:
                self._refuse_uncounted(excess.status, excess.text, excess.limit)
        except LateError:
            pass  # Nothing to say: a client that is slow in asking is not waiting for an answer.
        except OSError as error:
            log.debug("connection lost: %s", error)
        except StoreError as error:
            log.error("%s", error)
            if self._turns is None:
                self._enter(None)
            self._refuse_uncounted(500, "temporarily unavailable, try again")
        except Exception:
            log.exception("unexpected error on a connection")
        finally:
            service.connections.discard(self)
            self.close()
            if self._turns is not None:
                service.places.leave(self._place)

    def _recognise(self) -> Caller | None:
        """Who has connected, as soon as it is the turn of that process; None if it asks nothing and is gone."""
        service, who = self._service, self._who
        if who is None:
            return service.identifier.identify(self._socket, credentials(self._socket))
        caller: Caller | None = None
        try:
            service.newcomers.take(who.pid)
            # Whoever asks at once is answered at once: no other turn is to be waited for, this is it.
            early = self.read_available(READ)
            if early == b"":
                return None
            self._buffer = early or b""
            caller = service.identifier.identify(self._socket, who)
        finally:
            service.door.go(who.pid, caller)
        # Whoever waits to be known has gone through the door, and keeps nobody out of it.
        return service.patience.wait(self._socket, caller) if service.patience else caller

    def _enter(self, place: int | None) -> None:
        self.attach(self._service.places.enter(place))
        self._place = place

    def _serve(self, caller: Caller) -> None:
        service = self._service
        idle_seconds = service.limits.idle_seconds
        self._shelf = service.repeats.shelf(caller, self._dialect)
        # Whether the process that connected was seen alive since a whole request had come.
        confirmed = False
        just_seen = bool(self._buffer)
        self.set_deadline(service.limits.head_seconds)
        if len(self._buffer) >= LARGE or not just_seen:
            self._take_turn()
        while True:
            try:
                if self._buffer and (service.requests is not None or service.unsent) and self._who is not None:
                    service.ask_limits(caller.instance_id)
                if self._repeat(caller, confirmed or just_seen):
                    confirmed = True
                    self.set_deadline(idle_seconds)
                    self._take_turn()
                    continue
                head = self._read_head()
                if head is None:
                    return
                if not confirmed:
                    confirmed = True
                    self._caller = caller = service.identifier.confirm(self._socket, caller)
                    if caller.instance_id is None:
                        self._shelf = None
                answered = self._respond(head, caller)
            except ProtocolError as error:
                self._refuse(error.status, str(error), error.limit)
                return
            if isinstance(answered, Handover):
                # Nothing of the request is kept for as long as the stream lasts.
                del head
                self._be_stream(answered)
                return
            if not answered:
                return
            self.set_deadline(idle_seconds)
            self._take_turn()

    def _take_turn(self) -> None:
        """Wait for the beginning of the next request, or for the client's end."""
        self._in_head = True
        if self._buffer:
            # A pipelined request waits its turn as if it came only now.
            self.give_way(len(self._buffer))
        else:
            self._buffer = self._receive_fairly()

    def _repeat(self, caller: Caller, confirmed: bool) -> bool:
        """Answer the request that was just received as it was answered before, if that still holds.

        Args:
            caller: who asks.
            confirmed: the process that connected was there when the request was; otherwise that is still to be seen.
        """
        shelf = self._shelf
        if shelf is None or caller.init is None:
            return False
        began = time.monotonic()
        repeat = shelf.find(self._buffer, caller.init)
        if repeat is None or self._service.stopping:
            return False
        if not confirmed and self._service.identifier.confirm(self._socket, caller) is not caller:
            return False
        self._buffer = b""
        self._in_head = False
        answer = repeat.answer
        # Others may be given the same answer while this client takes its time.
        instance = None if answer is None else shelf.instance
        self._send(repeat.whole(), b"")
        if answer is not None:
            answer.again(caller, instance, time.monotonic() - began)
            self._service.answered(answer)
            answer.forget()
        return True

    def _read_head(self) -> Head | None:
        """The next request's head, of which there is a beginning; None if the client has no more."""
        if not self._buffer:
            return None
        limits = self._service.limits
        head = parse_head(self._buffer, limits)
        if head is None:
            # The first bytes are there and the rest is not: from here on, time runs for the head.
            self.set_deadline(limits.head_seconds)
            while head is None:
                seen = len(self._buffer)
                try:
                    more = self._receive()
                except LateError:
                    if (refusal := refuse_cut_line(self._buffer)) is not None:
                        raise refusal from None
                    raise
                if not more:
                    raise refuse_cut_line(self._buffer) or ProtocolError(400, "the head is not complete")
                self._buffer += more
                # Look at it again only when it may be complete, or it is read as often as it has bytes.
                if ends_head(self._buffer, seen) or is_too_large(self._buffer, limits):
                    if len(self._buffer) >= LARGE:
                        self.give_way(len(self._buffer))
                    head = parse_head(self._buffer, limits)
        # What was received is all of the request, and no more: only so it can be compared with what is received later.
        head.alone = self._buffer if len(self._buffer) == head.size and head.length == 0 else None
        self._buffer = self._buffer[head.size :]
        self._in_head = False
        return head

    def _be_stream(self, handover: Handover) -> None:
        early, self._buffer = self._buffer, b""
        self._stream = Stream(self, handover, self._service.pings, self._service.limits.stream_send_seconds)
        try:
            if not (early and handover.event_format is EventFormat.WEBSOCKET):
                self._stream.run()
            # RFC 6455, section 4.1: a client sends no frame before it has the answer. As Incus, end without a word.
        finally:
            handover.subscription.cancel()

    def _respond(self, head: Head, caller: Caller) -> bool | Handover:
        """Answer one request; whether another may follow. Or what the connection is handed over to."""
        service = self._service
        began = time.monotonic()
        environ = cast("Environ", head.environ)
        environ.update(service.environ)
        environ[CALLER] = caller
        environ[DIALECT] = self._dialect
        body: Body | None = None
        if head.length == 0:
            environ["wsgi.input"] = _NOTHING
        else:
            if head.length is not None and head.length > service.limits.body:
                raise ProtocolError(413, f"the body is larger than {service.limits.body} bytes")
            self.set_deadline(service.limits.body_seconds)
            environ["wsgi.input"] = body = Body(self, head.length, service.limits.body, head.expects)
        status, headers = "200 OK", [("Content-Length", "0")]
        content: bytes | Content = b""
        if environ[RAW_PATH] != "*":
            status, headers, content = self._call(environ)
        try:
            return self._answer(head, caller, body, status, headers, content, began)
        finally:
            if isinstance(content, Content):
                content.close()

    def _answer(
        self,
        head: Head,
        caller: Caller,
        body: Body | None,
        status: str,
        headers: list[tuple[str, str]],
        content: bytes | Content,
        began: float,
    ) -> bool | Handover:
        """Send what the application said, once the request's body is done with; returns as `_respond`."""
        service, environ = self._service, cast("Environ", head.environ)
        handover: Handover | None = environ.pop(HANDOVER, None)
        if handover is not None:
            answer = Answer(environ, caller, self._dialect, handover.status, [], 0, time.monotonic() - began)
            service.answered(answer)
            return handover
        # CONNECT would make a tunnel of the connection (RFC 9110, section 9.3.6): whatever follows is no request.
        close = not head.keep_alive or service.stopping or environ["REQUEST_METHOD"] == "CONNECT"
        if body is not None:
            if body.failure is not None:
                # The application has seen only a part of it, so its answer is none.
                raise body.failure
            close = close or not self._pass_over(body)
        protocol = environ["SERVER_PROTOCOL"]
        fields = response_fields(status, headers, protocol)
        end = response_end(protocol, close=close)
        prefix = b"".join((fields, date_line(), end))
        if isinstance(content, Content):
            self._send_content(prefix, content)
            sent = content.length
        else:
            self._send(prefix, content)
            sent = len(content)
        answer = Answer(environ, caller, self._dialect, status, headers, sent, time.monotonic() - began)
        service.answered(answer)
        if head.alone is not None and self._shelf is not None and isinstance(content, bytes) and not close:
            service.repeats.keep(self._shelf, head.alone, answer, fields, end + content)
        return not close

    def _pass_over(self, body: Body) -> bool:
        """Read what the application has left of a body; whether a request may follow it."""
        if body.untouched:
            return False
        try:
            body.drain()
        except ProtocolError:
            # The answer did not depend on it.
            return False
        return True

    def _call(self, environ: Environ) -> tuple[str, list[tuple[str, str]], bytes | Content]:
        """What the application says, all of it: nothing is sent before it is known to be whole, or its length is."""
        started: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], _exc_info: object = None) -> None:
            started[:] = status, headers

        chunks = self._service.application(environ, start_response)
        if isinstance(chunks, Content):
            return started[0], started[1], chunks
        content = chunks[0] if isinstance(chunks, list) and len(chunks) == 1 else b"".join(chunks)
        return started[0], started[1], content

    def _send_content(self, prefix: bytes, content: Content) -> None:
        """Send what has files in it; each time that the client takes some of it, it has ``send_seconds`` again."""
        seconds = self._service.limits.send_seconds
        self._send(prefix, b"")
        try:
            send_content(self, content, seconds, self._service.disk.apply)
        except ChangedFileError as error:
            # The head is sent. That the end is missing tells the client that it has nothing.
            log.error("%s", error)
            raise

    def _send_rest(self, head: bytes, content: memoryview, seconds: float) -> None:
        """As in the class above; what the client does not take at once is held against its instance."""
        instance_id = self._caller.instance_id if self._caller else None
        size = len(head) + len(content)
        self._service.wait_for(instance_id, size)
        try:
            super()._send_rest(head, content, seconds)
        finally:
            self._service.wait_for(instance_id, -size)

    def _refuse_uncounted(self, status: int, text: str, limit: str | None = None) -> None:
        """As `_refuse`, for a connection that is not counted as one of its instance: only some of those may linger."""
        instance_id = self._caller.instance_id if self._caller else None
        lingers = self._service.shares.linger(instance_id)
        try:
            self._refuse(status, text, limit, linger=lingers)
        finally:
            if lingers:
                self._service.shares.lingered(instance_id)

    def _refuse(self, status: int, text: str, limit: str | None = None, *, linger: bool = True) -> None:
        """Answer what cannot be served; the connection ends after it."""
        self._service.refused(self._caller, self._dialect, status, text, limit)
        try:
            self._send(error_response(status, text, retry_after=status == 429), b"")
            # The client may be sending still, and must not find the socket closed, or closed with unread bytes in it,
            # before it has seen the answer: read on to its end, but not for long.
            self.shut_down(socket.SHUT_WR)
            self.set_deadline(_LINGER_SECONDS)
            for _read in range(_LINGER_READS if linger else 0):
                if not self._receive():
                    break
        except (OSError, LateError):
            pass  # It does not wait for the answer.
