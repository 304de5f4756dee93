"""How often an instance may do something: token buckets."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

#: Instances that are remembered. Who is forgotten begins with a full bucket, so this only has to outnumber those that
#: can be busy at once.
_KEPT = 4096


class Buckets:
    """A bucket of tokens for each instance: `burst` at first, and `each_second` more every second."""

    #: Seconds after which a token is there for whoever found none (``Retry-After``).
    retry_after: int

    def __init__(self, each_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._each_second = each_second
        self._burst = burst
        self._clock = clock
        self.retry_after = math.ceil(1 / each_second)
        self._left: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def take(self, instance_id: int) -> bool:
        """Take a token; False if there is none."""
        now = self._clock()
        tokens, then = self._left.pop(instance_id, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - then) * self._each_second)
        taken = tokens >= 1
        self._left[instance_id] = (tokens - 1 if taken else tokens, now)
        if len(self._left) > _KEPT:
            self._left.popitem(last=False)
        return taken
