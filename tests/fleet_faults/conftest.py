"""A fleet on three PostgreSQL servers, ten hosts with followers, and a writer; for all tests of this directory.

They take minutes, so they run only on request: `make test-fleet` sets $GUESTAPI_FLEET.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.fleet_faults.field import FaultyFleet
from tests.harness.clock import moved_clock
from tests.harness.replicated import replicated

collect_ignore_glob = [] if os.environ.get("GUESTAPI_FLEET") else ["test_*.py"]


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyFleet]:
    """The fleet, for all tests."""
    with (
        moved_clock() as servers,
        moved_clock() as hosts,
        replicated(servers.environment) as replicas,
        FaultyFleet(replicas, tmp_path_factory.mktemp("hosts"), (servers, hosts)) as field,
    ):
        yield field


@pytest.fixture
def field(everything: FaultyFleet) -> Iterator[FaultyFleet]:
    """The fleet, with a writer that changes instances all the time; afterwards, all of it agrees."""
    everything.write()
    yield everything
    everything.settle()
    everything.verify()
