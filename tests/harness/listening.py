"""Clients of the event stream, in one process in a container. Runs on the system's Python and websocket-client.

Usage: listening.py KIND ARGUMENT. It prints one JSON document a line:

``raw``: ARGUMENT is a JSON list of [request, last]. Sends each request on a connection of its own. Prints "ready" when
each has the head of a response and, when each has received its ``last``, all that each received (text, ISO 8859-1).

``follow``: ARGUMENT is an id, or empty. A WebSocket that resumes whenever it is closed. Prints each event, and
``{"closed": code}``. Ends when standard input ends.

``many``: ARGUMENT is ``LISTENERS COUNT STUCK``. Prints "ready" when all WebSockets are open. STUCK of them read
nothing. Prints the changed keys of each of the others, when each has received COUNT events.

``last``: ARGUMENT is ``ID COUNT``. COUNT WebSockets that resume after ID whenever they are closed, and as many clients
that send requests in a loop (see looping.py), half of them on a kept connection. Prints "ready" when all WebSockets are
open and, when each has received a change of ``user.end``, the results of each client.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import websocket

from tests.harness.looping import ask

SOCKET = sys.argv[3] if len(sys.argv) > 3 else "/dev/incus/sock"


def print_document(document: object) -> None:
    """Print a JSON document in a line."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def connected() -> socket.socket:
    """Connect to the service."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(SOCKET)
    return connection


def raw(wanted: list[list[str]]) -> None:
    """Send requests unchanged, and print all that was received when each connection has received its `last`."""
    connections = [connected() for _pair in wanted]
    received = ["" for _pair in wanted]
    for connection, (request, _last) in zip(connections, wanted, strict=True):
        connection.sendall(request.encode("latin-1"))
    announced = False
    while not announced or not all(last in data for (_request, last), data in zip(wanted, received, strict=True)):
        for connection in select.select(connections, [], [])[0]:
            received[connections.index(connection)] += connection.recv(65536).decode("latin-1")
        if not announced and all("\r\n\r\n" in data for data in received):
            announced = True
            print_document("ready")
    print_document(received)


def opened(since: str) -> Any:
    """Open a WebSocket that resumes after an id; "" for none."""
    # Its validation takes a time for each byte, and json.loads rejects invalid UTF-8, too.
    client: Any = websocket.WebSocket(skip_utf8_validation=True)
    query = f"?since={since}" if since else ""
    client.connect(f"ws://guest/1.0/events{query}", socket=connected(), suppress_origin=True)
    return client


def follow(since: str) -> None:
    """Print each event, and resume whenever the connection is lost."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while True:
        try:
            client = opened(since)
            while True:
                opcode, data = client.recv_data()
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    print_document({"closed": int.from_bytes(data[:2], "big")})
                    break
                event = json.loads(data)
                since = str(event["id"])
                print_document(event)
        except (OSError, websocket.WebSocketException) as error:
            print_document({"lost": repr(error)})
            time.sleep(0.02)


def many(listeners: int, count: int, stuck: int) -> None:
    """Open many WebSockets, some of which are never read; print the changed keys that each of the others received."""
    clients = [opened("") for _number in range(listeners)]
    found: list[list[str]] = [[] for _client in clients[stuck:]]

    def read(client: Any, keys: list[str]) -> None:
        while len(keys) < count:
            keys.append(json.loads(client.recv())["metadata"]["key"])

    threads = [threading.Thread(target=read, args=pair) for pair in zip(clients[stuck:], found, strict=True)]
    for thread in threads:
        thread.start()
    print_document("ready")
    for thread in threads:
        thread.join()
    print_document(found)
    sys.stdin.read()


def resume(since: str, opened_once: threading.Semaphore, ended: threading.Event) -> dict[str, Any]:
    """Follow events until ``user.end`` is set, and resume whenever the connection is lost."""
    ids: list[int] = []
    codes: list[int] = []
    lost: list[str] = []
    first = True
    while True:
        try:
            client = opened(since)
            if first:
                opened_once.release()
            first = False
            while True:
                opcode, data = client.recv_data()
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    codes.append(int.from_bytes(data[:2], "big"))
                    break
                event = json.loads(data)
                ids.append(event["id"])
                since = str(event["id"])
                if event["metadata"].get("key") == "user.end":
                    ended.set()
                    return {"ids": ids, "codes": codes, "lost": lost}
        except (OSError, websocket.WebSocketException) as error:
            lost.append(repr(error))
            time.sleep(0.02)


def last(since: str, count: int) -> None:
    """Follow events on many WebSockets at once; print the results of each."""
    opened_once, ended = threading.Semaphore(0), threading.Event()
    with ThreadPoolExecutor(2 * count) as pool:
        listeners = [pool.submit(resume, since, opened_once, ended) for _number in range(count)]
        for _listener in listeners:
            opened_once.acquire()
        # The pause leaves processor time to others: this is no load test.
        loops = [pool.submit(ask, bool(number % 2), lambda: not ended.is_set(), 0.05) for number in range(count)]
        print_document("ready")
        print_document({"loops": [loop.result() for loop in loops], "listeners": [one.result() for one in listeners]})


if __name__ == "__main__":
    # PR_SET_PDEATHSIG: the test ends nsenter, which started this process.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if sys.argv[1] == "raw":
        raw(json.loads(sys.argv[2]))
    elif sys.argv[1] == "follow":
        follow(sys.argv[2])
    elif sys.argv[1] == "last":
        last(sys.argv[2].split()[0], int(sys.argv[2].split()[1]))
    else:
        many(*map(int, sys.argv[2].split()))
