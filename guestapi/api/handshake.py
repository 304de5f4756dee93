"""What a client asks of ``/1.0/events``, read from header fields and query by pure functions."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from urllib.parse import unquote_plus, urlsplit

from guestapi.api.errors import BadRequest, Refusal
from guestapi.notifications.events import EventFormat

#: RFC 6455, section 1.3.
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
#: An id of the change log fits into SQLite's 63 bits. Not every number of 19 digits does.
_ID_DIGITS = 18
#: The types that an event for a guest can have. A stream keeps no other word of what its client asks for.
_TYPES = frozenset({"attribute", "config", "device", "notice"})


def _parameter(name: str) -> re.Pattern[str]:
    """The first pair of a query, with a "&" before it, that has this name; the group is its value, None without "=".

    Like Go, it reads percent-encoded names, and ignores a pair with a semicolon or a malformed escape. It reads each
    byte a bounded number of times, whatever the guest sends.
    """
    encoded = "".join(f"(?:{letter}|%{ord(letter):02x}|%{ord(letter):02X})" for letter in name)
    return re.compile(f"&{encoded}(?:=([^&;%]*(?:%[0-9A-Fa-f]{{2}}[^&;%]*)*))?(?=&|\\Z)")


_TYPE, _SINCE = _parameter("type"), _parameter("since")


def _token(name: str) -> re.Pattern[str]:
    """Finds a token among those of a list, in any case and with any parameters (RFC 9110, section 5.6.1)."""
    return re.compile(rf"(?i)(?:\A|,)[ \t]*+{re.escape(name)}[ \t]*+(?:[;,]|\Z)")


_EVENT_STREAM, _UPGRADE, _VERSION = _token("text/event-stream"), _token("upgrade"), _token("13")


class ForeignOrigin(Refusal):
    """A page of another origin opens the WebSocket in a browser (RFC 6455, section 10.2)."""

    status_code = 403
    text = "the Origin is not this Host"


def event_format_of(environ: Mapping[str, str]) -> EventFormat:
    """Return the format that the client asks for. Only ``Upgrade: websocket`` in lower case asks for a WebSocket."""
    if environ.get("HTTP_UPGRADE") == "websocket":
        return EventFormat.WEBSOCKET
    if _EVENT_STREAM.search(environ.get("HTTP_ACCEPT", "")):
        return EventFormat.SERVER_SENT
    return EventFormat.LINES


def accept(environ: Mapping[str, str], *, checks_origin: bool = True, checks_key: bool = True) -> str:
    """Compute the Sec-WebSocket-Accept of an upgrade (RFC 6455, section 4.2).

    Args:
        environ: the request's header fields, named as in WSGI.
        checks_origin: whether an Origin has to be the Host.
        checks_key: whether the key has to be 16 bytes in base64; otherwise, it only has to be there.

    Raises:
        BadRequest: Connection, version or key is missing or malformed.
        ForeignOrigin: the client sent an Origin that differs from the Host.
    """
    version = {"Sec-WebSocket-Version": "13"}
    if not _UPGRADE.search(environ.get("HTTP_CONNECTION", "")):
        raise BadRequest("Connection: Upgrade is needed", headers=version)
    if not _VERSION.search(environ.get("HTTP_SEC_WEBSOCKET_VERSION", "")):
        raise BadRequest("Sec-WebSocket-Version: 13 is needed", headers=version)
    origin = environ.get("HTTP_ORIGIN")
    if checks_origin and origin is not None and not _same_host(origin, environ.get("HTTP_HOST", "")):
        raise ForeignOrigin(headers=version)
    key = environ.get("HTTP_SEC_WEBSOCKET_KEY", "")
    if not (_is_nonce(key) if checks_key else key):
        raise BadRequest("Sec-WebSocket-Key: 16 bytes in base64 are needed", headers=version)
    return base64.b64encode(hashlib.sha1((key + _GUID).encode("latin-1")).digest()).decode()


def _is_nonce(key: str) -> bool:
    """Whether a key is 16 bytes in base64."""
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        return False


def types_of(query: str) -> frozenset[str] | None:
    """Return the event types of the first ``type=``, split at commas only; None for all if it is absent or empty.

    Types that no event has are left out.
    """
    wanted = unquote_plus(_first(query, _TYPE) or "")
    return _TYPES.intersection(wanted.split(",")) if wanted else None


def since_of(environ: Mapping[str, str], query: str) -> int | None:
    """Return the id after which the client resumes, from ``?since=`` or Last-Event-ID; None if it begins now.

    Args:
        environ: the request's header fields, named as in WSGI.
        query: the request's.

    Raises:
        BadRequest: it is not an id.
    """
    # The header field wins: when a browser reconnects, it repeats the original URL with its ``?since=``.
    given = environ.get("HTTP_LAST_EVENT_ID")
    if not given:
        given = _first(query, _SINCE)
        if given is None:
            return None
        # A longer one, each digit of it percent-encoded, is none either way.
        given = unquote_plus(given) if len(given) <= 3 * _ID_DIGITS else ""
    if not (given.isascii() and given.isdigit() and len(given) <= _ID_DIGITS):
        raise BadRequest("since is not the id of an event; send the last one's, or 0 for all that are kept")
    return int(given)


def _first(query: str, parameter: re.Pattern[str]) -> str | None:
    """The value of a parameter's first pair, still percent-encoded; None if it is absent."""
    found = parameter.search("&" + query) if query else None
    return None if found is None else found[1] or ""


def _same_host(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
