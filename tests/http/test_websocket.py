"""What a client may send on a WebSocket of events, byte by byte."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.http.websocket import LONGEST_FRAME, ClientFrames, Opcode, close_frame, frame

MASK = b"\x01\x02\x03\x04"


def client(opcode: int, payload: bytes = b"", *, first: int = 0x80) -> bytes:
    """A masked client frame with a short payload."""
    masked = bytes(byte ^ MASK[index % 4] for index, byte in enumerate(payload))
    return bytes([first | opcode, 0x80 | len(payload)]) + MASK + masked


def test_ping_is_answered() -> None:
    """With a pong of the same payload; the connection goes on."""
    heard = ClientFrames().feed(client(Opcode.PING, b"abc"))
    assert (heard.reply, heard.pong, heard.ended) == (frame(Opcode.PONG, b"abc"), False, False)


def test_pong_is_noted() -> None:
    """And not answered."""
    heard = ClientFrames().feed(client(Opcode.PONG, b"keepalive"))
    assert (heard.reply, heard.pong, heard.ended) == (b"", True, False)


@pytest.mark.parametrize(
    ("payload", "reply"), [(b"", b""), (b"\x02", b""), (b"\x03\xe8", b"\x03\xe8"), (b"\x03\xe8bye", b"\x03\xe8")]
)
def test_close_is_answered(payload: bytes, reply: bytes) -> None:
    """With the code that it had, if it had one, and is the end."""
    heard = ClientFrames().feed(client(Opcode.CLOSE, payload))
    assert (heard.reply, heard.ended) == (frame(Opcode.CLOSE, reply), True)


@pytest.mark.parametrize(
    "data",
    [
        client(Opcode.TEXT, b"hello"),
        client(0x2, b"\x00"),
        client(0x0, b"more"),
        bytes([0x81, 0xFF]) + struct.pack("!Q", 2**62),
        bytes([0x01, 0x80]) + MASK,
    ],
    ids=["text", "binary", "continuation", "2^62", "fragment"],
)
def test_data_ends_it(data: bytes) -> None:
    """Any data frame ends the connection, without a word, on its first two bytes."""
    heard = ClientFrames().feed(data[:2])
    assert (heard.reply, heard.ended) == (b"", True)


@pytest.mark.parametrize(
    "data",
    [
        bytes([0x80 | Opcode.PING, 0x80 | 126]),
        bytes([0x80 | Opcode.PING, 0x80 | 127]),
        bytes([Opcode.PING, 0x80]),
        bytes([0x80 | Opcode.PING, 0x00]),
        bytes([0xC0 | Opcode.PING, 0x80]),
        bytes([0x80 | 0x3, 0x80]),
        bytes([0x80 | 0xF, 0x80]),
    ],
    ids=["126", "127", "fragmented", "unmasked", "rsv", "op3", "op15"],
)
def test_violations_end_it_with_1002(data: bytes) -> None:
    """What RFC 6455 forbids is told as a protocol error, on the first two bytes."""
    heard = ClientFrames().feed(data)
    assert heard.ended
    assert heard.reply[2:4] == struct.pack("!H", 1002)


@given(st.lists(st.tuples(st.sampled_from([Opcode.PING, Opcode.PONG]), st.binary(max_size=125)), max_size=8), st.data())
def test_any_split_is_heard_alike(frames: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """However the bytes of several frames are cut, what comes of them is the same, and little is held meanwhile."""
    stream = b"".join(client(opcode, payload) for opcode, payload in frames)
    heard = ClientFrames()
    reply, pong, position = b"", False, 0
    while position < len(stream):
        size = data.draw(st.integers(1, LONGEST_FRAME))
        came = heard.feed(stream[position : position + size])
        position += size
        reply += came.reply
        pong = pong or came.pong
        assert not came.ended
        assert len(heard._buffer) < LONGEST_FRAME
    assert reply == b"".join(frame(Opcode.PONG, payload) for opcode, payload in frames if opcode == Opcode.PING)
    assert pong == any(opcode == Opcode.PONG for opcode, _payload in frames)


@given(st.lists(st.binary(min_size=1, max_size=LONGEST_FRAME), max_size=5))
def test_no_bytes_do_harm(pieces: list[bytes]) -> None:
    """Whatever a client sends, there is an answer, and no more than one frame is ever held."""
    heard = ClientFrames()
    for piece in pieces:
        came = heard.feed(piece)
        assert len(heard._buffer) < LONGEST_FRAME
        if came.ended:
            break


def test_close_frame() -> None:
    """The code is really in the frame."""
    assert close_frame(1008, "no") == b"\x88\x04\x03\xf0no"
