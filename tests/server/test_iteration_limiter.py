"""`IterationLimiter`: in each iteration of the event loop, each process starts so many, however many it wants."""

from __future__ import annotations

import gevent
from gevent.hub import get_hub

from guestapi.server.scheduler import IterationLimiter


def run(wanted: dict[int, int], each: int, *, alone: bool = False) -> list[tuple[int, int, int]]:
    """Start greenlets that acquire; return process, iteration of the call and iteration of the start of each."""
    limiter = IterationLimiter(each, lambda: alone)
    loop = get_hub().loop
    had: list[tuple[int, int, int]] = []

    def take(whose: int) -> None:
        asked = loop.iteration
        limiter.acquire(whose)
        had.append((whose, asked, loop.iteration))

    with gevent.Timeout(10):
        gevent.joinall([gevent.spawn(take, whose) for whose, count in wanted.items() for _time in range(count)])
    return had


def test_nobody_waits_for_the_greedy() -> None:
    """A process with few starts gets them in this or the next iteration, whatever others want; all starts happen."""
    had = run({1: 200, 2: 3, 3: 1}, each=4)
    assert len(had) == 204
    assert all(when <= asked + 1 for whose, asked, when in had if whose != 1)
    for number in {when for _whose, _asked, when in had}:
        assert sum((whose, when) == (1, number) for whose, _asked, when in had) <= 4


def test_alone_nobody_is_waited_for() -> None:
    """While only one process waits, an iteration has more starts."""
    rounds = {when for _whose, _asked, when in run({1: 200}, each=4, alone=True)}
    assert len(rounds) < 20


def test_first_come_first_served() -> None:
    """Waiting starts happen in order of arrival; later ones do not overtake them."""
    limiter = IterationLimiter(1, lambda: False)
    order: list[int] = []

    def take(number: int) -> None:
        limiter.acquire(1)
        order.append(number)
        if number < 20:
            # As a busy client does: again, as soon as it has its answer.
            gevent.spawn(take, number + 100)

    with gevent.Timeout(10):
        gevent.joinall([gevent.spawn(take, number) for number in range(20)])
        while len(order) < 40:
            gevent.sleep(0.001)
    assert order == [*range(20), *range(100, 120)]
