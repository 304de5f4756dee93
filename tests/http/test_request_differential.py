"""HTTP/1.1 heads, parsed by guestapi and by h11: an accepted head has the same meaning for both."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guestapi.http.errors import ProtocolError
from guestapi.http.request import parse_head
from tests.fuzz.differential import LIMITS, check_head

#: Run with each version of the parser.
pytestmark = pytest.mark.usefixtures("parser")

START = b"GET / HTTP/1.1\r\nHost: x\r\n"

NAMES = st.sampled_from(
    b"Content-Length content-length Transfer-Encoding Content_Length Transfer_Encoding X-Y X_Y Connection Expect Host "
    b"Accept X _ - Content-Type Trailer !#$%&'*+.^`|~9".split()
)
VALUES = st.sampled_from(
    b"0|5|05|+5|-5|5, 5|5,6|0x5|5 5|111111111111111|1111111111111111|99999999999999999999999999|| |\t5 |chunked|"
    b"Chunked|chunked, chunked|gzip, chunked|chunked;a=b|identity|\x0bchunked|close|keep-alive|close, x|100-continue|"
    b"100-Continue|x|\xc3\xa9\xff|a\rb|a_b: c".split(b"|")
)
SPACES = st.sampled_from([b": "] * 9 + [b":", b" : ", b":\t", b"\t:", b""])
ENDS = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\n ", b"\r\n\t", b"\n\r", b"\r\r\n"])
FIELDS = st.tuples(st.sampled_from([b""] * 20 + [b" ", b"\t"]), NAMES, SPACES, VALUES, ENDS).map(b"".join)
METHODS = st.sampled_from([b"GET", b"HEAD", b"PATCH", b"get", b"OPTIONS", b"X-Y", b"G(T", b"", b"\x80"])
TARGETS = st.sampled_from(
    [
        b"/",
        b"/1.0?a=b",
        b"/1.0/config/user.a_b",
        b"/%2F",
        b"/%zz",
        b"/a b",
        b"http://x/y?z",
        b"*",
        b"x:80",
        b"/\xc3\xa9",
        b"",
        b"/a#b",
    ]
)
VERSIONS = st.sampled_from(
    [b"HTTP/1.1"] * 5 + [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/1.1 ", b"http/1.1", b"HTTP/11"]
)
HOSTS = st.sampled_from([b"Host: x\r\n"] * 5 + [b"", b"host:localhost\r\n", b"Host: a b\r\n", b"Host: x\n"])
REQUESTS = st.builds(
    lambda method, target, version, end, host, fields, last: (
        method + b" " + target + b" " + version + end + host + b"".join(fields) + last
    ),
    METHODS,
    TARGETS,
    VERSIONS,
    ENDS,
    HOSTS,
    st.lists(FIELDS, max_size=4),
    st.sampled_from([b"\r\n"] * 4 + [b"\n", b"", b"\r"]),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A request in which a few bytes were inserted, removed or replaced."""
    request = bytearray(draw(REQUESTS))
    for _time in range(draw(st.integers(1, 3))):
        where = draw(st.integers(0, len(request)))
        request[where : where + draw(st.integers(0, 2))] = draw(
            st.binary(max_size=2) | st.sampled_from([b"\r", b"\n", b"\0"])
        )
    return bytes(request)


@settings(max_examples=1500, deadline=None)
@given(REQUESTS | mutated() | st.binary(max_size=60))
@example(START + b"X: y\r\n a_b: 1\r\n\r\n")
@example(START + b"Content-Length: 1\r\n _0: 5\r\n\r\n")
@example(START + b"X_Y: 1\r\n Content-Length: 5\r\n\r\n")
@example(START + b"Content_Length: 5\r\nContent-Length: 3\r\n\r\n")
@example(START + b"X: a\x85b_: c\r\n\r\n")
def test_accepted_body_is_the_same_for_h11(received: bytes) -> None:
    """h11 accepts every accepted head as the same request with the same body; others are refused or incomplete."""
    check_head(received)


@settings(max_examples=300, deadline=None)
@given(REQUESTS, st.binary(max_size=40))
def test_end_of_an_accepted_head(received: bytes, more: bytes) -> None:
    """A head is complete with its last byte and not before; bytes after it do not change the result."""
    try:
        found = parse_head(received, LIMITS)
    except ProtocolError:
        return
    if found is None:
        return
    assert found.size == len(received)
    assert parse_head(received[:-1], LIMITS) is None
    again = parse_head(received + more, LIMITS)
    assert again is not None
    assert (again.environ, again.size, again.length) == (found.environ, found.size, found.length)
