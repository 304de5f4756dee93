"""A gunicorn.conf.py whose workers attempt what the sandbox must refuse, and write the outcomes to a file.

The test appends a line with the target process and the file (`_WHOM_AND_WHERE`).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
from collections.abc import Callable
from functools import partial

workers = 1

#: The PID of another user's process, and a file in the state directory.
_WHOM_AND_WHERE = (1, "/nowhere")

#: Numbers of system calls on x86_64 (arch/x86/entry/syscalls/syscall_64.tbl).
_PTRACE, _PROCESS_VM_READV, _PROCESS_VM_WRITEV, _KCMP, _PIDFD_GETFD = 101, 310, 311, 312, 438
_USERFAULTFD, _IO_URING_SETUP, _ADD_KEY = 323, 425, 248
#: include/uapi/linux/ptrace.h, kcmp.h.
_PTRACE_SEIZE, _KCMP_FILES = 0x4206, 2


def _call(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    # As long: the upper half of a register that is passed as int is undefined.
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in (number, *arguments)]
    if libc.syscall(*words) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def _open_socket(family: str) -> None:
    socket.socket(getattr(socket, f"AF_{family}"), socket.SOCK_DGRAM).close()


def _write(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.close(descriptor)
    os.unlink(path)


def _address(pid: int) -> int:
    with open(f"/proc/{pid}/maps") as maps:
        return int(maps.readline().partition("-")[0], 16)


def _memory(number: int, pid: int) -> None:
    buffer = ctypes.create_string_buffer(16)
    here = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 16 if number == _PROCESS_VM_READV else 0)
    there = (ctypes.c_size_t * 2)(_address(pid), 16 if number == _PROCESS_VM_READV else 0)
    _call(number, pid, ctypes.addressof(here), 1, ctypes.addressof(there), 1, 0)


def _open_memory(pid: int, flags: int) -> None:
    os.close(os.open(f"/proc/{pid}/mem", flags))


def post_worker_init(_worker: object) -> None:
    """As gunicorn's hook: runs in the worker, before it serves."""
    pid, file = _WHOM_AND_WHERE
    attempts: dict[str, Callable[[], object]] = {
        f"socket {name}": partial(_open_socket, name) for name in ("UNIX", "INET", "INET6", "NETLINK", "PACKET")
    }
    attempts |= {
        f"write {path}": partial(_write, f"{path}/guestapi-probe")
        for path in (os.path.dirname(file), "/tmp", "/etc", "/usr", "/var", "/var/lib", "/run", "/dev", "/dev/shm")
    }
    attempts |= {
        "ptrace": lambda: _call(_PTRACE, _PTRACE_SEIZE, pid, 0, 0),
        "process_vm_readv": lambda: _memory(_PROCESS_VM_READV, pid),
        "process_vm_writev": lambda: _memory(_PROCESS_VM_WRITEV, pid),
        "read memory": lambda: _open_memory(pid, os.O_RDONLY),
        "write memory": lambda: _open_memory(pid, os.O_RDWR),
        "list descriptors": lambda: os.listdir(f"/proc/{pid}/fd"),
        "pidfd_getfd": lambda: _call(_PIDFD_GETFD, os.pidfd_open(pid), 0, 0),
        "kcmp": lambda: _call(_KCMP, pid, os.getpid(), _KCMP_FILES, 0, 0),
        "namespace": lambda: os.close(os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY)),
        "io_uring": lambda: _call(_IO_URING_SETUP, 1, ctypes.create_string_buffer(120)),
        "userfaultfd": lambda: _call(_USERFAULTFD, 1),
        "add_key": lambda: _call(_ADD_KEY, b"user", b"guestapi-probe", b"x", 1, -3),
        "become root": lambda: os.setuid(0),
    }
    outcomes = {name: _outcome(attempt) for name, attempt in attempts.items()}
    with open(file, "w") as opened:
        json.dump(outcomes, opened)
