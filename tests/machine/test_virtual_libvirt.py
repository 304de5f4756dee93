"""Virtual machines of a real libvirt, with guestapi-libvirt.service as shipped: they register themselves.

The commands are those of docs/virtual-machines.md for libvirt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.machine import nested
from tests.machine.nested import Nested
from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

UNITS = (
    "libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket virtlogd.socket virtlogd-admin.socket"
)
#: libvirtd of Debian 12 needs them; that of 13 may not have them.
LOCKING = "virtlockd.socket virtlockd-admin.socket"
SOCKETS = ("libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket")

#: A vsock device whose CID is in the domain's definition, and one whose CID libvirt chooses.
FIXED = "<vsock model='virtio'><cid auto='no' address='77'/></vsock>"
CHOSEN = "<vsock model='virtio'><cid auto='yes'/></vsock>"

#: All domains have one disk, which they only read: libvirt would make each QEMU its owner.
_PREPARE = r"""
printf '%s\n' 'security_driver = "none"' 'namespaces = []' >>/etc/libvirt/qemu.conf
chmod o+r /dev/vdb
mkdir -p /var/lib/libvirt/boot
cp -L /srv/vmlinux /srv/small-initrd /var/lib/libvirt/boot/
"""

_DOMAIN = """<domain type='kvm'>
  <name>{name}</name>
  <memory unit='MiB'>256</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>/var/lib/libvirt/boot/vmlinux</kernel>
    <initrd>/var/lib/libvirt/boot/small-initrd</initrd>
    <cmdline>{append}</cmdline>
  </os>
  <cpu mode='host-passthrough' check='none'/>
  <features><acpi/><vmport state='off'/></features>
  <clock offset='utc'><timer name='hpet' present='no'/></clock>
  <devices>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/><source dev='/dev/vdb'/><target dev='vda' bus='virtio'/><readonly/>
    </disk>
    <serial type='file'><source path='/var/log/libvirt/qemu/{name}.console'/></serial>
    {vsock}
  </devices>
</domain>
"""


class LibvirtMachine:
    """libvirt on the machine, and what guestapi has of it."""

    def __init__(self, vm: VirtualMachine) -> None:
        self.vm = vm

    def virsh(self, *words: str) -> str:
        """Run virsh; return its output."""
        return self.vm.run("virsh", "--quiet", *words).stdout.strip()

    def define(self, name: str, vsock: str) -> None:
        """Define a domain; `vsock`: the XML of its vsock device."""
        self.vm.put(_DOMAIN.format(name=name, append=nested.APPEND, vsock=vsock).encode(), f"/root/{name}.xml")
        self.virsh("define", f"/root/{name}.xml")

    def instance(self, name: str) -> dict[str, Any]:
        """Return an instance as `guestapi instance list` has it; empty: there is none."""
        listed = json.loads(self.vm.run("guestapi", "instance", "list", "--format", "json").stdout)
        found: dict[str, Any] = next((one for one in listed if one["name"] == name), {})
        return found

    def wait_for(self, name: str, status: str) -> None:
        """Wait until an instance has a status; empty: until there is none."""
        if status == "running":
            # One process that waits: those of a loop would take the processor from what is waited for.
            self.vm.run("guestapi", "instance", "wait", name, "--running", "--timeout", "300")
            return
        line = f"{name},virtual-machine,{status}" if status else f"{name},"
        found = f"guestapi instance list --format csv --columns nts | grep -q '^{line}'"
        why = "guestapi check; virsh list --all; journalctl -b -n 60 --no-pager -u 'guestapi-libvirt*' -u libvirtd"
        self.vm.wait_until(found if status else f"! {found}", 300, why)

    def pid(self, name: str) -> int:
        """The PID of a domain's VMM."""
        return int(self.vm.run("cat", f"/run/libvirt/qemu/{name}.pid").stdout)

    def machine(self, name: str) -> Nested:
        """A domain that runs, once it has booted, with the agent."""
        cid = re.search(r"<cid [^>]*address='(\d+)'", self.virsh("dumpxml", name))
        assert cid
        found = Nested(self.vm, name, int(cid[1]), self.pid(name))
        found.wait()
        found.start_agent()
        return found


