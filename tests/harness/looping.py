"""A client in a container that requests ``user.foo`` repeatedly, and prints a JSON object of the results.

Usage: looping.py SECONDS KIND, where KIND is ``connect`` (a connection for each request) or ``keep`` (one connection
for as long as the server keeps it). It ends early if ``user.foo`` is ``enough`` instead of ``bar``. Runs on the
system's Python alone.
"""

import http.client
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

#: Seconds between two requests of a program: what is tested is that each is answered, not how many can be.
_PAUSE = 0.002


class LoopingConnection(http.client.HTTPConnection):
    """An HTTP connection over the socket."""

    def connect(self) -> None:
        """Connect, as http.client.HTTPConnection."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(300)
        self.sock.connect("/dev/incus/sock")


def ask(keep: bool, go_on: Callable[[], bool], pause: float = 0.0) -> dict[str, Any]:
    """Request the same key repeatedly; return the number of correct responses, other results, and the longest time."""
    good, failed, longest = 0, [], 0.0
    connection = LoopingConnection("x")
    while go_on():
        began = time.monotonic()
        try:
            connection.request("GET", "/1.0/config/user.foo", headers={} if keep else {"Connection": "close"})
            answer = connection.getresponse()
            body = answer.read()
            if answer.status == 200 and body == b"enough":
                break
            if answer.status != 200 or body != b"bar":
                failed.append(f"{answer.status} {body!r}")
            else:
                good += 1
            if answer.will_close:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            failed.append(repr(error))
            connection.close()
        longest = max(longest, time.monotonic() - began)
        time.sleep(pause)
    return {"good": good, "failed": failed, "longest": longest}


if __name__ == "__main__":
    until = time.monotonic() + float(sys.argv[1])
    sys.stdout.write(json.dumps(ask(sys.argv[2] == "keep", lambda: time.monotonic() < until, _PAUSE)))
