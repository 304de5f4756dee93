"""Virtual machines in the virtual machine: QEMU as docs/virtual-machines.md starts it, with a CID of its own.

They boot from the machine's second disk, which is the image once more, with its kernel, and are emulated by
KVM, which the emulated processor offers (SVM). Each is asked over vsock(7) for a shell: see test-shell in image.py.
"""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.machine.virtual import VirtualMachine

#: The shell's port.
_PORT = 9000
#: Seconds that a boot may take; 10 are usual on an idle host.
BOOT_SECONDS = 600.0

#: Once after each boot of the machine: the kernel and the initrd of the image.
_PREPARE = """
modprobe kvm halt_poll_ns=0
modprobe kvm_amd 2>/dev/null || modprobe kvm_intel
modprobe vhost_vsock
mkdir -p /srv/image
mountpoint -q /srv/image || mount -o ro,noload /dev/vdb /srv/image
ln -sf /srv/image/boot/vmlinux /srv/image/boot/small-initrd /srv/
"""
#: Has a shell as the only process; with FROM_DISK on the kernel's command line, the init of the disk.
INITRD = "/srv/small-initrd"
FROM_DISK = "init_from=disk"

#: Of the kernel's command line, for all. On a processor of AMD's, the kernel looks for AGP bridges on all buses, twice,
#: which takes longer than the rest of its boot ("noearly").
APPEND = "root=/dev/vda rw console=ttyS0 quiet mitigations=off tsc=reliable pci=noearly panic=-1"

#: The kernel would look for what these are, and wait for it.
MACHINE = "pc,i8042=off,hpet=off,vmport=off"

#: $1: name, $2: CID, $3: the disk, $4: the kernel's command line, $5: MiB of memory, then more options.
_START = f"""
name=$1 cid=$2 disk=$3 append=$4 megabytes=$5
shift 5
rm -f /run/$name.pid
qemu-system-x86_64 -enable-kvm -machine {MACHINE} -cpu host -m $megabytes -nodefaults -no-user-config -no-reboot \
    -kernel /srv/vmlinux -initrd {INITRD} -append "$append" \
    -serial file:/run/$name.console -drive "file=$disk" -device vhost-vsock-pci,guest-cid=$cid \
    -display none -daemonize -pidfile /run/$name.pid "$@"
cat /run/$name.pid
"""

#: $1: CID, $2: the shell's port, $3: seconds. The agent of the host's installation, started without systemd.
_AGENT = """
file=/usr/share/guestapi/guestapi-agent
[ -e $file ] || file=/usr/local/share/guestapi/guestapi-agent
{
    echo "base64 -d >/usr/local/sbin/guestapi-agent <<END"
    base64 $file
    echo "END"
    echo "chmod 0755 /usr/local/sbin/guestapi-agent"
    echo "setsid guestapi-agent >/tmp/agent.log 2>&1 </dev/null &"
    echo "until [ -S /dev/lxd/sock ]; do sleep 0.1; done"
} | timeout $3 socat -t$3 - VSOCK-CONNECT:$1:$2
"""


@dataclass(eq=False)
class Nested:
    """A virtual machine that runs.

    Attributes:
        vm: the machine in which it is.
        name: of it and, mostly, of its instance.
        cid: its context ID.
        pid: of its QEMU.
    """

    vm: VirtualMachine
    name: str
    cid: int
    pid: int

    def run(self, script: str, timeout: float = 300) -> str:
        """Run a shell script in it; fail if one of its commands does; return its output."""
        output, _, code = self.attempt(script, timeout).rpartition("exit ")
        assert code == "0\n", output + code
        return output

    def attempt(self, script: str, timeout: float = 300) -> str:
        """Run a shell script in it; return its output, which ends with "exit " and its exit status, if it has ended."""
        return self.vm.run(*self._words(timeout), given=script.encode(), timeout=timeout + 60, check=False).stdout

    def spawn(self, script: str, timeout: float = 600) -> subprocess.Popen[str]:
        """Run a shell script in it; its output can be read meanwhile."""
        return self.vm.spawn(*self._words(timeout), given=script.encode())

    def _words(self, timeout: float) -> tuple[str, ...]:
        return "timeout", f"{timeout:.0f}", "socat", f"-t{timeout:.0f}", "-", f"VSOCK-CONNECT:{self.cid}:{_PORT}"

    def put(self, content: bytes | Path, path: str, mode: str = "0644") -> None:
        """Write a file of at most 90 KiB in it, and create the directories above it."""
        given = content.read_bytes() if isinstance(content, Path) else content
        text = base64.b64encode(given).decode()
        self.run(f"mkdir -p '{Path(path).parent}'; echo {text} | base64 -d >'{path}'; chmod {mode} '{path}'")

    def start_agent(self) -> None:
        """Copy guestapi-agent from the host, as docs/virtual-machines.md has it, and start it without systemd."""
        output = self.vm.script(_AGENT, str(self.cid), str(_PORT), "300")
        assert output == "exit 0\n", output

    def register(self) -> None:
        """Register it as the instance of its name."""
        words = ("guestapi", "instance", "register", self.name, "--cid", str(self.cid), "--pid", str(self.pid))
        self.vm.run(*words)

    def wait(self) -> None:
        """Wait until it has booted."""
        # One process that tries to connect: several that start five times a second would take a third of the processor.
        words = self._words(BOOT_SECONDS)
        tries = f"{words[-1]},retry={BOOT_SECONDS * 5:.0f},interval=0.2"
        done = self.vm.run(*words[:-1], tries, given=b"true", timeout=BOOT_SECONDS + 60, check=False)
        if done.stdout != "exit 0\n":
            console = self.vm.run("tail", "-c", "3000", f"/run/{self.name}.console", check=False).stdout
            raise AssertionError(f"{self.name} does not boot: {done.stderr}{console}")

    def ask(self, path: str, port: str = "/dev/incus/sock") -> tuple[int, str]:
        """Send a request as root, at a socket of the agent; return status and body."""
        url = f"http://x{path}"
        text = self.run(f"curl -sS --max-time 250 -w '\\n%{{http_code}}' --unix-socket {port} '{url}'")
        body, _, status = text.rpartition("\n")
        return int(status), body

    def end(self) -> None:
        """End it, if it runs: QEMU is killed."""
        self.vm.script('kill -9 "$1" 2>/dev/null || exit 0; while [ -e /proc/$1 ]; do sleep 0.1; done', str(self.pid))


def prepare(vm: VirtualMachine) -> None:
    """Make a machine one that can have virtual machines."""
    vm.script(_PREPARE)


@contextmanager
def started(
    vm: VirtualMachine,
    name: str,
    cid: int,
    *,
    disk: str = "",
    append: str = "",
    megabytes: int = 256,
    options: Sequence[str] = (),
) -> Iterator[Nested]:
    """Start a virtual machine, without waiting for its boot.

    Args:
        vm: where, prepared.
        name: of it.
        cid: its context ID.
        disk: a file in qcow2 that it writes; by default it writes to its memory.
        append: more of its kernel's command line.
        megabytes: of memory, in MiB.
        options: more of QEMU's.

    Yields:
        the machine, which is killed afterwards if it runs then.
    """
    drive = f"{disk},if=virtio,format=qcow2" if disk else "/dev/vdb,if=virtio,format=raw,readonly=on"
    pid = vm.script(_START, name, str(cid), drive, f"{APPEND} {append}", str(megabytes), *options)
    nested = Nested(vm, name, cid, int(pid))
    try:
        yield nested
    finally:
        nested.end()
