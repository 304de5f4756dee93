"""A request that waits for a change, as the connection sees it: between two looks of the application."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from guestapi.notifications.waiting import Waiter
from guestapi.server.transport import DeadlineError


class WaitingPeer(Protocol):
    """What a wait needs of its connection. `transport.Transport` implements it."""

    def set_deadline(self, seconds: float) -> None:
        """Let waits end `seconds` from now."""
        ...

    def wait_for_wake(self) -> None:
        """Wait for input, or until `wake` is called; raises DeadlineError or OSError."""
        ...

    @property
    def received(self) -> bytes:
        """What the client has sent behind the request."""
        ...

    @property
    def wake(self) -> Callable[[], None]:
        """End `wait_for_wake`."""
        ...

    def receive_now(self) -> int | None:
        """Keep what the client has sent; 0 at the end of its input, None if there is none."""
        ...


def wait_for_change(peer: WaitingPeer, waiter: Waiter) -> bool:
    """Wait until the waiter is due or over. Its time ends the wait, and so does another request on the connection.

    Args:
        peer: the connection.
        waiter: what it waits for.

    Returns:
        Whether there is somebody to answer; False if the client has closed the connection.

    Raises:
        OSError: the connection is lost.
    """
    waiter.wake = peer.wake
    peer.set_deadline(max(0.001, waiter.until - time.monotonic()))
    if peer.received:
        # It came together with the request.
        waiter.over = True
    try:
        while True:
            # Looked at even if there is an answer: nobody is answered who has gone.
            received = peer.receive_now()
            if received == 0:
                return False
            if received:
                waiter.over = True
            if waiter.due or waiter.over:
                break
            peer.wait_for_wake()
    except DeadlineError:
        waiter.over = True
    waiter.due = False
    return True
