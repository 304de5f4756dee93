"""One booted machine with guestapi installed, for all tests of this directory.

They take minutes, so they run only on request: `make test-machine` sets $GUESTAPI_MACHINE to the suite of Debian.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.machine import guests, nested
from tests.machine.image import build_image
from tests.machine.product import Product, built
from tests.machine.virtual import VirtualMachine

SUITE = os.environ.get("GUESTAPI_MACHINE")

collect_ignore_glob = ["test_*.py"] if SUITE is None else []
collect_ignore = [] if SUITE == "bookworm" else ["test_suite.py"]


#: The units that are enabled for containers of LXC and nspawn.
ENABLED = ("guestapi.socket", "guestapi-lxc.service", "guestapi-nspawn.service")

#: A registration that takes a tenth of a second elsewhere takes seconds on an emulated processor of a busy host, so
#: callers may wait for it as long as guestapi.toml allows.
PATIENT = r"""
sed -i 's/^wait_seconds = .*/wait_seconds = 10.0/' /etc/guestapi/guestapi.toml
grep -qx 'wait_seconds = 10.0' /etc/guestapi/guestapi.toml
"""

#: The steps of docs/lxc.md and docs/nspawn.md for containers that start at boot.
AT_BOOT = """
for name in web1 web2; do echo 'lxc.start.auto = 1' >>/var/lib/lxc/$name/config; done
install -D -m 0644 /etc/guestapi/nspawn-guestapi.conf /etc/systemd/system/systemd-nspawn@.service.d/guestapi.conf
systemctl daemon-reload
systemctl enable --quiet systemd-nspawn@shop.service machines.target
"""


@pytest.fixture(scope="session")
def product() -> Iterator[Product]:
    """guestapi of this checkout, built for the machine's Debian."""
    assert SUITE is not None
    with built(SUITE) as files:
        yield files


@pytest.fixture(scope="session")
def vm(product: Product) -> Iterator[VirtualMachine]:
    """The machine, set up as in the README; the containers web1, web2 and shop start with it."""
    assert SUITE is not None
    with VirtualMachine(build_image(SUITE)) as machine:
        # Otherwise lxc.service, a part of this boot, may start the containers that are made below.
        machine.run("systemctl", "is-system-running", "--wait", check=False)
        product.install(machine)
        machine.script(PATIENT)
        machine.run("systemctl", "enable", "--now", *ENABLED)
        guests.prepare(machine)
        guests.make(machine, "lxc", ["web1", "web2"])
        guests.make(machine, "nspawn", ["shop"])
        machine.script(AT_BOOT)
        yield machine


@pytest.fixture(scope="session")
def vsock_host(vm: VirtualMachine) -> VirtualMachine:
    """The machine, set up as in docs/virtual-machines.md: virtual machines can start in it, and their relay runs."""
    vm.leave_one_processor()
    nested.prepare(vm)
    vm.run("systemctl", "enable", "--now", "guestapi-vsock.socket")
    # The first request would start it, which takes as long as the relay waits on an emulated processor of a busy host.
    vm.run("systemctl", "start", "guestapi.service")
    return vm
