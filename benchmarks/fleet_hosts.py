"""`python -m benchmarks.fleet_hosts URL FIRST COUNT`: hosts of a fleet that ask as followers do, without stores.

Each host is a thread, and twenty are a process: more threads would take several times as much processor time to wait
for their interpreter's lock as for what they ask. A host listens, looks at the database each second, and has in memory
what its store would have. It gives up and comes back as a follower does. `{}` in the URL stands for the name of a host.
"""

from __future__ import annotations

import os
import random
import sys
import time
from threading import Lock, Thread
from types import TracebackType
from typing import ClassVar

from guestapi.fleet import inventory
from guestapi.fleet.engine import FleetError, LateError, Session, open_session
from guestapi.fleet.follower import LOOK_SECONDS
from guestapi.fleet.inventory import PlacedRow
from guestapi.fleet.joining import ANSWER_SECONDS
from guestapi.store.placements import Cursor

#: As in `guestapi.fleet.follower`.
_CONTACT_SECONDS, _FIRST_RETRY, _LAST_RETRY, _MOST_FACTOR = 5.0, 0.1, 5.0, 8.0
#: As in `guestapi.fleet.engine`.
_WATCH_SECONDS = 0.2
#: Hosts of a process.
_THREADS = 20


class _WatchedTogether(Session):
    """A session that one thread watches for all: a thousand such threads would be what is measured."""

    _all: ClassVar[set[_WatchedTogether]] = set()
    _lock = Lock()

    def _watch(self) -> None:
        pass

    def __enter__(self) -> _WatchedTogether:
        with self._lock:
            self._all.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._all.discard(self)
        super().__exit__(kind, error, trace)

    @classmethod
    def watch_all(cls) -> None:
        """End those whose question has no answer in time."""
        while True:
            time.sleep(_WATCH_SECONDS)
            with cls._lock:
                those = list(cls._all)
            for one in those:
                one.end_if_late()


class SimulatedHost:
    """What a host does at the database."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url.format(name)
        self._instances: dict[str, object] = {}
        self._cursor = Cursor()
        self._place: tuple[int, int] | None = None
        self._deadline_factor = 1.0

    def run(self) -> None:
        """Follow, and connect again when the database was lost."""
        retry = _FIRST_RETRY
        while True:
            began = time.monotonic()
            try:
                with open_session(self._url, {}, ANSWER_SECONDS, self._deadline_factor, _WatchedTogether) as session:
                    self._follow(session)
            except LateError:
                self._deadline_factor = min(2 * self._deadline_factor, _MOST_FACTOR)
            except FleetError:
                pass
            if time.monotonic() - began > _LAST_RETRY:
                retry = _FIRST_RETRY
            time.sleep(retry * random.uniform(0.5, 1))
            retry = min(2 * retry, _LAST_RETRY)

    def _follow(self, session: Session) -> None:
        state = inventory.read_state(session)
        inventory.listen(session, state.host)
        place = inventory.read_place(session)
        inventory.read_said(session, state.host)
        if place != self._place or state.cursor[:2] != self._cursor[:2]:
            self._look_at_all(session)
            self._place = place
        contacted = 0.0
        while True:
            found = inventory.look(session, self._cursor)
            changed = found.state.cursor != self._cursor
            if changed:
                assert found.placements is not None, "these are small changes"
                self._instances.update(found.placements)
                self._instances.update((one.uuid, one) for one in found.profiles)
                self._cursor = found.state.cursor
            if changed or time.monotonic() > contacted + _CONTACT_SECONDS:
                inventory.say_contact(session, self._cursor.revision, "")
                contacted = time.monotonic()
            self._deadline_factor = session.deadline_factor = 1.0
            session.wait(LOOK_SECONDS)

    def _look_at_all(self, session: Session) -> None:
        with session.snapshot():
            state = inventory.read_state(session)
            self._instances.update((one.uuid, one) for one in inventory.read_my_profiles(session))
            self._take(session, inventory.list_mine(session, state.host))
        self._cursor = state.cursor

    def _take(self, session: Session, listed: list[PlacedRow]) -> None:
        self._instances.update((one.observed.key, one) for one in inventory.read_placements(session, listed))


def main() -> None:
    """Run hosts until the end of standard input."""
    import psycopg  # noqa: F401 - once for all processes

    url, first, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[2]) + int(sys.argv[3])
    for start in range(first, end, _THREADS):
        if os.fork() == 0:
            Thread(target=_WatchedTogether.watch_all, daemon=True).start()
            for number in range(start, min(start + _THREADS, end)):
                Thread(target=SimulatedHost(url, f"h{number}").run, daemon=True).start()
            break
    sys.stdin.read()


if __name__ == "__main__":
    main()
