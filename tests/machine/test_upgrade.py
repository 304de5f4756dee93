"""Reload, restart and upgrade of a service in use: no request of a container fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.machine import guests
from tests.machine.product import KIND, Product
from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]


def reload(vm: VirtualMachine, product: Product) -> None:
    """Reload the service twice."""
    for _ in range(2):
        vm.run("systemctl", "reload", "guestapi.service")


def restart(vm: VirtualMachine, product: Product) -> None:
    """Restart the service twice."""
    for _ in range(2):
        vm.run("systemctl", "restart", "guestapi.service")


def upgrade(vm: VirtualMachine, product: Product) -> None:
    """Install a newer version, and check that it runs."""
    before = vm.run("systemctl", "show", "--value", "-p", "MainPID", "guestapi.service").stdout
    product.upgrade(vm)
    units = vm.run("systemctl", "is-active", "guestapi.socket", "guestapi.service").stdout
    assert units.split() == ["active", "active"]
    if KIND == "deb":
        status = vm.run("dpkg-query", "-W", "-f", "${Status} ${Version}", "guestapi").stdout
        assert status.startswith("install ok installed ")
        assert status.endswith("+newer")
        assert vm.run("systemctl", "show", "--value", "-p", "MainPID", "guestapi.service").stdout != before


@pytest.mark.parametrize("act", [reload, restart, upgrade])
def test_no_request_fails(vm: VirtualMachine, product: Product, act: Callable[[VirtualMachine, Product], None]) -> None:
    """While a container sends requests all the time, a reload, restart or upgrade makes none of them fail."""
    vm.script("lxc-info -q -s -n web1 | grep -q RUNNING || lxc-start -n web1")
    with guests.load(vm, "web1") as load:
        act(vm, product)
        vm.wait_until("systemctl is-active --quiet guestapi.service", 300)
    assert load.failures == ()
    assert load.requests > 20
