"""PID 1 of a test container. Runs on the system's Python alone. Tests also import it, to do the same on the host.

It reads one JSON command a line from standard input, runs each in a child process, and answers with one line. When
standard input ends, PID 1 ends, and with it the container.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000

#: Seconds to wait after the last response for the server to close the connection.
LOOK = 0.05


def unshare(flags: int) -> None:
    """Leave namespaces. From 3.12 on Python has a function for this."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def become(steps: list[str]) -> None:
    """Turn this process into another kind of caller: ``uid:1000``, ``userns`` (root of a new one), ``pidns``."""
    for step in steps:
        if step.startswith("uid:"):
            uid = int(step[4:])
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        elif step == "userns":
            uid = os.getuid()
            # PR_SET_DUMPABLE: after a change of user, /proc/self belongs to root.
            ctypes.CDLL(None).prctl(4, 1)
            unshare(CLONE_NEWUSER)
            with open("/proc/self/uid_map", "w") as file:
                file.write(f"0 {uid} 1")
            os.setresuid(0, 0, 0)
        elif step == "pidns":
            unshare(CLONE_NEWPID)
            child = os.fork()
            if child:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:
            raise ValueError(step)


def connect(path: str, how: str = "self") -> socket.socket:
    """Return a connected socket.

    Args:
        path: the path of the listening socket.
        how: ``self``: this process connects; ``exited``: a child connects and has exited when this returns;
            ``leaving``: the same, but the child exits only after a byte from the server; ``parent``: this process
            connects, and its child, which inherits the socket, continues.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(300)
    if how in ("exited", "leaving"):
        child = os.fork()
        if child == 0:
            connection.connect(path)
            if how == "leaving":
                connection.recv(1)
            os._exit(0)
        os.waitpid(child, 0)
        return connection
    connection.connect(path)
    if how == "parent":
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return connection


def exchange(connection: socket.socket, steps: list[list[Any]]) -> dict[str, Any]:
    """Perform the steps of an exchange.

    Args:
        connection: a connected socket.
        steps: ``send`` bytes (base64); ``wait`` seconds; ``shutdown``; ``receive`` a number of responses to a method.

    Returns:
        ``received``: base64 for each ``receive``; ``closed``: whether the server closed the connection; ``seconds``.
    """
    began = time.monotonic()
    received: list[str] = []
    closed = False
    for step in steps:
        if step[0] == "send":
            try:
                connection.sendall(base64.b64decode(step[1]))
            except (BrokenPipeError, ConnectionResetError):
                pass
        elif step[0] == "wait":
            time.sleep(step[1])
        elif step[0] == "shutdown":
            connection.shutdown(socket.SHUT_WR)
        else:
            data, closed = receive(connection, step[1], step[2], step[3] if len(step) > 3 else 300)
            received.append(base64.b64encode(data).decode())
    if not closed:
        connection.settimeout(LOOK)
        try:
            closed = connection.recv(65536) == b""
        except TimeoutError:
            pass
        except ConnectionResetError:
            closed = True
    return {"received": received, "closed": closed, "seconds": time.monotonic() - began}


def receive(connection: socket.socket, count: int, method: str, timeout: float) -> tuple[bytes, bool]:
    """Read until `count` responses are complete, the server closes the connection, or the time is over."""
    data = b""
    until = time.monotonic() + timeout
    while not complete(data, count, method):
        connection.settimeout(max(0.001, until - time.monotonic()))
        try:
            more = connection.recv(1 << 20)
        except TimeoutError:
            return data, False
        except ConnectionResetError:
            return data, True
        if not more:
            return data, True
        data += more
    return data, False


def complete(data: bytes, count: int, method: str) -> bool:
    """Return whether `data` holds `count` complete responses."""
    while count:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            return False
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:") and method != "HEAD" and b" 100 " not in head[:14]:
                length = int(line[15:])
        if len(rest) < length:
            return False
        data = rest[length:]
        count -= 1
    return True


def perform(command: dict[str, Any]) -> dict[str, Any]:
    """Execute one command in this process."""
    become(command.get("become", []))
    if command["do"] == "exchange":
        return exchange(connect(command["socket"], command.get("how", "self")), command["steps"])
    if command["do"] == "run":
        done = subprocess.run(
            command["argv"],
            input=base64.b64decode(command.get("input", "")),
            capture_output=True,
            timeout=command.get("timeout", 300),
            check=False,
        )
        out, err = base64.b64encode(done.stdout).decode(), base64.b64encode(done.stderr).decode()
        return {"code": done.returncode, "out": out, "err": err}
    raise ValueError(command["do"])


def in_child(command: dict[str, Any]) -> dict[str, Any]:
    """Execute one command in a child process, and return its answer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            try:
                answer = perform(command)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            data = json.dumps(answer).encode()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(data)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    result: dict[str, Any] = json.loads(data or b'{"error": "the child said nothing"}')
    return result


def change_init(steps: list[str]) -> None:
    """Apply the steps of `become` to PID 1 itself. A child takes over the commands."""
    reading, writing = os.pipe()
    steward = os.fork()
    if steward == 0:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            failed = pipe.read() != b"done"
        sys.stdout.buffer.write(json.dumps({"error": "PID 1 could not change"} if failed else {}).encode() + b"\n")
        sys.stdout.buffer.flush()
        return
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        for step in steps:
            if step == "pidns":
                # A process that unshares its PID namespace stays in the old one; only its children are in the new one.
                unshare(CLONE_NEWPID)
                if os.fork() == 0:
                    pipe.close()
                    signal.pause()
            else:
                become([step])
        pipe.write(b"done")
    os.waitpid(steward, 0)
    os._exit(0)


def main() -> None:
    """Execute commands until standard input ends."""
    # Orphaned processes of earlier commands need no handler.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Not by iteration: it reads ahead, and the buffered line would reach both PID 1 and its child.
    while line := sys.stdin.buffer.readline():
        command = json.loads(line)
        if command["do"] == "change init":
            change_init(command["become"])
            continue
        sys.stdout.buffer.write(json.dumps(in_child(command)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
