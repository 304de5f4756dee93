"""The operator's command with a store of its own for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import Guestapi


@pytest.fixture
def guestapi(tmp_path: Path) -> Guestapi:
    """The command, where nothing was added yet."""
    return Guestapi(tmp_path)


@pytest.fixture
def c1(guestapi: Guestapi) -> Guestapi:
    """The command, where instance c1 has two keys and a NIC."""
    guestapi.good(
        "instance", "add", "c1", "--config", "user.a=1", "--config", "user.b=2", "--device", "eth0,type=nic,name=eth0"
    )
    return guestapi
