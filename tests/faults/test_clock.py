"""A host whose clock is set back."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import pytest

from guestapi.store.lookup import read_entries
from guestapi.store.view import view
from tests.harness.clock import Clock, moved_clock
from tests.harness.service import COMMAND, Service
from tests.harness.waiting import TIMEOUT, until
from tests.server.test_events import EventReader, latest
from tests.server.test_notices import acknowledge, listed

pytestmark = pytest.mark.root

DAY = 86400


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
        follower = EventReader(client)
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


@contextmanager
def announcing(own: Service, clock: Clock, seconds: str) -> Iterator[subprocess.Popen[str]]:
    """Announce a stop to web and wait for its acknowledgement, by a command that has the clock."""
    command = [str(COMMAND), "--config", str(own.config), "notice", "web", "stop", "--in", seconds, "--wait"]
    environment = {**os.environ, **clock.environment}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as waiting:
        try:
            yield waiting
        finally:
            # It may wait for an hour.
            waiting.kill()


@pytest.mark.parametrize("moved", [-DAY, DAY], ids=["back", "on"])
def test_notices_while_the_clock_is_set(clock: Clock, moved: int) -> None:
    """A clock that is set by a day changes what a notice says of its time, and neither when it is due nor who waits."""
    with Service(dialects=["incus"], environment=clock.environment) as own, own.container("web") as web:
        with announcing(own, clock, "1h") as waiting:
            until(lambda: listed(web), "the notice")
            (before,) = listed(web)
            clock.set(moved)
            # Each worker sees the new clock, and says the same.
            for _time in range(8):
                (after,) = listed(web)
                times = [datetime.fromisoformat(one["not_before"]) for one in (before, after)]
                assert abs((times[1] - times[0]).total_seconds() - moved) <= 2
                assert {**after, "not_before": ""} == {**before, "not_before": ""}
            assert waiting.poll() is None, "the clock has made it past, or cancelled it"
            assert acknowledge(web, before["id"]) == 204
            assert waiting.wait(TIMEOUT) == 0
        clock.set(0)
        with announcing(own, clock, "3s") as waiting:
            until(lambda: len(listed(web)) == 2, "the second notice")
            # Due is what is announced for 3 s by the clock that nobody can set.
            (soon,) = (one for one in listed(web) if one["id"] != before["id"])
            clock.set(moved)
            assert waiting.wait(TIMEOUT) == 3
            assert waiting.stdout is not None
            assert waiting.stdout.read().strip() == soon["id"]
        assert acknowledge(web, soon["id"]) == 404
        assert [one["id"] for one in listed(web)] == [before["id"]]
        assert "Traceback" not in own.log.read_text()
