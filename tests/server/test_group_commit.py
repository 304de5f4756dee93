"""`GroupCommit`: many concurrent changes are written in few transactions."""

from __future__ import annotations

from collections.abc import Sequence

import gevent
import pytest
from gevent.event import Event

from guestapi.server.group_commit import MOST_IN_GROUP, GroupCommit
from tests.harness.waiting import TIMEOUT


class Disk:
    """A writer that records each group, and waits until the test lets it go on."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.ready = Event()

    def write(self, changes: Sequence[int]) -> list[int]:
        """Wait, and return ten times each change."""
        self.groups.append(list(changes))
        self.ready.wait()
        if -1 in changes:
            raise OSError("full")
        return [10 * change for change in changes]


def test_changes_during_a_write_form_one_group() -> None:
    """Changes that arrive during a write form one group; each caller gets its own result, in the order of arrival."""
    disk = Disk()
    group: GroupCommit[int, int] = GroupCommit(disk.write)
    callers = [gevent.spawn(group.submit, number) for number in range(40)]
    gevent.sleep(0)
    gevent.sleep(0)
    disk.ready.set()
    gevent.joinall(callers, timeout=TIMEOUT)
    assert [caller.value for caller in callers] == [10 * number for number in range(40)]
    assert len(disk.groups) <= 2
    assert [number for one in disk.groups for number in one] == list(range(40))


def test_groups_are_bounded() -> None:
    """The size of a group is bounded, because the store's other writers wait for its transaction."""
    disk = Disk()
    group: GroupCommit[int, int] = GroupCommit(disk.write)
    callers = [gevent.spawn(group.submit, number) for number in range(3 * MOST_IN_GROUP)]
    disk.ready.set()
    gevent.joinall(callers, timeout=TIMEOUT)
    assert max(map(len, disk.groups)) == MOST_IN_GROUP


def test_error_affects_only_its_group() -> None:
    """An error reaches the callers of its group; a later change is written."""
    disk = Disk()
    disk.ready.set()
    group: GroupCommit[int, int] = GroupCommit(disk.write)
    with pytest.raises(OSError, match="full"):
        group.submit(-1)
    assert group.submit(5) == 50
