"""A process of the isolation proof: the host's, an instance's init, or one inside an instance.

It needs only the system's Python, and is a fork of the process that made it, so thousands can be made. It executes the
commands on its control socket: one JSON object a message, with descriptors (SCM_RIGHTS). It exits when that is closed.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import socket
import sys
from typing import Any

CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
#: The system call clone(2), which glibc wraps only for threads; arch/x86/entry/syscalls and
#: include/uapi/asm-generic/unistd.h.
SYS_CLONE = {"x86_64": 56, "aarch64": 220}[platform.machine()]
PR_SET_DUMPABLE = 4
#: Seconds to wait for a response.
TIMEOUT = 300

libc = ctypes.CDLL(None, use_errno=True)


def clone(flags: int) -> int:
    """Fork, with these new namespaces."""
    pid: int = libc.syscall(SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return pid


def make(
    control: socket.socket, container: bool, privileged: bool, base: int, count: int, uid: int
) -> tuple[dict[str, Any], list[int]]:
    """Make another process; return its PID and the control socket through which it takes commands.

    Args:
        control: this process's own control socket.
        container: make it PID 1 of a new PID namespace; otherwise it is in this process's namespace.
        privileged: keep it in this process's user namespace; otherwise a container gets one of its own.
        base: the UID, in this process's user namespace, of root in the new one.
        count: the number of IDs in the new user namespace.
        uid: the UID of the new process in its own namespace.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mapped = container and not privileged
    if clone((CLONE_NEWPID if container else 0) | (CLONE_NEWUSER if mapped else 0)) == 0:
        try:
            control.close()
            ours.close()
            # The mounted /proc is of the outermost namespace, so this is the PID by which the test and the service know
            # it.
            theirs.send(os.readlink("/proc/self").encode())
            theirs.recv(1)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            # A change of user makes its /proc/PID root's; then it could not make containers of its own.
            libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            theirs.send(b"there")
            serve(theirs)
        finally:
            os._exit(1)
    theirs.close()
    pid = int(ours.recv(20))
    if mapped:
        for file in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{file}", "w") as opened:
                opened.write(f"0 {base} {count}")
    ours.send(b"x")
    if ours.recv(5) != b"there":
        raise ChildProcessError(f"process {pid} has ended at once")
    return {"pid": pid}, [ours.detach()]


def connect(path: str) -> tuple[dict[str, Any], list[int]]:
    """Connect to a socket; hand over the connection."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return {}, [connection.detach()]


def ask(given: int, question: str) -> tuple[dict[str, Any], list[int]]:
    """Send a request on a passed connection; return what arrives until a response is complete or the end."""
    with socket.socket(fileno=given) as connection:
        connection.settimeout(TIMEOUT)
        answer = b""
        try:
            connection.sendall(question.encode())
            while not whole(answer) and (more := connection.recv(65536)):
                answer += more
        except OSError:
            pass  # An error ends the connection, too.
    return {"answer": answer.decode("latin-1")}, []


def whole(answer: bytes) -> bool:
    """Return whether `answer` is one complete response."""
    head, end, body = answer.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return bool(end) and len(body) >= int(line[15:])
    return bool(end)


def serve(control: socket.socket) -> None:
    """Execute commands until the control socket is closed."""
    while True:
        message, given, _flags, _address = socket.recv_fds(control, 65536, 1)
        if not message:
            os._exit(0)
        command = json.loads(message)
        what = command.pop("do")
        try:
            if what == "make":
                answer, found = make(control, **command)
            elif what == "connect":
                answer, found = connect(**command)
            else:
                answer, found = ask(given[0], **command)
        except Exception as error:
            answer, found = {"error": f"{type(error).__name__}: {error}"}, []
        socket.send_fds(control, [json.dumps(answer).encode()], found)
        for descriptor in found:
            os.close(descriptor)


if __name__ == "__main__":
    # Have the kernel reap ended children at once, which frees their PIDs.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
