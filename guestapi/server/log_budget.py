"""How many lines, and how many bytes of them, the requests of each instance may cause. No I/O.

In each second a worker writes a number of lines in all. When they are used up, an instance that had less than an equal
part of them still gets that part, so nobody who is busy hides what another one was refused. Over a longer time an
instance is bounded by bytes, so nobody fills the journal.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

#: Seconds of an instance's bytes that it may have at once.
BURST_SECONDS = 64
#: How many instances are remembered. A forgotten one begins with all its bytes.
_REMEMBERED = 4096


class LogBudget:
    """Decides which lines are written. A key stands for an instance, or for an unregistered container."""

    def __init__(self, lines: int, bytes_each: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing used.

        Args:
            lines: in a second, in all.
            bytes_each: in a second, of each key.
            clock: returns seconds.
        """
        self._lines = lines
        self._bytes_each = bytes_each
        self._clock = clock
        self._second = 0
        self._total = 0
        self._counts: dict[int, int] = {}
        self._active = 0
        self._bytes: OrderedDict[int, tuple[float, float]] = OrderedDict()
        self._left_out: dict[int, int] = {}

    def admit(self, key: int) -> bool:
        """Tell whether one more line may be written; if so, `charge` has to follow. If not, it counts as left out."""
        now = self._clock()
        if int(now) != self._second:
            self._second, self._total = int(now), 0
            self._active, self._counts = len(self._counts), {}
        count = self._counts.get(key, 0)
        # Every key that asks counts for its part, whether it is admitted or not.
        self._counts[key] = count
        part = max(1, self._lines // max(self._active, len(self._counts)))
        if (self._total < self._lines or count < part) and self._bytes_left(key, now) > 0:
            self._counts[key] = count + 1
            self._total += 1
            return True
        self._left_out[key] = self._left_out.get(key, 0) + 1
        return False

    def charge(self, key: int, size: int) -> None:
        """Count the bytes of a line that was admitted."""
        left, then = self._bytes[key]
        self._bytes[key] = (left - size, then)

    def take_left_out(self) -> dict[int, int]:
        """Return how many lines of each key were left out since the last call."""
        left_out, self._left_out = self._left_out, {}
        return left_out

    def _bytes_left(self, key: int, now: float) -> float:
        most = self._bytes_each * BURST_SECONDS
        left, then = self._bytes.pop(key, (float(most), now))
        left = min(most, left + (now - then) * self._bytes_each)
        self._bytes[key] = (left, now)
        if len(self._bytes) > _REMEMBERED:
            self._bytes.popitem(last=False)
        return left
