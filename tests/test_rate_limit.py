"""Token buckets: how many requests at once, how many in the long run, each instance by itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guestapi import rate_limit
from guestapi.rate_limit import RateLimit


class Clock:
    """Seconds, as they are said."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Now."""
        return self.now


def taken(limit: RateLimit, instance_id: int, tries: int) -> int:
    """How many of so many tries succeed."""
    return sum(limit.take(instance_id) for _time in range(tries))


def test_burst_and_then_each_second() -> None:
    """As many at once as the burst, then as many as the seconds bring; never more than the burst again."""
    clock = Clock()
    limit = RateLimit(2.0, 3, clock)
    assert taken(limit, 1, 10) == 3
    clock.now += 0.5
    assert taken(limit, 1, 10) == 1
    # What was refused costs nothing: half a token is still there.
    clock.now += 0.25
    assert taken(limit, 1, 10) == 0
    clock.now += 0.25
    assert taken(limit, 1, 10) == 1
    clock.now += 1000
    assert taken(limit, 1, 10) == 3


def test_each_instance_has_its_own() -> None:
    """One that has used its tokens up takes none from another."""
    limit = RateLimit(1.0, 2, Clock())
    assert taken(limit, 1, 5) == 2
    assert taken(limit, 2, 5) == 2
    assert taken(limit, 1, 5) == 0


def test_when_to_come_back() -> None:
    """In whole seconds, rounded up: not before there is a token."""
    assert [RateLimit(rate, 1).retry_after for rate in (0.1, 0.3, 1.0, 5.0)] == [10, 4, 1, 1]


def test_instances_are_forgotten() -> None:
    """Of many instances, the one that was busy longest ago is forgotten, and begins anew; the others are not."""
    limit = RateLimit(1.0, 1, Clock())
    for instance_id in range(rate_limit._REMEMBERED):
        assert limit.take(instance_id)
    # Taking again, or trying to, is being busy.
    assert not limit.take(0)
    assert limit.take(rate_limit._REMEMBERED)
    assert not limit.take(0)
    assert not limit.take(2)
    assert limit.take(1)


@given(st.floats(0.1, 100), st.integers(1, 20), st.lists(st.tuples(st.floats(0, 3), st.integers(1, 30)), max_size=20))
def test_never_more_than_burst_and_rate(per_second: float, burst: int, waits: list[tuple[float, int]]) -> None:
    """However one asks: no more than the burst, and what the time has brought."""
    clock = Clock()
    limit = RateLimit(per_second, burst, clock)
    begin, total = clock.now, 0
    for seconds, tries in waits:
        clock.now += seconds
        got = taken(limit, 1, tries)
        total += got
        assert got <= burst
        assert total <= burst + (clock.now - begin) * per_second + 1e-6
