"""vsock_flood.py SECONDS: connects to the host over vsock as fast as it can; prints how often.

Runs in a virtual machine, on its Python alone, beside the agent, as whoever floods would. Of four processes, each keeps
its last 100 connections open: two send nothing on them, two a request.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import deque

HOST, PORT, KEPT, PROCESSES = 2, 8444, 100, 4
REQUEST = b"GET /1.0/config/user.role HTTP/1.1\r\nHost: x\r\n\r\n"


def flood(asks: bool, until: float) -> int:
    """Connect until then; return how often."""
    kept: deque[socket.socket] = deque()
    count = 0
    while time.monotonic() < until:
        sock = socket.socket(socket.AF_VSOCK)
        sock.settimeout(1)
        try:
            sock.connect((HOST, PORT))
            if asks:
                sock.send(REQUEST)
        except OSError:
            sock.close()
            continue
        count += 1
        kept.append(sock)
        if len(kept) > KEPT:
            kept.popleft().close()
    return count


end = time.monotonic() + float(sys.argv[1])
reading, writing = os.pipe()
for number in range(PROCESSES):
    if os.fork() == 0:
        os.write(writing, b"%d\n" % flood(number % 2 == 1, end))
        os._exit(0)
os.close(writing)
os.write(1, b"%d\n" % sum(map(int, os.fdopen(reading))))
