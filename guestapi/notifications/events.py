"""How an event is written. Encoded once for a worker, whatever the number of listeners.

Plain clients see exactly ``{"type":...,"timestamp":...,"metadata":...}`` and LF; those that can resume get an ``id``
besides, to resume after.
"""

from __future__ import annotations

from enum import Enum
from functools import cached_property

from guestapi.http.websocket import Opcode, frame
from guestapi.model import Notification
from guestapi.store.changes import encode, timestamp


class Form(Enum):
    """What a listener reads: how events are framed."""

    WEBSOCKET = "websocket"
    LINES = "lines"
    SERVER_SENT = "server-sent"


class Event:
    """An entry of the change log in all its forms, each made when it is wanted first."""

    def __init__(self, notification: Notification) -> None:
        self.id = notification.id
        self.instance_id = notification.instance_id
        self.type = notification.type
        self.for_guest = notification.for_guest
        self.size = len(notification.metadata)
        self._start = (
            f'{{"type":"{notification.type}","timestamp":"{notification.timestamp}","metadata":{notification.metadata}'
        )

    def written(self, form: Form, numbered: bool) -> bytes:
        """The event's bytes for a listener of that form; `numbered`: with its id."""
        if form is Form.SERVER_SENT:
            return self._server_sent
        if form is Form.LINES:
            return self._numbered_line if numbered else self._line
        return self._numbered_frame if numbered else self._frame

    @cached_property
    def _line(self) -> bytes:
        return f"{self._start}}}\n".encode()

    @cached_property
    def _numbered_line(self) -> bytes:
        return f'{self._start},"id":{self.id}}}\n'.encode()

    @cached_property
    def _frame(self) -> bytes:
        return frame(Opcode.TEXT, self._line)

    @cached_property
    def _numbered_frame(self) -> bytes:
        return frame(Opcode.TEXT, self._numbered_line)

    @cached_property
    def _server_sent(self) -> bytes:
        # html.spec.whatwg.org, "Parsing an event stream". JSON has no line breaks of its own.
        return f"id: {self.id}\ndata: {self._numbered_line.decode()}\n".encode()


def gap(since: int, oldest: int) -> Event:
    """What tells a listener that the log does not reach back to where it wants to resume.

    Args:
        since: the id after which it wanted to resume.
        oldest: the id of the oldest entry that the log still holds, from which on it will hear everything.
    """
    metadata = encode({"since": since, "oldest": oldest})
    # Whoever resumes after the gap's own id hears the oldest entry first.
    return Event(Notification(oldest - 1, 0, "", "", "gap", timestamp(), metadata, for_guest=True))
