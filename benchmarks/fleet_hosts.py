"""`python -m benchmarks.fleet_hosts URL FIRST COUNT`: hosts of a fleet that ask as followers do, without stores.

Each host is a thread. It listens, looks at the database each second, and has in memory what its store would have. `{}`
in the URL stands for the name of a host.
"""

from __future__ import annotations

import random
import sys
import time
from threading import Thread

import psycopg

from guestapi.fleet import inventory
from guestapi.fleet.engine import FleetError, Session
from guestapi.fleet.follower import LOOK_SECONDS
from guestapi.fleet.inventory import PlacedRow

#: As in `guestapi.fleet.follower`.
_CONTACT_SECONDS, _FIRST_RETRY, _LAST_RETRY = 5.0, 0.1, 5.0
#: As in `guestapi.fleet.engine`; longer, since a thousand hosts share the processors of the database.
_CONNECT_SECONDS, _ANSWER_SECONDS = 30, 30.0


class _Unwatched(Session):
    """A session without the thread that ends it: a thousand of these would be what is measured."""

    def _watch(self) -> None:
        pass


class SimulatedHost:
    """What a host does at the database."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url.format(name)
        self._instances: dict[str, object] = {}

    def run(self) -> None:
        """Follow, and connect again when the database was lost."""
        retry = _FIRST_RETRY
        while True:
            try:
                with self._connect() as session:
                    retry = _FIRST_RETRY
                    self._follow(session)
            except (FleetError, psycopg.Error):
                time.sleep(retry * random.uniform(0.5, 1))
                retry = min(2 * retry, _LAST_RETRY)

    def _connect(self) -> Session:
        connection = psycopg.connect(
            self._url, autocommit=True, connect_timeout=_CONNECT_SECONDS, target_session_attrs="read-write"
        )
        return _Unwatched(connection, _ANSWER_SECONDS)

    def _follow(self, session: Session) -> None:
        state = inventory.read_state(session)
        inventory.listen(session, state.host)
        with session.snapshot():
            state = inventory.read_state(session)
            self._instances.update((one.uuid, one) for one in inventory.read_my_profiles(session))
            listed = inventory.list_mine(session, state.host)
            inventory.read_said(session, state.host)
            self._take(session, listed)
        cursor = state.cursor
        contacted = 0.0
        heard = True
        while True:
            changed = heard or inventory.read_state(session).cursor != cursor
            if changed:
                found = inventory.look(session, cursor)
                assert found.placements is not None, "these are small changes"
                self._instances.update(found.placements)
                self._instances.update((one.uuid, one) for one in found.profiles)
                cursor = found.state.cursor
            if changed or time.monotonic() > contacted + _CONTACT_SECONDS:
                inventory.say_contact(session, cursor.revision, "")
                contacted = time.monotonic()
            heard = session.wait(LOOK_SECONDS)

    def _take(self, session: Session, listed: list[PlacedRow]) -> None:
        self._instances.update((one.observed.key, one) for one in inventory.read_placements(session, listed))


def main() -> None:
    """Run hosts until the end of standard input."""
    url, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for number in range(first, first + count):
        Thread(target=SimulatedHost(url, f"h{number}").run, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
