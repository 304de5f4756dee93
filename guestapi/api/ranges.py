"""Conditional and range requests (RFC 9110, sections 13 and 14), as pure functions.

Where the RFC leaves a choice, they decide as Go's http.ServeContent, for which existing clients were written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum

from guestapi.api.errors import RangeNotSatisfiable

#: Offset of the first byte, and number of bytes.
Range = tuple[int, int]

#: The most ranges of one request. If there are more, the whole is sent, as RFC 9110, section 14.2, allows.
MOST_RANGES = 32

#: 18 digits are an exabyte. No file has more bytes.
_SPEC = re.compile(r"[ \t]*(\d{0,18})[ \t]*-[ \t]*(\d{0,18})[ \t]*", re.ASCII)
_ETAG = re.compile(r'(?:W/)?"[^"]*"')


class ConditionResult(Enum):
    """The result of a request's conditions."""

    SEND = "send"
    NOT_MODIFIED = "not modified"
    FAILED = "precondition failed"


def judge(environ: Mapping[str, str], etag: str, modified: int) -> ConditionResult:
    """Evaluate If-Match, If-Unmodified-Since, If-None-Match and If-Modified-Since of a GET or HEAD, in that order.

    Args:
        environ: the request's header fields, named as in WSGI.
        etag: strong ETag of the representation, in its quotes.
        modified: when it was last modified, in whole seconds of Unix time.
    """
    if (wanted := environ.get("HTTP_IF_MATCH")) is not None:
        if not _lists(wanted, etag, weakly=False):
            return ConditionResult.FAILED
    elif (date := _date(environ.get("HTTP_IF_UNMODIFIED_SINCE"))) is not None and modified > date:
        return ConditionResult.FAILED
    if (known := environ.get("HTTP_IF_NONE_MATCH")) is not None:
        return ConditionResult.NOT_MODIFIED if _lists(known, etag, weakly=True) else ConditionResult.SEND
    date = _date(environ.get("HTTP_IF_MODIFIED_SINCE"))
    return ConditionResult.NOT_MODIFIED if date is not None and modified <= date else ConditionResult.SEND


def wanted_ranges(environ: Mapping[str, str], etag: str, modified: int, size: int) -> list[Range]:
    """Return the ranges to send; an empty list for the whole.

    Args:
        environ: as for `judge`.
        etag: as for `judge`.
        modified: as for `judge`.
        size: bytes of the representation.

    Raises:
        RangeNotSatisfiable: the field is malformed, or the representation has none of the ranges.
    """
    field = environ.get("HTTP_RANGE")
    if field is None or not field.startswith("bytes="):
        return []
    condition = environ.get("HTTP_IF_RANGE")
    if condition is not None and condition.strip() != etag and _date(condition) != modified:
        return []
    try:
        found = parse(field.removeprefix("bytes="), size)
    except ValueError as error:
        raise RangeNotSatisfiable(f"invalid range{error}", headers={"Content-Range": f"bytes */{size}"}) from None
    # Overlapping ranges with more bytes than the whole are an attack or a mistake.
    return [] if len(found) > MOST_RANGES or sum(length for _offset, length in found) > size else found


def parse(specs: str, size: int) -> list[Range]:
    """Parse what follows ``bytes=`` in a Range field, for a representation of `size` bytes.

    Raises:
        ValueError: it is not a list of ranges, or all ranges lie behind the end. Only in the latter case it has a text.
    """
    found = []
    beyond = False
    for spec in specs.split(","):
        if not spec.strip(" \t"):
            continue
        match = _SPEC.fullmatch(spec)
        if match is None or match[1] == match[2] == "":
            raise ValueError
        if match[1] == "":
            length = min(int(match[2]), size)
            offset = size - length
        else:
            offset = int(match[1])
            last = int(match[2]) if match[2] else size - 1
            if match[2] and last < offset:
                raise ValueError
            length = min(last, size - 1) - offset + 1
        if length <= 0:
            beyond = True
        else:
            found.append((offset, length))
    if beyond and not found:
        raise ValueError(": failed to overlap")
    return found


def _lists(field: str, etag: str, *, weakly: bool) -> bool:
    if field.strip() == "*":
        return True
    tags = _ETAG.findall(field)
    return etag in ([tag.removeprefix("W/") for tag in tags] if weakly else tags)


def _date(field: str | None) -> int | None:
    """Read an HTTP date as seconds of Unix time; None if it is absent or malformed."""
    if field is None:
        return None
    try:
        date = parsedate_to_datetime(field)
        return int((date if date.tzinfo else date.replace(tzinfo=UTC)).astimezone(UTC).timestamp())
    except (ValueError, OverflowError):
        return None


def http_date(seconds: float) -> str:
    """Write an HTTP date (RFC 9110, section 5.6.7) from seconds of Unix time."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
