"""Whether a process is the one that a runtime means: runtimes report PIDs, and PIDs are reused."""

from __future__ import annotations

import array
import fcntl
import os
import time

from guestapi.callers.namespaces import open_namespace, open_owner
from guestapi.model import Init

#: include/uapi/linux/nsfs.h: the owner of a user namespace (ioctl_ns(2)).
_NS_GET_OWNER_UID = 0xB704
_TICKS = os.sysconf("SC_CLK_TCK")
#: Bytes of a process's /proc/PID/cgroup and cmdline that are read.
_BYTES = 1 << 16


def born(init: Init) -> float:
    """Return when an init started, in seconds of Unix time, by the clock as it is set now."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + init.start_time / _TICKS


def in_cgroup(pid: int, name: str) -> bool:
    """Whether the path of a process's cgroup contains `name`, which is long enough to be no coincidence."""
    return name.encode() in _read(pid, "cgroup")


def arguments(pid: int) -> list[str]:
    """The command line of a process; empty if there is no such process."""
    return [os.fsdecode(word) for word in _read(pid, "cmdline").split(b"\0")[:-1]]


def parent(pid: int) -> int:
    """The PID of a process's parent; 0 if there is none."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def is_roots(pid: int) -> bool:
    """Whether a process is one of the host's root."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == 0
    except FileNotFoundError:
        return False


def is_made_by_root(pid: int) -> bool:
    """Whether a process's PID namespace belongs to the host's root, and not to another user who made it.

    Raises:
        ProcessLookupError: there is no such process.
    """
    namespace = open_namespace(pid, None)
    try:
        owner = open_owner(namespace)
    finally:
        os.close(namespace)
    if owner is None:
        return False
    try:
        if os.fstat(owner).st_ino == os.stat("/proc/self/ns/user").st_ino:
            return True
        uid = array.array("I", [1])
        fcntl.ioctl(owner, _NS_GET_OWNER_UID, uid)
        return uid[0] == 0
    finally:
        os.close(owner)


def children(pid: int) -> list[int]:
    """The PIDs of a process's children."""
    return [int(word) for word in _read(pid, f"task/{pid}/children").split()]


def _read(pid: int, file: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{file}", "rb", buffering=0) as opened:
            return opened.read(_BYTES)
    except (FileNotFoundError, ProcessLookupError):
        return b""
