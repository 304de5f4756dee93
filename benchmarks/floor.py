"""The minimal server on this stack: a bare gevent loop that receives requests, and sends a fixed response.

Usage: python -m benchmarks.floor SOCKET fair|greedy

``fair`` waits for its turn in the event loop before each read, as guestapi does. ``greedy`` is the simplest loop:
gevent's recv() tries the socket at once, so a connection with a fast client is served again before other connections
are served at all. It parses nothing and identifies no caller.
"""

from __future__ import annotations

import os
import sys

import gevent
from gevent import socket
from gevent.hub import get_hub

RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Type: application/octet-stream\r\n"
    b"Date: Mon, 01 Jun 2026 12:00:00 GMT\r\n\r\nbar"
)


def fair(connection: socket.socket) -> None:
    """Serve a connection, taking turns with others."""
    hub = get_hub()
    readable = hub.loop.io(connection.fileno(), 1)
    try:
        while True:
            hub.wait(readable)
            if not connection.recv(65536):
                return
            connection.sendall(RESPONSE)
    except OSError:
        pass  # The load ends when its time is over.
    finally:
        readable.close()
        connection.close()


def greedy(connection: socket.socket) -> None:
    """Serve a connection as long as it has input."""
    try:
        while connection.recv(65536):
            connection.sendall(RESPONSE)
    except OSError:
        pass  # As above.
    finally:
        connection.close()


def main(path: str, manner: str) -> None:
    """Accept connections for ever."""
    serve = {"fair": fair, "greedy": greedy}[manner]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o666)
        listener.listen(2048)
        while True:
            connection, _address = listener.accept()
            gevent.spawn(serve, connection)


if __name__ == "__main__":
    main(*sys.argv[1:])
