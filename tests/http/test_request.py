"""Heads of requests and responses: accepted and refused requests, statuses, and the form of responses."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import Any

import h11
import pytest

from guestapi.http import request as request_module
from guestapi.http.errors import ProtocolError
from guestapi.http.request import (
    KNOWN_BYTES,
    KNOWN_FIELDS,
    KNOWN_HEADS,
    Head,
    KnownFields,
    KnownHeads,
    _body_length,
    ends_head,
    is_too_large,
    parse_head,
    refuse_cut_line,
)
from guestapi.http.response import date_line, error_response, response_end, response_fields
from guestapi.settings import LimitSettings
from tests.harness.containers import parse

#: Run with each version of the parser.
pytestmark = pytest.mark.usefixtures("parser")

LIMITS = LimitSettings()
SMALL = LimitSettings(request_line=512, header_fields=8, header_field=512, head=1024)
#: The statuses with which a request can be refused before its body is read.
STATUSES = {400, 413, 414, 417, 431, 501, 505}


def head(*lines: bytes, start: bytes = b"GET /1.0 HTTP/1.1") -> bytes:
    """Return the head of a request with these header lines after Host."""
    return b"\r\n".join([start, b"Host: x", *lines, b"", b""])


def taken(received: bytes, limits: LimitSettings = LIMITS) -> Head:
    """Return the parsed head, which must be complete and accepted."""
    found = parse_head(received, limits)
    assert found is not None
    return found


def refused(received: bytes, limits: LimitSettings = LIMITS) -> int:
    """Return the status of the refusal, whose text must be one line."""
    with pytest.raises(ProtocolError) as refusal:
        parse_head(received, limits)
    assert refusal.value.text.isprintable()
    return refusal.value.status


@pytest.mark.parametrize(
    "lines",
    [
        [b"Content-Length: 1", b"Content-Length: 1"],
        [b"Content-Length: 1", b"Content-Length: 2"],
        [b"Content-Length: 1, 1"],
        [b"Content-Length: 1,"],
        [b"Content-Length: +1"],
        [b"Content-Length: -1"],
        [b"Content-Length: 1 1"],
        [b"Content-Length: 0x1"],
        [b"Content-Length: 1_0"],
        [b"Content-Length: 1.0"],
        [b"Content-Length: \xb2"],
        [b"Content-Length:"],
        [b"Content-Length: 18446744073709551617"],
        [b"Content-Length: 00000000000000000001"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 1"],
        [b"Content-Length: 1", b"Transfer-Encoding: chunked"],
        [b"Content-Length: 0", b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked, chunked"],
        [b"Transfer-Encoding: chunked, identity"],
        [b"Transfer-Encoding: gzip, chunked"],
        [b"Transfer-Encoding: chunked;q=1"],
        [b'Transfer-Encoding: "chunked"'],
        [b"Transfer-Encoding: xchunked"],
        [b"Transfer-Encoding: x chunked"],
        [b"Transfer-Encoding:\x0bchunked"],
        [b"Transfer-Encoding: chunked\0"],
        [b"Transfer-Encoding: chunked,"],
        [b"Transfer-Encoding: ,chunked"],
        [b"Transfer-Encoding:"],
        [b"Transfer-Encoding : chunked"],
        [b"Transfer-Encoding\t: chunked"],
        [b" Transfer-Encoding: chunked"],
        [b"\tTransfer-Encoding: chunked"],
        [b"Transfer-Encoding:", b" chunked"],
        [b"X: y", b" z"],
        [b"X: y", b" "],
        [b"X: y\rTransfer-Encoding: chunked"],
        [b"X: y\r\rTransfer-Encoding: chunked"],
        [b"X: \r\n\rTransfer-Encoding: chunked"],
        [b"X\0: y"],
        [b"X: \0"],
        [b"X: \x7f"],
        [b": y"],
        [b"no colon"],
        [b"Host: y"],
        [b"X: y", b" a_b: z"],
        [b"Content-Length: 1", b"\t_: 2"],
        [b"X_Y: y", b" Content-Length: 2"],
    ],
    ids=repr,
)
def test_smuggling(lines: list[bytes]) -> None:
    """A head that another parser could read as different requests is refused: lengths, encodings, folds, spaces."""
    assert refused(head(*lines, start=b"PATCH /1.0 HTTP/1.1")) in (400, 501)


def test_fields_with_underscores_are_left_out() -> None:
    """A field with an underscore in its name is left out: environ would not tell it from one with a hyphen."""
    found = taken(head(b"Content_Length: 5", b"Transfer_Encoding: chunked", b"X_Y: 1", b"X-Y: 2", b"X_Y: 3", b"_: 4"))
    assert found.length == 0
    assert {key: value for key, value in found.environ.items() if key.startswith(("HTTP_", "CONTENT_"))} == {
        "HTTP_HOST": "x",
        "HTTP_X_Y": "2",
    }
    assert taken(head(b"Content_Length: 5", b"Content-Length: 3")).length == 3
    assert refused(b"GET / HTTP/1.1\r\nHo_st: x\r\n\r\n") == 400


@pytest.mark.parametrize(
    ("received", "status"),
    [
        (b"\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"options * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /%gg HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET /1.0 HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (head(b"Expect: 200-ok"), 417),
        (head(b"Expect: 100-continue", b"Expect: 100-continue"), 417),
        (head(b"Transfer-Encoding: gzip"), 501),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
    ids=repr,
)
def test_refused(received: bytes, status: int) -> None:
    """A malformed or unsupported request is refused with the proper status."""
    assert refused(received) == status


@pytest.mark.parametrize(
    ("received", "text"),
    [
        (b"\r\nGET / HTTP/1.1\r\n\r\n", "empty line"),
        (b"\nGET / HTTP/1.1\r\n\r\n", "empty line"),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", "request line"),
        (b"GET /1.0\r\n Host: x\r\n", "request line"),
        (head(b"X: y", b" z"), "folded"),
        (head(b"X: y", b"\tz"), "folded"),
        (head(b"X : y"), "a header field is not"),
        (head(b"X"), "a header field is not"),
        (head(b"X: \0"), "a header field is not"),
        (head(b"Content-Length: 1", b"Content-Length: 1"), "more than once"),
        (head(b"Content-Length: 1234567890123456"), "Content-Length"),
    ],
    ids=repr,
)
def test_text_of_a_refusal(received: bytes, text: str) -> None:
    """The text of a refusal names the fault of the request."""
    with pytest.raises(ProtocolError, match=text) as refusal:
        parse_head(received, LIMITS)
    assert refusal.value.status == 400


@pytest.mark.parametrize("host", [b"x", b"_", b"1.0", b"", b"localhost:80", b"[::1]:8443", b"lxd"])
def test_any_host(host: bytes) -> None:
    """Any Host that the RFC allows is accepted, also an empty one and one with underscores."""
    assert taken(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n").environ["HTTP_HOST"] == host.decode()


@pytest.mark.parametrize(
    ("start", "lines", "expected"),
    [
        (b"GET / HTTP/1.1", [], True),
        (b"GET / HTTP/1.1", [b"Connection: close"], False),
        (b"GET / HTTP/1.1", [b"Connection: keep-alive, Close"], False),
        (b"GET / HTTP/1.1", [b"Connection: keep-alive", b"Connection: close"], False),
        (b"GET / HTTP/1.1", [b"Connection: x-close"], True),
        (b"GET / HTTP/1.0", [], False),
        (b"GET / HTTP/1.0", [b"Connection: Keep-Alive"], True),
        (b"GET / HTTP/1.0", [b"Connection: keep-alive, close"], False),
    ],
)
def test_keep_alive(start: bytes, lines: list[bytes], expected: bool) -> None:
    """HTTP/1.1 keeps the connection without `close`, HTTP/1.0 only with `keep-alive`; `close` takes precedence."""
    assert taken(head(*lines, start=start)).keep_alive is expected


def test_expectation() -> None:
    """100-continue is recognised in any case, and ignored from an HTTP/1.0 client (RFC 9110, section 10.1.1)."""
    length = b"Content-Length: 5"
    assert taken(head(b"Expect: 100-Continue", length)).expects
    assert not taken(head(b"Expect: 100-continue", length, start=b"PATCH / HTTP/1.0")).expects
    assert not taken(head(length)).expects


@pytest.mark.parametrize(
    ("target", "raw", "decoded", "query"),
    [
        (b"/1.0?a=b?c", "/1.0", "/1.0", "a=b?c"),
        (b"/1.0/config/user.a%2Fb", "/1.0/config/user.a%2Fb", "/1.0/config/user.a/b", ""),
        (b"/%c3%a9", "/%c3%a9", "/\xc3\xa9", ""),
        (b"/\xc3\xa9", "/\xc3\xa9", "/\xc3\xa9", ""),
        (b"/a#b;c", "/a#b;c", "/a#b;c", ""),
        (b"http://x/1.0?y", "/1.0", "/1.0", "y"),
        (b"*", "*", "*", ""),
    ],
)
def test_target(target: bytes, raw: str, decoded: str, query: str) -> None:
    """RAW_PATH is as sent; PATH_INFO is decoded once, into bytes as characters (PEP 3333)."""
    environ = taken(head(start=b"OPTIONS " + target + b" HTTP/1.1")).environ
    assert (environ["RAW_PATH"], environ["PATH_INFO"], environ["QUERY_STRING"]) == (raw, decoded, query)


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /1.0 HTTP/1.1\nHost: x\n\n",
        b"GET /1.0 HTTP/1.1\r\nHost: x\n\r\n",
        b"GET /1.0 HTTP/1.1\nHost: x\r\n\n",
        b"GET /1.0 HTTP/1.1\nHost: x\r\nX-Y: 1\nX_Y: 2\n\r\n",
    ],
)
def test_bare_lf(raw: bytes) -> None:
    """With any parser, a line may end with a bare LF, and the head ends at the first empty line."""
    body = b"a\n\nb\r\n\r\n"
    found = taken(raw + body)
    assert (found.size, found.environ["HTTP_HOST"], found.environ["RAW_PATH"]) == (len(raw), "x", "/1.0")
    for size in range(1, len(raw)):
        assert parse_head(raw[:size], LIMITS) is None


@pytest.mark.parametrize(
    ("received", "answered"),
    [
        (b"G", True),
        (b"GET /1.0", True),
        (b"GET /1.0 HTTP/1", True),
        (b"GET /1.0 HTTP/1.1", False),
        (b"GET /1.0 HTTP/1.1\r", False),
        (b"GET /1.0 HTTP/1.1\r\nHost: x\r\nX-A: ", False),
        (b"GET /1.0 HTTP/1.1\nX", False),
    ],
)
def test_cut_line(received: bytes, answered: bool) -> None:
    """At the deadline an incomplete request line gets 400; an incomplete head with a complete one gets no answer."""
    refusal = refuse_cut_line(received)
    assert (refusal is not None and refusal.status == 400) == answered


@pytest.mark.parametrize(("sent", "taken_for"), [(b"1.0", "HTTP/1.0"), (b"1.1", "HTTP/1.1"), (b"1.2", "HTTP/1.1")])
def test_version(sent: bytes, taken_for: str) -> None:
    """A later minor version is answered as the highest supported one."""
    assert taken(head(start=b"GET / HTTP/" + sent)).environ["SERVER_PROTOCOL"] == taken_for


def test_wrong_line_is_refused_at_once() -> None:
    """A wrong request line is refused before the head is complete."""
    assert refused(b"GET /1.0\r\nHost: x\r\n") == 400
    assert refused(b"\r\n") == 400
    assert refused(b"\n") == 400
    assert refused(b"\n" + b"x" * 600, SMALL) == 400
    assert parse_head(b"GET /1.0 HTTP/1.1\r\nHost : x", LIMITS) is None


def test_limits() -> None:
    """For each limit, a request just within it is accepted, and one beyond it is refused with the proper status."""
    line = b"GET /" + b"a" * (512 - len("GET / HTTP/1.1")) + b" HTTP/1.1"
    assert taken(head(start=line), SMALL)
    assert refused(head(start=line.replace(b"/", b"/a", 1)), SMALL) == 414
    assert taken(head(*[b"X: y"] * 7), SMALL)
    assert refused(head(*[b"X: y"] * 8), SMALL) == 431
    assert refused(head(*[b"X_: y"] * 8), SMALL) == 431
    assert refused(head(*[b"X: y"] * 600), LIMITS) == 431
    assert taken(head(b"X: " + b"y" * 507), SMALL)
    assert refused(head(b"X: " + b"y" * 510), SMALL) == 431
    fill = b"X: " + b"y" * 493
    room = 1024 - len(head(fill, b"Z: "))
    assert taken(head(fill, b"Z: " + b"z" * room), SMALL).size == 1024
    assert refused(head(fill, b"Z: " + b"z" * (room + 1)), SMALL) == 431


def test_most_fields_of_the_parser() -> None:
    """Of a limit beyond what gunicorn_h1c takes, that is what counts: 256 fields; so it says why it refuses more."""
    limits = LimitSettings(header_fields=1000)
    assert taken(head(*[b"X: y"] * 255), limits)
    assert refused(head(*[b"X: y"] * 256), limits) == 431


def test_limits_of_incomplete_heads() -> None:
    """A line or head beyond its limit is refused before its end arrives."""
    assert parse_head(b"G" * 512, SMALL) is None
    assert refused(b"G" * 513, SMALL) == 414
    assert refused(b"GET /" + b"a" * 600, SMALL) == 414
    assert refused(head(*[b"X: " + b"y" * 400] * 3)[:-2], SMALL) == 431
    assert refused(head(b"X: " + b"y" * 2000)[:-4], SMALL) == 431


def test_first_field_is_limited_too() -> None:
    """The limit of a field's size applies to the first field, too."""
    assert refused(b"GET / HTTP/1.1\r\nX: " + b"y" * 510 + b"\r\nHost: x\r\n\r\n", SMALL) == 431


