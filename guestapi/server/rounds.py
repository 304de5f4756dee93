"""Rounds of the event loop: in each, everybody has so many turns, and whoever wants more waits for the next one.

Without them a round would be as long as the greediest has something to do. With them, it is as long as there are many
who have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from gevent.hub import get_hub
from greenlet import getcurrent

if TYPE_CHECKING:
    from greenlet import greenlet

#: As many times more turns are in a round while there is nobody who waits for it.
_ALONE = 8


class Rounds:
    """Who has had how many turns in this round, and who waits."""

    def __init__(self, each: int, alone: Callable[[], bool]) -> None:
        """Args:
        each: how many turns there are in a round for each.
        alone: whether there is nobody else to wait for a round.
        """
        self._each = each
        self._alone = alone
        self._hub = get_hub()
        self._loop = self._hub.loop
        self._round = -1
        self._taken: dict[int, int] = {}
        self._waiting: dict[int, deque[greenlet]] = {}
        #: Goes off in the round after the one in which it is started.
        self._next = self._loop.timer(0)

    def take(self, whose: int) -> None:
        """Take a turn; blocks the calling greenlet until there is one."""
        self._look_at_round()
        taken = self._taken.get(whose, 0)
        # Whoever comes later does not overtake those that wait.
        if whose not in self._waiting and (taken < self._each or (taken < self._each * _ALONE and self._alone())):
            self._taken[whose] = taken + 1
            return
        if not self._waiting:
            self._next.start(self._go_on)
        self._waiting.setdefault(whose, deque()).append(getcurrent())
        self._hub.switch()

    def _go_on(self) -> None:
        """The next round: of each who has some waiting, those go on that came first."""
        self._look_at_round()
        most = self._each * _ALONE if self._alone() else self._each
        due: list[greenlet] = []
        for whose, waiting in list(self._waiting.items()):
            taken = self._taken.get(whose, 0)
            count = max(0, min(most - taken, len(waiting)))
            due.extend(waiting.popleft() for _turn in range(count))
            self._taken[whose] = taken + count
            if not waiting:
                del self._waiting[whose]
        if self._waiting:
            self._next.start(self._go_on)
        for waiter in due:
            waiter.switch()

    def _look_at_round(self) -> None:
        if self._loop.iteration != self._round:
            self._round = self._loop.iteration
            self._taken.clear()
