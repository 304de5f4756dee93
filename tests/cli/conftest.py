"""Fixtures: the operator's command with a store for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import Guestapi


@pytest.fixture
def guestapi(tmp_path: Path) -> Guestapi:
    """The command, without a store."""
    return Guestapi(tmp_path)


@pytest.fixture
def c1(guestapi: Guestapi) -> Guestapi:
    """The command, with an instance c1 that has two keys and a NIC."""
    guestapi.good(
        "instance", "add", "c1", "--config", "user.a=1", "--config", "user.b=2", "--device", "eth0,type=nic,name=eth0"
    )
    return guestapi
