"""The project's own tests on Debian 12 with its own kernel and AppArmor, except those that need a daemon.

That kernel, 6.1, has neither SO_PEERPIDFD nor ioctls of pidfds, so callers are identified by /proc alone. conftest.py
leaves this module out on other suites, whose kernels are like those of the hosts that `make test` runs on.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.image import CHECKOUT, DEBIAN_ROOT, build_image
from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

SELECTIONS = (
    "tests/callers",
    "tests/wire/test_replay.py",
    "tests/wire/test_events.py",
    "tests/server/test_connection.py",
    "tests/server/test_events.py",
    "tests/sources/test_lxc.py",
)

#: Run in a root of the machine's Debian, in a copy of the checkout, without the packages for lint.
_PACK = """
tools/venv .venv run test
VENV=.venv tools/parsers .venv/parsers
tar -C /srv -czf /srv/out/guestapi.tar.gz guestapi
"""


@pytest.fixture(scope="module")
def plain() -> Iterator[VirtualMachine]:
    """A machine without guestapi, with the checkout and its virtual environment in /srv/guestapi."""
    packages = subprocess.check_output([CHECKOUT / "tools/packages", "list", "debian"], text=True).split()
    with tempfile.TemporaryDirectory(prefix="guestapi-suite-", dir="/var/tmp") as name:
        run = [str(DEBIAN_ROOT), "run", "bookworm", "--package", *packages, "--checkout", f"--bind={name}:/srv/out"]
        subprocess.run([*run, "--", "sh", "-ec", _PACK], check=True)
        with VirtualMachine(build_image("bookworm")) as machine:
            machine.put(Path(name) / "guestapi.tar.gz", "/srv/guestapi.tar.gz")
            machine.script("tar -C /srv -xzf /srv/guestapi.tar.gz; rm /srv/guestapi.tar.gz", timeout=1800)
            yield machine


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selection_passes(plain: VirtualMachine, selection: str) -> None:
    """These tests pass, and none is skipped, without timeouts, which an emulated processor would exceed."""
    words = [".venv/bin/pytest", "-q", "-p", "no:timeout", "-p", "no:cacheprovider", "-o", "addopts=", selection]
    done = plain.run("env", "-C", "/srv/guestapi", "CI=true", *words, check=False, timeout=3000)
    assert done.returncode == 0, done.stdout[-8000:]
