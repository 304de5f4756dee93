"""What a client asks of ``/1.0/events``, read from header fields and query by pure functions."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

from guestapi.api.errors import BadRequest, Refusal
from guestapi.notifications.events import EventFormat

#: RFC 6455, section 1.3.
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
#: An id of the change log fits into SQLite's 63 bits. Not every number of 19 digits does.
_ID_DIGITS = 18


class ForeignOrigin(Refusal):
    """A page of another origin opens the WebSocket in a browser (RFC 6455, section 10.2)."""

    status_code = 403
    text = "the Origin is not this Host"


def event_format_of(environ: Mapping[str, str]) -> EventFormat:
    """Return the format that the client asks for. Only ``Upgrade: websocket`` in lower case asks for a WebSocket."""
    if environ.get("HTTP_UPGRADE") == "websocket":
        return EventFormat.WEBSOCKET
    if "text/event-stream" in _tokens(environ.get("HTTP_ACCEPT", "")):
        return EventFormat.SERVER_SENT
    return EventFormat.LINES


def accept(environ: Mapping[str, str]) -> str:
    """Compute the Sec-WebSocket-Accept of an upgrade (RFC 6455, section 4.2).

    Raises:
        BadRequest: Connection, version or key is missing or malformed.
        ForeignOrigin: the client sent an Origin that differs from the Host.
    """
    version = {"Sec-WebSocket-Version": "13"}
    if "upgrade" not in _tokens(environ.get("HTTP_CONNECTION", "")):
        raise BadRequest("Connection: Upgrade is needed", headers=version)
    if "13" not in _tokens(environ.get("HTTP_SEC_WEBSOCKET_VERSION", "")):
        raise BadRequest("Sec-WebSocket-Version: 13 is needed", headers=version)
    origin = environ.get("HTTP_ORIGIN")
    if origin is not None and not _same_host(origin, environ.get("HTTP_HOST", "")):
        raise ForeignOrigin(headers=version)
    key = environ.get("HTTP_SEC_WEBSOCKET_KEY", "")
    try:
        valid = len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        valid = False
    if not valid:
        raise BadRequest("Sec-WebSocket-Key: 16 bytes in base64 are needed", headers=version)
    return base64.b64encode(hashlib.sha1((key + _GUID).encode()).digest()).decode()


def types_of(query: str) -> frozenset[str] | None:
    """Return the event types of the first ``type=``, split at commas only; None for all if it is absent or empty."""
    wanted = _first(query, "type") or ""
    return frozenset(wanted.split(",")) if wanted else None


def since_of(environ: Mapping[str, str]) -> int | None:
    """Return the id after which the client resumes, from ``?since=`` or Last-Event-ID; None if it begins now.

    Raises:
        BadRequest: it is not an id.
    """
    # The header field wins: when a browser reconnects, it repeats the original URL with its ``?since=``.
    given = environ.get("HTTP_LAST_EVENT_ID") or _first(environ.get("QUERY_STRING", ""), "since")
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= _ID_DIGITS):
        raise BadRequest("since is not the id of an event; send the last one's, or 0 for all that are kept")
    return int(given)


def _first(query: str, name: str) -> str | None:
    """The first value of a query's parameter; None if it is absent. Like Go, it ignores a pair with a semicolon."""
    pairs = "&".join(pair for pair in query.split("&") if ";" not in pair)
    return parse_qs(pairs, keep_blank_values=True).get(name, [None])[0]


def _tokens(field: str) -> list[str]:
    return [token.split(";")[0].strip().lower() for token in field.split(",")]


def _same_host(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
