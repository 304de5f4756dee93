"""The body of a request, read from a source that returns it in pieces of any size."""

from __future__ import annotations

import io
from collections.abc import Callable

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestapi.http.body import Body
from guestapi.http.errors import ProtocolError
from guestapi.http.response import CONTINUE


class Pieces:
    """A source of these pieces, after which it fails as a closed or late connection does."""

    def __init__(self, *pieces: bytes, end: str = "the body is cut short") -> None:
        self.left = b""
        self.said: list[bytes] = []
        self._pieces = [piece for piece in pieces if piece]
        self._end = end

    def peek_line(self, limit: int) -> bytes:
        """Return the next line, or what there is up to the limit, without consuming it."""
        while b"\n" not in self.left[:limit]:
            if len(self.left) >= limit:
                raise ProtocolError(400, "a line is too long")
            self.left += self._next()
        return self.left[: self.left.index(b"\n") + 1]

    def take(self, size: int) -> bytes:
        """Return up to `size` bytes of the next piece."""
        assert size > 0
        if not self.left:
            self.left = self._next()
        taken, self.left = self.left[:size], self.left[size:]
        return taken

    def send_interim(self, response: bytes) -> None:
        """Record the response."""
        self.said.append(response)

    def _next(self) -> bytes:
        if not self._pieces:
            raise ProtocolError(400, self._end)
        return self._pieces.pop(0)

    @property
    def rest(self) -> bytes:
        """The bytes that were not consumed."""
        return self.left + b"".join(self._pieces)


def chunked(source: Pieces, limit: int = 1000, expects: bool = False) -> Body:
    """Return a chunked body."""
    return Body(source, None, limit, expects)


def refused(body: Body) -> ProtocolError:
    """Return the error of reading, which must fail."""
    with pytest.raises(ProtocolError) as refusal:
        body.read()
    return refusal.value


def cut(raw: bytes, places: list[int]) -> list[bytes]:
    """Return `raw` in pieces."""
    ends = sorted({place % (len(raw) + 1) for place in places})
    return [raw[start:end] for start, end in zip([0, *ends], [*ends, len(raw)], strict=True)]


READERS: dict[str, Callable[[Body], bytes]] = {
    "all": lambda body: body.read(),
    "by 3": lambda body: b"".join(iter(lambda: body.read(3) or b"", b"")),
    "lines": lambda body: b"".join(body),
    "rest": lambda body: (body.read(1) or b"") + body.read(),
}
PLACES = st.lists(st.integers(0, 10_000), max_size=12)
CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
NEXT = b"GET / HTTP/1.1\r\n"


@given(CHUNKS, PLACES, st.sampled_from(list(READERS)), st.sampled_from([b"", b"X: y\r\n", b"A: b\r\nC:\r\n"]))
def test_chunks_in_any_pieces(chunks: list[bytes], places: list[int], reader: str, trailers: bytes) -> None:
    """However a chunked body is split and read, its content is the same, and nothing after it is consumed."""
    raw = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailers + b"\r\n" + NEXT
    source = Pieces(*cut(raw, places))
    body = chunked(source)
    assert READERS[reader](body) == b"".join(chunks)
    assert body.read() == b""
    assert source.rest == NEXT


@given(st.binary(max_size=80), PLACES, st.sampled_from(list(READERS)))
def test_length_in_any_pieces(content: bytes, places: list[int], reader: str) -> None:
    """A body with a length is read completely and no further, however it is split and read."""
    source = Pieces(*cut(content + NEXT, places))
    body = Body(source, len(content), 1000, False)
    assert READERS[reader](body) == content
    assert body.read() == b""
    assert source.rest == NEXT


def test_body_can_be_buffered() -> None:
    """An application may read a body through any reader of io, as PEP 3333 requires."""
    with io.BufferedReader(Body(Pieces(b"one\ntwo"), 7, 1000, False)) as reader:
        assert list(reader) == [b"one\n", b"two"]


