"""Responses: status line, header fields, and the whole of an error response."""

from __future__ import annotations

import time
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus


class _Date:
    """The Date header field, formatted once a second."""

    __slots__ = ("_line", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._line = b""

    def line(self) -> bytes:
        """Return the Date field. Within a second it is the same object, so callers can compare by identity."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = f"Date: {formatdate(second, usegmt=True)}\r\n".encode()
        return self._line


date_line = _Date().line

#: Falcon has header names in lower case. Clients ignore case, but people read the names and scripts grep for them.
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
    """Write the status line and the application's header fields. `date_line` and `response_end` follow them.

    Args:
        status: code and reason, like ``200 OK``.
        headers: the application's fields, with Content-Length.
        protocol: version of the request. A request of HTTP/1.0 is answered with HTTP/1.0.
    """
    lines = [f"{_SPELLED.get(name) or name.title()}: {value}\r\n" for name, value in headers]
    return f"{protocol} {status}\r\n{''.join(lines)}".encode("latin-1")


def response_end(protocol: str = "HTTP/1.1", *, close: bool = False) -> bytes:
    """Write the end of a response's head, which follows `date_line`.

    Args:
        protocol: version of the request.
        close: whether the connection ends after this response.
    """
    if close:
        return b"Connection: close\r\n\r\n"
    return b"Connection: keep-alive\r\n\r\n" if protocol == "HTTP/1.0" else b"\r\n"


def stream_head(status: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """Write the whole head of a stream's response. The server adds no field of its own."""
    return "".join([f"HTTP/1.1 {status}\r\n", *[f"{name}: {value}\r\n" for name, value in headers], "\r\n"]).encode(
        "latin-1"
    )


def error_response(status: int, text: str, *, retry_after: bool = False) -> bytes:
    """Write a whole response that says in one line what was wrong, and that the connection ends.

    Args:
        status: HTTP status code.
        text: one line without its LF.
        retry_after: whether to add ``Retry-After: 1``.
    """
    body = f"{text}\n".encode("latin-1", "replace")
    fields = [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Length", str(len(body))),
        *([("Retry-After", "1")] if retry_after else []),
    ]
    head = response_fields(f"{status} {HTTPStatus(status).phrase}", fields)
    return b"".join((head, date_line(), response_end(close=True), body))
