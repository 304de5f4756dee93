"""HTTP/1.1 (RFC 9112) as pure functions: bytes -> environ, answer -> bytes. This file does no I/O.

The head is parsed by gunicorn_h1c (gunicorn's C parser), which refuses Content-Length with Transfer-Encoding, doubled
lengths, white space before a colon, bare CR and control characters. What it lets pass and must not is refused here:
folded lines, more than one space in the request line, empty lines before it, lengths beyond 64 bits, a missing or
malformed Host, targets that are neither a path nor an absolute URI.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes

from gunicorn_h1c import IncompleteError, LimitRequestHeaders, LimitRequestLine, ParseError, parse_to_wsgi_environ

from guestapi.api.paths import split_target
from guestapi.settings import Limits

Environ = dict[str, Any]

#: The bytes that Go's net/http lets a Host have (httpguts.ValidHostHeader): RFC 3986 "host" and "port", no more.
_HOST = re.compile(r"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*")
_REQUEST_LINE = re.compile(rb"[!-~]+ (\S+) HTTP/([0-9])\.[0-9]\r?\n")
#: 15 digits fit into 64 bits, whoever does the sum.
_LENGTH_DIGITS = 15


class ProtocolError(OSError):
    """The request cannot be taken. It is answered with ``status`` and one line of text, and the connection ends.

    An OSError, because that is what a WSGI application has to expect of ``wsgi.input``.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Head:
    """What the server itself needs to know of a request whose head was read.

    Attributes:
        environ: PEP 3333, with ``RAW_PATH`` and ``RAW_URI`` besides.
        size: how many bytes the head has.
        length: of the body; None if it comes in chunks.
        expects: the client waits for ``100 Continue`` before it sends the body.
        keep_alive: the client may send another request after this one.
        alone: what was received, if that is the head and nothing else, and no body belongs to it.
    """

    __slots__ = ("alone", "environ", "expects", "keep_alive", "length", "size")

    def __init__(self, environ: Environ, size: int, length: int | None, expects: bool, keep_alive: bool) -> None:
        self.environ = environ
        self.size = size
        self.length = length
        self.expects = expects
        self.keep_alive = keep_alive
        self.alone: bytes | None = None


def ends_head(received: bytes, start: int = 0) -> bool:
    """Whether there is an end of a head at or after `start`: an empty line."""
    start = max(0, start - 3)
    return received.find(b"\n\r\n", start) >= 0 or received.find(b"\n\n", start) >= 0


def parse_head(received: bytes, limits: Limits) -> Head | None:
    """The head at the start of `received`, or None if it is not complete yet.

    Raises:
        ProtocolError: it is no request that this server takes.
    """
    if received[:1] in (b"\r", b"\n"):
        raise ProtocolError(400, "an empty line stands before the request line")
    try:
        environ: Environ = parse_to_wsgi_environ(
            received,
            limit_request_line=limits.request_line,
            limit_request_fields=limits.header_fields,
            limit_request_field_size=limits.header_field,
            permit_unconventional_http_method=True,
            permit_unconventional_http_version=True,
        )
    except IncompleteError:
        if len(received) > limits.request_line and b"\n" not in received:
            raise ProtocolError(414, f"the request line is longer than {limits.request_line} bytes") from None
        if len(received) > limits.head:
            raise ProtocolError(431, f"the head is larger than {limits.head} bytes") from None
        return None
    except ParseError as error:
        raise _explain(received, error, limits) from None
    size: int = environ.pop("_consumed")
    if size > limits.head:
        raise ProtocolError(431, f"the head is larger than {limits.head} bytes")
    # A line that begins with white space continues the one before (RFC 9112, section 5.2); gunicorn_h1c makes of it a
    # header without a name.
    if "HTTP_" in environ:
        raise ProtocolError(400, "a header field is folded over several lines")
    head = received[:size]
    if b"_" in head:
        environ = _without_underscores(head, environ, limits)
    return _check(head, environ)


def _check(head: bytes, environ: Environ) -> Head:
    if head.count(b" ", 0, head.index(b"\n")) != 2:
        raise ProtocolError(400, "the request line is not: method, one space, target, one space, HTTP/1.1")
    newer = environ["SERVER_PROTOCOL"] != "HTTP/1.0"
    host = environ.get("HTTP_HOST")
    if host is None:
        if newer:
            raise ProtocolError(400, "the Host header field is missing")
    elif not _HOST.fullmatch(host):
        raise ProtocolError(400, "the Host header field is malformed")
    _set_path(environ)
    connection = environ.get("HTTP_CONNECTION")
    keep_alive = newer
    if connection is not None:
        options = {option.strip().lower() for option in connection.split(",")}
        keep_alive = "close" not in options and (newer or "keep-alive" in options)
    expect = environ.get("HTTP_EXPECT")
    if expect is not None and expect.lower() != "100-continue":
        raise ProtocolError(417, "only 100-continue can be expected")
    return Head(environ, len(head), _body_length(environ), expect is not None and newer, keep_alive)