@pytest.fixture(scope="module")
def libvirt(vsock_host: VirtualMachine) -> Iterator[LibvirtMachine]:
    """libvirt with a domain that has a vsock device and does not run, and the follower."""
    vm = vsock_host
    vm.script(_PREPARE)
    vm.script(f"systemctl unmask --quiet {UNITS} {LOCKING}; systemctl start libvirtd.service")
    made = LibvirtMachine(vm)
    try:
        vm.run("systemctl", "enable", "--now", "guestapi-libvirt.service")
        words = ("--type", "virtual-machine", "--config", "user.role=frontend")
        vm.run("guestapi", "instance", "add", "web", *words)
        made.define("web", CHOSEN)
        yield made
    finally:
        for name in ("web", "old", "new"):
            vm.run("virsh", "--quiet", "destroy", name, check=False)
            vm.run("virsh", "--quiet", "undefine", name, check=False)
        vm.script(f"systemctl disable --now --quiet guestapi-libvirt.service {UNITS}; systemctl mask --quiet {UNITS}")
        vm.run("guestapi", "follow", "libvirt", "--forget")


def test_a_machine_of_libvirt(libvirt: LibvirtMachine) -> None:
    """A domain registers itself when it starts, is answered about its instance, and its end is noticed."""
    vm = libvirt.vm
    libvirt.virsh("start", "web")
    libvirt.wait_for("web", "running")
    one = libvirt.instance("web")
    assert (one["source"], one["pid"], one["type"]) == ("libvirt", libvirt.pid("web"), "virtual-machine")
    web = libvirt.machine("web")
    assert web.ask("/1.0/config/user.role") == (200, "frontend")
    assert "local-hostname: web" in web.ask("/1.0/meta-data", "/dev/lxd/sock")[1]

    # Neither libvirt's daemon nor the follower is needed for answers; both find what runs when they are back.
    vm.run("systemctl", "stop", *SOCKETS, "libvirtd.service", "guestapi-libvirt.service")
    assert web.ask("/1.0/config/user.role") == (200, "frontend")
    vm.run("systemctl", "start", *SOCKETS, "libvirtd.service", "guestapi-libvirt.service")
    assert libvirt.instance("web") == one
    assert web.ask("/1.0/config/user.role") == (200, "frontend")
    vm.wait_until("guestapi check | grep -q '^ok   follower libvirt: .* 1 instances, 1 running'", 300, "guestapi check")

    libvirt.virsh("destroy", "web")
    libvirt.wait_for("web", "stopped")


def test_definitions(libvirt: LibvirtMachine) -> None:
    """An instance has its domain's name and UUID, follows its renaming, and is gone with it if nothing was set."""
    libvirt.define("plain", CHOSEN)
    libvirt.define("mute", "")
    libvirt.wait_for("plain", "stopped")
    one = libvirt.instance("plain")
    assert one["uuid"] == libvirt.virsh("domuuid", "plain")
    assert libvirt.instance("mute") == {}
    libvirt.virsh("domrename", "plain", "other")
    libvirt.wait_for("other", "stopped")
    assert libvirt.instance("plain") == {}
    assert libvirt.instance("other")["uuid"] == one["uuid"]
    libvirt.virsh("undefine", "other")
    libvirt.virsh("undefine", "mute")
    libvirt.wait_for("other", "")


def test_a_cid_that_another_domain_gets(libvirt: LibvirtMachine) -> None:
    """Who gets a domain's CID is never answered as that domain, even if nobody has noticed that it has ended."""
    vm = libvirt.vm
    for name in ("old", "new"):
        words = ("--type", "virtual-machine", "--config", f"user.role=role of {name}")
        vm.run("guestapi", "instance", "add", name, *words)
        libvirt.define(name, FIXED)
    libvirt.virsh("start", "old")
    libvirt.wait_for("old", "running")
    old = libvirt.machine("old")
    assert old.ask("/1.0/config/user.role") == (200, "role of old")

    vm.run("systemctl", "stop", "guestapi-libvirt.service")
    libvirt.virsh("destroy", "old")
    libvirt.virsh("start", "new")
    new = libvirt.machine("new")
    assert new.cid == old.cid
    assert new.ask("/1.0/config/user.role") == (500, "pid not in container?\n")
    vm.run("systemctl", "start", "guestapi-libvirt.service")
    libvirt.wait_for("new", "running")
    assert new.ask("/1.0/config/user.role") == (200, "role of new")
    assert libvirt.instance("old")["status"] == "stopped"

    # With the follower, the domain is registered while it boots.
    libvirt.virsh("destroy", "new")
    libvirt.virsh("start", "old")
    assert libvirt.machine("old").ask("/1.0/config/user.role") == (200, "role of old")
