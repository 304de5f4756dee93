"""Virtual machines: which process holds a context ID of vsock(7).

The kernel gives a CID to one open file of /dev/vhost-vsock at a time, and takes it back when that file is closed. So a
virtual machine has its CID for as long as its VMM (QEMU, for example) has that file open. When a VMM ends, the kernel
closes the file first, and another VMM may have the CID before the old one has ended: memory of many gigabytes is freed
in between. So the process alone proves nothing; the open file does.

Nothing here can be chosen by a guest. The VMM itself belongs to the host.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat

from guestapi.callers import namespaces
from guestapi.callers.credentials import credentials
from guestapi.callers.namespaces import boot_id, is_gone, start_time
from guestapi.errors import OperatorError
from guestapi.model import Init, hybrid_number, vsock_place

#: /dev/vhost-vsock: include/linux/miscdevice.h, VHOST_VSOCK_MINOR; Documentation/admin-guide/devices.txt, major 10.
DEVICE = os.makedev(10, 241)
#: Its node as the host has it, although the service that asks may have a /dev of its own: libvirt and other managers
#: open it there, and hand it over to the VMM (`vhostfd`).
HOST_NODE = "/proc/1/root/dev/vhost-vsock"
#: 0 is the hypervisor, 1 the loopback, 2 the host (vsock(7)): they belong to no instance.
LEAST_CID = 3
#: The greatest CID; the next number is VMADDR_CID_ANY.
MOST_CID = (1 << 32) - 2
#: Inode numbers of a file system of devices are below this.
_INODES = 1 << 32
#: Bytes of proc_pid_fdinfo(5) that are read.
_FDINFO = 4096
#: How many open files of a VMM are looked at. QEMU has some hundred.
_MOST_FILES = 65536
#: How QEMU's option -device names the CID, in both of its notations.
_QEMU_CID = re.compile(rb'guest-cid(?:"\s*:\s*|=)(\d+)')
#: How it names the descriptor with which QEMU was started.
_QEMU_DESCRIPTOR = re.compile(rb'vhostfd(?:"\s*:\s*"|=)(\d+)')
#: What a host's program sends to a VMM's own socket in order to connect to a port of the guest, and how the VMM begins
#: its answer (github.com/firecracker-microvm/firecracker, docs/vsock.md). No guest needs to listen at this port.
_CONNECT, _CONNECTED = b"CONNECT 8444\n", b"OK "
#: Seconds that a VMM has for its answer: without a guest that runs, there is none.
_ANSWER_SECONDS = 1.0
#: Bytes of a command line that are read.
_COMMAND_LINE = 1 << 20


class NotAMachineError(OperatorError):
    """A process cannot be the VMM of an instance. The message says which one would be right."""


def holds_vsock(pid: int, open_file: int) -> bool:
    """Whether a process still has its vsock device open.

    What is open can be listed by the process's user and by root alone. But whoever may look at the process
    (CAP_SYS_PTRACE) reads from proc_pid_fdinfo(5) which inode one of its descriptors is of.

    Args:
        pid: the process.
        open_file: as of `find_vsock`.

    Raises:
        PermissionError: CAP_SYS_PTRACE is missing.
    """
    descriptor, number = divmod(open_file, _INODES)
    try:
        with open(f"/proc/{pid}/fdinfo/{descriptor}", "rb", buffering=0) as file:
            return b"\nino:\t%d\n" % number in file.read(_FDINFO)
    except (FileNotFoundError, ProcessLookupError):
        return False


def find_vsock(pid: int) -> int | None:
    """Find the open vsock device of a process. For root.

    Returns:
        The number of its descriptor and the inode of its device node, as one number for `holds_vsock`; None if it has
        none.

    Raises:
        PermissionError: this process may not list the files of that one.
        ProcessLookupError: there is no such process.
    """
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    for name in names[:_MOST_FILES]:
        try:
            status = os.stat(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # Closed meanwhile.
        if status.st_rdev == DEVICE and stat.S_ISCHR(status.st_mode) and status.st_ino < _INODES:
            return int(name) * _INODES + status.st_ino
    return None


def find_vsock_by_inode(pid: int, node: str | None = None) -> int | None:
    """Find the open vsock device of a process, for whoever may look at the process but not list its files.

    Args:
        pid: the process.
        node: the device node that was opened; default: `HOST_NODE`.

    Returns:
        As `find_vsock`.

    Raises:
        PermissionError: CAP_SYS_PTRACE is missing.
        ProcessLookupError: there is no such process.
    """
    try:
        status = os.stat(node or HOST_NODE)
    except FileNotFoundError:
        return None
    if status.st_rdev != DEVICE or not stat.S_ISCHR(status.st_mode) or status.st_ino >= _INODES:
        return None
    # The number of an inode is unique within one file system only, so what the command line says comes first.
    named = _QEMU_DESCRIPTOR.search(_command_line(pid))
    try:
        names = [named[1].decode()] if named else sorted(os.listdir(f"/proc/{pid}/fdinfo"), key=int)
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    for name in names[:_MOST_FILES]:
        found = int(name) * _INODES + status.st_ino
        if holds_vsock(pid, found):
            return found
    return None


def examine_machine(pid: int, cid: int) -> Init:
    """Examine the process `pid` as the VMM that holds a CID.

    Args:
        pid: the process.
        cid: the context ID of its virtual machine.

    Raises:
        NotAMachineError: there is no such process, or it does not hold that CID.
    """
    if not LEAST_CID <= cid <= MOST_CID:
        raise NotAMachineError(f"CID {cid} belongs to no virtual machine", f"give one from {LEAST_CID} on")
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError):
        raise NotAMachineError(f"no process {pid}", "give the PID of the virtual machine's VMM, such as QEMU") from None
    try:
        started = start_time(pid)
        try:
            held = find_vsock(pid)
        except PermissionError:
            held = find_vsock_by_inode(pid)
        named = command_line_cid(pid)
        if is_gone(pidfd):
            raise ProcessLookupError
    except ProcessLookupError:
        raise NotAMachineError(f"process {pid} has just ended", "give the PID of a running VMM") from None
    except PermissionError:
        raise NotAMachineError(f"process {pid} may not be looked at", "run this as root") from None
    finally:
        os.close(pidfd)
    if held is None:
        reason = f"process {pid} has no vsock device"
        raise NotAMachineError(reason, "give the PID of a VMM with one: qemu -device vhost-vsock-pci,guest-cid=N")
    if named is not None and named != cid:
        raise NotAMachineError(f"process {pid} has CID {named}, not {cid}", f"give --cid {named}")
    return Init(pid, started, boot_id(), vsock_place(cid), root_uid=0, user_namespace=held)


def examine_hybrid(pid: int) -> Init:
    """Examine the process `pid` as the VMM of a virtual machine whose vsock is Unix sockets of the host.

    Raises:
        NotAMachineError: there is no such process.
    """
    try:
        return Init(pid, start_time(pid), boot_id(), vsock_place(hybrid_number(pid)), root_uid=0)
    except (ProcessLookupError, OverflowError):
        raise NotAMachineError(f"no process {pid}", "give the PID of the virtual machine's VMM") from None


def find_hybrid(path: str) -> int:
    """Find the VMM that listens at its own socket of hybrid vsock.

    Args:
        path: of that socket.

    Returns:
        Its PID, which the kernel has kept since it began to listen (unix(7), SO_PEERCRED).

    Raises:
        NotAMachineError: no VMM listens there.
    """
    hint = "give the path that the VMM has for its vsock device: uds_path (Firecracker), socket= (cloud-hypervisor)"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_ANSWER_SECONDS)
        try:
            sock.connect(path)
            vmm = credentials(sock).pid
        except (OSError, ValueError) as error:
            raise NotAMachineError(f"{path}: {getattr(error, 'strerror', None) or error}", hint) from None
        try:
            sock.sendall(_CONNECT)
            answer = sock.recv(64)
        except OSError:
            # The guest does not run yet, or nothing in it listens at that port.
            answer = b""
    if answer and not answer.startswith(_CONNECTED):
        raise NotAMachineError(f"{path}: what listens there is not a VMM", hint)
    return vmm


def command_line_cid(pid: int) -> int | None:
    """Return the CID that a command line of QEMU names; None if it names none.

    Raises:
        ProcessLookupError: there is no such process.
    """
    found = _QEMU_CID.search(_command_line(pid))
    return int(found[1]) if found else None


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            return file.read(_COMMAND_LINE)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None


def is_alive(init: Init) -> bool:
    """Whether this very process still runs and, if it is a VMM, holds a CID."""
    if init.cid is not None and init.boot_id == boot_id():
        try:
            if init.user_namespace is None or not holds_vsock(init.pid, init.user_namespace):
                return False
        except PermissionError:
            pass  # Not root. As for containers, the process has to do.
    return namespaces.is_alive(init)
