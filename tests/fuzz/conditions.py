"""The conditions of a request for the tree: If-None-Match and ``wait``, beside a second reading of the same rules."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote_to_bytes

from guestapi.api.errors import BadRequest
from guestapi.api.waiting import Condition, condition_of
from guestapi.wsgi import QUERY

#: Each number of seconds that a request may wait, as it is written.
_WAITS = {str(seconds).encode(): seconds for seconds in range(1, 61)}


def check_conditions(data: bytes) -> None:
    """Read `data` as If-None-Match and, after a NUL, as a query: a condition or a refusal, as the rules say.

    Raises:
        AssertionError: it is another one.
    """
    field, _separator, query = data.partition(b"\0")
    environ = {"HTTP_IF_NONE_MATCH": field.decode("latin-1"), QUERY: query.decode("latin-1")}
    tags, seconds = _read_tags(field), _read_wait(query)
    found = _condition(environ)
    if found is None:
        assert tags is None or seconds is None, "a right one is refused"
        return
    assert tags is not None, f"accepted as tags: {found.tags!r}"
    assert seconds is not None, f"accepted as a wait of {found.seconds} s"
    assert found.seconds == seconds
    assert found.tags == frozenset(tag.decode("latin-1") for tag in tags)
    anything = b"*" in tags
    assert found.knows('"5d41"') == (anything or b'"5d41"' in tags)
    assert all(found.knows(tag.decode("latin-1")) for tag in tags)


def _condition(environ: Mapping[str, str]) -> Condition | None:
    """Return what the service reads; None if it refuses."""
    try:
        return condition_of(environ)
    except BadRequest:
        return None


def _read_tags(field: bytes) -> set[bytes] | None:
    """Read a list of entity tags, byte by byte (RFC 9110, sections 5.6.1 and 8.8.3); None if it is none."""
    if field.strip(b" \t") == b"*":
        return {b"*"}
    found: set[bytes] = set()
    at, may_begin = 0, True
    while at < len(field):
        one = field[at : at + 1]
        if one in b" \t":
            at += 1
        elif one == b",":
            at, may_begin = at + 1, True
        elif may_begin:
            begin = at + 2 if field[at : at + 2] == b"W/" else at
            end = field.find(b'"', begin + 1)
            if field[begin : begin + 1] != b'"' or end < 0:
                return None
            tag = field[begin : end + 1]
            if any(byte <= 0x20 or byte == 0x7F for byte in tag):
                return None
            found.add(tag)
            at, may_begin = end + 1, False
        else:
            return None
    return found or None


def _read_wait(query: bytes) -> int | None:
    """Read ``wait`` in a query; 0 if it is not there, None if it is wrong."""
    pairs = [pair.partition(b"=") for pair in query.split(b"&")]
    values = [_decoded(value) for name, _equals, value in pairs if _decoded(name) == b"wait"]
    if not values:
        return 0
    return _WAITS.get(values[0]) if len(values) == 1 else None


def _decoded(text: bytes) -> bytes:
    return unquote_to_bytes(text.replace(b"+", b" "))
