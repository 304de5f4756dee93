"""Disk images of Debian with its own kernel, systemd, LXC, nspawn, QEMU, libvirt, PostgreSQL and SSH, for QEMU.

    python3 -m tests.machine.image SUITE

builds one in advance. An image is made from a root of tools/debian_root.py without booting it: an initrd with only the
drivers of a disk, and an ext4 file system that mke2fs fills. It contains nothing of guestapi, so one image serves every
checkout. Virtual machines in a machine that boots from it boot from the same image, with its cloud-init. It is kept
below $GUESTAPI_CACHE (~/.cache/guestapi), and built again if it is missing or its parts have
changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("GUESTAPI_CACHE", Path.home() / ".cache" / "guestapi"))
DEBIAN_ROOT = CHECKOUT / "tools" / "debian_root.py"

#: The packages of a host of containers, and the tests' own tools.
PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "dbus", "kmod", "linux-image-amd64", "initramfs-tools", "zstd", "e2fsprogs"),
    *("openssh-server", "iproute2", "procps", "curl", "sqlite3", "python3", "libsystemd0", "apparmor", "uidmap"),
    *("lxc", "busybox-static", "systemd-container", "strace"),
    *("qemu-system-x86", "qemu-utils", "libvirt-daemon-system", "libvirt-clients", "cloud-init", "socat"),
    "postgresql",
)

#: The release of Debian whose QEMU emulates every machine, whatever the host has (decision 0285).
EMULATOR = "trixie"

#: The size of the disk's file system; the file is sparse.
SIZE = "4G"

#: Run in the root, where it may write; the image's files go to /srv/image.
_MAKE = r"""
set -e
echo guestapi-test >/etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 guestapi-test\n' >/etc/hosts
echo '/dev/vda / ext4 errors=remount-ro 0 1' >/etc/fstab
printf '[Match]\nName=en*\n[Network]\nDHCP=yes\n' >/etc/systemd/network/20-vm.network
systemd-machine-id-setup >&2
systemctl enable --quiet systemd-networkd ssh
# lxc.service waits half a minute for the bridge of lxc-net.service, which is masked below.
echo 'USE_LXC_BRIDGE="false"' >/etc/default/lxc-net
# They would take part of a boot's time, or of the two processors at any time.
systemctl mask --quiet systemd-networkd-wait-online.service lxc-net.service apt-daily.timer apt-daily-upgrade.timer \
    dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer man-db.timer
# So would what systemd makes once after an update: the cache of ldconfig, and others, which the root has.
touch /etc/.updated /var/.updated
# A start that takes ten seconds elsewhere takes minutes on an emulated processor of a busy host.
mkdir -p /etc/systemd/system.conf.d
printf '[Manager]\nDefaultTimeoutStartSec=900\nDefaultTimeoutStopSec=300\n' >/etc/systemd/system.conf.d/emulated.conf
# They would be compiled at the first boot: profiles of programs that the image does not have.
find /etc/apparmor.d -maxdepth 1 -type f ! -name '*lxc*' ! -name '*libvirt*' ! -name unprivileged_userns -delete
# Tests start PostgreSQL.
echo manual >"$(ls -d /etc/postgresql/*/main)/start.conf"
# Tests start libvirt. cloud-init runs where its generator is told so: in a virtual machine of a test.
systemctl mask --quiet libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket virtlockd.socket \
    virtlogd.socket virtlockd-admin.socket virtlogd-admin.socket libvirt-guests.service
touch /etc/cloud/cloud-init.disabled
# What tests need in a virtual machine of the machine: a shell at a port of vsock, as its only process (init=) or not.
cat >/usr/local/sbin/test-shell <<'END'
#!/bin/sh
bash -euc "$(cat)" test-shell </dev/null 2>&1
echo "exit $?"
END
cat >/usr/local/sbin/test-init <<'END'
#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
exec socat -t 3600 VSOCK-LISTEN:9000,fork EXEC:/usr/local/sbin/test-shell
END
chmod 0755 /usr/local/sbin/test-shell /usr/local/sbin/test-init
cat >/etc/systemd/system/test-shell.service <<'END'
[Unit]
ConditionKernelCommandLine=test-shell
[Service]
ExecStartPre=modprobe vmw_vsock_virtio_transport
ExecStart=socat -t 3600 VSOCK-LISTEN:9000,fork EXEC:/usr/local/sbin/test-shell
[Install]
WantedBy=multi-user.target
END
systemctl enable --quiet test-shell.service
mkdir -p /var/log/journal
mkdir -p -m 0700 /root/.ssh
cp /srv/image/key.pub /root/.ssh/authorized_keys
rm -f /etc/ssh/ssh_host_*
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
printf 'UseDNS no\nMaxSessions 100\n' >/etc/ssh/sshd_config.d/test.conf
# A client that came before would wait for a time-out.
mkdir -p /etc/systemd/system/ssh.service.d
cat >/etc/systemd/system/ssh.service.d/console.conf <<'END'
[Service]
ExecStartPost=/bin/sh -c 'echo SSH listens >/dev/console'
END
echo MODULES=list >/etc/initramfs-tools/conf.d/vm
printf '%s\n' virtio_pci virtio_blk ext4 >/etc/initramfs-tools/modules
kernel=$(ls /lib/modules)
update-initramfs -c -k "$kernel" >&2
cp "/boot/initrd.img-$kernel" /srv/image/initrd
# QEMU starts an unpacked kernel by its PVH entry; to unpack itself, the kernel would take as long as its boot.
python3 -I - "/boot/vmlinuz-$kernel" /srv/image/vmlinux <<'END'
import lzma, subprocess, sys
image = open(sys.argv[1], "rb").read()
# linux/Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
start = (image[0x1F1] + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
packed = image[start : start + int.from_bytes(image[0x24C:0x250], "little")]
if packed[:4] == b"\x28\xb5\x2f\xfd":
    # The length of what is unpacked follows, in four bytes.
    kernel = subprocess.run(["zstd", "-dcq"], input=packed[:-4], stdout=subprocess.PIPE, check=True).stdout
else:
    kernel = lzma.LZMADecompressor().decompress(packed)
open(sys.argv[2], "wb").write(kernel)
END
# A virtual machine of the machine that is no more than test-init: Debian's initrd would take longer than the kernel.
small=$(mktemp -d)
mkdir "$small/bin" "$small/modules" "$small/dev" "$small/disk" "$small/memory" "$small/root"
cp "$(command -v busybox)" "$small/bin/busybox"
for module in virtio_pci virtio_blk crc32c ext4 overlay vmw_vsock_virtio_transport; do
    modprobe --set-version "$kernel" --show-depends "$module"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r file; do
    number=$((number + 1))
    case $file in
    *.xz) busybox unxz -c "$file" ;;
    *) cat "$file" ;;
    esac >"$small/modules/$(printf %02d $number)"