def test_many_chunks_are_refused() -> None:
    """A body of too many chunks is refused, because parsing them would delay other clients."""
    whole = chunked(Pieces(b"1\r\nx\r\n" * 255 + b"0\r\n\r\n"))
    assert whole.read() == b"x" * 255
    source = Pieces(b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n")
    assert refused(chunked(source)).status == 400
    trailers = Pieces(b"0\r\n" + b"a:\r\n" * 500 + b"\r\n")
    assert refused(chunked(trailers)).status == 400


@pytest.mark.parametrize(("size", "refuses"), [(4096, False), (4097, True)])
def test_trailer_section_is_limited(size: int, refuses: bool) -> None:
    """A trailer section of any number of lines has no more bytes than a line may have."""
    lines = [b"a: " + b"b" * 95 + b"\r\n"] * 40
    lines.append(b"c: " + b"d" * (size - len(b"".join(lines)) - 7) + b"\r\n")
    body = chunked(Pieces(b"0\r\n" + b"".join(lines) + b"\r\n"))
    assert sum(map(len, lines)) + 2 == size
    if refuses:
        assert refused(body).status == 400
    else:
        assert body.read() == b""


def read_by_h11(raw: bytes) -> tuple[bytes, bytes] | None:
    """Return the chunked body at the start of `raw` and the rest, as h11 parses it; None if it is incomplete."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + raw)
    content = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            return None
        content += event.data if isinstance(event, h11.Data) else b""
    return content, connection.trailing_data[0]


SIZES = [
    b"0",
    b"1",
    b"2",
    b"5",
    b"A",
    b"0a",
    b"00000001",
    b"000000001",
    b"ffffffff",
    b"+1",
    b"-1",
    b" 1",
    b"0x1",
    b"1_0",
    b"",
]
PARTS = [
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b";",
    b";a=b",
    b"a",
    b"abcde",
    b"X: y",
    b"X : y",
    b" z",
    b":",
    b"\0",
    b"0\r\n\r\n",
]


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(SIZES + PARTS), max_size=12).map(b"".join) | st.binary(max_size=30))
def test_accepted_body_is_the_same_for_h11(raw: bytes) -> None:
    """An accepted chunked body has the same content and the same end for h11."""
    source = Pieces(raw)
    try:
        content = chunked(source).read()
    except ProtocolError:
        return
    assert read_by_h11(raw) == (content, source.rest)


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n0\r\n\r\n",
        b"x\r\n\r\n",
        b"0x1\r\na\r\n0\r\n\r\n",
        b"+1\r\na\r\n0\r\n\r\n",
        b"-1\r\na\r\n0\r\n\r\n",
        b" 1\r\na\r\n0\r\n\r\n",
        b"1 ;a\r\na\r\n0\r\n\r\n",
        b"1 1\r\na\r\n0\r\n\r\n",
        b"1_0\r\na\r\n0\r\n\r\n",
        b"1\na\r\n0\r\n\r\n",
        b"1\r\na\n0\r\n\r\n",
        b"1\r\nab\r\n0\r\n\r\n",
        b"1\r\na0\r\n\r\n",
        b"1;a\rb\r\na\r\n0\r\n\r\n",
        b"1;a\nb\r\na\r\n0\r\n\r\n",
        b"0\r\n\n",
        b"0\r\nX: y\n\r\n",
        b"0\r\nno colon\r\n\r\n",
        b"0\r\n: y\r\n\r\n",
        b"0\r\nX: y\r\n z\r\n\r\n",
        b'0\r\n{"a: y\r\n\r\n',
        b"0\r\nX : y\r\n\r\n",
        b"0\r\ncontent-Length: 5\r\n\r\n",
        b"0\r\nTransfer-Encoding: x\r\n\r\n",
        b"0\r\nX: \x0by\r\n\r\n",
        b"0\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"0\r\nX: " + b"y" * 5000 + b"\r\n\r\n",
        b"1;" + b"a" * 5000 + b"\r\na\r\n0\r\n\r\n",
        b"1" * 5000,
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_malformed(raw: bytes) -> None:
    """Malformed or endless sizes, line ends, extensions and trailers are refused."""
    assert refused(chunked(Pieces(raw))).status == 400


@pytest.mark.parametrize(
    "raw", [b"5\r\nhello\r\n0\r\n\r\n", b"5;a=b\r\nhello\r\n00\r\nX: y\r\n\r\n", b"05; a\r\nhello\r\n0\r\n\r\n"]
)
def test_truncated_body_is_refused(raw: bytes) -> None:
    """A body that ends early is refused, and never accepted as a shorter one."""
    for end in range(len(raw)):
        assert refused(chunked(Pieces(raw[:end]))).status == 400
    assert chunked(Pieces(raw)).read() == b"hello"
    assert refused(Body(Pieces(b"hell"), 5, 1000, False)).status == 400


def test_limit() -> None:
    """The limit applies to the sum of the announced sizes of all chunks."""
    within = b"6\r\nhello \r\n4\r\nhost\r\n0\r\n\r\n"
    assert chunked(Pieces(within), limit=10).read() == b"hello host"
    assert refused(chunked(Pieces(within), limit=9)).status == 413
    source = Pieces(b"7fffffff\r\n")
    assert refused(chunked(source, limit=65536)).status == 413
    assert refused(chunked(Pieces(b"ffffffff\r\n"), limit=65536)).status == 413


def test_failure_stays() -> None:
    """After a failure, reading fails again in the same way, and the failure can be read as an attribute."""
    body = chunked(Pieces(b"5\r\nhel", end="the body did not come in time"))
    assert body.failure is None
    first = refused(body)
    assert first.text == "the body did not come in time"
    assert refused(body) is first
    assert body.failure is first
    with pytest.raises(ProtocolError):
        body.drain()


def test_failure_is_an_oserror() -> None:
    """A WSGI application gets the failure as an OSError, the exception that it expects from its input."""
    with pytest.raises(OSError, match="cut"):
        Body(Pieces(), 1, 10, False).read()


@pytest.mark.parametrize("raw", [b"2\r\nhi\r\n0\r\n\r\n"])
def test_continue_is_sent_at_the_first_read(raw: bytes) -> None:
    """`100 Continue` is sent once, at the first read; until then the client may omit the body."""
    source = Pieces(raw)
    body = chunked(source, expects=True)
    assert body.untouched
    assert source.said == []
    assert body.read(1) == b"h"
    assert not body.untouched
    assert body.read() == b"i"
    assert source.said == [CONTINUE]


def test_continue_is_not_sent_unasked() -> None:
    """`100 Continue` is not sent to a client that did not ask for it, or that has an empty body."""
    source = Pieces(b"hi")
    assert Body(source, 2, 10, False).read() == b"hi"
    assert source.said == []
    assert not Body(source, 0, 10, True).untouched
    assert not Body(source, 2, 10, False).untouched


def test_drain_leaves_the_next_request() -> None:
    """Draining reads to the end of the body and not beyond."""
    source = Pieces(b"5\r\nhello\r\n0\r\n\r\n" + NEXT)
    body = chunked(source)
    assert body.read(2) == b"he"
    body.drain()
    assert source.rest == NEXT
    assert body.read() == b""
