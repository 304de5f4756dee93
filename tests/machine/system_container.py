"""A second host in the machine: Debian with its own systemd in systemd-nspawn, with the machine's guestapi.

Its root is the machine's image once more, under a file system in memory. The files of guestapi's package are those that
dpkg has installed on the machine; most of them are read where they are. Its network is a pair of interfaces.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.machine.virtual import VirtualMachine

#: The addresses of the machine and of the second host, in the network of docs/fleet.md (RFC 5737).
MACHINE_ADDRESS, ADDRESS = "192.0.2.1", "192.0.2.2"
#: The same file is seen from the machine below this directory.
ROOT = "/srv/second/root"

#: $1: ADDRESS, $2: MACHINE_ADDRESS. Prints the PID of its PID 1. Of its units, only those start that are told to.
_START = r"""
mkdir -p /srv/image
mountpoint -q /srv/image || mount -o ro,noload /dev/vdb /srv/image
mkdir -p /srv/second
mount -t tmpfs -o mode=0755 tmpfs /srv/second
cd /srv/second
mkdir upper work root
mount -t overlay overlay -o lowerdir=/srv/image,upperdir=upper,workdir=work root
dpkg -L guestapi | while read -r path; do
    case $path in
    /usr/lib/guestapi/*) ;;
    *) [ -d "$path" ] && [ ! -L "$path" ] || echo "$path" ;;
    esac
done >files
tar -C / -cf - -T files | tar -C root -xf -
mkdir -p root/usr/lib/guestapi
systemd-id128 new >root/etc/machine-id
ip link add fleet0 type veth peer name fleet1
ip address add "$2/24" dev fleet0
ip link set fleet0 up
systemd-run --quiet --collect --unit=second-host -p Type=notify -p Delegate=yes -p TimeoutStartSec=900 \
    systemd-nspawn --quiet --keep-unit --register=no --notify-ready=yes --machine=second --directory=/srv/second/root \
    --bind-ro=/usr/lib/guestapi --network-interface=fleet1 --system-call-filter='add_key keyctl bpf' \
    --boot systemd.unit=basic.target
main=$(systemctl show --value -p MainPID second-host)
pid=$(pgrep -o -P "$main")
nsenter -t "$pid" -n sh -c "ip link set lo up; ip address add $1/24 dev fleet1; ip link set fleet1 up"
echo "$pid"
"""

#: What the package's own script does, for a root that was not installed but copied.
_CONFIGURE = """
systemd-sysusers guestapi.conf
systemd-tmpfiles --create guestapi.conf
systemctl daemon-reload
systemctl start dbus.service
systemctl enable --now guestapi.socket guestapi-lxc.service
# Otherwise the first request would start it, which takes long on an emulated processor.
systemctl start --no-block guestapi.service
"""

_STOP = """
systemctl kill --signal=KILL second-host 2>/dev/null || true
while systemctl is-active --quiet second-host; do sleep 0.2; done
ip link delete fleet0 2>/dev/null || true
for each in root .; do
    ! mountpoint -q /srv/second/$each || umount --lazy /srv/second/$each
done
"""


class SystemContainer:
    """The second host, which runs."""

    def __init__(self, vm: VirtualMachine, pid: int) -> None:
        """Describe it.

        Args:
            vm: in which it is.
            pid: of its PID 1.
        """
        self._vm = vm
        self._enter = ("nsenter", "-t", str(pid), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w")
        self._pid = pid

    def run(self, *argv: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program in it; as of `VirtualMachine`."""
        return self._vm.run(*self._enter, *argv, check=check, **options)

    def script(self, text: str) -> str:
        """Run a shell script in it; as of `VirtualMachine`."""
        return self.run("bash", "-euc", text).stdout

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Take its network away for the length of the block."""
        link = ("nsenter", "-t", str(self._pid), "-n", "ip", "link", "set", "fleet1")
        self._vm.run(*link, "down")
        try:
            yield
        finally:
            self._vm.run(*link, "up")


@contextmanager
def second_host(vm: VirtualMachine) -> Iterator[SystemContainer]:
    """Boot the second host, with guestapi, its socket and its follower of LXC; it is killed afterwards."""
    try:
        pid = vm.script(_START, ADDRESS, MACHINE_ADDRESS)
        host = SystemContainer(vm, int(pid))
        host.script(_CONFIGURE)
        yield host
    finally:
        vm.script(_STOP)
