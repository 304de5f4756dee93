"""WebSocket frames (RFC 6455): those that the server sends, and those that a client may send on a stream of events.

Pure functions: bytes in, what to do out. A client may send pings, pongs and a close frame. Any other frame, and any
frame with a payload longer than that of a control frame, ends the connection. Its header alone decides: the server
neither waits for such a payload nor stores it. gevent-websocket's codec decodes frame headers.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import IntEnum

from geventwebsocket.exceptions import WebSocketError
from geventwebsocket.websocket import Header


class Opcode(IntEnum):
    """Frame types (RFC 6455, section 5.2)."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class CloseCode(IntEnum):
    """Why a WebSocket is closed (RFC 6455, section 7.4.1; www.iana.org/assignments/websocket)."""

    #: The server stops, or the instance stopped.
    GOING_AWAY = 1001
    #: The client sent a malformed frame.
    PROTOCOL_ERROR = 1002
    #: The guest API was switched off for the instance.
    POLICY_VIOLATION = 1008
    #: The change log cannot be read.
    INTERNAL_ERROR = 1011
    #: The change log is another one, or was trimmed too early: the client has to connect again.
    TRY_AGAIN_LATER = 1013


#: The reason that a close frame carries besides its code.
CLOSE_REASONS: dict[int, str] = {
    CloseCode.GOING_AWAY: "going away",
    CloseCode.POLICY_VIOLATION: "not authorized",
    CloseCode.INTERNAL_ERROR: "internal error",
    CloseCode.TRY_AGAIN_LATER: "try again later",
}

#: RFC 6455, section 5.5: the longest payload of a control frame, in bytes.
_LONGEST_PAYLOAD = 125
#: Header, mask and payload of the longest frame that is accepted, in bytes.
LONGEST_FRAME = 2 + 4 + _LONGEST_PAYLOAD


@dataclass(frozen=True, slots=True)
class Reaction:
    """What the server does about a client's bytes.

    Attributes:
        reply: bytes to send back.
        pong: whether the client answered a ping.
        ended: whether the connection ends after the reply.
    """

    reply: bytes = b""
    pong: bool = False
    ended: bool = False


class ClientFrames:
    """Parses the frames that a client sends. It never stores more than one control frame."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Reaction:
        """Parse `data` and what an earlier call left over.

        Args:
            data: bytes as received, of any length.

        Returns:
            What to do now.
        """
        self._buffer += data
        reply, pong = b"", False
        while len(self._buffer) >= 2:
            refusal = _refuse(self._buffer[0], self._buffer[1])
            if refusal is not None:
                self._buffer = b""
                return Reaction(reply + refusal, pong, ended=True)
            size = 2 + 4 + (self._buffer[1] & 0x7F)
            if len(self._buffer) < size:
                break
            stream = io.BytesIO(self._buffer[:size])
            try:
                header = Header.decode_header(stream)
            except WebSocketError:
                return Reaction(reply + close_frame(CloseCode.PROTOCOL_ERROR, "malformed frame"), pong, ended=True)
            payload = bytes(header.unmask_payload(stream.read()))
            self._buffer = self._buffer[size:]
            if header.opcode == Opcode.PING:
                reply += frame(Opcode.PONG, payload)
            elif header.opcode == Opcode.PONG:
                pong = True
            else:
                # The client's close code, sent back (section 5.5.1).
                return Reaction(
                    reply + frame(Opcode.CLOSE, payload[:2] if len(payload) >= 2 else b""), pong, ended=True
                )
        return Reaction(reply, pong)


def frame(opcode: int, payload: bytes) -> bytes:
    """Write a whole frame of a server: final and not masked (section 5.2).

    Args:
        opcode: an `Opcode`.
        payload: of any length.
    """
    return bytes(Header.encode_header(True, int(opcode), b"", len(payload), 0)) + payload


def close_frame(code: int, reason: str | None = None) -> bytes:
    """Write a close frame (section 5.5.1).

    Args:
        code: a `CloseCode`.
        reason: text for the client; None: the one in `CLOSE_REASONS`, if there is one.
    """
    if reason is None:
        reason = CLOSE_REASONS.get(code, "")
    return frame(Opcode.CLOSE, code.to_bytes(2) + reason.encode())


def _refuse(first: int, second: int) -> bytes | None:
    """The bytes to send before the connection ends because of a frame's first two bytes; None to accept the frame."""
    opcode = first & 0x0F
    if first & 0x70:
        return close_frame(CloseCode.PROTOCOL_ERROR, "reserved bits are set")
    if opcode in (Opcode.CONTINUATION, Opcode.TEXT, Opcode.BINARY):
        # As Incus: the stream has one direction, so a message from the client ends it without a close frame.
        return b""
    if opcode not in (Opcode.CLOSE, Opcode.PING, Opcode.PONG):
        return close_frame(CloseCode.PROTOCOL_ERROR, f"unknown opcode {opcode}")
    if not first & 0x80:
        return close_frame(CloseCode.PROTOCOL_ERROR, "a control frame is fragmented")
    if second & 0x7F > _LONGEST_PAYLOAD:
        return close_frame(CloseCode.PROTOCOL_ERROR, f"a control frame is longer than {_LONGEST_PAYLOAD} bytes")
    if not second & 0x80:
        return close_frame(CloseCode.PROTOCOL_ERROR, "a frame is not masked")
    return None
