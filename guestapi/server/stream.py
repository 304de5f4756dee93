"""A connection that was handed over: sends what its listener hears, until either side ends it."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from typing import Protocol

from guestapi.http.response import stream_head
from guestapi.http.websocket import LONGEST_FRAME, ClientFrames, CloseCode, Opcode, close_frame, frame
from guestapi.notifications.events import EncodedEvent, EventFormat
from guestapi.server.turns import LARGE
from guestapi.store.errors import StoreError
from guestapi.wsgi import Handover

log = logging.getLogger(__name__)

#: Seconds between two pings, and how many may stay unanswered: as Incus.
PING_SECONDS = 10.0
_UNANSWERED = 3
_PING = frame(Opcode.PING, b"keepalive")
#: A comment, which clients skip (html.spec.whatwg.org, "Parsing an event stream").
_COMMENT = b":\n\n"

#: How many bytes of events are sent at a time.
_BATCH = 65536
#: Seconds that a client has to take what is left when its stream is ended, and then to say goodbye itself.
_LAST_SECONDS = 0.08
_GOODBYE_SECONDS = 0.5


class LateError(Exception):
    """A deadline has passed."""


class Peer(Protocol):
    """The connection, as a stream needs it: `connection.Connection`."""

    def send_within(self, seconds: float, data: bytes) -> None:
        """Send all; raises LateError, or OSError."""
        ...

    def wait_readable(self) -> None:
        """Wait until the client has sent something, or `wake` is called."""
        ...

    def wake(self) -> None:
        """End `wait_readable`."""
        ...

    def read_available(self, size: int) -> bytes | None:
        """What the client has sent; b"" at its end, None if there is nothing."""
        ...

    def receive_within(self, seconds: float, size: int) -> bytes:
        """What the client sends next; b"" at its end; raises LateError."""
        ...

    def hurry(self, seconds: float) -> None:
        """Give what is being sent so long, and no longer."""
        ...

    def give_way(self, size: int = 0) -> None:
        """Let others have their turn before so many bytes are looked at."""
        ...

    def abort(self) -> None:
        """Shut the connection, whatever it is doing."""
        ...


class Stream:
    """One client's stream of events."""

    def __init__(self, peer: Peer, handover: Handover, pings: Pings, send_seconds: float) -> None:
        self._peer = peer
        self._subscription = handover.subscription
        self._format = handover.event_format
        self._pings = pings
        self._seconds = send_seconds
        self._head = stream_head(handover.status, handover.headers)
        self._frames = ClientFrames() if handover.event_format is EventFormat.WEBSOCKET else None
        self._unanswered = 0
        self._ping_due = False
        self._sending = False

    def run(self) -> None:
        """Send what there is until the stream ends."""
        self._subscription.wake = self._on_news
        # The first ping leaves with the head.
        self._send(self._head + (_PING if self._frames else b""))
        self._head = b""
        if self._format is not EventFormat.LINES:
            self._unanswered = 1
            self._pings.add(self)
        try:
            for events in self._subscription.missed():
                self._send_events(events)
                if not self._listen():
                    return
                if self._subscription.overrun or self._subscription.closing is not None:
                    break
                # However much was missed, others have their turn; a batch takes milliseconds to read.
                self._peer.give_way(LARGE)
            self._follow()
        except StoreError as error:
            log.error("an event stream ends: %s", error)
            if self._frames is not None:
                self._send(close_frame(CloseCode.INTERNAL_ERROR))
        except LateError:
            pass  # It does not take what it has asked for.
        finally:
            self._pings.remove(self)

    def close(self, code: int) -> None:
        """End the stream, with this close code if it is a WebSocket."""
        self._subscription.close(code)

    def ping(self) -> None:
        """It is time for a ping."""
        self._ping_due = True
        self._peer.wake()

    def _follow(self) -> None:
        while True:
            if self._subscription.overrun:
                return
            if self._subscription.closing is not None:
                self._say_goodbye(self._subscription.closing)
                return
            if self._ping_due and not self._send_ping():
                return
            events = self._subscription.pop()
            if events:
                self._send_events(events)
            elif self._subscription.closing is None:
                self._peer.wait_readable()
            if not self._listen():
                return

    def _send_events(self, events: list[EncodedEvent]) -> None:
        with_id = self._subscription.with_id
        batch: list[bytes] = []
        size = 0
        for event in events:
            batch.append(event.encode(self._format, with_id=with_id))
            size += len(batch[-1])
            if size > _BATCH:
                self._send(b"".join(batch))
                batch, size = [], 0
        if batch:
            self._send(b"".join(batch))

    def _send(self, data: bytes) -> None:
        self._sending = True
        try:
            self._peer.send_within(self._seconds, data)
        finally:
            self._sending = False

    def _send_ping(self) -> bool:
        self._ping_due = False
        if self._frames is not None and self._unanswered >= _UNANSWERED:
            return False
        self._unanswered += 1
        self._send(_PING if self._frames else _COMMENT)
        return True

    def _listen(self) -> bool:
        """Take what the client has sent, without waiting; whether the stream goes on."""
        data = self._peer.read_available(LONGEST_FRAME)
        if data is None:
            return True
        if not data or self._frames is None:
            return False
        heard = self._frames.feed(data)
        if heard.pong:
            self._unanswered = 0
        if heard.reply:
            self._send(heard.reply)
        return not heard.ended

    def _say_goodbye(self, code: int) -> None:
        # What came before the end is told, as far as the client takes it at once.
        self._seconds = _LAST_SECONDS
        self._send_events(self._subscription.pop())
        if self._frames is None:
            return
        self._send(close_frame(code))
        # RFC 6455, section 7.1.1: the client answers with a close frame of its own, and would find nobody there.
        until = time.monotonic() + _GOODBYE_SECONDS
        while (left := until - time.monotonic()) > 0:
            data = self._peer.receive_within(left, LONGEST_FRAME)
            if not data or self._frames.feed(data).ended:
                return

    def _on_news(self) -> None:
        """The listener has something, or is to be ended."""
        if self._sending and self._subscription.overrun:
            # It is stuck, and will not get to it.
            self._peer.abort()
        elif self._sending and self._subscription.closing is not None:
            # It may be stuck. What is under way is finished, if that is quick, so that the close code can follow.
            self._peer.hurry(_LAST_SECONDS)
        else:
            self._peer.wake()


class Pings:
    """Which stream is to send a ping when. All wait equally long, so they are due in the order in which they came."""

    def __init__(self) -> None:
        self._due: OrderedDict[Stream, float] = OrderedDict()

    def add(self, stream: Stream) -> None:
        """Have the stream send one when it is time, and again and again."""
        self._due[stream] = time.monotonic() + PING_SECONDS

    def remove(self, stream: Stream) -> None:
        """No more."""
        self._due.pop(stream, None)

    def run(self) -> float:
        """Have those send one for which it is time; the seconds until the next."""
        now = time.monotonic()
        while self._due:
            stream, due = next(iter(self._due.items()))
            if due > now:
                return due - now
            self._due[stream] = now + PING_SECONDS
            self._due.move_to_end(stream)
            stream.ping()
        return PING_SECONDS