@pytest.mark.parametrize("field", [b"Host: x", b"Content-Length: 1", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("between", [[], [b"X-Between: y"]])
def test_repeated_fields(field: bytes, between: list[bytes]) -> None:
    """A second Host, Content-Length or Transfer-Encoding field is refused, whatever value, case and parser."""
    rest = [b"Host: x"] * (field != b"Host: x")
    start = b"PATCH / HTTP/1.1"
    assert parse_head(b"\r\n".join([start, field, *between, *rest, b"", b""]), LIMITS)
    for again in (field, field.lower(), field.upper()):
        twice = b"\r\n".join([start, field, *between, again, *rest, b"", b""])
        # The parser refuses some of them, too, but does not say why.
        with pytest.raises(ProtocolError, match="more than once") as raised:
            parse_head(twice, LIMITS)
        assert raised.value.status == 400


def test_length_and_encoding_exclude_each_other() -> None:
    """Content-Length with Transfer-Encoding is refused, even if the parser accepts both."""
    environ = {"SERVER_PROTOCOL": "HTTP/1.1", "HTTP_TRANSFER_ENCODING": "chunked"}
    assert _body_length(environ) is None
    with pytest.raises(ProtocolError) as refusal:
        _body_length({**environ, "CONTENT_LENGTH": "1"})
    assert refusal.value.status == 400


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\r\n", b"\n\n", b"\r\n\n"])
def test_end_of_a_head(end: bytes) -> None:
    """The end of a head is found in any form and across any division into pieces, but not in bytes checked before."""
    start = b"GET / HTTP/1.1\r\nHost: x"
    whole = start + end
    for length in range(len(whole)):
        assert not ends_head(whole[:length])
    assert ends_head(whole)
    for seen in range(len(start), len(whole)):
        assert ends_head(whole, seen)
    assert ends_head(whole + b"more", len(whole) - 1)
    assert not ends_head(whole + b"more of it", len(whole) + 3)
    assert ends_head(end[1:] if end.startswith(b"\r") else end), "without a line before it"
    assert not ends_head(b"x\n\nmore", len(b"x\n\n") + 2)


def test_too_large() -> None:
    """An incomplete line or head beyond its limit is too large; one of exactly the limit is not."""
    assert not is_too_large(b"G" * 512, SMALL)
    assert is_too_large(b"G" * 513, SMALL)
    assert not is_too_large(b"G" * 512 + b"\n" + b"x" * 511, SMALL)
    assert is_too_large(b"G" * 512 + b"\n" + b"x" * 512, SMALL)


def response_head(
    status: str, headers: list[tuple[str, str]], protocol: str = "HTTP/1.1", close: bool = False
) -> bytes:
    """Return a complete head."""
    return response_fields(status, headers, protocol) + date_line() + response_end(protocol, close=close)


def test_response_head() -> None:
    """A head has a status line, the given fields, a valid Date, and Connection where it is necessary."""
    plain = response_head("200 OK", [("content-length", "2"), ("X-Any", "é")])
    lines = plain.decode("latin-1").split("\r\n")
    assert lines[:3] == ["HTTP/1.1 200 OK", "Content-Length: 2", "X-Any: é"]
    assert lines[3].startswith("Date: ")
    assert lines[3].endswith(" GMT")
    assert parsedate_to_datetime(lines[3][6:])
    assert lines[4:] == ["", ""]
    assert b"\r\nConnection: close\r\n\r\n" in response_head("200 OK", [], close=True)
    older = response_head("200 OK", [], protocol="HTTP/1.0")
    assert older.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"\r\nConnection: keep-alive\r\n\r\n" in older
    assert b"\r\nConnection: close\r\n\r\n" in response_head("200 OK", [], protocol="HTTP/1.0", close=True)


@pytest.mark.parametrize("status", sorted(STATUSES | {429, 500}))
def test_error_response(status: int) -> None:
    """A refusal is a complete response of one line of text, and closes the connection."""
    raw = error_response(status, "what was wrong", retry_after=True)
    (response,) = parse(raw)
    assert (response.status, response.text) == (status, "what was wrong\n")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert (response.headers["connection"], response.headers["retry-after"]) == ("close", "1")
    assert "retry-after" not in parse(error_response(status, "what was wrong"))[0].headers
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    client.receive_data(raw)
    assert isinstance(client.next_event(), h11.Response)


def test_fields_that_are_known() -> None:
    """A head is parsed alike whether or not its fields are known, and no request changes another's."""
    same = [b"Host: x", b"User-Agent: a"]
    requests = [
        [b"GET /a HTTP/1.1", *same],
        [b"GET /b?c HTTP/1.1", *same],
        [b"GET /b HTTP/1.0", *same],
        [b"PATCH /b HTTP/1.1", *same, b"Content-Length: 3"],
        [b"GET /a HTTP/1.1", *same],
        [b"GET /a HTTP/1.1", *same, b"X-Large: " + b"y" * 1000],
        [b"GET /a HTTP/1.1", *same, b"X-Large: " + b"y" * 1000],
        [b"PATCH /a HTTP/1.1", *same, b"X-Large: " + b"y" * 1000, b"Content-Length: 7"],
        [b"GET /a HTTP/1.1", *same, b"Connection: close"],
        [b"PATCH /b HTTP/1.1", *same, b"Content-Length: 3", b"Expect: 100-continue"],
        [b"PATCH /b HTTP/1.0", *same, b"Content-Length: 3", b"Expect: 100-continue"],
        [b"PATCH /b HTTP/1.1", *same, b"Content-Length: 3", b"Expect: 100-continue"],
    ]
    known = KnownFields()
    for lines in requests:
        received = b"\r\n".join([*lines, b"", b""])
        for _time in range(2):
            expected, found = parse_head(received, LIMITS), parse_head(received, LIMITS, known=known)
            assert expected is not None
            assert found is not None
            assert found.environ == expected.environ
            for attribute in ("length", "keep_alive", "expects", "size", "raw", "alone"):
                assert getattr(found, attribute) == getattr(expected, attribute)
            found.environ["HTTP_X"] = "changed"
    wrong = [[b"GET /a HTTP/1.1", *same, b"Host: y"], [b"GET /a HTTP/1.1", b"User-Agent: a"]]
    for refused in [one for one in wrong for _time in range(2)]:
        with pytest.raises(ProtocolError):
            parse_head(b"\r\n".join([*refused, b"", b""]), LIMITS, known=known)


@pytest.mark.parametrize(
    ("line", "more", "kept"),
    [
        (b"GET /a HTTP/1.1", 0, True),
        (b"GET /a HTTP/1.0", 0, True),
        (b"GET /%41 HTTP/1.1", 0, True),
        (b"GET /a HTTP/1.1", 1, False),
        (b"GET /a?b HTTP/1.1", 0, False),
        (b"GET http://x/a HTTP/1.1", 0, False),
        (b"HEAD /a HTTP/1.1", 0, False),
        (b"OPTIONS * HTTP/1.1", 0, False),
    ],
)
def test_heads_that_are_remembered(line: bytes, more: int, kept: bool) -> None:
    """A short GET without a query is remembered as it was parsed, and found by all of its bytes alone."""
    filler = KNOWN_BYTES + more - len(line) - len(b"\r\nHost: x\r\nX: \r\n\r\n")
    received = line + b"\r\nHost: x\r\nX: " + b"y" * filler + b"\r\n\r\n"
    known = KnownHeads()
    assert known.get(received) is None
    parsed, expected = parse_head(received, LIMITS), parse_head(received, LIMITS)
    assert parsed is not None
    assert expected is not None
    known.add(parsed)
    for _time in range(2):
        found = known.get(received)
        assert (found is not None) == kept
        if found is not None:
            assert found.environ == expected.environ
            for attribute in ("length", "keep_alive", "expects", "size", "raw", "alone"):
                assert getattr(found, attribute) == getattr(expected, attribute)
            found.environ["HTTP_X"] = "changed"
        parsed.environ["HTTP_X"] = "changed"
    assert known.get(received[:-1]) is None
    assert known.get(received + b"x") is None


def test_number_of_heads_that_are_remembered() -> None:
    """Only so many heads are remembered; each new one drives out the oldest."""
    known = KnownHeads()
    heads = [b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(KNOWN_HEADS + 1)]
    for one in heads:
        assert known.get(heads[0]) is not None or one is heads[0]
        parsed = parse_head(one, LIMITS)
        assert parsed is not None
        known.add(parsed)
    assert [known.get(one) is None for one in heads] == [True] + [False] * KNOWN_HEADS


def test_longest_request_line() -> None:
    """A request line may have exactly as many bytes as the limit says, with either line break, complete or not."""
    line = b"GET /" + b"x" * (SMALL.request_line - len(b"GET / HTTP/1.1")) + b" HTTP/1.1"
    assert len(line) == SMALL.request_line
    rest = b"Host: x\r\n\r\n"
    for end in (b"\r\n", b"\n"):
        taken(line + end + rest, SMALL)
        assert refused(b"GET /x" + line[5:] + end + rest, SMALL) == 414
    assert parse_head(line, SMALL) is None
    assert is_too_large(b"GET /x" + line[5:], SMALL)


def test_date_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Date field is the same object within a second, so a cached response is not put together anew."""
    monkeypatch.setattr("guestapi.http.response.time.time", lambda: 1_000_000_000.2)
    first = date_line()
    assert first == b"Date: Sun, 09 Sep 2001 01:46:40 GMT\r\n"
    assert date_line() is first
    monkeypatch.setattr("guestapi.http.response.time.time", lambda: 1_000_000_001.0)
    assert date_line() == b"Date: Sun, 09 Sep 2001 01:46:41 GMT\r\n"


def test_environ_has_no_other_keys() -> None:
    """The environ has what PEP 3333 and the server name, and nothing of what the parser notes for itself."""
    own = [key for key in taken(head(b"X-Any: 1")).environ if key.startswith("_")]
    assert own == []


def test_bytes_of_the_head() -> None:
    """A head has its bytes as they were received, without what follows."""
    head = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    parsed = parse_head(head + b"body", LIMITS)
    assert parsed is not None
    assert parsed.raw == head


def test_end_of_a_head_from_the_beginning() -> None:
    """The empty line is found wherever it stands, by default from the first byte on."""
    for end in (b"\n\n", b"\n\r\n"):
        assert ends_head(end)
        assert ends_head(b"GET / HTTP/1.1" + end)
        assert not ends_head(end[:-1])
        assert ends_head(b"xx" + end, 2 + len(end) - 1)


@pytest.mark.parametrize(("more", "known"), [(0, True), (1, False)])
def test_fields_that_are_remembered(monkeypatch: pytest.MonkeyPatch, more: int, known: bool) -> None:
    """Field lines of exactly the permitted bytes are remembered; with a byte more, they are parsed each time."""
    calls: list[bytes] = []
    parse = request_module._parse_fields

    def counted(fields: bytes, limits: LimitSettings) -> Any:
        calls.append(fields)
        return parse(fields, limits)

    monkeypatch.setattr(request_module, "_parse_fields", counted)
    monkeypatch.setattr(request_module, "KNOWN_BYTES", len(b"Host: x\r\n\r\n") - more)
    fields = KnownFields()
    for _time in range(2):
        assert fields.parse(b"Host: x\r\n\r\n", LIMITS)[0]["HTTP_HOST"] == "x"
    assert len(calls) == (1 if known else 2)


def test_number_of_fields_that_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many sets of field lines are remembered; each new one drives out the oldest."""
    calls: list[bytes] = []
    parse = request_module._parse_fields

    def counted(fields: bytes, limits: LimitSettings) -> Any:
        calls.append(fields)
        return parse(fields, limits)

    monkeypatch.setattr(request_module, "_parse_fields", counted)
    lines = [b"Host: %d\r\n\r\n" % number for number in range(KNOWN_FIELDS + 1)]
    fields = KnownFields()
    for one in lines[:-1] * 2:
        fields.parse(one, LIMITS)
    assert calls == lines[:-1]
    for one in (lines[-1], lines[1], lines[0]):
        fields.parse(one, LIMITS)
    assert calls == [*lines, lines[0]]
