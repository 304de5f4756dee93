"""vsock_flood.py COUNT FILE: connects to the host over vsock as fast as it can, until FILE is there.

Prints a line once it has connected COUNT times, and how often it has when it ends. Runs in a virtual machine, on its
Python alone, beside the agent, as whoever floods would. Of four processes, each keeps its last 100 connections open:
two send nothing on them, two a request.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import deque

HOST, PORT, KEPT, PROCESSES = 2, 8444, 100, 4
REQUEST = b"GET /1.0/config/user.role HTTP/1.1\r\nHost: x\r\n\r\n"


def flood(asks: bool, end: str, told: int) -> None:
    """Connect until the file is there; write a byte for each connection."""
    kept: deque[socket.socket] = deque()
    while not os.path.exists(end):
        sock = socket.socket(socket.AF_VSOCK)
        sock.settimeout(1)
        try:
            sock.connect((HOST, PORT))
            if asks:
                sock.send(REQUEST)
        except OSError:
            sock.close()
            continue
        os.write(told, b".")
        kept.append(sock)
        if len(kept) > KEPT:
            kept.popleft().close()


many, end = int(sys.argv[1]), sys.argv[2]
reading, writing = os.pipe()
for number in range(PROCESSES):
    if os.fork() == 0:
        flood(number % 2 == 1, end, writing)
        os._exit(0)
os.close(writing)
count = 0
while told := os.read(reading, 4096):
    if count < many <= count + len(told):
        os.write(1, b"many\n")
    count += len(told)
os.write(1, b"%d\n" % count)
