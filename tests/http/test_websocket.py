"""Frames of clients on a WebSocket of events."""

from __future__ import annotations

import struct

import pytest
from geventwebsocket.exceptions import WebSocketError
from geventwebsocket.websocket import Header
from hypothesis import given
from hypothesis import strategies as st

from guestapi.http.websocket import LONGEST_FRAME, ClientFrames, CloseCode, Opcode, close_frame, frame

MASK = b"\x01\x02\x03\x04"


def client(opcode: int, payload: bytes = b"", *, first: int = 0x80) -> bytes:
    """Return a masked client frame with a short payload."""
    masked = bytes(byte ^ MASK[index % 4] for index, byte in enumerate(payload))
    return bytes([first | opcode, 0x80 | len(payload)]) + MASK + masked


def test_bytes_of_frames() -> None:
    """Opcodes and the length of the longest frame are those of RFC 6455, whatever their names stand for here."""
    assert ClientFrames().feed(client(0x9, b"abc")).reply == b"\x8a\x03abc"
    assert ClientFrames().feed(client(0xA, b"abc")).pong
    assert len(client(0x9, b"x" * 125)) == LONGEST_FRAME


def test_ping_is_answered() -> None:
    """A ping is answered by a pong with the same payload, and the connection stays open."""
    result = ClientFrames().feed(client(Opcode.PING, b"abc"))
    assert (result.reply, result.pong, result.ended) == (frame(Opcode.PONG, b"abc"), False, False)


def test_pong_is_reported() -> None:
    """A pong is reported, and not answered."""
    result = ClientFrames().feed(client(Opcode.PONG, b"keepalive"))
    assert (result.reply, result.pong, result.ended) == (b"", True, False)


@pytest.mark.parametrize(
    ("payload", "reply"),
    [
        (b"", b""),
        (b"\x02", b""),
        (b"\x03\xe8", b"\x03\xe8"),
        (b"\x03\xe8bye", b"\x03\xe8"),
        *[(struct.pack("!H", code), struct.pack("!H", code)) for code in (1000, 1001, 1003, 1007, 1013, 3000, 4999)],
    ],
)
def test_close_is_answered(payload: bytes, reply: bytes) -> None:
    """A close frame is answered with its code, if it has one, and ends the connection."""
    result = ClientFrames().feed(client(Opcode.CLOSE, payload))
    assert (result.reply, result.ended) == (frame(Opcode.CLOSE, reply), True)


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1014, 1015, 1016, 2999, 5000, 65535])
def test_bad_close_code(code: int) -> None:
    """A close code that is not permitted on the wire is not sent back; it is a protocol error."""
    result = ClientFrames().feed(client(Opcode.CLOSE, struct.pack("!H", code) + b"bye"))
    assert (result.reply, result.ended) == (close_frame(1002, f"bad close code {code}"), True)


def test_bad_close_reason() -> None:
    """A reason that is not UTF-8 is a protocol error (RFC 6455, section 8.1)."""
    result = ClientFrames().feed(client(Opcode.CLOSE, b"\x03\xe8\xff"))
    assert result.reply[2:4] == struct.pack("!H", 1002)
    assert result.ended


