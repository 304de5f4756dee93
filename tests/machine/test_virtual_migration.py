"""A virtual machine that goes to another VMM, which has another CID, while its agent runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.machine import guests, nested
from tests.machine.nested import Nested
from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

NAME, CID, NEW_CID = "moving", 47, 48
MONITOR, WAY = "/run/moving.monitor", "/run/moving.sock"
#: A command of QEMU's monitor.
_TELL = f"socat -t 5 - UNIX-CONNECT:{MONITOR}"


@pytest.fixture
def moving(vsock_host: VirtualMachine) -> Iterator[Nested]:
    """A registered virtual machine with the agent, which can be migrated."""
    vm = vsock_host
    vm.run("guestapi", "instance", "add", NAME, "--type", "virtual-machine", "--config", f"user.role=role of {NAME}")
    options = ("-monitor", f"unix:{MONITOR},server=on,wait=off")
    try:
        with nested.started(vm, NAME, CID, options=options) as machine:
            machine.register()
            machine.wait()
            machine.start_agent()
            yield machine
    finally:
        vm.run("guestapi", "instance", "remove", NAME)


def test_migration(vsock_host: VirtualMachine, moving: Nested) -> None:
    """After a migration, the agent that has run all the time asks as the CID that the machine has then."""
    vm = vsock_host
    assert moving.ask("/1.0/config/user.role") == (200, f"role of {NAME}")
    agent = moving.run("pgrep -f '[g]uestapi-agent'")
    with nested.started(vm, "moved", NEW_CID, options=("-incoming", f"unix:{WAY}")) as moved:
        vm.script(f"echo 'migrate -d unix:{WAY}' | {_TELL}")
        vm.wait_until(
            f"echo 'info migrate' | {_TELL} | grep -qi 'status:.*completed'", 300, f"echo 'info migrate' | {_TELL}"
        )
        moving.end()
        assert guests.statuses(vm)[NAME] == "dead"
        moved.wait()
        assert moved.run("pgrep -f '[g]uestapi-agent'") == agent
        # Nobody has told the host that this is the machine.
        assert moved.ask("/1.0/config/user.role") == (500, "pid not in container?\n")
        replace(moved, name=NAME).register()
        assert moved.ask("/1.0/config/user.role") == (200, f"role of {NAME}")
