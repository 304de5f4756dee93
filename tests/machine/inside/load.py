"""load.py EXPECTED: requests user.role all the time until /stop exists; prints the results as JSON.

Runs inside a container, on its Python alone. Two threads keep their connection as long as the service permits, two open
a new one for each request. A request fails if its response is not EXPECTED with status 200, or if its connection is
refused, reset or closed without a response.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import threading
import time

#: Seconds that one request may wait: longer than any restart takes on an emulated processor.
TIMEOUT = 600.0

EXPECTED = sys.argv[1].encode()

requests = 0
longest = 0.0
failures: list[str] = []
counting = threading.Lock()


class LoadConnection(http.client.HTTPConnection):
    """An HTTP connection over the guest socket."""

    def connect(self) -> None:
        """Connect to the guest socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect("/dev/incus/sock")


def ask(connection: LoadConnection) -> None:
    """Send one request, and count it."""
    global requests, longest
    began = time.monotonic()
    try:
        connection.request("GET", "/1.0/config/user.role")
        answer = connection.getresponse()
        body = answer.read()
        failure = "" if (answer.status, body) == (200, EXPECTED) else f"{answer.status} {body!r}"
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        failure = f"{type(error).__name__}: {error}"
    with counting:
        requests += 1
        longest = max(longest, time.monotonic() - began)
        if failure:
            failures.append(f"after {time.monotonic() - began:.2f} s: {failure}")


def ask_on_one() -> None:
    """Send requests on one connection; http.client opens another one after a response with Connection: close."""
    connection = LoadConnection("x")
    while not os.path.exists("/stop"):
        ask(connection)
        time.sleep(0.02)
    connection.close()


def ask_anew() -> None:
    """Send each request on a new connection."""
    while not os.path.exists("/stop"):
        connection = LoadConnection("x")
        ask(connection)
        connection.close()
        time.sleep(0.02)


threads = [threading.Thread(target=target) for target in (ask_on_one, ask_on_one, ask_anew, ask_anew)]
for thread in threads:
    thread.start()
open("/started", "w").close()
for thread in threads:
    thread.join()
json.dump({"requests": requests, "failures": failures[:20], "longest": longest}, sys.stdout)
