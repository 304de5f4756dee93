"""Many changes at once are few transactions."""

from __future__ import annotations

from collections.abc import Sequence

import gevent
import pytest
from gevent.event import Event

from guestapi.server.group_commit import MOST_IN_GROUP, GroupCommit


class Disk:
    """A writer that notes each group, and is as slow as the test lets it be."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.ready = Event()

    def write(self, changes: Sequence[int]) -> list[int]:
        """Wait, and give back ten times of each."""
        self.groups.append(list(changes))
        self.ready.wait()
        if -1 in changes:
            raise OSError("full")
        return [10 * change for change in changes]


def test_what_comes_meanwhile_is_one_group() -> None:
    """While one is written, others collect; each gets its own result, in the order in which they came."""
    disk = Disk()
    group: GroupCommit[int, int] = GroupCommit(disk.write)
    callers = [gevent.spawn(group.submit, number) for number in range(40)]
    gevent.sleep(0)
    gevent.sleep(0)
    disk.ready.set()
    gevent.joinall(callers, timeout=5)
    assert [caller.value for caller in callers] == [10 * number for number in range(40)]
    assert len(disk.groups) <= 2
    assert [number for one in disk.groups for number in one] == list(range(40))


def test_groups_are_bounded() -> None:
    """A transaction does not grow with the crowd: others of the store's writers wait for it."""
    disk = Disk()
    group: GroupCommit[int, int] = GroupCommit(disk.write)
    callers = [gevent.spawn(group.submit, number) for number in range(3 * MOST_IN_GROUP)]
    disk.ready.set()
    gevent.joinall(callers, timeout=5)
    assert max(map(len, disk.groups)) == MOST_IN_GROUP


def test_an_error_is_that_of_its_group_alone() -> None:
    """Who was in the group hears of it, who comes later is written."""
    disk = Disk()
    disk.ready.set()
    group: GroupCommit[int, int] = GroupCommit(disk.write)
    with pytest.raises(OSError, match="full"):
        group.submit(-1)
    assert group.submit(5) == 50
