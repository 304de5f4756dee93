"""Looking at processes: PID namespaces, start times, user ID maps.

Rules:
- Every function answers for the process that it was given, or raises ProcessLookupError. It never answers for another
  process that got the same PID meanwhile.
- Nothing that a container's init does to itself later changes an answer. It may create a PID namespace for its
  children, and it may enter another user namespace. Neither moves it out of its own PID namespace, and the owner of
  that PID namespace stays the same for as long as the PID namespace exists.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import subprocess
import sys
from collections.abc import Iterable
from functools import cache

from guestapi.errors import OperatorError
from guestapi.model import Init

#: include/uapi/linux/pidfd.h, since Linux 6.11: a descriptor of the PID namespace of a pidfd's process. The next
#: number, 0xFF06, is the namespace that its *children* will be in, which a process changes by unshare(2).
_PIDFD_GET_PID_NAMESPACE = 0xFF05
#: include/uapi/linux/nsfs.h, since Linux 4.9 (ioctl_ns(2)): a descriptor of the user namespace that owns a namespace,
#: and one of the namespace around a PID namespace.
_NS_GET_USERNS = 0xB701
_NS_GET_PARENT = 0xB702

#: Enters the user namespace of the given descriptor, prints a line, and stays until its standard input ends.
_ENTER = (
    "import ctypes, sys; print(ctypes.CDLL(None).setns(int(sys.argv[1]), 0x10000000), flush=True); sys.stdin.read()"
)
#: Seconds that a process has to enter a user namespace.
_ENTER_SECONDS = 5.0

#: proc_pid_stat(5): after the command's closing parenthesis the fields start with 3, "state"; "starttime" is 22.
_STATE, _START_TIME = 3 - 3, 22 - 3


class NotAnInitError(OperatorError):
    """A process cannot be the init of an instance. The message says which process would be right."""


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
    """Return when process `pid` started, in clock ticks since boot.

    Raises:
        ProcessLookupError: there is no such process, or it is a zombie.
    """
    # The command's name is in parentheses and may contain parentheses itself, so count from the last one.
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    if fields[_STATE] in (b"Z", b"X"):
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return int(fields[_START_TIME])


#: Ranges of users: the first as the namespace numbers them, the first as we do, and how many.
IdMap = tuple[tuple[int, int, int], ...]


def root_uid(pid: int, user_namespace: int) -> int | None:
    """Which user of ours is root in a user namespace; None if none is (yet). Arguments and errors as of `id_map`."""
    for inside, outside, _count in id_map(pid, user_namespace) or ():
        if inside == 0:
            return outside
    return None


def id_map(pid: int, user_namespace: int) -> IdMap | None:
    """Which users of ours there are in a user namespace (user_namespaces(7)), as a process that is in it shows.

    Args:
        pid: the process. Which one it is does not matter: the ID map belongs to the namespace.
        user_namespace: inode number of the user namespace, which the caller holds open.

    Returns:
        The map, empty if it is not written yet; None if the process is in another user namespace.

    Raises:
        ProcessLookupError: there is no such process.
        PermissionError: CAP_SYS_PTRACE is missing.
    """
    try:
        # What is opened through this descriptor is of one process, even if its PID is handed out again.
        process = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    try:
        with open(os.open("uid_map", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process), "rb", buffering=0) as file:
            lines = file.read().splitlines()
        # A process that has left a user namespace cannot come back: setns(2) needs CAP_SYS_ADMIN there. So one that is
        # in it now was in it when its map was opened.
        if os.stat("ns/user", dir_fd=process).st_ino != user_namespace:
            return None
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    finally:
        os.close(process)
    found = []
    for line in lines:
        inside, outside, count = map(int, line.split())
        found.append((inside, outside, count))
    return tuple(found)


def is_gone(pidfd: int) -> bool:
    """Whether the process of `pidfd` has ended: then it polls readable (pidfd_open(2))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def open_namespace(pid: int, pidfd: int | None, *, by_ioctl: bool = True) -> int:
    """Open the PID namespace of a process. While it is open, its inode number is not reused.

    Args:
        pid: the process.
        pidfd: of the same process. None: there is none; then the result is valid only if `pid` was not reused
            meanwhile.
        by_ioctl: use the ioctl of the pidfd, since Linux 6.11. Otherwise /proc is read.

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
    """Open the PID namespace around `namespace`; None at the top of those that are visible here."""
    try:
        return fcntl.ioctl(namespace, _NS_GET_PARENT, 0)
    except PermissionError:
        return None


def open_owner(namespace: int) -> int | None:
    """Open the user namespace that owns `namespace`; None if it lies around the service's own."""
    try:
        return fcntl.ioctl(namespace, _NS_GET_USERNS, 0)
    except PermissionError:
        return None


