"""Virtual machines that systemd-machined knows, without libvirt: guestapi-nspawn.service registers them.

The commands are those of docs/virtual-machines.md for machined. systemd-vmspawn is in no Debian that is tested; a shell
that waits for its QEMU is in its place.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.machine import nested
from tests.machine.nested import Nested
from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

#: {name}, {cid}, {machine}, {initrd}, {append}.
_QEMU = r"""qemu-system-x86_64 -enable-kvm -machine {machine} -cpu host -m 256 -nodefaults -no-user-config -no-reboot \
    -kernel /srv/vmlinux -initrd {initrd} -append "{append}" \
    -serial file:/run/{name}.console -drive file=/dev/vdb,if=virtio,format=raw,readonly=on \
    -device vhost-vsock-pci,guest-cid={cid} -display none"""
#: {name}, {command}: a machine is a unit, and machined is told of its main process.
_REGISTER = """
systemd-run --quiet --collect --service-type=exec --unit={name} {command}
busctl call org.freedesktop.machine1 /org/freedesktop/machine1 org.freedesktop.machine1.Manager \
    RegisterMachine sayssus {name} 0 qemu vm "$(systemctl show --value -p MainPID {name})" ""
"""


def listed(vm: VirtualMachine, name: str) -> dict[str, Any]:
    """Return an instance as `guestapi instance list` has it; empty: there is none."""
    found = json.loads(vm.run("guestapi", "instance", "list", "--format", "json").stdout)
    return next((one for one in found if one["name"] == name), {})


def wait_until_stopped(vm: VirtualMachine, name: str) -> None:
    """Wait until the end of an instance has been noticed."""
    why = "guestapi check; machinectl list; journalctl -b -n 60 --no-pager -u 'guestapi-nspawn*'"
    words = f"guestapi instance list --format csv --columns nts | grep -qx '{name},virtual-machine,stopped'"
    vm.wait_until(words, 300, why)


@contextmanager
def registered(vm: VirtualMachine, name: str, cid: int, *, wrapped: bool = False) -> Iterator[dict[str, Any]]:
    """Start a virtual machine that machined knows, with an instance of its name; yield the instance once it runs.

    Args:
        vm: where.
        name: of the machine, its unit and its instance.
        cid: its context ID.
        wrapped: whether its leader is a shell that has started QEMU, and not QEMU.
    """
    vm.run("guestapi", "instance", "add", name, "--type", "virtual-machine", "--config", f"user.role=role of {name}")
    words = {"machine": nested.MACHINE, "initrd": nested.INITRD, "append": nested.APPEND}
    command = _QEMU.format(name=name, cid=cid, **words)
    if wrapped:
        # Its processor need not run (-S): the VMM's process is looked at.
        command = f"sh -c {shlex.quote(command + ' -S; exit $?')}"
    vm.script(_REGISTER.format(name=name, command=command))
    try:
        # One process that waits: those of a loop would take the processor from what is waited for.
        vm.run("guestapi", "instance", "wait", name, "--running", "--timeout", "300")
        yield listed(vm, name)
    finally:
        vm.run("systemctl", "stop", name, check=False)
        wait_until_stopped(vm, name)
        vm.run("guestapi", "instance", "remove", name)


def test_a_machine_of_machined(vsock_host: VirtualMachine) -> None:
    """A VMM that machined knows is registered under the machine's name, is answered as it, and its end is noticed."""
    vm = vsock_host
    with registered(vm, "scope", 45) as one:
        leader = int(vm.run("machinectl", "show", "--value", "-p", "Leader", "scope").stdout)
        assert (one["source"], one["pid"]) == ("nspawn", leader)
        machine = Nested(vm, "scope", 45, leader)
        machine.wait()
        machine.start_agent()
        assert machine.ask("/1.0/config/user.role") == (200, "role of scope")
        assert json.loads(machine.ask("/1.0")[1])["instance_type"] == "virtual-machine"
        # Only at the start machined is needed, and the follower.
        vm.run("systemctl", "stop", "guestapi-nspawn.service", "systemd-machined.service")
        assert machine.ask("/1.0/config/user.role") == (200, "role of scope")
        vm.run("systemctl", "start", "guestapi-nspawn.service")
    # The instance is removed only after its end was noticed.
    assert listed(vm, "scope") == {}


def test_a_leader_that_has_started_the_vmm(vsock_host: VirtualMachine) -> None:
    """Below a leader that is no VMM, the process with the vsock device is the machine."""
    vm = vsock_host
    with registered(vm, "wrapped", 46, wrapped=True) as one:
        leader = vm.run("machinectl", "show", "--value", "-p", "Leader", "wrapped").stdout.strip()
        assert one["source"] == "nspawn"
        assert vm.run("cat", f"/proc/{one['pid']}/comm").stdout.startswith("qemu-system")
        assert vm.run("ps", "-o", "ppid=", "-p", str(one["pid"])).stdout.strip() == leader
