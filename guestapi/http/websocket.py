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

#: The codes that a client's close frame may carry (RFC 6455, sections 7.4.1 and 7.4.2, and the registry of IANA): not
#: 1004 to 1006, 1014 and 1015, which are reserved or must not be on the wire.
_RECEIVABLE_CODES = frozenset({*range(1000, 1004), *range(1007, 1014), *range(3000, 5000)})

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
                return Reaction(reply + close_frame(CloseCode.PROTOCOL_ERROR, "bad header"), pong, ended=True)
            payload = bytes(header.unmask_payload(stream.read()))
            self._buffer = self._buffer[size:]
            if header.opcode == Opcode.PING:
                reply += frame(Opcode.PONG, payload)
            elif header.opcode == Opcode.PONG:
                pong = True
            else:
                return Reaction(reply + _answer_close(payload), pong, ended=True)
        return Reaction(reply, pong)


def frame(opcode: int, payload: bytes) -> bytes:
    """Write a whole frame of a server: final and not masked (section 5.2).

    Args:
        opcode: an `Opcode`.
        payload: of any length.
    """
    return frame_head(opcode, len(payload)) + payload


def frame_head(opcode: int, size: int) -> bytes:
    """Write what stands before the payload of a server's frame.

    Args:
        opcode: an `Opcode`.
        size: bytes of the payload.
    """
    return bytes(Header.encode_header(True, int(opcode), b"", size, 0))


def close_frame(code: int, reason: str | None = None) -> bytes:
    """Write a close frame (section 5.5.1).

    Args:
        code: a `CloseCode`.
        reason: text for the client; None: the one in `CLOSE_REASONS`, if there is one.
    """
    if reason is None:
        reason = CLOSE_REASONS.get(code, "")
    return frame(Opcode.CLOSE, code.to_bytes(2) + reason.encode())


def _answer_close(payload: bytes) -> bytes:
    """The close frame that answers a client's (section 5.5.1): its code, or what is wrong with it."""
    if len(payload) < 2:
        return frame(Opcode.CLOSE, b"")
    code = int.from_bytes(payload[:2])
    if code not in _RECEIVABLE_CODES:
        return close_frame(CloseCode.PROTOCOL_ERROR, f"bad close code {code}")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        return close_frame(CloseCode.PROTOCOL_ERROR, "invalid utf8 payload in close frame")
    return close_frame(code, "")


def _refuse(first: int, second: int) -> bytes | None:
    """Judge the first two bytes of a frame.

    A protocol error comes first, as with Incus, and is told in the words that Incus sends. Then, as with Incus, a
    message from the client ends the stream without a close frame, since the stream has one direction.

    Returns:
        The bytes to send before the connection ends; None to accept the frame.
    """
    opcode = first & 0x0F
    is_control = opcode in (Opcode.CLOSE, Opcode.PING, Opcode.PONG)
    faults = [f"RSV{number} set" for number, bit in ((1, 0x40), (2, 0x20), (3, 0x10)) if first & bit]
    if is_control and second & 0x7F > _LONGEST_PAYLOAD:
        faults.append(f"len > {_LONGEST_PAYLOAD} for control")
    if is_control and not first & 0x80:
        faults.append("FIN not set on control")
    if opcode == Opcode.CONTINUATION:
        faults.append("continuation after FIN")
    elif not is_control and opcode not in (Opcode.TEXT, Opcode.BINARY):
        faults.append(f"bad opcode {opcode}")
    if not second & 0x80:
        faults.append("bad MASK")
    if faults:
        return close_frame(CloseCode.PROTOCOL_ERROR, ", ".join(faults))
    return None if is_control else b""