@pytest.mark.parametrize(
    "data",
    [
        client(Opcode.TEXT, b"hello"),
        client(0x2, b"\x00"),
        bytes([0x81, 0xFF]) + struct.pack("!Q", 2**62),
        bytes([0x01, 0x80]) + MASK,
    ],
    ids=["text", "binary", "2^62", "fragment"],
)
def test_data_frame_ends_the_connection(data: bytes) -> None:
    """The first two bytes of a data frame end the connection, without a close frame."""
    frames = ClientFrames()
    result = frames.feed(data[:2])
    assert (result.reply, result.ended) == (b"", True)
    assert frames._buffer == b"", "nothing is stored of what is refused"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes([0x80 | Opcode.PING, 0x80 | 126]), "len > 125 for control"),
        (bytes([0x80 | Opcode.PING, 0x80 | 127]), "len > 125 for control"),
        (bytes([Opcode.PING, 0x80]), "FIN not set on control"),
        (bytes([0x80 | Opcode.PING, 0x00]), "bad MASK"),
        (bytes([0x80 | Opcode.TEXT, 0x05]), "bad MASK"),
        (bytes([0x80, 0x81]), "continuation after FIN"),
        (bytes([0x00, 0x81]), "continuation after FIN"),
        (bytes([0xC0 | Opcode.PING, 0x80]), "RSV1 set"),
        (bytes([0x90 | Opcode.TEXT, 0x80]), "RSV3 set"),
        (bytes([0x80 | 0x3, 0x80]), "bad opcode 3"),
        (bytes([0x80 | 0xF, 0x80]), "bad opcode 15"),
        (bytes([0xF0 | Opcode.PING, 0x7E]), "RSV1 set, RSV2 set, RSV3 set, len > 125 for control, bad MASK"),
    ],
)
def test_violations_end_the_connection_with_1002(data: bytes, reason: str) -> None:
    """A violation of RFC 6455 is a protocol error with the text that Incus sends, at the first two bytes."""
    result = ClientFrames().feed(data)
    assert (result.reply, result.ended) == (close_frame(1002, reason), True)


@given(st.lists(st.tuples(st.sampled_from([Opcode.PING, Opcode.PONG]), st.binary(max_size=125)), max_size=8), st.data())
def test_any_split_has_the_same_result(sent: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """However the bytes of several frames are split, the result is the same, and little is stored."""
    stream = b"".join(client(opcode, payload) for opcode, payload in sent)
    frames = ClientFrames()
    reply, pong, position = b"", False, 0
    while position < len(stream):
        size = data.draw(st.integers(1, LONGEST_FRAME))
        came = frames.feed(stream[position : position + size])
        position += size
        reply += came.reply
        pong = pong or came.pong
        assert not came.ended
        assert len(frames._buffer) < LONGEST_FRAME
    assert reply == b"".join(frame(Opcode.PONG, payload) for opcode, payload in sent if opcode == Opcode.PING)
    assert pong == any(opcode == Opcode.PONG for opcode, _payload in sent)


@given(st.lists(st.binary(min_size=1, max_size=LONGEST_FRAME), max_size=5))
def test_any_bytes_have_a_result(pieces: list[bytes]) -> None:
    """For any bytes of a client there is a result, and no more than one frame is stored."""
    frames = ClientFrames()
    for piece in pieces:
        came = frames.feed(piece)
        assert len(frames._buffer) < LONGEST_FRAME
        if came.ended:
            break


def test_close_frame() -> None:
    """The frame contains the code."""
    assert close_frame(1008, "no") == b"\x88\x04\x03\xf0no"


def test_close_codes() -> None:
    """The codes are those of RFC 6455 and the IANA registry."""
    assert {code.name: int(code) for code in CloseCode} == {
        "GOING_AWAY": 1001,
        "PROTOCOL_ERROR": 1002,
        "POLICY_VIOLATION": 1008,
        "INTERNAL_ERROR": 1011,
        "TRY_AGAIN_LATER": 1013,
    }


def test_frame_that_the_library_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that our own look accepts and gevent-websocket does not is a protocol error."""

    def refuse(_stream: object) -> None:
        raise WebSocketError

    monkeypatch.setattr(Header, "decode_header", refuse)
    result = ClientFrames().feed(client(Opcode.PING, b"abc"))
    assert (result.reply, result.pong, result.ended) == (close_frame(1002, "bad header"), False, True)


def test_longest_frame() -> None:
    """The longest frame that is accepted has two bytes, a mask and 125 bytes of payload."""
    assert len(client(Opcode.PING, b"x" * 125)) == LONGEST_FRAME == 131