def find_root(namespace: int, pids: Iterable[int], *, enter: bool = False) -> tuple[int | None, int | None]:
    """Find the host user who is root in the user namespace that owns a PID namespace.

    Args:
        namespace: a descriptor of the PID namespace.
        pids: processes that may be in that user namespace. The ID map of the first that is there is used.
        enter: if none of them is there, start a process that enters it. That needs CAP_SYS_ADMIN.

    Returns:
        The user, None if it is unknown; and the inode number of the user namespace, None if it is not visible.

    Raises:
        PermissionError: CAP_SYS_PTRACE is missing.
    """
    owner = open_owner(namespace)
    if owner is None:
        return None, None
    try:
        number = inode(owner)
        for pid in (*pids, os.getpid()):
            try:
                if (uid := root_uid(pid, number)) is not None:
                    return uid, number
            except ProcessLookupError:
                continue
        return (_root_by_entering(owner, number) if enter else None), number
    finally:
        os.close(owner)


def _root_by_entering(user_namespace: int, number: int) -> int | None:
    command = [sys.executable, "-I", "-S", "-c", _ENTER, str(user_namespace)]
    # A new process, not a fork of this one, which may have threads. It runs nothing of the container's, and the
    # container cannot see it: it enters no PID namespace.
    with subprocess.Popen(
        command, pass_fds=[user_namespace], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        try:
            # If it could not enter, it is still in our own user namespace, whose map is of no use.
            select.select([child.stdout], [], [], _ENTER_SECONDS)
            return root_uid(child.pid, number)
        except ProcessLookupError:
            return None
        finally:
            child.kill()


def inode(namespace: int) -> int:
    """Return the inode number of an open namespace, which identifies it for as long as it exists."""
    return os.fstat(namespace).st_ino


def examine(pid: int, *, stated_root_uid: int | None = None) -> Init:
    """Examine the process `pid` as the init of an instance: its identity, and the host user who is root there.

    Root follows from the ID map of the user namespace that owns the init's PID namespace. The init itself may have
    entered another user namespace. Then a process of ours has to enter the owner, which needs CAP_SYS_ADMIN.

    Args:
        pid: the process, in the PID namespace of this process.
        stated_root_uid: the root user that the container's runtime states. It is used only if the kernel does not
            tell.

    Raises:
        NotAnInitError: there is no such process, it is in our own PID namespace, or it is not PID 1 of its own.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError):
        raise NotAnInitError(f"no process {pid}", "give the PID of the container's init, as the host sees it") from None
    try:
        started = start_time(pid)
        namespace = open_namespace(pid, pidfd)
        try:
            number = inode(namespace)
            root, owner = find_root(namespace, [pid], enter=True)
        finally:
            os.close(namespace)
        # proc_pid_status(5), NSpid: the PID in each namespace, the innermost last.
        inside = next(line for line in _read(pid, "status").splitlines() if line.startswith(b"NSpid:")).split()[-1]
        if is_gone(pidfd):
            raise ProcessLookupError
    except ProcessLookupError:
        raise NotAnInitError(f"process {pid} has just ended", "give the PID of a running container's init") from None
    except PermissionError:
        raise NotAnInitError(f"process {pid} may not be looked at", "run this as root") from None
    finally:
        os.close(pidfd)
    if number == own_namespace():
        raise NotAnInitError(f"process {pid} is in the host's PID namespace", "give the PID of a container's init")
    if inside != b"1":
        reason = f"process {pid} is number {inside.decode()} in its PID namespace"
        raise NotAnInitError(f"{reason}", "give the container's init, which is number 1 there")
    return Init(pid, started, boot_id(), number, stated_root_uid if root is None else root, owner)


def is_alive(init: Init) -> bool:
    """Whether this very process still runs."""
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
