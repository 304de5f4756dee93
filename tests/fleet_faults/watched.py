"""`guestapi fleet follow` for tests: records what its store has, and stops or ends where it is told to.

    python -m tests.fleet_faults.watched DIRECTORY CONFIG

In DIRECTORY, `record` gets a line before and after each commit that places an instance or removes one, and `point`
names a point in two words. `kill commit:3`: the process kills itself before its third commit, and with `committed:3`
after it. `hold leaving`: before the next commit that removes an instance, `point` becomes `reached`, and nothing goes
on until that is removed. The other points of a move are `left` (after that commit), `released`, `arriving`, `arrived`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guestapi.cli.main import main
from guestapi.fleet import follower, inventory
from guestapi.fleet.engine import Session
from guestapi.store.placements import list_placed
from guestapi.store.transaction import Change
from guestapi.store.writing import Writer

_DIRECTORY = Path(sys.argv[1])
_POINT, _REACHED = _DIRECTORY / "point", _DIRECTORY / "reached"
_change, _release = Writer.change, inventory.release


class _Records:
    """What is recorded."""

    def __init__(self) -> None:
        self.placed: set[str] | None = None
        self.commits = 0
        self._file = (_DIRECTORY / "record").open("a", buffering=1)

    def note(self, what: str, placed: set[str]) -> None:
        """Record what the store has, by the clock that all processes of this machine share."""
        print(json.dumps([what, time.monotonic(), sorted(placed)]), file=self._file)


def _pass(name: str) -> None:
    """Go through a point."""
    if not _POINT.exists():
        return
    action, _, wanted = _POINT.read_text().partition(" ")
    if wanted != name:
        return
    if action == "kill":
        _POINT.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    _POINT.rename(_REACHED)
    while _REACHED.exists():
        time.sleep(0.01)


_watch = _Records()


def _record(what: str, left: str, arrived: str, before: set[str], after: set[str]) -> None:
    """Record what a commit changes, and go through the points `what`, `left` and `arrived` if they are due."""
    if before != after:
        _watch.note(what, after)
    _pass(f"{what}:{_watch.commits}")
    if before - after:
        _pass(left)
    if after - before:
        _pass(arrived)


@contextmanager
def change(self: Writer) -> Iterator[Change]:
    """As `Writer.change`."""
    with _change(self) as one:
        before = set(list_placed(one))
        yield one
        after = set(list_placed(one))
        if _watch.placed is None:
            # What it was when this process began.
            _watch.note("begin", before)
        _watch.placed = after
        _watch.commits += 1
        _record("commit", "leaving", "arriving", before, after)
    _record("committed", "left", "arrived", before, after)


def release(session: Session, uuid: str, epoch: int) -> bool:
    """As `inventory.release`."""
    done = _release(session, uuid, epoch)
    _pass("released")
    return done


if __name__ == "__main__":
    Writer.change = change  # type: ignore[method-assign]
    inventory.release = release
    # So that the first look takes several transactions.
    follower.BATCH = 1
    main(["--config", sys.argv[2], "fleet", "follow"])
