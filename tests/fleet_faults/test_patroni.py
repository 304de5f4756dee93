"""A failover that Patroni makes by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fleet_faults.field import FaultyFleet
from tests.harness.clock import moved_clock
from tests.harness.patroni import patroni

pytestmark = pytest.mark.root


def test_the_primary_is_killed(tmp_path: Path) -> None:
    """Patroni replaces a primary that was killed; then everything is as after each other fault."""
    with moved_clock() as clock, patroni() as servers, FaultyFleet(servers, tmp_path, (clock, clock)) as field:
        field.write()
        field.wait_for_changes()
        old = servers.primary
        servers.kill_primary()
        field.wait_for_changes()
        servers.find_primary()
        assert servers.primary is not old
        field.settle()
        field.verify()
