"""How often an instance may do something: token buckets."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

#: How many instances are remembered. A forgotten one begins with a full bucket, so this has to exceed the number of
#: instances that can be busy at the same time.
_REMEMBERED = 4096


class RateLimit:
    """A bucket of tokens for each instance. It holds `burst` tokens at first, and gains `per_second` each second.

    Attributes:
        retry_after: seconds until the next token of an empty bucket, for ``Retry-After``.
    """

    retry_after: int

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Fill all buckets.

        Args:
            per_second: tokens that a bucket gains in a second.
            burst: the most tokens that a bucket holds.
            clock: returns seconds.
        """
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self.retry_after = math.ceil(1 / per_second)
        self._left: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def take(self, instance_id: int, left: int = 0) -> bool:
        """Take a token of an instance, unless no more than `left` are there; return whether one was taken."""
        now = self._clock()
        tokens, then = self._left.pop(instance_id, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - then) * self._per_second)
        taken = tokens >= 1 + left
        self._left[instance_id] = (tokens - 1 if taken else tokens, now)
        if len(self._left) > _REMEMBERED:
            self._left.popitem(last=False)
        return taken
