"""A host whose clock is set back."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from guestapi.store.lookup import read_entries
from guestapi.store.view import view
from tests.harness.clock import Clock, moved_clock
from tests.harness.service import COMMAND, Service
from tests.server.test_events import Follower, latest

pytestmark = pytest.mark.root


@pytest.fixture
def clock() -> Iterator[Clock]:
    """A clock for processes of any user."""
    with moved_clock() as own:
        yield own


def test_clock_set_back(clock: Clock) -> None:
    """With a clock set back by an hour, and from a wrong year, requests, events and readiness work."""
    with (
        Service(workers=1, dialects=["incus"], environment=clock.environment) as own,
        own.container("c1") as c1,
        c1.listening("follow", str(latest(own))) as client,
    ):
        begin = latest(own)
        follower = Follower(client)
        ids = []
        for number, moved in enumerate([0, -3600, 100 * 365 * 86400, -3600]):
            clock.set(moved)
            command = [str(COMMAND), "--config", str(own.config), "config", "set", "c1", f"user.n={number}"]
            subprocess.run(command, env={**os.environ, **clock.environment}, check=True)
            follower.wait_for(latest(own))
            for state in ("Ready", "Started"):
                assert c1.ask("/1.0", "PATCH", json.dumps({"state": state}).encode()).status == 200
            assert c1.ask("/1.0/config/user.n").text == str(number)
            ids.append(latest(own) - 2)
        with view(own.settings.store.url) as store:
            entries = read_entries(store, begin, 100).found
        # For each step the operator's change and two of a worker. Entries older than an hour by the wrong year's clock
        # are gone.
        assert follower.ids == ids
        assert [entry.id for entry in entries] == [ids[step] + number for step in (2, 3) for number in range(3)]
        years = [int(entry.timestamp[:4]) for entry in entries]
        assert years[0] == years[1] == years[2] > years[3] + 90
        assert "Traceback" not in own.log.read_text()
