"""A virtual machine that really boots: QEMU on a copy of an image's disk, and commands in it over SSH.

The processor is emulated (TCG) unless $GUESTAPI_ACCEL is "kvm", because many places that run tests have no KVM that
boots a stock kernel. So everything inside takes ten to fifteen times as long as on the host.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.machine.image import DiskImage

#: Seconds that a boot may take until SSH answers; 20 are usual on an idle host.
BOOT_SECONDS = 600.0

#: The number of attempts to boot. Two emulated processors sometimes disagree about code that the kernel patches while
#: it runs (static keys), mostly during a boot, which then ends with "Oops: int3". This is not a fault of the tested
#: software. Where virtual machines start in it, its kernel patches itself again: there it has one processor.
BOOTS = 3

#: For an emulated processor: keeps the kernel from marking its clock unstable on a busy host, which would patch code,
#: and makes a panic end QEMU, with -no-reboot.
_EMULATED = "tsc=reliable panic=-1"

#: What an emulated processor had better not have: a fifth level of page tables, protections that are looked at with
#: each access, copies byte by byte, and registers of vectors, which are emulated piece by piece and saved with each
#: process.
_WITHOUT = (
    *("la57", "smap", "smep", "umip", "pku", "erms", "monitor"),
    *("avx", "avx2", "f16c", "fma", "mpx", "xsave", "xsaveopt", "xgetbv1"),
)

_ACCELERATORS = {
    "tcg": ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", ",".join(["max", *(f"{name}=off" for name in _WITHOUT)])],
    "kvm": ["-accel", "kvm", "-cpu", "host"],
}


class VirtualMachine:
    """A machine whose disk survives reboots and power cuts, and is removed at the end.

    /dev/vdb is the image once more, unchanged and read-only: virtual machines of the machine boot from it.

    Attributes:
        processors: how many it has from its next start on.
    """

    def __init__(self, image: DiskImage) -> None:
        self.suite = image.suite
        self.processors = 2
        self._image = image
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VirtualMachine:
        self._directory = Path(tempfile.mkdtemp(prefix="guestapi-vm-", dir="/var/tmp"))
        try:
            self._disk = self._directory / "disk"
            subprocess.run(["cp", "--sparse=always", "--reflink=auto", self._image.disk, self._disk], check=True)
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cut_power()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _control(self) -> Path:
        return self._directory / "ssh"

    @property
    def console(self) -> str:
        """The end of the machine's console output."""
        return self._output().decode(errors="replace")[-3000:]

    def _output(self) -> bytes:
        # QEMU makes the file.
        file = self._directory / "console"
        return file.read_bytes() if file.exists() else b""

    def start(self) -> float:
        """Switch the machine on, and wait until SSH answers.

        Returns:
            the seconds until then.
        """
        began = time.monotonic()
        for _ in range(BOOTS):
            if self._boot(began):
                return time.monotonic() - began
        raise AssertionError(f"QEMU has ended while the machine booted: {self.console}")

    def _boot(self, began: float) -> bool:
        """Switch it on; return whether SSH answers. If not, the kernel has panicked, and QEMU has ended."""
        self._control.unlink(missing_ok=True)
        (self._directory / "console").unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        append = f"root=/dev/vda rw console=ttyS0 quiet systemd.show_status=0 mitigations=off {_EMULATED}"
        self._process = subprocess.Popen(
            [
                # It ends with this process in any case.
                *("setpriv", "--pdeathsig", "KILL", *self._image.qemu, "-machine", "q35"),
                *_ACCELERATORS[os.environ.get("GUESTAPI_ACCEL", "tcg")],
                *("-smp", str(self.processors), "-m", "2560", "-nodefaults", "-no-user-config"),
                *("-display", "none", "-no-reboot"),
                *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd), "-append", append),
                *("-drive", f"file={self._disk},if=virtio,format=raw,cache=writeback,discard=unmap"),
                *("-drive", f"file={self._image.disk},if=virtio,format=raw,readonly=on"),
                *("-netdev", f"user,id=n0,hostfwd=tcp:127.0.0.1:{self._port}-:22"),
                *("-device", "virtio-net-pci,netdev=n0,romfile=", "-device", "virtio-rng-pci"),
                *("-chardev", f"file,id=c0,path={self._directory / 'console'}", "-serial", "chardev:c0"),
            ],
            stdin=subprocess.DEVNULL,
        )
        while b"SSH listens" not in self._output() or self.run("true", check=False).returncode != 0:
            if self._process.poll() is not None:
                return False
            assert time.monotonic() - began < BOOT_SECONDS, f"SSH does not answer: {self.console}"
            time.sleep(0.5)
        return True

    def leave_one_processor(self) -> None:
        """Go on with one processor: see BOOTS."""
        self.processors = 1
        self.script("echo 0 >/sys/devices/system/cpu/cpu1/online")

    def cut_power(self) -> None:
        """Switch the machine off at once; whatever is not on its disk is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._control.unlink(missing_ok=True)

    def reboot(self) -> float:
        """Shut the machine down in good order, and start it again.

        Returns:
            the seconds from power-on until SSH answered.
        """
        assert self._process is not None
        self.run("systemctl", "reboot", check=False)
        self._process.wait(BOOT_SECONDS)
        self.cut_power()
        return self.start()

    def _ssh(self, argv: Sequence[str]) -> list[str]:
        # The connection is kept, because a key exchange takes seconds on an emulated processor.
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=20", "BatchMode=yes"]
        options += [
            "ControlMaster=auto",
            f"ControlPath={self._control}",
            "ControlPersist=600",
            "ServerAliveInterval=15",
        ]
        words = [word for option in options for word in ("-o", option)]
        key = str(self._image.key)
        return ["ssh", "-q", "-F", "none", "-p", str(self._port), "-i", key, *words, "root@127.0.0.1", shlex.join(argv)]

    def run(
        self, *argv: str, check: bool = True, timeout: float = 900, given: bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on the machine, as root.

        Args:
            argv: the program and its arguments.
            check: fail if the program fails.
            timeout: seconds that it may take.
            given: its standard input; default: nothing.

        Returns:
            its exit status and output; status 255 if SSH does not answer.
        """
        done = subprocess.run(
            self._ssh(argv),
            input=given if given is not None else b"",
            capture_output=True,
            check=False,
            timeout=timeout,
        )
        text = subprocess.CompletedProcess(argv, done.returncode, done.stdout.decode(), done.stderr.decode())
        assert not check or text.returncode == 0, f"{shlex.join(argv)}: {text.stdout}{text.stderr}"
        return text

    def script(self, text: str, *arguments: str, timeout: float = 900) -> str:
        """Run a shell script on the machine; it fails, and the test with it, at the first command that fails.

        Args:
            text: the script.
            arguments: its $1, $2 and so on.
            timeout: seconds that it may take.

        Returns:
            its standard output.
        """
        return self.run("bash", "-euc", text, "script", *arguments, timeout=timeout).stdout

    def spawn(self, *argv: str, given: bytes = b"") -> subprocess.Popen[str]:
        """Start a program on the machine; its output can be read while it runs.

        Args:
            argv: the program and its arguments.
            given: its standard input, of less than a pipe's 64 KiB.

        Returns:
            the local process; killing it does not end the program.
        """
        process = subprocess.Popen(
            self._ssh(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdin is not None
        process.stdin.write(given.decode())
        process.stdin.close()
        process.stdin = None
        return process

    def put(self, content: bytes | Path, path: str, mode: str = "0644") -> None:
        """Write a file on the machine, and create the directories above it.

        Args:
            content: its content, or a file of the host.
            path: the path on the machine.
            mode: its permissions, in octal.
        """
        given = content.read_bytes() if isinstance(content, Path) else content
        self.run("sh", "-c", 'mkdir -p "${1%/*}" && cat >"$1" && chmod "$2" "$1"', "put", path, mode, given=given)

    def wait_until(self, condition: str, seconds: float = 120, why: str = "") -> None:
        """Wait until a shell command succeeds on the machine, with five attempts a second.

        Args:
            condition: the command.
            seconds: the longest wait.
            why: a command whose output explains a failure.
        """
        loop = (
            f"end=$((SECONDS + {int(seconds)})); until {condition}; do [ $SECONDS -lt $end ] || exit 9; sleep 0.2; done"
        )
        done = self.run("bash", "-c", loop, check=False, timeout=seconds + 60)
        if done.returncode == 255:
            raise AssertionError(f"SSH does not answer any more: {self.console}")
        if done.returncode != 0:
            explained = self.run("bash", "-c", why or "journalctl -b -n 40 --no-pager", check=False).stdout
            raise AssertionError(f"not within {seconds:.0f} s: {condition}\n{done.stderr}{explained}")
