"""Looking at processes: PID namespaces, start times, user ID maps. Every answer is about the process that was asked
about, or is ProcessLookupError; never about another that got its PID meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from functools import cache

from guestapi.errors import OperatorError
from guestapi.model import Init

#: include/uapi/linux/pidfd.h, since Linux 6.11: a descriptor of the PID namespace of a pidfd's process.
_PIDFD_GET_PID_NAMESPACE = 0xFF06
#: include/uapi/linux/nsfs.h, since Linux 4.9: a descriptor of the namespace around one (ioctl_ns(2)).
_NS_GET_PARENT = 0xB702

#: proc_pid_stat(5): after the command's closing parenthesis the fields start with 3, "state"; "starttime" is 22.
_STATE, _START_TIME = 3 - 3, 22 - 3


class NotAnInitError(OperatorError):
    """A process cannot be an instance's identity; the text is one sentence that says what would be right."""


@cache
def boot_id() -> str:
    """This boot's UUID (random(4))."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@cache
def own_namespace() -> int:
    """The inode number of the PID namespace that this process is in."""
    return os.stat("/proc/self/ns/pid").st_ino


def start_time(pid: int) -> int:
    """When process `pid` started, in clock ticks since boot.

    Raises:
        ProcessLookupError: there is none, or it has ended and waits for its parent to notice.
    """
    # The command's name stands in parentheses and may itself hold any, so count from the last one.
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    if fields[_STATE] in (b"Z", b"X"):
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return int(fields[_START_TIME])


def root_uid(pid: int) -> int | None:
    """Which user of ours is root in the user namespace of `pid` (user_namespaces(7)); None if nobody is (yet).

    Raises:
        ProcessLookupError: there is no such process.
    """
    for line in _read(pid, "uid_map").splitlines():
        inside, outside, _count = map(int, line.split())
        if inside == 0:
            return outside
    return None


def is_gone(pidfd: int) -> bool:
    """Whether the process of `pidfd` has ended: then it polls readable (pidfd_open(2))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def open_namespace(pid: int, pidfd: int | None, *, by_ioctl: bool = True) -> int:
    """A descriptor of the PID namespace of a process. While it is open, nobody else gets the inode number.

    Args:
        pid: the process.
        pidfd: of the same process, or None where there is none: then `pid` alone is trusted, and only if no other
            process takes it over during the look.
        by_ioctl: ask the pidfd itself, where the kernel can (6.11). Otherwise, and before, /proc is asked.

    Raises:
        ProcessLookupError: the process is gone.
        PermissionError: CAP_SYS_PTRACE is missing.
    """
    if pidfd is not None and by_ioctl:
        try:
            return fcntl.ioctl(pidfd, _PIDFD_GET_PID_NAMESPACE, 0)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
                raise
    before = start_time(pid) if pidfd is None else None
    try:
        namespace = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    try:
        if is_gone(pidfd) if pidfd is not None else start_time(pid) != before:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    except BaseException:
        os.close(namespace)
        raise
    return namespace


def open_parent(namespace: int) -> int | None:
    """A descriptor of the PID namespace around `namespace`; None at the top of what can be seen from here."""
    try:
        return fcntl.ioctl(namespace, _NS_GET_PARENT, 0)
    except PermissionError:
        return None


def inode(namespace: int) -> int:
    """The inode number of an open namespace, its name for as long as it exists."""
    return os.fstat(namespace).st_ino


def examine(pid: int) -> Init:
    """What identifies the process `pid` as an instance's init.

    Raises:
        NotAnInitError: there is no such process, it is in our own PID namespace, or it is not PID 1 of its own.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError):
        raise NotAnInitError(f"no process {pid}; give the PID of the container's init, as the host sees it") from None
    try:
        started = start_time(pid)
        namespace = open_namespace(pid, pidfd)
        try:
            number = inode(namespace)
        finally:
            os.close(namespace)
        # proc_pid_status(5), NSpid: the PID in each namespace, the innermost last.
        inside = next(line for line in _read(pid, "status").splitlines() if line.startswith(b"NSpid:")).split()[-1]
        if is_gone(pidfd):
            raise ProcessLookupError
    except ProcessLookupError:
        raise NotAnInitError(f"process {pid} has just ended; give the PID of a running container's init") from None
    except PermissionError:
        raise NotAnInitError(f"process {pid} may not be looked at; run this as root") from None
    finally:
        os.close(pidfd)
    if number == own_namespace():
        raise NotAnInitError(f"process {pid} is in the host's PID namespace; give the PID of a container's init")
    if inside != b"1":
        reason = f"process {pid} is number {inside.decode()} in its PID namespace"
        raise NotAnInitError(f"{reason}; give the container's init, which is number 1 there")
    return Init(pid, started, boot_id(), number)


def is_alive(init: Init) -> bool:
    """Whether that very process still runs."""
    try:
        return init.boot_id == boot_id() and start_time(init.pid) == init.start_time
    except ProcessLookupError:
        return False


def _read(pid: int, file: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{file}", "rb", buffering=0) as opened:
            return opened.read()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
