"""Ranges and conditions, as pure functions."""

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
    """Of 100 bytes, ranges are offsets and lengths; what lies behind the end is cut, or left out beside others."""
    assert parse(specs, 100) == found


@pytest.mark.parametrize(
    "specs", ["x", "-", "5", "5-4", "--5", "1-2-3", "+1-2", "1.0-2", "0x1-2", "١-٢", "9" * 30 + "-", "0-1;2-3"]
)
def test_no_ranges(specs: str) -> None:
    """What is no list of ranges is refused, and 416 says of how many bytes one could ask."""
    with pytest.raises(RangeNotSatisfiable) as raised:
        wanted_ranges({"HTTP_RANGE": f"bytes={specs}"}, ETAG, MODIFIED, 100)
    assert raised.value.text == "invalid range"
    assert dict(raised.value.headers or {})["Content-Range"] == "bytes */100"


@pytest.mark.parametrize("specs", ["100-", "100-200", "-0", "100-,200-"])
def test_ranges_behind_the_end(specs: str) -> None:
    """Ranges none of which has a byte are refused."""
    with pytest.raises(RangeNotSatisfiable) as raised:
        wanted_ranges({"HTTP_RANGE": f"bytes={specs}"}, ETAG, MODIFIED, 100)
    assert raised.value.text == "invalid range: failed to overlap"


@given(st.text(alphabet="0123456789-, x", max_size=30), st.integers(1, 10**12))
def test_ranges_are_within(specs: str, size: int) -> None:
    """Whatever is asked, what is sent lies within the file, and is not more than it."""
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
    """Another unit, ranges that come to more than the whole, or too many of them get the whole."""
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
    """A range counts only if the representation is exactly the one that the client has a part of."""
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
    """Conditions are evaluated in the order of RFC 9110, section 13.2.2; a date that is none does not count."""
    assert judge({f"HTTP_{name}": value for name, value in fields.items()}, ETAG, MODIFIED) is verdict


@given(st.integers(0, 2**32))
@example(MODIFIED - 1)
@example(MODIFIED)
@example(MODIFIED + 1)
def test_dates_count_by_their_moment(seconds: int) -> None:
    """A date is one of before the file was last modified, or it is not."""
    found = judge({"HTTP_IF_MODIFIED_SINCE": http_date(seconds)}, ETAG, MODIFIED)
    assert found is (ConditionResult.SEND if seconds < MODIFIED else ConditionResult.NOT_MODIFIED)


@given(st.text(max_size=40))
def test_dates_of_any_form(text: str) -> None:
    """Whatever stands where a date should, it is a date or it does not count; without a digit it is none."""
    found = judge({"HTTP_IF_MODIFIED_SINCE": text}, ETAG, MODIFIED)
    assert found in (
        {ConditionResult.SEND, ConditionResult.NOT_MODIFIED} if any(map(str.isdigit, text)) else {ConditionResult.SEND}
    )


def test_http_date() -> None:
    """Dates have the form that RFC 9110 prescribes."""
    assert http_date(MODIFIED + 0.9) == DATE