def _set_path(environ: Environ) -> None:
    """``RAW_PATH`` and ``RAW_URI`` as they were sent; ``PATH_INFO`` decoded, as PEP 3333 wants it."""
    path: str = environ["PATH_INFO"]
    query: str = environ["QUERY_STRING"]
    target = f"{path}?{query}" if query else path
    # It is empty where the target is a query alone.
    if path[:1] != "/" or "%" in path:
        if target == "*":
            environ["RAW_PATH"] = environ["RAW_URI"] = "*"
            return
        split = split_target(target)
        if split is None:
            raise ProtocolError(400, "the request target is neither a path nor an absolute URI")
        path, query = split
        environ["PATH_INFO"] = unquote_to_bytes(path.encode("latin-1")).decode("latin-1") if "%" in path else path
        environ["QUERY_STRING"] = query
    environ["RAW_PATH"] = path
    environ["RAW_URI"] = target


def _body_length(environ: Environ) -> int | None:
    """RFC 9112, section 6.3; both lengths at once were refused before."""
    encoding = environ.get("HTTP_TRANSFER_ENCODING")
    if encoding is not None:
        if encoding.lower() != "chunked" or "CONTENT_LENGTH" in environ:
            raise ProtocolError(501, "no transfer encoding but chunked is supported")
        return None
    length = environ.get("CONTENT_LENGTH")
    if length is None:
        return 0
    if len(length) > _LENGTH_DIGITS:
        raise ProtocolError(400, "the Content-Length is not possible")
    return int(length)


def _without_underscores(head: bytes, environ: Environ, limits: Limits) -> Environ:
    """Leave out header fields with an underscore in their name: in an environ they pass for others (X_Y for X-Y)."""
    lines = head.splitlines(keepends=True)
    kept = [lines[0], *(line for line in lines[1:] if b"_" not in line.partition(b":")[0])]
    if len(kept) == len(lines):
        return environ
    environ = parse_to_wsgi_environ(
        b"".join(kept),
        limit_request_line=limits.request_line,
        limit_request_fields=limits.header_fields,
        limit_request_field_size=limits.header_field,
        permit_unconventional_http_method=True,
        permit_unconventional_http_version=True,
    )
    del environ["_consumed"]
    return environ


def _explain(received: bytes, error: ParseError, limits: Limits) -> ProtocolError:
    """The answer to what the parser refused."""
    if isinstance(error, LimitRequestLine):
        return ProtocolError(414, f"the request line is longer than {limits.request_line} bytes")
    if isinstance(error, LimitRequestHeaders):
        text = f"more than {limits.header_fields} header fields, or one longer than {limits.header_field} bytes"
        return ProtocolError(431, text)
    line = _REQUEST_LINE.match(received)
    if line and line[2] != b"1" and line[1].startswith(b"/"):
        return ProtocolError(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    if received.partition(b"\r\n\r\n")[0].count(b"\n") > limits.header_fields:
        return ProtocolError(431, f"more than {limits.header_fields} header fields")
    return ProtocolError(400, f"bad request: {error}")


class _Date:
    """The Date header field, made once a second."""

    __slots__ = ("_line", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._line = b""

    def line(self) -> bytes:
        """The same object for as long as it is the same second."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = f"Date: {formatdate(second, usegmt=True)}\r\n".encode()
        return self._line


date_line = _Date().line

#: Falcon has header names in lower case. Nobody should mind, but people read them and scripts grep for them.
_SPELLED = {
    name.lower(): name
    for name in (
        "Allow",
        "Content-Length",
        "Content-Type",
        "ETag",
        "Location",
        "Retry-After",
        "Sec-WebSocket-Version",
        "X-Content-Type-Options",
    )
}

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def response_fields(status: str, headers: Iterable[tuple[str, str]], protocol: str = "HTTP/1.1") -> bytes:
    """Status line and header fields of a response, up to those that are the server's; `response_end` follows.

    Args:
        status: code and reason, like ``200 OK``.
        headers: the application's, its Content-Length among them.
        protocol: of the request: one of HTTP/1.0 is answered in HTTP/1.0.
    """
    lines = [f"{_SPELLED.get(name) or name.title()}: {value}\r\n" for name, value in headers]
    return f"{protocol} {status}\r\n{''.join(lines)}".encode("latin-1")


def response_end(protocol: str = "HTTP/1.1", *, close: bool = False) -> bytes:
    """What follows `date_line` at the end of a response's head; `close`: it is the connection's last."""
    if close:
        return b"Connection: close\r\n\r\n"
    return b"Connection: keep-alive\r\n\r\n" if protocol == "HTTP/1.0" else b"\r\n"


def stream_head(status: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """The head of a stream's response: just this, and whatever follows."""
    return "".join([f"HTTP/1.1 {status}\r\n", *[f"{name}: {value}\r\n" for name, value in headers], "\r\n"]).encode(
        "latin-1"
    )


def error_response(status: int, text: str, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """A whole last response that says in one line what was wrong."""
    body = f"{text}\n".encode("latin-1", "replace")
    fields = [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Length", str(len(body))),
        *headers,
    ]
    head = response_fields(f"{status} {HTTPStatus(status).phrase}", fields)
    return b"".join((head, date_line(), response_end(close=True), body))
