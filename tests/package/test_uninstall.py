"""Containers that were set up for guestapi still start and stop after its removal."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.lxc import Lxc
from tests.harness.machine import CHECKOUT, Machine
from tests.harness.scratch import SCRATCH

pytestmark = pytest.mark.root

DROP_IN = "/etc/systemd/system/systemd-nspawn@.service.d/guestapi.conf"
UNIT = "systemd-nspawn@web.service"


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that every user can enter."""
    with tempfile.TemporaryDirectory(prefix="guestapi-", dir=SCRATCH) as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_lxc(directory: Path) -> None:
    """A container that includes guestapi's file stops and starts after the hook program was removed."""
    (directory / "socket").mkdir()
    hook = directory / "called"
    with Lxc(directory, "web", f"touch {hook};", directory / "socket") as web:
        web.start()
        assert hook.exists(), "the container does not call the hook"
        hook.unlink()
        (directory / "web/guestapi-hook").unlink()
        web.stop()
        web.start()
        assert web.run("/bin/cat", "/proc/self/comm").out == "cat\n"
        assert not hook.exists()


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine with the files of `make install`, without the environment, and a root directory to boot with nspawn."""
    with Machine() as booted:
        booted.run("/usr/bin/python3", str(CHECKOUT / "tools/installation.py"), "install")
        booted.run("install", "-D", "-m", "0644", "/etc/guestapi/nspawn-guestapi.conf", DROP_IN)
        booted.run("systemctl", "daemon-reload")
        booted.run("/usr/bin/python3", "-I", str(CHECKOUT / "tests/harness/rootfs.py"), "/var/lib/machines/web")
        yield booted


def test_nspawn(machine: Machine) -> None:
    """A container's unit with guestapi's drop-in stops and starts after `tools/installation.py uninstall`."""
    machine.run("systemctl", "start", UNIT)
    machine.run("/usr/bin/python3", str(CHECKOUT / "tools/installation.py"), "uninstall")
    assert machine.run("ls", "/opt/guestapi", check=False).returncode != 0
    machine.run("systemctl", "stop", UNIT)
    assert machine.run("systemctl", "is-failed", UNIT, check=False).stdout.strip() == "inactive"
    machine.run("systemctl", "start", UNIT)
    assert machine.run("systemctl", "is-active", UNIT).stdout.strip() == "active"
