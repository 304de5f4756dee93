"""Incus and LXD on a machine with a real systemd: Debian's packages, installed with their own units."""

from __future__ import annotations

from pathlib import Path

from tests.harness.daemon import packages
from tests.harness.machine import Machine

CLIENTS = {"incus": "incus", "lxd": "lxc"}
_ROOTFS = Path(__file__).with_name("rootfs.py")

#: Run by /bin/sh on the machine, with the unpacked packages, the daemon's name and its client's name. It does first
#: what the packages do at their installation (lxd's postinst adds the group), then what an operator does.
_INSTALL = f"""
set -e
tar -C "$1" -c . | tar -C / -x --keep-directory-symlink
ldconfig
systemd-sysusers
groupadd --force --system lxd
echo root:1000000:65536000 | tee /etc/subuid >/etc/subgid
systemctl daemon-reload
systemctl start "$2.service"
"$3" storage create default dir
"$3" profile device add default root disk path=/ pool=default
mkdir "/tmp/image-$2"
cd "/tmp/image-$2"
/usr/bin/python3 -I -S {_ROOTFS} rootfs
echo '{{"architecture": "x86_64", "creation_date": 1}}' >metadata.yaml
tar -c -f image.tar metadata.yaml rootfs
"$3" image import image.tar --alias busybox
"""


def install_daemon(machine: Machine, kind: str) -> None:
    """Install a daemon and start its unit. It has an image ``busybox``, with curl in it.

    Args:
        machine: a booted machine.
        kind: ``incus`` or ``lxd``.
    """
    machine.run("/bin/sh", "-c", _INSTALL, "sh", str(packages(kind)), kind, CLIENTS[kind])
