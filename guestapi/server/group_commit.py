"""Changes of many callers in few transactions.

A transaction costs a wait for the disk, whatever it holds. While one runs, what else is to be written collects, and is
written in the next one. So a caller waits for at most two transactions, however many others write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import gevent
from gevent.event import AsyncResult

T = TypeVar("T")
R = TypeVar("R")

#: Changes in a transaction: as many as take about as long as the wait for the disk.
MOST_IN_GROUP = 64


class GroupCommit(Generic[T, R]):
    """Collects changes for a function that writes several of them at once. One call of it runs at a time."""

    def __init__(self, write: Callable[[Sequence[T]], list[R]]) -> None:
        """Begin with nothing to write.

        Args:
            write: writes changes and returns the result of each. It may block the calling greenlet, no other.
        """
        self._write = write
        self._waiting: list[tuple[T, AsyncResult[R]]] = []
        self._running = False

    def submit(self, change: T) -> R:
        """Write a change, with others if there are any. Blocks the calling greenlet alone.

        Returns:
            The change's result.

        Raises:
            Exception: what `write` raised; then nothing of its group is written.
        """
        outcome: AsyncResult[R] = AsyncResult()
        self._waiting.append((change, outcome))
        if not self._running:
            self._running = True
            gevent.spawn(self._run)
        return cast("R", outcome.get())

    def _run(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[:MOST_IN_GROUP], self._waiting[MOST_IN_GROUP:]
            try:
                results = self._write([change for change, _outcome in group])
            except Exception as error:
                for _change, outcome in group:
                    outcome.set_exception(error)
            else:
                for (_change, outcome), result in zip(group, results, strict=True):
                    outcome.set(result)
        self._running = False
