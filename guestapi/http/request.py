"""The head of a request (RFC 9112): bytes -> WSGI environ.

gunicorn_h1c (gunicorn's C parser) parses the head. It refuses Content-Length together with Transfer-Encoding, repeated
lengths, white space before a colon, bare CR and control characters. This module refuses what gunicorn_h1c accepts but
must not be accepted: folded lines, more than one space in the request line, empty lines before it, lengths of more than
64 bits, a missing or malformed Host, and targets that are neither a path nor an absolute URI.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote_to_bytes

from gunicorn_h1c import IncompleteError, LimitRequestHeaders, LimitRequestLine, ParseError, parse_to_wsgi_environ

from guestapi.http.errors import ProtocolError
from guestapi.http.target import split_target
from guestapi.settings import Limits

Environ = dict[str, Any]

#: The bytes that Go's net/http accepts in Host (httpguts.ValidHostHeader): those of RFC 3986's "host" and "port".
_HOST = re.compile(r"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*")
_REQUEST_LINE = re.compile(rb"[!-~]+ (\S+) HTTP/([0-9])\.[0-9]\r?\n")
#: A number of 15 digits fits into 64 bits.
_LENGTH_DIGITS = 15


class Head:
    """A parsed head: what the server needs to know of a request.

    Attributes:
        environ: the WSGI environ (PEP 3333), and ``RAW_PATH`` and ``RAW_URI`` as they were sent.
        size: bytes of the head.
        length: bytes of the body; None if it comes in chunks.
        expects: whether the client waits for ``100 Continue`` before it sends the body.
        keep_alive: whether the client may send another request on this connection.
        alone: the received bytes, if they are this head and nothing else and it has no body; otherwise None.
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
    """Tell whether the empty line that ends a head stands at or after `start`."""
    start = max(0, start - 3)
    return received.find(b"\n\r\n", start) >= 0 or received.find(b"\n\n", start) >= 0


def is_too_large(received: bytes, limits: Limits) -> bool:
    """Tell whether the beginning of a head exceeds a limit, whatever follows."""
    return len(received) > limits.head or (len(received) > limits.request_line and b"\n" not in received)


def parse_head(received: bytes, limits: Limits) -> Head | None:
    """Parse the head at the start of `received`.

    Args:
        received: bytes as received from the client.
        limits: sizes in bytes and numbers of fields.

    Returns:
        The head; None if it is not complete yet.

    Raises:
        ProtocolError: the server does not accept this request.
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
    # A line that begins with white space continues the line before (RFC 9112, section 5.2). gunicorn_h1c turns it into
    # a header field without a name.
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
    """Set ``RAW_PATH`` and ``RAW_URI`` as they were sent, and decode ``PATH_INFO`` as PEP 3333 requires."""
    path: str = environ["PATH_INFO"]
    query: str = environ["QUERY_STRING"]
    target = f"{path}?{query}" if query else path
    # The path is empty where the target is only a query.
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
    """The length of the body (RFC 9112, section 6.3). The parser has refused both lengths at once."""
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
    """Drop header fields with an underscore in their name: in an environ, X_Y cannot be told from X-Y."""
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
    """Translate the parser's error into the answer for the client."""
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
