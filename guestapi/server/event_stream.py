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
#: Seconds that a client has to accept the last events when its stream is closed.
_LAST_SECONDS = 0.08
#: Seconds that the server waits for the client's close frame.
_CLOSE_SECONDS = 0.5


class StreamPeer(Protocol):
    """What a stream needs of its connection. `transport.Transport` implements it."""

    def send_within(self, seconds: float, data: bytes) -> None:
        """Send all of `data`; raises DeadlineError or OSError."""
        ...

    def wait_readable(self) -> None:
        """Wait for input, or until `wake` is called."""
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
                # Reading a batch takes milliseconds, so others proceed in between.
                self._peer.give_way()
            self._follow()
        except StoreError as error:
            log.error("an event stream ends: %s", error)
            if self._frames is not None:
                self._send(close_frame(CloseCode.INTERNAL_ERROR))
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
        while True:
            if self._subscription.overrun:
                return
            if self._subscription.closing is not None:
                self._finish(self._subscription.closing)
                return
            if self._ping_due and not self._send_ping():
                return
            events = self._subscription.pop()
            if events:
                self._send_events(events)
            elif self._subscription.closing is None:
                self._peer.wait_readable()
            if not self._process_input():
                return

    def _send_events(self, events: list[EncodedEvent]) -> None:
        with_id = self._subscription.with_id
        batch: list[bytes] = []
        size = 0
        for event in events:
            batch.append(event.encode(self._format, with_id=with_id))
            size += len(batch[-1])
            if size > _BATCH_BYTES:
                self._send(b"".join(batch))
                batch, size = [], 0
        if batch:
            self._send(b"".join(batch))

    def _send(self, data: bytes) -> None:
        self._sending = True
        try:
            self._peer.send_within(self._send_seconds, data)
        finally:
            self._sending = False

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
        # The client gets the events that came before the end, if it accepts them at once.
        self._send_seconds = _LAST_SECONDS
        self._send_events(self._subscription.pop())
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
