"""Waiting for a state that no event announces.

Runs on the system's Python alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds after which a test gives up. They end a test that hangs; no result depends on them, however busy the host is.
TIMEOUT = 300.0


def until(
    true: Callable[[], object], what: str | Callable[[], str], *, pause: float = 0.01, seconds: float = TIMEOUT
) -> None:
    """Wait until a condition is true.

    Args:
        true: the condition; it is asked again and again.
        what: the message if it does not become true in time, or what returns it.
        pause: seconds between two questions.
        seconds: after which to give up.
    """
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what if isinstance(what, str) else what()}"
        time.sleep(pause)
