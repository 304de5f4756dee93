"""measure.py REQUESTS EXPECTED: requests user.role so often, each on a new connection; prints times as JSON.

Runs in a virtual machine, on its Python alone.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time


class MeasuredConnection(http.client.HTTPConnection):
    """An HTTP connection over the guest socket."""

    def connect(self) -> None:
        """Connect to the guest socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(120)
        self.sock.connect("/dev/incus/sock")


requests, expected = int(sys.argv[1]), sys.argv[2].encode()
taken: list[float] = []
failures: list[str] = []
start = time.monotonic()
for _ in range(requests):
    began = time.monotonic()
    connection = MeasuredConnection("x")
    try:
        connection.request("GET", "/1.0/config/user.role")
        answer = connection.getresponse()
        body = answer.read()
        if (answer.status, body) != (200, expected):
            failures.append(f"{answer.status} {body!r}")
    except (OSError, http.client.HTTPException) as error:
        failures.append(f"{type(error).__name__}: {error}")
    connection.close()
    taken.append(time.monotonic() - began)
taken.sort()
json.dump(
    {
        "requests": len(taken),
        "failures": failures[:20],
        "seconds": time.monotonic() - start,
        "p50": taken[len(taken) // 2],
        "p99": taken[len(taken) * 99 // 100],
    },
    sys.stdout,
)
