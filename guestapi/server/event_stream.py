"""A connection that was handed over: it sends the events of a subscription until either side ends it."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from typing import Protocol

from guestapi.http.response import stream_head
from guestapi.http.websocket import LONGEST_FRAME, ClientFrames, CloseCode, Opcode, close_frame, frame
from guestapi.notifications.events import EncodedEvent, EventFormat
from guestapi.server.transport import DeadlineError
from guestapi.store.errors import StoreError
from guestapi.wsgi import Handover

log = logging.getLogger(__name__)

#: Seconds between two pings, as with Incus.
PING_SECONDS = 10.0
#: How many pings may stay unanswered, as with Incus.
_MOST_UNANSWERED = 3
_PING = frame(Opcode.PING, b"keepalive")
#: A comment, which clients skip (html.spec.whatwg.org, "Parsing an event stream").
_COMMENT = b":\n\n"

#: About how many bytes of events are sent at a time.
_BATCH_BYTES = 65536


class _LostEntryError(Exception):
    """The log does not have the rest of an event any more."""


#: Seconds that a client has to accept the last events when its stream is closed.
_LAST_SECONDS = 0.08
#: Seconds that the server waits for the client's close frame.
_CLOSE_SECONDS = 0.5


class StreamPeer(Protocol):
    """What a stream needs of its connection. `transport.Transport` implements it."""

    def send(self, head: bytes, content: bytes = b"", seconds: float | None = None) -> None:
        """Send all of both within so many seconds; raises DeadlineError or OSError."""
        ...

    def wait_readable(self) -> bool:
        """Wait for input, or until `wake` is called; return whether there is input."""
        ...

    def wake(self) -> None:
        """End `wait_readable`."""
        ...

    def read_available(self, size: int) -> bytes | None:
        """Read input without waiting; b"" at its end, None if there is none."""
        ...

    def receive_within(self, seconds: float, size: int) -> bytes:
        """Wait for input; b"" at its end; raises DeadlineError."""
        ...

    def hurry(self, seconds: float) -> None:
        """Move the deadline of what is being sent, if it is later."""
        ...

    def give_way(self) -> None:
        """Let other connections proceed."""
        ...

    def abort(self) -> None:
        """Shut the connection down, whatever its greenlet is doing."""
        ...


class EventStream:
    """The stream of events of one client."""

    def __init__(self, peer: StreamPeer, handover: Handover, pings: PingTimer, send_seconds: float) -> None:
        """Prepare a stream; `run` begins it.

        Args:
            peer: the connection.
            handover: what the application handed over.
            pings: tells the stream when to send a ping.
            send_seconds: how long the client has to accept what is sent.
        """
        self._peer = peer
        self._subscription = handover.subscription
        self._format = handover.event_format
        self._pings = pings
        self._send_seconds = send_seconds
        self._head = stream_head(handover.status, handover.headers)
        self._frames = ClientFrames() if handover.event_format is EventFormat.WEBSOCKET else None
        self._unanswered = 0
        self._ping_due = False
        self._sending = False
        #: Until when the parts of large events must be sent, because the stream ends.
        self._until: float | None = None
        #: A part of an event was sent, but not the end of it. Nothing else can be sent then.
        self._is_cut = False

    def run(self) -> None:
        """Send events until the stream ends."""
        self._subscription.wake = self._on_wake
        # The first ping follows the head.
        self._send(self._head + (_PING if self._frames else b""))
        self._head = b""
        if self._format is not EventFormat.LINES:
            self._unanswered = 1
            self._pings.add(self)
        try:
            for events in self._subscription.missed():
                self._send_events(events)
                if not self._process_input():
                    return
                if self._subscription.overrun or self._subscription.closing is not None:
                    break
                # Reading a batch takes time, so others proceed in between.
                self._peer.give_way()
            self._follow()
        except StoreError as error:
            log.error("an event stream ends: %s", error)
            self._send_close(CloseCode.INTERNAL_ERROR)
        except _LostEntryError:
            self._send_close(CloseCode.TRY_AGAIN_LATER)
        except DeadlineError:
            pass  # The client does not accept the events that it asked for.
        finally:
            self._pings.remove(self)

    def close(self, code: int) -> None:
        """End the stream; a WebSocket gets this `CloseCode`."""
        self._subscription.close(code)

    def ping(self) -> None:
        """Send a ping soon."""
        self._ping_due = True
        self._peer.wake()

    def _follow(self) -> None:
        has_waited = False
        while True:
            if self._subscription.overrun:
                return
            if self._subscription.closing is not None:
                self._finish(self._subscription.closing)
                return
            if self._ping_due and not self._send_ping():
                return
            has_input = True
            events = self._subscription.pop(_BATCH_BYTES)
            if events:
                self._send_events(events)
                # PERF: input that has come meanwhile ends the next wait. Only a stream without waits has to look.
                has_input, has_waited = not has_waited, False
            elif self._subscription.closing is None:
                has_input, has_waited = self._peer.wait_readable(), True
            if has_input and not self._process_input():
                return

    def _send_events(self, events: list[EncodedEvent]) -> None:
        with_id = self._subscription.with_id
        if len(events) == 1 and not events[0].left_out:
            # PERF: as a rule.
            self._send(b"", events.pop().encode(self._format, with_id=with_id))
            return
        batch: list[bytes] = []
        size = 0
        # What is sent is freed: the client may take its time for the rest.
        events.reverse()
        while events:
            event = events.pop()
            if not event.left_out:
                batch.append(event.encode(self._format, with_id=with_id))
                size += len(batch[-1])
            if batch and (event.left_out or size > _BATCH_BYTES or not events):
                data, batch, size = b"".join(batch), [], 0
                self._send(b"", data)
                del data
            if event.left_out:
                self._send_large(event, with_id=with_id)

    def _send_large(self, event: EncodedEvent, *, with_id: bool) -> None:
        """Send an event part by part. Each part is read when the client has taken the one before, in a turn of its own.

        Raises:
            _LostEntryError: the log does not have all of it any more.
        """
        before, after = event.around(self._format, with_id=with_id)
        sent = 0
        while sent < event.left_out:
            self._peer.give_way()
            if self._subscription.overrun or not self._has_time():
                raise DeadlineError
            part = self._subscription.read_part(event, sent)
            if not part:
                raise _LostEntryError
            self._is_cut = True
            self._send(before, part)
            sent += len(part)
            before = b""
        self._send(after)
        self._is_cut = False

    def _has_time(self) -> bool:
        """Whether there is time for another part of a large event: always, unless the stream must end."""
        if self._subscription.closing is None:
            return True
        now = time.monotonic()
        if self._until is None:
            self._until = now + _LAST_SECONDS
        return now < self._until

    def _send(self, head: bytes, content: bytes = b"") -> None:
        self._sending = True
        # A client gets the events that came before the end of its stream, if it accepts them at once.
        seconds = self._send_seconds if self._subscription.closing is None else _LAST_SECONDS
        try:
            self._peer.send(head, content, seconds)
        finally:
            self._sending = False

    def _send_close(self, code: int) -> None:
        if self._frames is not None and not self._is_cut:
            self._send(close_frame(code))

    def _send_ping(self) -> bool:
        """Send a ping; return False if the client left too many unanswered."""
        self._ping_due = False
        if self._frames is not None and self._unanswered >= _MOST_UNANSWERED:
            return False
        self._unanswered += 1
        self._send(_PING if self._frames else _COMMENT)
        return True

    def _process_input(self) -> bool:
        """Process what the client has sent, without waiting; return whether the stream continues."""
        data = self._peer.read_available(LONGEST_FRAME)
        if data is None:
            return True
        if not data or self._frames is None:
            return False
        reaction = self._frames.feed(data)
        if reaction.pong:
            self._unanswered = 0
        if reaction.reply:
            self._send(reaction.reply)
        return not reaction.ended

    def _finish(self, code: int) -> None:
        while events := self._subscription.pop(_BATCH_BYTES):
            self._send_events(events)
        if self._frames is None:
            return
        self._send(close_frame(code))
        # RFC 6455, section 7.1.1: the client answers with a close frame, and must not find the socket closed before.
        until = time.monotonic() + _CLOSE_SECONDS
        while (left := until - time.monotonic()) > 0:
            data = self._peer.receive_within(left, LONGEST_FRAME)
            if not data or self._frames.feed(data).ended:
                return

    def _on_wake(self) -> None:
        """The subscription has events, or has to end."""
        if self._sending and self._subscription.overrun:
            # The client blocks it, so it would not notice.
            self._peer.abort()
        elif self._sending and self._subscription.closing is not None:
            # The client may block it. What is being sent gets a little time, so that the close frame can follow.
            self._peer.hurry(_LAST_SECONDS)
        else:
            self._peer.wake()


class PingTimer:
    """When each stream has to send a ping. The interval is the same for all, so they are due in order of arrival."""

    def __init__(self) -> None:
        self._due: OrderedDict[EventStream, float] = OrderedDict()

    def add(self, stream: EventStream) -> None:
        """Have the stream send a ping every `PING_SECONDS`."""
        self._due[stream] = time.monotonic() + PING_SECONDS

    def remove(self, stream: EventStream) -> None:
        """Have the stream send no more pings."""
        self._due.pop(stream, None)

    def run(self) -> float:
        """Have the streams that are due send a ping.

        Returns:
            Seconds until the next stream is due.
        """
        now = time.monotonic()
        while self._due:
            stream, due = next(iter(self._due.items()))
            if due > now:
                return due - now
            self._due[stream] = now + PING_SECONDS
            self._due.move_to_end(stream)
            stream.ping()
        return PING_SECONDS
