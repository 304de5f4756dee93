"""Ranges and conditions of requests, as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guestapi.api.errors import RangeNotSatisfiable
from guestapi.api.ranges import MOST_RANGES, ConditionResult, http_date, judge, parse, wanted_ranges

ETAG = '"abc"'
#: Sun, 06 Nov 1994 08:49:37 GMT (RFC 9110, section 5.6.7).
MODIFIED = 784_111_777
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
EARLIER, LATER = "Sun, 06 Nov 1994 08:49:36 GMT", "Sun, 06 Nov 1994 08:49:38 GMT"


@pytest.mark.parametrize(
    ("specs", "found"),
    [
        ("0-9", [(0, 10)]),
        ("0-", [(0, 100)]),
        ("99-", [(99, 1)]),
        ("90-1000", [(90, 10)]),
        ("-10", [(90, 10)]),
        ("-1000", [(0, 100)]),
        ("0-0,-1", [(0, 1), (99, 1)]),
        (" 0 - 3 ,\t5-8,, ", [(0, 4), (5, 4)]),
        ("200-, 5-5", [(5, 1)]),
        ("", []),
    ],
)
def test_ranges(specs: str, found: list[tuple[int, int]]) -> None:
    """Of 100 bytes, ranges are offsets and lengths; parts beyond the end are cut off or left out."""
    assert parse(specs, 100) == found


@pytest.mark.parametrize(
    "specs", ["x", "-", "5", "5-4", "--5", "1-2-3", "+1-2", "1.0-2", "0x1-2", "١-٢", "9" * 30 + "-", "0-1;2-3"]
)
def test_no_ranges(specs: str) -> None:
    """A malformed list of ranges is refused with 416 and the number of bytes."""
    with pytest.raises(RangeNotSatisfiable) as raised:
        wanted_ranges({"HTTP_RANGE": f"bytes={specs}"}, ETAG, MODIFIED, 100)
    assert raised.value.text == "invalid range"
    assert dict(raised.value.headers or {})["Content-Range"] == "bytes */100"


@pytest.mark.parametrize("specs", ["100-", "100-200", "-0", "100-,200-"])
def test_ranges_behind_the_end(specs: str) -> None:
    """If no range has a byte, they are refused."""
    with pytest.raises(RangeNotSatisfiable) as raised:
        wanted_ranges({"HTTP_RANGE": f"bytes={specs}"}, ETAG, MODIFIED, 100)
    assert raised.value.text == "invalid range: failed to overlap"


@given(st.text(alphabet="0123456789-, x", max_size=30), st.integers(1, 10**12))
def test_ranges_are_within(specs: str, size: int) -> None:
    """Any accepted ranges lie within the file, and are not larger than it in total."""
    try:
        found = wanted_ranges({"HTTP_RANGE": f"bytes={specs}"}, ETAG, MODIFIED, size)
    except RangeNotSatisfiable:
        return
    assert all(offset >= 0 and length > 0 and offset + length <= size for offset, length in found)
    assert sum(length for _offset, length in found) <= size


@pytest.mark.parametrize(
    "field",
    ["items=0-1", "0-1", "bytes 0-1", "bytes=0-,0-", "bytes=" + ",".join(f"{n}-{n}" for n in range(MOST_RANGES + 1))],
)
def test_ranges_that_are_ignored(field: str) -> None:
    """With another unit, ranges larger than the whole in total, or too many ranges, the whole is sent."""
    assert wanted_ranges({"HTTP_RANGE": field}, ETAG, MODIFIED, 100) == []


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (ETAG, True),
        (DATE, True),
        ('"other"', False),
        (f"W/{ETAG}", False),
        (EARLIER, False),
        (LATER, False),
        ("", False),
    ],
)
def test_if_range(condition: str, holds: bool) -> None:
    """A range applies only if If-Range matches exactly."""
    fields = {"HTTP_RANGE": "bytes=0-0", "HTTP_IF_RANGE": condition}
    assert wanted_ranges(fields, ETAG, MODIFIED, 100) == ([(0, 1)] if holds else [])


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({}, ConditionResult.SEND),
        ({"IF_NONE_MATCH": ETAG}, ConditionResult.NOT_MODIFIED),
        ({"IF_NONE_MATCH": f'"x", W/{ETAG}'}, ConditionResult.NOT_MODIFIED),
        ({"IF_NONE_MATCH": "*"}, ConditionResult.NOT_MODIFIED),
        ({"IF_NONE_MATCH": '"x"'}, ConditionResult.SEND),
        ({"IF_NONE_MATCH": '"x"', "IF_MODIFIED_SINCE": DATE}, ConditionResult.SEND),
        ({"IF_MODIFIED_SINCE": DATE}, ConditionResult.NOT_MODIFIED),
        ({"IF_MODIFIED_SINCE": LATER}, ConditionResult.NOT_MODIFIED),
        ({"IF_MODIFIED_SINCE": EARLIER}, ConditionResult.SEND),
        ({"IF_MODIFIED_SINCE": "yesterday"}, ConditionResult.SEND),
        ({"IF_MODIFIED_SINCE": "Sun, 99 Nov 1994 08:49:37 GMT"}, ConditionResult.SEND),
        ({"IF_MATCH": ETAG}, ConditionResult.SEND),
        ({"IF_MATCH": "*"}, ConditionResult.SEND),
        ({"IF_MATCH": f"W/{ETAG}"}, ConditionResult.FAILED),
        ({"IF_MATCH": '"x"', "IF_NONE_MATCH": ETAG}, ConditionResult.FAILED),
        ({"IF_UNMODIFIED_SINCE": EARLIER}, ConditionResult.FAILED),
        ({"IF_UNMODIFIED_SINCE": DATE}, ConditionResult.SEND),
        ({"IF_UNMODIFIED_SINCE": EARLIER, "IF_MATCH": ETAG}, ConditionResult.SEND),
    ],
)
def test_conditions(fields: dict[str, str], verdict: ConditionResult) -> None:
    """Conditions are evaluated in the order of RFC 9110, section 13.2.2; an invalid date is ignored."""
    assert judge({f"HTTP_{name}": value for name, value in fields.items()}, ETAG, MODIFIED) is verdict


@given(st.integers(0, 2**32))
@example(MODIFIED - 1)
@example(MODIFIED)
@example(MODIFIED + 1)
def test_dates_are_compared_by_the_second(seconds: int) -> None:
    """A date is compared with the modification time by the second."""
    found = judge({"HTTP_IF_MODIFIED_SINCE": http_date(seconds)}, ETAG, MODIFIED)
    assert found is (ConditionResult.SEND if seconds < MODIFIED else ConditionResult.NOT_MODIFIED)


@given(st.text(max_size=40))
def test_dates_of_any_form(text: str) -> None:
    """Any text as a date is a valid date or ignored; without a digit it is ignored."""
    found = judge({"HTTP_IF_MODIFIED_SINCE": text}, ETAG, MODIFIED)
    assert found in (
        {ConditionResult.SEND, ConditionResult.NOT_MODIFIED} if any(map(str.isdigit, text)) else {ConditionResult.SEND}
    )


def test_http_date() -> None:
    """Dates have the form of RFC 9110."""
    assert http_date(MODIFIED + 0.9) == DATE
