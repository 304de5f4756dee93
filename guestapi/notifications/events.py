"""How an event is written. It is encoded once for a worker, whatever the number of subscriptions.

Plain clients read exactly ``{"type":...,"timestamp":...,"metadata":...}`` and LF. Clients that resume also read an
``id``, after which they can resume again.
"""

from __future__ import annotations

from enum import Enum
from functools import cached_property

from guestapi.encoding import to_json
from guestapi.http.websocket import Opcode, frame
from guestapi.model import Notification
from guestapi.store.changes import key_of, timestamp
from guestapi.store.transaction import blank_metadata


class EventFormat(Enum):
    """How the events of a stream are framed."""

    WEBSOCKET = "websocket"
    LINES = "lines"
    SERVER_SENT = "server-sent"


class EncodedEvent:
    """An entry of the change log in all formats, each encoded when it is first used.

    Attributes:
        id: of the entry.
        instance_id: of the instance that the entry is about.
        type: of the event, like ``config``.
        for_guest: whether the instance itself receives it.
        key: the configuration key that it is about; None if it is about something else.
        size: about how many bytes it has.
    """

    def __init__(self, notification: Notification) -> None:
        self.id = notification.id
        self.instance_id = notification.instance_id
        self.type = notification.type
        self.for_guest = notification.for_guest
        self.size = len(notification.metadata)
        self.key = key_of(notification.type, notification.metadata)
        self._notification = (notification.timestamp, notification.for_guest)
        self._start = (
            f'{{"type":"{notification.type}","timestamp":"{notification.timestamp}","metadata":{notification.metadata}'
        )

    def encode(self, event_format: EventFormat, *, with_id: bool) -> bytes:
        """Return the event's bytes in a format. Server-sent events always have an id."""
        if event_format is EventFormat.SERVER_SENT:
            return self._server_sent
        if event_format is EventFormat.LINES:
            return self._line_with_id if with_id else self._line
        return self._frame_with_id if with_id else self._frame

    def blank(self) -> EncodedEvent:
        """Return the same event without the values of its key."""
        assert self.key is not None
        timestamp, for_guest = self._notification
        metadata = blank_metadata(self.key)
        return EncodedEvent(Notification(self.id, self.instance_id, "", "", self.type, timestamp, metadata, for_guest))

    # An event may have many MiB, so what is made on the way to a format is not kept.

    @cached_property
    def _line(self) -> bytes:
        return f"{self._start}}}\n".encode()

    @cached_property
    def _line_with_id(self) -> bytes:
        return self._text_with_id().encode()

    @cached_property
    def _frame(self) -> bytes:
        return frame(Opcode.TEXT, f"{self._start}}}\n".encode())

    @cached_property
    def _frame_with_id(self) -> bytes:
        return frame(Opcode.TEXT, self._text_with_id().encode())

    @cached_property
    def _server_sent(self) -> bytes:
        # html.spec.whatwg.org, "Parsing an event stream". JSON contains no line breaks.
        return f"id: {self.id}\ndata: {self._text_with_id()}\n".encode()

    def _text_with_id(self) -> str:
        return f'{self._start},"id":{self.id}}}\n'


def gap_event(since: int, oldest: int) -> EncodedEvent:
    """Make the event that tells a client that the log no longer has all that it missed.

    Args:
        since: the id after which the client wanted to resume.
        oldest: the id of the oldest entry in the log. The client receives everything from there on.
    """
    metadata = to_json({"since": since, "oldest": oldest}, html=True).decode()
    # A client that resumes after the gap's own id receives the oldest entry first.
    return EncodedEvent(Notification(oldest - 1, 0, "", "", "gap", timestamp(), metadata, for_guest=True))
