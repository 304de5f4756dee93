"""Requests, parsed by guestapi and by h11: an accepted request has the same meaning for both.

The intended differences are in `read_by_h11`, `seen_by_h11` and `check_head`; guestapi accepts nothing else.
"""

from __future__ import annotations

import re

import h11

from guestapi.http.body import Body
from guestapi.http.errors import ProtocolError
from guestapi.http.request import Head, parse_head
from guestapi.settings import LimitSettings

LIMITS = LimitSettings()
#: The statuses with which a request can be refused before its body is read, and while it is read.
STATUSES = {400, 413, 414, 417, 431, 501, 505}
BODY_STATUSES = {400, 413}


def read_by_h11(received: bytes) -> tuple[h11.Connection, h11.Request | None]:
    """Return h11's parser and its request, or None if the request is incomplete. Raises h11.RemoteProtocolError."""
    # RFC 3986 does not permit bytes from 0x80 on in a target. Go accepts them, and so does guestapi; h11 gets others
    # instead.
    line, end, rest = received.partition(b"\n")
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(bytes(byte if byte < 0x80 else 0x7E for byte in line) + end + rest)
    event = connection.next_event()
    return connection, event if isinstance(event, h11.Request) else None


def seen_by_h11(request: h11.Request) -> dict[str, str]:
    """Return h11's header fields as in environ: repeated ones joined, those with an underscore left out."""
    fields: dict[str, str] = {}
    for raw_name, value in request.headers:
        name = raw_name.decode().upper()
        if "_" not in name:
            key = name.replace("-", "_")
            key = key if key in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{key}"
            fields[key] = f"{fields[key]},{value.decode('latin-1')}" if key in fields else value.decode("latin-1")
    return fields


def framing_by_h11(request: h11.Request) -> int | None:
    """Return the length of the body according to h11; None: it is chunked."""
    fields = dict(request.headers)
    if b"transfer-encoding" in fields:
        return None
    return int(fields.get(b"content-length", b"0"))


def check_head(received: bytes) -> tuple[Head, h11.Connection] | None:
    """Compare an accepted head with h11's; return None if it is refused or incomplete.

    Raises:
        AssertionError: it has another meaning for h11, or the refusal has an unknown status.
    """
    try:
        found = parse_head(received, LIMITS)
    except ProtocolError as refusal:
        _check_refusal(refusal, STATUSES)
        return None
    try:
        connection, request = read_by_h11(received)
    except h11.RemoteProtocolError:
        assert found is None, "accepted, but h11 refuses it"
        return None
    if found is None:
        assert request is None, "incomplete, but complete for h11"
        return None
    assert request is not None, "accepted, but h11 waits for more"
    environ = found.environ
    assert environ["REQUEST_METHOD"].encode() == request.method
    assert re.sub(r"[\x80-\xff]", "~", environ["RAW_URI"]).encode() == request.target
    ours = {key: value for key, value in environ.items() if key.startswith(("HTTP_", "CONTENT_"))}
    if "HTTP_TRANSFER_ENCODING" in ours:
        # The name of a coding does not depend on case (RFC 9112, section 7); h11 converts it to lower case.
        ours["HTTP_TRANSFER_ENCODING"] = ours["HTTP_TRANSFER_ENCODING"].lower()
    assert ours == seen_by_h11(request)
    assert found.length == framing_by_h11(request)
    return found, connection


def check_requests(received: bytes) -> None:
    """Compare all requests in `received` with h11's: content, bodies, and where the next one begins.

    Raises:
        AssertionError: one has another meaning for h11, or a refusal has an unknown status.
    """
    while taken := check_head(received):
        head, connection = taken
        source = _Received(received[head.size :])
        try:
            if head.length is not None and head.length > LIMITS.body:
                raise ProtocolError(413, "too large")
            content = Body(source, head.length, LIMITS.body, head.expects).readall()
        except ProtocolError as refusal:
            _check_refusal(refusal, BODY_STATUSES)
            return
        assert (content, source.left) == _body_by_h11(connection)
        received = source.left


def _check_refusal(refusal: ProtocolError, statuses: set[int]) -> None:
    assert refusal.status in statuses
    assert refusal.text.isprintable()


def _body_by_h11(connection: h11.Connection) -> tuple[bytes, bytes]:
    content = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Data), "accepted, but h11 waits for more"
        content += event.data
    return content, connection.trailing_data[0]


class _Received:
    """The received bytes of a body, after which nothing more arrives (`body.Source`)."""

    def __init__(self, left: bytes) -> None:
        self.left = left

    def peek_line(self, limit: int) -> bytes:
        """Return the next line without consuming it."""
        end = self.left.find(b"\n", 0, limit)
        if end < 0:
            raise ProtocolError(400, "a line is too long, or cut short")
        return self.left[: end + 1]

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        if not self.left:
            raise ProtocolError(400, "the body is cut short")
        taken, self.left = self.left[:size], self.left[size:]
        return taken

    def send_interim(self, _response: bytes) -> None:
        """Discard the response."""