done
cat >"$small/init" <<'END'
#!/bin/busybox sh
for module in /modules/*; do /bin/busybox insmod "$module"; done
/bin/busybox mount -t devtmpfs dev /dev
# A word of the kernel's command line that the kernel does not know is a variable.
if [ "$init_from" = disk ]; then
    /bin/busybox mount -t ext4 /dev/vda /root
    /bin/busybox mount --move /dev /root/dev
    exec /bin/busybox switch_root /root /sbin/init
fi
/bin/busybox ip link set lo up
# The disk is never written, so several machines can have it.
/bin/busybox mount -t ext4 -o ro /dev/vda /disk
/bin/busybox mount -t tmpfs tmpfs /memory
/bin/busybox mkdir /memory/upper /memory/work
/bin/busybox mount -t overlay -o lowerdir=/disk,upperdir=/memory/upper,workdir=/memory/work overlay /root
for kind in proc sysfs; do /bin/busybox mount -t $kind $kind /root/${kind%fs}; done
/bin/busybox mount -t tmpfs tmpfs /root/tmp
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /usr/local/sbin/test-init
END
chmod 0755 "$small/init"
(cd "$small" && find . | cpio --quiet -o -H newc) >/srv/image/small-initrd
cp /srv/image/vmlinux /srv/image/small-initrd /boot/
mount --bind / /mnt
mke2fs -q -t ext4 -L root -d /mnt /srv/image/disk "$1"
"""


@dataclass(frozen=True)
class DiskImage:
    """The files from which QEMU boots, and QEMU itself.

    Attributes:
        suite: of Debian.
        directory: with the files.
        emulator: a root of Debian that has QEMU.
    """

    suite: str
    directory: Path
    emulator: Path

    @property
    def qemu(self) -> list[str]:
        """The emulator with its own libraries and firmware, whatever the host has: the first words of its command."""
        libraries = self.emulator / "usr/lib/x86_64-linux-gnu"
        words = [self.emulator / "lib64/ld-linux-x86-64.so.2", "--library-path", f"{libraries}:{libraries}/pulseaudio"]
        words += [self.emulator / "usr/bin/qemu-system-x86_64"]
        return [*map(str, words), "-L", f"{self.emulator}/usr/share/qemu", "-L", f"{self.emulator}/usr/share/seabios"]

    @property
    def disk(self) -> Path:
        """The file system, which must be copied before it is booted."""
        return self.directory / "disk"

    @property
    def kernel(self) -> Path:
        """The suite's own kernel, unpacked."""
        return self.directory / "vmlinux"

    @property
    def initrd(self) -> Path:
        """The initrd, with which the kernel finds its disk."""
        return self.directory / "initrd"

    @property
    def key(self) -> Path:
        """A private key that root of the image accepts."""
        return self.directory / "key"


def build_image(suite: str) -> DiskImage:
    """Return an image of a suite of Debian; build it if the cache has none.

    Args:
        suite: Debian's name of it, such as "trixie".

    Returns:
        the image, which other processes use, too; it must not be written.

    Raises:
        subprocess.CalledProcessError: a tool failed; its output is on standard error.
    """
    root, emulator = _root(suite), _root(EMULATOR)
    key = hashlib.sha256(f"{root.name} {root.stat().st_mtime_ns} {SIZE} {_MAKE}".encode()).hexdigest()[:12]
    images = CACHE / "images"
    directory = images / f"{suite}-{key}"
    images.mkdir(parents=True, exist_ok=True)
    with (images / f"{suite}.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if directory.is_dir():
            return DiskImage(suite, directory, emulator)
        # Images of older roots are not used any more.
        for old in images.glob(f"{suite}-*"):
            shutil.rmtree(old)
        sys.stderr.write(f"building an image of Debian {suite} in {directory}\n")
        building = images / f"{suite}.building"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", building / "key"], check=True)
        bind = f"--bind={building}:/srv/image"
        subprocess.run([*_tool("run", suite), bind, "--", "sh", "-c", _MAKE, "make", SIZE], check=True)
        building.rename(directory)
    return DiskImage(suite, directory, emulator)


def _root(suite: str) -> Path:
    done = subprocess.run(_tool("build", suite), stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


def _tool(verb: str, suite: str) -> list[str]:
    return [str(DEBIAN_ROOT), verb, suite, "--package", *PACKAGES]


if __name__ == "__main__":
    build_image(sys.argv[1])
