"""How an event is written. It is encoded once for a worker, whatever the number of subscriptions.

Plain clients read exactly ``{"type":...,"timestamp":...,"metadata":...}`` and LF. Clients that resume also read an
``id``, after which they can resume again.
"""

from __future__ import annotations

from enum import Enum
from functools import cached_property

from guestapi.encoding import to_json
from guestapi.http.websocket import Opcode, frame_head
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

    An event with large metadata is not encoded whole: the metadata stays in the log, from where it is sent in parts.

    Attributes:
        entry: the entry, if its metadata is left out.
        id: of the entry.
        type: of the event, like ``config``.
        for_guest: whether the instance itself receives it.
        left_out: bytes of the metadata that stay in the log; 0 if it is here.
        size: about how many bytes of memory it takes in one format.
    """

    def __init__(self, notification: Notification) -> None:
        self.entry = notification if notification.left_out else None
        self.id = notification.id
        self.type = notification.type
        self.for_guest = notification.for_guest
        self.left_out = notification.left_out
        self._about = (notification.instance_id, notification.timestamp)
        self._metadata = b"" if notification.left_out else notification.metadata.encode()
        self._start = f'{{"type":"{notification.type}","timestamp":"{notification.timestamp}","metadata":'.encode()
        self.size = len(self._start) + len(notification.metadata)

    @cached_property
    def key(self) -> str | None:
        """The configuration key that it is about; None if it is about something else."""
        return key_of(self.type, self._metadata.decode() if self.entry is None else self.entry.metadata)

    def encode(self, event_format: EventFormat, *, with_id: bool) -> bytes:
        """Return the event's bytes in a format, if nothing of it is left out. Server-sent events always have an id."""
        if event_format is EventFormat.SERVER_SENT:
            return self._server_sent
        if event_format is EventFormat.LINES:
            return self._line_with_id if with_id else self._line
        return self._frame_with_id if with_id else self._frame

    def around(self, event_format: EventFormat, *, with_id: bool) -> tuple[bytes, bytes]:
        """Return what stands before the metadata in a format, and what stands behind it."""
        start = self._start
        end = b',"id":%d}\n' % self.id if with_id or event_format is EventFormat.SERVER_SENT else b"}\n"
        if event_format is EventFormat.SERVER_SENT:
            # html.spec.whatwg.org, "Parsing an event stream". JSON contains no line breaks.
            return b"id: %d\ndata: %b" % (self.id, start), end + b"\n"
        if event_format is EventFormat.WEBSOCKET:
            size = len(start) + (self.left_out or len(self._metadata)) + len(end)
            return frame_head(Opcode.TEXT, size) + start, end
        return start, end

    def blank(self) -> EncodedEvent:
        """Return the same event without the values of its key."""
        assert self.key is not None
        instance_id, timestamp = self._about
        metadata = blank_metadata(self.key)
        return EncodedEvent(Notification(self.id, instance_id, "", "", self.type, timestamp, metadata, self.for_guest))

    @cached_property
    def _line(self) -> bytes:
        return self._join(EventFormat.LINES, with_id=False)

    @cached_property
    def _line_with_id(self) -> bytes:
        return self._join(EventFormat.LINES, with_id=True)

    @cached_property
    def _frame(self) -> bytes:
        return self._join(EventFormat.WEBSOCKET, with_id=False)

    @cached_property
    def _frame_with_id(self) -> bytes:
        return self._join(EventFormat.WEBSOCKET, with_id=True)

    @cached_property
    def _server_sent(self) -> bytes:
        return self._join(EventFormat.SERVER_SENT, with_id=True)

    def _join(self, event_format: EventFormat, *, with_id: bool) -> bytes:
        before, after = self.around(event_format, with_id=with_id)
        return b"".join((before, self._metadata, after))


def gap_event(since: int, oldest: int) -> EncodedEvent:
    """Make the event that tells a client that the log no longer has all that it missed.

    Args:
        since: the id after which the client wanted to resume.
        oldest: the id of the oldest entry in the log. The client receives everything from there on.
    """
    metadata = to_json({"since": since, "oldest": oldest}, html=True).decode()
    # A client that resumes after the gap's own id receives the oldest entry first.
    return EncodedEvent(Notification(oldest - 1, 0, "", "", "gap", timestamp(), metadata, for_guest=True))
