"""Makes a container around agent.py, as container managers do.

It makes the mounts as the host's root, then a user, PID, UTS, IPC and cgroup namespace, then PID 1. It prints the PID
of the container's init, and ends with it.

Runs on the system's Python alone. Its one argument is JSON: ``binds`` (pairs of host and guest directories), ``base``
(the host UID of root in the container; null: no user namespace), ``hostname``, ``agent`` (path of agent.py),
``checkout`` (the project's directory).
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 4096, 8192, 16384, 1 << 18

#: The number of IDs of a container, as usual in /etc/subuid.
IDS = 65536


def call(function: str, *arguments: int) -> None:
    """Call a function of the C library that returns 0, or raise OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount by the system call, or raise OSError. The command takes most of the time of a container's start."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")


def prepare_mounts(binds: list[list[str]], checkout: str) -> None:
    """Make the container's mounts, in a mount namespace of its own."""
    call("unshare", CLONE_NEWNS)
    mount("none", "/", flags=MS_PRIVATE | MS_REC)
    mount("tmpfs", "/mnt", "tmpfs", data="mode=0755")
    for device in ("null", "zero", "full", "random", "urandom", "tty"):
        with open(f"/mnt/{device}", "w"):
            pass
        mount(f"/dev/{device}", f"/mnt/{device}", flags=MS_BIND)
    for host, guest in binds:
        if guest.startswith("/dev/"):
            os.makedirs(f"/mnt/{guest[5:]}")
            mount(host, f"/mnt/{guest[5:]}", flags=MS_BIND)
    mount("/mnt", "/dev", flags=MS_MOVE)
    # A /tmp of its own, the only directory that the container's root may write to. A checkout below /tmp stays visible
    # in it.
    mount("tmpfs", "/mnt", "tmpfs", data="mode=1777")
    if checkout.startswith("/tmp/"):
        os.makedirs(f"/mnt/{checkout[5:]}")
        mount(checkout, f"/mnt/{checkout[5:]}", flags=MS_BIND)
    mount("/mnt", "/tmp", flags=MS_MOVE)


def main() -> None:
    """Make the container and wait for its end."""
    options = json.loads(sys.argv[1])
    agent = open(options["agent"], "rb").read()  # noqa: SIM115 - another /tmp is mounted next
    prepare_mounts(options["binds"], options["checkout"])
    base = options["base"]
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child:
        theirs.close()
        ours.recv(1)
        if base is not None:
            for file in ("uid_map", "gid_map"):
                with open(f"/proc/{child}/{file}", "w") as opened:
                    opened.write(f"0 {base} {IDS}")
        ours.send(b"x")
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    ours.close()
    # A second mount namespace, owned by the new user namespace: root may mount /proc only in that one.
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP
    call("unshare", flags | (CLONE_NEWUSER if base is not None else 0))
    theirs.send(b"x")
    theirs.recv(1)
    theirs.close()
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    init = os.fork()
    if init:
        os.write(1, f"{init}\n".encode())
        os.close(0)
        os.close(1)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) & 0xFF)
    # The kernel kills it if the launcher dies, so tests leave no process behind.
    ctypes.CDLL(None).prctl(1, 9)
    mount("proc", "/proc", "proc")
    socket.sethostname(options["hostname"])
    with open("/tmp/agent.py", "wb") as copy:
        copy.write(agent)
    # Close all descriptors except standard input, output and error.
    os.closerange(3, 256)
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}
    os.execve("/usr/bin/python3", ["python3", "-I", "-S", "/tmp/agent.py"], environment)


main()
