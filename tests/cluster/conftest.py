"""A cluster of three Incus daemons, each with a guestapi beside it, for all tests of this directory.

They take minutes, so they run only on request: `make test-cluster` sets $GUESTAPI_CLUSTER.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.cluster.side import Side
from tests.harness.cluster import Cluster
from tests.harness.mirroring import MirrorProcess
from tests.harness.service import Service

collect_ignore_glob = [] if os.environ.get("GUESTAPI_CLUSTER") else ["test_*.py"]


@pytest.fixture(scope="session")
def sides() -> Iterator[list[Side]]:
    """The three members, each with its own service, store and mirror."""
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster())
        made = []
        for member in cluster.members:
            service = stack.enter_context(Service(workers=1, dialects=["incus"]))
            mirror = stack.enter_context(MirrorProcess(service, "incus", member.socket))
            made.append(Side(member, service, mirror))
        yield made
