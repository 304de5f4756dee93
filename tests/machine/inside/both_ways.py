"""Prints as JSON what comes of requests that need bytes in both directions.

Runs in a virtual machine, at the agent's socket.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys


def opened() -> socket.socket:
    """A connection to the agent."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(250)
    sock.connect("/dev/incus/sock")
    return sock


def rest(sock: socket.socket) -> bytes:
    """All that comes until the end."""
    found = b""
    while data := sock.recv(65536):
        found += data
    return found


def until(sock: socket.socket, end: bytes) -> bytes:
    """What comes, with `end` at its end; no byte more is read."""
    found = b""
    while not found.endswith(end):
        data = sock.recv(1)
        if not data:
            raise EOFError(found)
        found += data
    return found


def half_closed(path: str) -> str:
    """The body for a client that sends nothing more after its request, and says so."""
    with opened() as sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        sock.shutdown(socket.SHUT_WR)
        return rest(sock).partition(b"\r\n\r\n")[2].decode()


def continued(body: bytes) -> list[str]:
    """The status lines for a client that sends its body when it is told to (RFC 9110, section 10.1.1)."""
    fields = f"Host: x\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with opened() as sock:
        sock.sendall(f"PATCH /1.0 HTTP/1.1\r\n{fields}".encode())
        first = until(sock, b"\r\n\r\n")
        sock.sendall(body)
        return [answer.split(b"\r\n")[0].decode() for answer in (first, rest(sock))]


def web_socket() -> list[str]:
    """The status of a handshake, and the frames for a ping and a close of the client, as hexadecimal digits."""
    key = base64.b64encode(os.urandom(16)).decode()
    fields = (
        f"Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}"
    )
    with opened() as sock:
        sock.sendall(f"GET /1.0/events HTTP/1.1\r\n{fields}\r\n\r\n".encode())
        head = until(sock, b"\r\n\r\n")
        # Masked with zeros (RFC 6455, section 5.3).
        sock.sendall(b"\x89\x82\0\0\0\0hi")
        pong = until(sock, b"hi")
        sock.sendall(b"\x88\x82\0\0\0\0" + (1000).to_bytes(2, "big"))
        return [head.split(b" ")[1].decode(), pong.hex(), rest(sock).hex()]


json.dump([half_closed(sys.argv[1]), continued(b'{"state": "Ready"}'), web_socket()], sys.stdout)
