"""A cluster of three Incus daemons, each with a guestapi beside it, for all tests of this directory.

They take minutes, so they run only on request: `make test-cluster` sets $GUESTAPI_CLUSTER to the release of Incus.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.side import Side, beside_each

collect_ignore_glob = [] if os.environ.get("GUESTAPI_CLUSTER") else ["test_*.py"]


@pytest.fixture(scope="session")
def sides() -> Iterator[list[Side]]:
    """The three members, each with its own service, store and mirror."""
    with beside_each(os.environ["GUESTAPI_CLUSTER"]) as made:
        yield made
