"""An instance among attackers. It sends requests all the time, and prints results and times as JSON.

It uses new and kept connections. It runs inside a container, with the system's Python alone. It ends when its standard
input does, but not before it has had ten answers.
"""

import ctypes
import http.client
import json
import select
import signal
import socket
import sys
import time


class VictimConnection(http.client.HTTPConnection):
    """A connection to the guest API."""

    #: How often the kernel's queue was full.
    full = 0

    def connect(self) -> None:
        """Connect as http.client does, and retry on EAGAIN, which a full queue gives a socket with a timeout."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(300)
        while True:
            try:
                return self.sock.connect("/dev/incus/sock")
            except BlockingIOError:
                VictimConnection.full += 1
                time.sleep(0.001)


def ask(connection: VictimConnection) -> str:
    """Send one request; return what was wrong with the response."""
    try:
        connection.request("GET", "/1.0/config/user.foo")
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return repr(error)
    return "" if (answer.status, body) == (200, b"bar") else f"{answer.status} {body!r}"


def main() -> None:
    """Send requests until the standard input ends."""
    # PR_SET_PDEATHSIG: a test ends nsenter, which started this process.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    kept = VictimConnection("x")
    took: list[float] = []
    failed: list[str] = []
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], 0.002)[0] or len(took) < 10:
        for connection in (kept, VictimConnection("x")):
            began = time.monotonic()
            if wrong := ask(connection):
                failed.append(wrong)
            took.append(time.monotonic() - began)
            if connection is not kept:
                connection.close()
    took.sort()
    figures = {"p50": took[len(took) // 2], "p99": took[len(took) * 99 // 100], "max": took[-1]}
    sys.stdout.write(
        json.dumps({"answered": len(took) - len(failed), "failed": failed, "full": VictimConnection.full, **figures})
    )


main()
