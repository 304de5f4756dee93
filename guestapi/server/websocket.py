"""What a client may send on a WebSocket of events: pings, pongs and a close. Pure: bytes in, what to do out.

Anything else, and any frame whose payload is longer than a control frame's may be, ends the connection on its header
alone: no byte of the payload is waited for or kept. The frame's header is gevent-websocket's codec's to decode.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from geventwebsocket.exceptions import WebSocketError
from geventwebsocket.websocket import Header

from guestapi.notifications.events import BINARY, CLOSE, PING, PONG, TEXT, frame

#: RFC 6455, section 5.5: a control frame's payload.
_LONGEST = 125
#: Header, mask and payload of the longest frame that is taken.
LONGEST_FRAME = 2 + 4 + _LONGEST

#: RFC 6455, section 7.4.1.
_PROTOCOL_ERROR = 1002


@dataclass(frozen=True, slots=True)
class Heard:
    """What a client's bytes come to.

    Attributes:
        reply: what to send back.
        pong: there was an answer to a ping.
        ended: the connection is over once the reply is sent.
    """

    reply: bytes = b""
    pong: bool = False
    ended: bool = False


class ClientFrames:
    """Takes a client's bytes apart into frames. Never holds more than one control frame."""

    def __init__(self) -> None:
        self._buffer = b""

    def hear(self, data: bytes) -> Heard:
        """What has come with `data`, and what was left over from before."""
        self._buffer += data
        reply, pong = b"", False
        while len(self._buffer) >= 2:
            refused = _refuse(self._buffer[0], self._buffer[1])
            if refused is not None:
                self._buffer = b""
                return Heard(reply + refused, pong, ended=True)
            size = 2 + 4 + (self._buffer[1] & 0x7F)
            if len(self._buffer) < size:
                break
            stream = io.BytesIO(self._buffer[:size])
            try:
                header = Header.decode_header(stream)
            except WebSocketError:
                return Heard(reply + closing(_PROTOCOL_ERROR, "malformed frame"), pong, ended=True)
            payload = bytes(header.unmask_payload(stream.read()))
            self._buffer = self._buffer[size:]
            if header.opcode == PING:
                reply += frame(PONG, payload)
            elif header.opcode == PONG:
                pong = True
            else:
                return Heard(reply + frame(CLOSE, payload[:2] if len(payload) >= 2 else b""), pong, ended=True)
        return Heard(reply, pong)


def closing(code: int, reason: str) -> bytes:
    """A close frame (RFC 6455, section 5.5.1)."""
    return frame(CLOSE, code.to_bytes(2) + reason.encode())


def _refuse(first: int, second: int) -> bytes | None:
    """What ends the connection on account of a frame's first two bytes; None if the frame is taken."""
    opcode = first & 0x0F
    if first & 0x70:
        return closing(_PROTOCOL_ERROR, "reserved bits are set")
    if opcode in (0x0, TEXT, BINARY):
        # As Incus: this is no conversation.
        return b""
    if opcode not in (CLOSE, PING, PONG):
        return closing(_PROTOCOL_ERROR, f"unknown opcode {opcode}")
    if not first & 0x80:
        return closing(_PROTOCOL_ERROR, "a control frame is fragmented")
    if second & 0x7F > _LONGEST:
        return closing(_PROTOCOL_ERROR, f"a control frame is longer than {_LONGEST} bytes")
    if not second & 0x80:
        return closing(_PROTOCOL_ERROR, "a frame is not masked")
    return None
