"""A process of the isolation proof: the host's, an instance's init, or one inside an instance.

It needs nothing but the system's Python, so that thousands can be made: each is a fork of the one that made it.

It obeys whoever has the other end of its control socket: one JSON object a message, descriptors beside it (SCM_RIGHTS).
When that end is closed, it ends.
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
#: clone(2), which glibc wraps for threads alone; arch/x86/entry/syscalls and include/uapi/asm-generic/unistd.h.
SYS_CLONE = {"x86_64": 56, "aarch64": 220}[platform.machine()]
PR_SET_DUMPABLE = 4
#: Seconds to wait for an answer.
PATIENCE = 20

libc = ctypes.CDLL(None, use_errno=True)


def clone(flags: int) -> int:
    """As fork, with these namespaces new."""
    pid: int = libc.syscall(SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return pid


def make(
    control: socket.socket, container: bool, privileged: bool, base: int, count: int, uid: int
) -> tuple[dict[str, Any], list[int]]:
    """Another process, which obeys a control socket of its own: that is what is handed back.

    Args:
        control: this process's own.
        container: in a PID namespace of its own; otherwise in that of this process.
        privileged: in the user namespace of this process; otherwise, if it is a container, in one of its own.
        base: which user of this namespace it has as 0, if it has one of its own.
        count: how many users it has from there on.
        uid: who it is, in its own namespace.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mapped = container and not privileged
    if clone((CLONE_NEWPID if container else 0) | (CLONE_NEWUSER if mapped else 0)) == 0:
        try:
            control.close()
            ours.close()
            # The /proc that is mounted is the outermost one, so this is how the test and the service know this process.
            theirs.send(os.readlink("/proc/self").encode())
            theirs.recv(1)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            # After a change of user its /proc/PID is the host's root's, and it could have no containers of its own.
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
    """A connection that was made by this process."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return {}, [connection.detach()]


def ask(given: int, question: str) -> tuple[dict[str, Any], list[int]]:
    """Ask on a connection that somebody else has made: send, and receive until there is a whole answer, or the end."""
    with socket.socket(fileno=given) as connection:
        connection.settimeout(PATIENCE)
        answer = b""
        try:
            connection.sendall(question.encode())
            while not whole(answer) and (more := connection.recv(65536)):
                answer += more
        except OSError:
            pass  # The end, too.
    return {"answer": answer.decode("latin-1")}, []


def whole(answer: bytes) -> bool:
    """Whether there is one whole response."""
    head, end, body = answer.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return bool(end) and len(body) >= int(line[15:])
    return bool(end)


def serve(control: socket.socket) -> None:
    """Obey until the control socket ends."""
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
    # Whoever has ended is gone at once, and its PID is free.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
