"""Token buckets: a burst, a rate, and a separate bucket for each instance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guestapi import rate_limit
from guestapi.rate_limit import RateLimit
from tests.harness.clock import ManualClock


def taken(limit: RateLimit, instance_id: int, tries: int) -> int:
    """Return how many of these tries succeed."""
    return sum(limit.take(instance_id) for _time in range(tries))


def test_burst_and_then_each_second() -> None:
    """The burst is available at once, then as many as the elapsed seconds give, and never more than the burst."""
    clock = ManualClock()
    limit = RateLimit(2.0, 3, clock)
    assert taken(limit, 1, 10) == 3
    clock.now += 0.5
    assert taken(limit, 1, 10) == 1
    # A refused try costs nothing: half a token is left.
    clock.now += 0.25
    assert taken(limit, 1, 10) == 0
    clock.now += 0.25
    assert taken(limit, 1, 10) == 1
    clock.now += 1000
    assert taken(limit, 1, 10) == 3


def test_tokens_that_are_left() -> None:
    """Who leaves two of five tokens gets three, and one more when there are three again; the two are for others."""
    clock = ManualClock()
    limit = RateLimit(1.0, 5, clock)
    assert [limit.take(1, 2) for _time in range(5)] == [True] * 3 + [False] * 2
    clock.now += 1
    assert [limit.take(1, 2) for _time in range(2)] == [True, False]
    assert taken(limit, 1, 5) == 2


def test_each_instance_has_its_own_bucket() -> None:
    """An instance without tokens takes none from another one."""
    limit = RateLimit(1.0, 2, ManualClock())
    assert taken(limit, 1, 5) == 2
    assert taken(limit, 2, 5) == 2
    assert taken(limit, 1, 5) == 0


def test_retry_after() -> None:
    """Retry-After is the time until the next token in whole seconds, rounded up."""
    assert [RateLimit(rate, 1).retry_after for rate in (0.1, 0.3, 1.0, 5.0)] == [10, 4, 1, 1]


def test_number_of_buckets_is_bounded() -> None:
    """Of many instances, the least recently used bucket is dropped, and starts full again."""
    limit = RateLimit(1.0, 1, ManualClock())
    assert rate_limit._REMEMBERED == 4096
    for instance_id in range(rate_limit._REMEMBERED):
        assert limit.take(instance_id)
    # Taking, and a refused try, count as use.
    assert not limit.take(0)
    assert limit.take(rate_limit._REMEMBERED)
    assert not limit.take(0)
    assert not limit.take(2)
    assert limit.take(1)


@given(st.floats(0.1, 100), st.integers(1, 20), st.lists(st.tuples(st.floats(0, 3), st.integers(1, 30)), max_size=20))
def test_never_more_than_burst_and_rate(per_second: float, burst: int, waits: list[tuple[float, int]]) -> None:
    """In any sequence of tries, no more succeed than the burst and the rate permit."""
    clock = ManualClock()
    limit = RateLimit(per_second, burst, clock)
    begin, total = clock.now, 0
    for seconds, tries in waits:
        clock.now += seconds
        got = taken(limit, 1, tries)
        total += got
        assert got <= burst
        assert total <= burst + (clock.now - begin) * per_second + 1e-6
