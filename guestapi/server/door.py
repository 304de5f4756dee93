"""Connections that are accepted, of which nobody knows yet whose they are.

To find that out takes longer than to connect, so a guest can have any number of them waiting. If they waited in the
kernel's queue, nobody else could connect meanwhile (connect(2), EAGAIN). So they are accepted as fast as they come, and
wait here, by process: that, the kernel tells at once. A process with more of them than an instance may have is refused
without a further look, whatever its instance.
"""

from __future__ import annotations

from guestapi.callers.identify import Caller
from guestapi.server.shares import TOO_MANY, UNKNOWN, Excess

#: How many may wait in all before there is room only for processes of which none does.
_MOST = 1024


class _Process:
    __slots__ = ("instance_id", "recognised", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.recognised = False
        self.instance_id: int | None = None


class Door:
    """Who waits to be recognised, by PID."""

    def __init__(self, each: int) -> None:
        """Args:
        each: how many connections of a process may wait: as many as its instance may have.
        """
        self._each = each
        self._processes: dict[int, _Process] = {}
        self._count = 0

    def come(self, pid: int) -> bool:
        """A connection of this process waits from now on; False if it may not."""
        process = self._processes.get(pid)
        if process is None:
            process = self._processes[pid] = _Process()
        elif process.waiting >= self._each or self._count >= _MOST:
            return False
        process.waiting += 1
        self._count += 1
        return True

    def of_one(self) -> bool:
        """Whether all that wait are of one process."""
        return len(self._processes) < 2

    def why_not(self, pid: int) -> tuple[int | None, Excess]:
        """For a process that may not `come`: its instance as far as is known, for the log; and what it is told."""
        process = self._processes[pid]
        unknown = process.recognised and process.instance_id is None
        return process.instance_id, UNKNOWN if unknown else TOO_MANY

    def go(self, pid: int, caller: Caller | None) -> None:
        """A connection of this process waits no longer: this is who it is, if it was looked at."""
        process = self._processes[pid]
        if caller is not None:
            process.instance_id = caller.instance_id
            process.recognised = True
        process.waiting -= 1
        self._count -= 1
        if not process.waiting:
            del self._processes[pid]
