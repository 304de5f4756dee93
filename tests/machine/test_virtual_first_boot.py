"""The first boot of a virtual machine with Debian's cloud-init: it finds its data in guestapi, over the agent.

The machine's disk is prepared by the commands of docs/virtual-machines.md. Then it boots with systemd. cloud-init is
the package's, and what runs in the guest at which moment is decided by systemd and the shipped units alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.machine import nested
from tests.machine.nested import Nested
from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

NAME, CID = "first", 44
DISK = "/var/tmp/first.qcow2"

USER_DATA = """#cloud-config
write_files:
- path: /etc/from-host
  content: written by cloud-init
runcmd:
- curl -sS --unix-socket /dev/incus/sock http://x/1.0/config/user.role -o /root/asked
"""

#: Opens the disk as a directory of the host: /mnt.
_OPEN = f"""
modprobe nbd
qemu-nbd --connect=/dev/nbd0 {DISK}
until [ "$(cat /sys/block/nbd0/size)" -gt 0 ]; do sleep 0.1; done
mount /dev/nbd0 /mnt
for share in /usr/share /usr/local/share; do
    [ ! -d $share/guestapi ] || cp $share/guestapi/guestapi-agent* /mnt/root
done
"""
_CLOSE = """
umount /mnt
qemu-nbd --disconnect /dev/nbd0 >&2
"""
#: docs/virtual-machines.md, "In the virtual machine" and "cloud-init", in the directory with the files.
_INSTALL = """
cd /root
install -D -m 0755 guestapi-agent /usr/local/sbin/guestapi-agent
install -D -m 0644 -t /etc/systemd/system guestapi-agent.socket guestapi-agent.service
systemctl enable guestapi-agent.socket
echo 'datasource_list: [LXD, None]' >/etc/cloud/cloud.cfg.d/90-guestapi.cfg
rm /etc/cloud/cloud-init.disabled
"""
#: What the image has for a host of containers, and what systemd makes after an update, would take part of the
#: processor's time.
_QUIET = """
systemctl mask ssh.service lxc.service lxc-net.service lxc-monitord.service apparmor.service machines.target \
    systemd-logind.service systemd-networkd.service systemd-networkd.socket e2scrub_reap.service \
    sys-fs-fuse-connections.mount modprobe@fuse.service modprobe@efi_pstore.service modprobe@configfs.service \
    sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount dev-mqueue.mount \
    systemd-binfmt.service proc-sys-fs-binfmt_misc.automount postgresql.service getty@tty1.service \
    serial-getty@ttyS0.service systemd-tmpfiles-clean.timer logrotate.timer
touch /etc/.updated /var/.updated
"""
#: Of cloud-init's modules, those that the test looks at: its own lists begin with what no test uses.
_MODULES = """
cat >/etc/cloud/cloud.cfg.d/91-test.cfg <<END
cloud_init_modules: [write-files, set_hostname, update_hostname]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user]
END
"""
#: The console is none that is emulated: each character of a serial port takes its time.
#: No driver of what the test does not use is loaded.
_APPEND = (
    f"test-shell console=tty0 {nested.FROM_DISK} "
    "module_blacklist=floppy,ata_piix,ata_generic,pata_acpi,i2c_piix4,pcspkr,kvm_amd,kvm_intel,kvm"
)
#: Prints JSON of what cloud-init says of itself when all its stages have ended, whatever its exit status says.
_STATUS = "cloud-init status --wait --format json || true"
#: $1: a unit, $2: one of its times. Prints it, in microseconds since the boot.
_TIME = "systemctl show --value -p {} {}"


@dataclass(frozen=True)
class Booted:
    """The machine after its first boot, and what `cloud-init status` says there."""

    machine: Nested
    status: dict[str, object]


@pytest.fixture(scope="module")
def booted(vsock_host: VirtualMachine) -> Iterator[Booted]:
    """A virtual machine after its first boot with cloud-init."""
    vm = vsock_host
    vm.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/dev/vdb", DISK)
    vm.script(_OPEN)
    vm.script('SYSTEMD_OFFLINE=1 chroot /mnt bash -euc "$1"', _INSTALL + _QUIET + _MODULES)
    vm.script(_CLOSE)
    words = ("--config", "user.role=frontend", "--config", f"cloud-init.user-data={USER_DATA}")
    vm.run("guestapi", "instance", "add", NAME, "--type", "virtual-machine", *words)
    try:
        with nested.started(vm, NAME, CID, disk=DISK, append=_APPEND, megabytes=512) as machine:
            machine.register()
            machine.wait()
            yield Booted(machine, json.loads(machine.run(_STATUS, timeout=900).rpartition("\n}")[0] + "\n}"))
    finally:
        vm.run("guestapi", "instance", "remove", NAME)
        vm.run("rm", DISK)


def test_cloud_init_finds_its_data(booted: Booted) -> None:
    """cloud-init has the data source LXD at its first stage, and the identity that the host gives."""
    one = booted.machine
    assert booted.status["status"] == "done", booted.status
    assert booted.status["errors"] == []
    assert booted.status["detail"] == "DataSourceLXD"
    assert "found local data from DataSourceLXD" in one.run("cat /var/log/cloud-init.log")
    told = dict(line.split(": ", 1) for line in one.ask("/1.0/meta-data")[1].splitlines() if ": " in line)
    assert one.run("cloud-init query instance_id").strip() == told["instance-id"]
    assert told["local-hostname"] == NAME


def test_cloud_init_does_what_it_is_told(booted: Booted) -> None:
    """The machine has its host name, its files and the results of its commands, one of which has asked the host."""
    one = booted.machine
    assert one.run("uname -n").strip() == NAME
    assert one.run("cat /etc/from-host") == "written by cloud-init"
    assert one.run("cat /root/asked") == "frontend"


def test_the_sockets_are_open_before_cloud_init(booted: Booted) -> None:
    """systemd opens the agent's sockets before the first stage of cloud-init begins, because the unit says so."""
    one = booted.machine
    after = one.run("systemctl show --value -p After cloud-init-local.service").split()
    assert "guestapi-agent.socket" in after
    opened = int(one.run(_TIME.format("ActiveEnterTimestampMonotonic", "guestapi-agent.socket")))
    begun = int(one.run(_TIME.format("InactiveExitTimestampMonotonic", "cloud-init-local.service")))
    assert 0 < opened <= begun
