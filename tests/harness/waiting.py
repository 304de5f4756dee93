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
        true: the condition; it is asked again and again. A question that takes long, such as a command, is asked less
            often: two thirds of the time are left to what is waited for. So is one after a long wait: the last pause
            is a tenth of the wait.
        what: the message if it does not become true in time, or what returns it.
        pause: seconds between two questions, at least.
        seconds: after which to give up.
    """
    began = time.monotonic()
    while True:
        asked = time.monotonic()
        if true():
            return
        now = time.monotonic()
        assert now < began + seconds, f"not within {seconds} s: {what if isinstance(what, str) else what()}"
        time.sleep(max(pause, min(2 * (now - asked), 1), min((now - began) / 10, 1)))
