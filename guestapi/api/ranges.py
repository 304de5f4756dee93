"""Which part of a representation a client wants, and whether it wants it at all (RFC 9110, sections 13 and 14).

Pure functions. Where the RFC leaves a choice, as Go's http.ServeContent, whose clients are ours.
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

#: More ranges than this in one request are no download: the whole is sent (RFC 9110, section 14.2, allows it).
MOST = 32

#: 18 digits are an exabyte; more is no number of bytes.
_SPEC = re.compile(r"[ \t]*(\d{0,18})[ \t]*-[ \t]*(\d{0,18})[ \t]*", re.ASCII)
_ETAG = re.compile(r'(?:W/)?"[^"]*"')


class Verdict(Enum):
    """What the conditions of a request come to."""

    SEND = "send"
    NOT_MODIFIED = "not modified"
    FAILED = "precondition failed"


def judge(environ: Mapping[str, str], etag: str, modified: int) -> Verdict:
    """Evaluate If-Match, If-Unmodified-Since, If-None-Match and If-Modified-Since of a GET or HEAD, in that order.

    Args:
        environ: the request's header fields, as WSGI has them.
        etag: the representation's, strong, in its quotes.
        modified: when it was last modified, in whole seconds of Unix time.
    """
    if (wanted := environ.get("HTTP_IF_MATCH")) is not None:
        if not _lists(wanted, etag, weakly=False):
            return Verdict.FAILED
    elif (date := _date(environ.get("HTTP_IF_UNMODIFIED_SINCE"))) is not None and modified > date:
        return Verdict.FAILED
    if (known := environ.get("HTTP_IF_NONE_MATCH")) is not None:
        return Verdict.NOT_MODIFIED if _lists(known, etag, weakly=True) else Verdict.SEND
    date = _date(environ.get("HTTP_IF_MODIFIED_SINCE"))
    return Verdict.NOT_MODIFIED if date is not None and modified <= date else Verdict.SEND


def wanted_ranges(environ: Mapping[str, str], etag: str, modified: int, size: int) -> list[Range]:
    """The ranges that are to be sent; none: the whole.

    Args:
        environ, etag, modified: as for `judge`.
        size: bytes of the representation.

    Raises:
        RangeNotSatisfiable: none of them is there, or it is no range.
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
    # Overlapping ranges that come to more than the whole are an attack or a mistake.
    return [] if len(found) > MOST or sum(length for _offset, length in found) > size else found


def parse(specs: str, size: int) -> list[Range]:
    """The ranges of a representation of `size` bytes that a Range field names after ``bytes=``.

    Raises:
        ValueError: it is no list of ranges, or all of them lie behind the end; the text is empty, or says so.
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
    """An HTTP date in seconds of Unix time; None if there is none, or it is not one."""
    if field is None:
        return None
    try:
        date = parsedate_to_datetime(field)
        return int((date if date.tzinfo else date.replace(tzinfo=UTC)).astimezone(UTC).timestamp())
    except (ValueError, OverflowError):
        return None


def written(seconds: float) -> str:
    """An HTTP date (RFC 9110, section 5.6.7)."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
