"""Attacks of a hostile guest on the socket. Runs inside a container, on the system's Python alone.

Usage: attacks.py NAME SECONDS. Runs the attack for SECONDS, closes everything, and prints its counts as a JSON object.
"""

import contextlib
import ctypes
import json
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

SOCKET = "/dev/incus/sock"
GET = b"GET /1.0/config/user.foo HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = b"GET /1.0/config/user.large HTTP/1.1\r\nHost: x\r\n\r\n"
PATCH = b"PATCH /1.0 HTTP/1.1\r\nHost: x\r\n"
EVENTS = b"GET /1.0/events HTTP/1.1\r\nHost: x\r\n"
UPGRADE = (
    EVENTS + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)

Seen = dict[str, int]


def connected(first: bytes = b"") -> socket.socket | None:
    """Return a non-blocking connection on which `first` was sent; None if the service accepts no more at the moment."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(2)
    try:
        connection.connect(SOCKET)
        connection.setblocking(False)
        if first:
            connection.send(first)
    except OSError:
        connection.close()
        return None
    return connection


def push(connection: socket.socket, data: bytes, flags: int = 0) -> bool:
    """Send as much as the socket takes at once; return False if it is closed."""
    try:
        connection.send(data, flags)
    except BlockingIOError:
        pass
    except OSError:
        return False
    return True


def pull(connection: socket.socket) -> bytes | None:
    """Return the received bytes; b"" at the end of the stream, None if there are none."""
    try:
        return connection.recv(65536)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def crowd(count: int, until: float, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """Hold `count` connections until the time is over; replace the closed ones."""
    held: list[socket.socket] = []
    while time.monotonic() < until:
        while len(held) < count and time.monotonic() < until and (made := connected(first)):
            held.append(made)
        yield held
        for connection in [one for one in held if one.fileno() < 0]:
            held.remove(connection)
        time.sleep(0.001)


def statuses(connection: socket.socket, seen: Seen) -> None:
    """Count the status of a received response; close a connection at the end of its stream."""
    data = pull(connection)
    if data:
        key = data[9:12].decode("latin-1") if data.startswith(b"HTTP/1.") else "other"
        seen[key] = seen.get(key, 0) + 1
    elif data == b"":
        connection.close()


def silence(until: float) -> Seen:
    """Open 1,000 connections and send nothing."""
    seen: Seen = {}
    for held in crowd(1000, until):
        for connection in held:
            statuses(connection, seen)
        time.sleep(0.05)
    return seen


def dripping(until: float) -> Seen:
    """Send heads and bodies one byte at a time."""
    seen: Seen = {}
    bodies = [PATCH + b"Content-Length: 1000\r\n\r\n", PATCH + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n"]
    for first in (b"GET / HTTP/1.1\r\nHost: x\r\nX: ", *bodies):
        if child := os.fork():
            continue
        for held in crowd(80, until, first):
            for connection in held:
                if not push(connection, b"x"):
                    connection.close()
                statuses(connection, seen)
            time.sleep(0.3)
        os._exit(child)
    gather()
    return seen


def gather() -> None:
    """Wait for all children."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def pipelining(until: float) -> Seen:
    """Send requests without end, and read no response."""
    block = GET * 500
    for held in crowd(100, until):
        for connection in held:
            if not push(connection, block):
                connection.close()
    return {}


def unread(until: float) -> Seen:
    """Request 2 MiB on as many connections as possible, and read no response."""
    seen: Seen = {}
    for held in crowd(500, until, LARGE * 20):
        time.sleep(0.2)
        # Peek, so that the response stays unread: count the refused connections.
        for connection in held:
            with contextlib.suppress(OSError):
                status = connection.recv(12, socket.MSG_PEEK | socket.MSG_DONTWAIT)[9:].decode()
                seen[status] = max(seen.get(status, 0), 1)
    return seen


def slow_readers(until: float) -> Seen:
    """Request 2 MiB and read one byte at a time."""
    for held in crowd(200, until, LARGE):
        for connection in held:
            with contextlib.suppress(OSError):
                connection.recv(1)
    return {}


def bodies(until: float) -> Seen:
    """Announce bodies of 1 GiB, by length and by chunk, and bodies that are costly to parse; begin to send them."""
    seen: Seen = {}
    announced = [
        PATCH + b"Content-Length: 1073741824\r\n\r\n",
        PATCH + b"Transfer-Encoding: chunked\r\n\r\n40000000\r\n",
        PATCH + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000,
        PATCH + b"Transfer-Encoding: chunked\r\n\r\n" + b"1;" + b"x" * 4000 + b"\r\nx\r\n",
        PATCH + b"Content-Length: 65536\r\n\r\n" + b"[" * 65536,
        PATCH + b"Content-Length: 65536\r\n\r\n" + b'{"a":' * 13107 + b" ",
        PATCH + b"Content-Length: 65536\r\n\r\n" + b"\xff" * 65536,
        PATCH + b"Content-Length: 65536\r\n\r\n" + b'{"state":"' + b"\xff" * 65524 + b'"}',
        PATCH + b"Content-Length: 65538\r\n\r\n" + b'{"state":[' + b"1," * 32763 + b"0]}"[:2],
        GET[:-2] + b"Expect: 100-continue\r\nContent-Length: 1073741824\r\n\r\n",
    ]
    for held in crowd(60, until):
        for connection in held:
            push(connection, random.choice(announced))
            push(connection, b"x" * 65536)
            statuses(connection, seen)
    return seen


def streams(until: float) -> Seen:
    """Open 1,000 event streams, of every form."""
    seen: Seen = {}
    for first in (
        UPGRADE,
        EVENTS + b"\r\n",
        EVENTS + b"Accept: text/event-stream\r\n\r\n",
        EVENTS + b"Last-Event-ID: 0\r\n\r\n",
    ):
        for held in crowd(250, time.monotonic() + (until - time.monotonic()) / 2, first):
            for connection in held:
                statuses(connection, seen)
    return seen


def resuming(until: float) -> Seen:
    """Streams that begin with all that the log still has, as many as there may be, and nobody takes it."""
    seen: Seen = {}
    for held in crowd(128, until, EVENTS + b"Last-Event-ID: 0\r\n\r\n"):
        time.sleep(0.1)
        for connection in held:
            with contextlib.suppress(OSError):
                if not connection.recv(12, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    connection.close()
    return seen


def frame(first: int, payload: bytes = b"", *, length: int | None = None, mask: bool = True) -> bytes:
    """Return a WebSocket frame, whose length field may be wrong."""
    size = len(payload) if length is None else length
    bit = 0x80 if mask else 0
    head = bytes([first, bit | size]) if size < 126 else bytes([first, bit | 127]) + size.to_bytes(8, "big")
    return head + (bytes(4) if mask else b"") + payload


FRAMES = [
    frame(0x82, b"x" * 50, length=1 << 62),
    frame(0x89, b"x" * 50, length=1 << 62),
    frame(0x88, length=(1 << 64) - 1),
    frame(0x81, b"\xff\xfe\xc0"),
    frame(0x88, b"\x03\xe8\xff\xfe\xc0"),
    frame(0x88, b"\x03"),
    frame(0x88, b"\x00\x00"),
    frame(0x01, b"part") + frame(0x00, b"of") * 50,
    frame(0x09, b"fragmented ping"),
    frame(0x89, b"bare", mask=False),
    frame(0xF9, b"reserved"),
    frame(0xC9, b"reserved"),
    frame(0x83, b"opcode"),
    frame(0x8F, b"opcode"),
    frame(0x89, b"x" * 125) * 3 + b"\x89",
    b"\x89\xfe\xff\xff",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3,
    bytes(range(256)),
]


def frames(until: float) -> Seen:
    """Send every kind of invalid frame on WebSockets."""
    seen: Seen = {}
    turn = 0
    for held in crowd(20, until, UPGRADE):
        for connection in held:
            data = pull(connection)
            if data == b"":
                seen["closed"] = seen.get("closed", 0) + 1
                connection.close()
            elif data is not None and data.startswith(b"HTTP/1.1 101"):
                turn += 1
                push(connection, FRAMES[turn % len(FRAMES)])
                if turn % 3 == 0:
                    connection.shutdown(socket.SHUT_WR)
    return seen


def pings(until: float) -> Seen:
    """Send pings without end on 40 WebSockets; on half of them, read no pong."""
    block = frame(0x89, b"x" * 125) * 400
    for held in crowd(40, until, UPGRADE):
        for number, connection in enumerate(held):
            if not push(connection, block):
                connection.close()
            elif number % 2:
                statuses(connection, {})
    return {}


def changes(until: float) -> Seen:
    """Change the state as fast as requests can be sent."""
    seen: Seen = {}
    states = [
        PATCH + b"Content-Length: %d\r\n\r\n%s" % (len(b), b) for b in (b'{"state":"Ready"}', b'{"state":"Started"}')
    ]
    for held in crowd(50, until):
        for number, connection in enumerate(held):
            if not push(connection, states[number % 2]):
                connection.close()
            statuses(connection, seen)
    return seen


def attributes(until: float) -> Seen:
    """Write the largest attributes, more of them than are kept, as fast as requests can be sent, and read them back."""
    seen: Seen = {}
    path = b"/1.0/guestapi/attributes"
    body = random.randbytes(16384)
    number = 0
    for held in crowd(50, until):
        for connection in held:
            number += 1
            name = b"%b/a%d/%d" % (path, number % 7, number % 211)
            put = b"PUT %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (name, len(body), body)
            others = (b"GET %b", b"GET %b" % path, b"DELETE %b", b"PUT %b%00")
            other = others[number % 4].replace(b"%b", name) + b" HTTP/1.1\r\nHost: x\r\n\r\n"
            if not push(connection, put if number % 3 else other):
                connection.close()
            statuses(connection, seen)
    return seen


def waits(until: float) -> Seen:
    """Wait for changes on more connections than may wait, with many tags, and cause the changes oneself."""
    seen: Seen = {}
    tree = b"GET /1.0/guestapi/tree?wait=60 HTTP/1.1\r\nHost: x\r\n"
    key = b"GET /1.0/guestapi/tree/config/user.absent-%d?wait=60 HTTP/1.1\r\nHost: x\r\n"
    none = b", ".join(b'"%040d"' % number for number in range(180))
    states = [
        PATCH + b"Content-Length: %d\r\n\r\n%s" % (len(b), b) for b in (b'{"state":"Ready"}', b'{"state":"Started"}')
    ]
    tag = b'"0"'
    for number, held in enumerate(crowd(400, until)):
        for place, connection in enumerate(held):
            answer = pull(connection)
            if answer == b"":
                connection.close()
                continue
            if answer:
                status = answer[9:12].decode("latin-1")
                seen[status] = seen.get(status, 0) + 1
                if (found := re.search(rb'(?i)etag: ("[^"]+")', answer)) is not None:
                    tag = found[1]
            elif place >= 4 and number % 10:
                continue
            if place < 4:
                request = states[(number + place) % 2]
            elif place % 3 == 0:
                request = key % place + b"If-None-Match: " + none + b"\r\n\r\n"
            else:
                request = tree + b"If-None-Match: " + none + b", " + tag + b"\r\n\r\n"
            if not push(connection, request):
                connection.close()
        time.sleep(0.01)
    return seen


def heads(until: float) -> Seen:
    """Send heads of the largest permitted size, larger ones, and ones that grow one byte at a time."""
    seen: Seen = {}
    many = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 400) for n in range(126))
    firsts = [
        many + b"\r\n",
        many + b"X: y\r\n" * 5000,
        b"GET /" + b"a" * 70_000,
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000,
        b"GET " + b"/." * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"%2F" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X_%d: y\r\n" * 120 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
        b"\r\n" * 30_000,
        os.urandom(4000),
    ]
    growing = many[:-1]
    for held in crowd(60, until):
        for number, connection in enumerate(held):
            if number % 3 == 0:
                alive = push(connection, growing) and all(push(connection, b"y") for _time in range(20))
            else:
                alive = push(connection, random.choice(firsts))
            statuses(connection, seen)
            if not alive:
                connection.close()
    return seen


def endless(until: float) -> Seen:
    """Send lines, heads, chunk sizes and trailers that do not end, as fast as they are read, on a few connections."""
    seen: Seen = {}
    chunked = PATCH + b"Transfer-Encoding: chunked\r\n\r\n"
    firsts = [b"GET /", GET[:-2] + b"X: ", GET[:-2] + b"X: y\r\n", chunked + b"1;", chunked + b"0\r\nX: "]
    for held in crowd(5, until):
        for number, connection in enumerate(held):
            first = firsts[number % len(firsts)]
            alive = push(connection, first) and all(push(connection, b"y" * 65536) for _time in range(8))
            statuses(connection, seen)
            if not alive:
                connection.close()
    return seen


def exits(until: float) -> Seen:
    """Fork processes that connect, perhaps send a request, and exit."""
    seen: Seen = {"processes": 0}
    while time.monotonic() < until:
        for first in (b"", b"GET", GET, EVENTS + b"\r\n"):
            if os.fork() == 0:
                connected(first)
                os._exit(0)
            seen["processes"] += 1
        gather()
    return seen


def forks(until: float) -> Seen:
    """Fork as many processes as the container may have, each of which connects all the time."""
    # This limit binds root in a user namespace like any other user.
    resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))
    # The limit counts the processes of a user, and this user has no others.
    os.setresuid(4242, 4242, 4242)
    seen: Seen = {"processes": 1}
    with contextlib.suppress(BlockingIOError):
        while child := os.fork():
            seen["processes"] += 1
        if not child:
            while time.monotonic() < until:
                held = [connected(random.choice((b"", GET))) for _time in range(20)]
                del held
            os._exit(0)
    gather()
    return seen


def queue(until: float) -> Seen:
    """Keep the kernel's queue of connections that are not accepted yet full."""
    seen: Seen = {"connected": 0, "refused": 0}
    held: list[socket.socket] = []
    while time.monotonic() < until:
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            connection.connect(SOCKET)
            seen["connected"] += 1
            held.append(connection)
        except BlockingIOError:
            seen["refused"] += 1
            connection.close()
            time.sleep(0.001)
        if len(held) >= 1000:
            for old in held:
                old.close()
            held.clear()
    return seen


def halves(until: float) -> Seen:
    """Shut down either side of connections at random moments."""
    seen: Seen = {}
    for held in crowd(60, until):
        for connection in held:
            for step in random.sample(range(6), 4):
                with contextlib.suppress(OSError):
                    if step < 3:
                        connection.shutdown((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)[step])
                    else:
                        connection.send((b"", GET, EVENTS + b"\r\n", UPGRADE)[step - 2])
            statuses(connection, seen)
            if random.random() < 0.5:
                connection.close()
    return seen


def oddities(until: float) -> Seen:
    """Send out-of-band and empty data, use the smallest buffers, bind client addresses, and linger on close."""
    seen: Seen = {}
    number = 0
    for held in crowd(40, until):
        for connection in held:
            number += 1
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, number % 2))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                connection.bind(os.fsdecode(b"\0\xff\xfe%d" % number) if number % 2 else f"/tmp/\udcff{number}")
            for piece in (b"", b"G", b"ET / HT", b"TP/1.1\r\nHost: x\r\n\r\n", UPGRADE, b"x"):
                if not push(connection, piece, socket.MSG_OOB if random.random() < 0.5 else 0):
                    break
            statuses(connection, seen)
            if number % 5 == 0:
                connection.close()
    # Send only out-of-band bytes on streams, which have no deadline.
    for first in (UPGRADE, EVENTS + b"\r\n"):
        for connection in filter(None, [connected(first) for _time in range(10)]):
            for _time in range(20):
                push(connection, b"!", socket.MSG_OOB)
    return seen


def descriptors(until: float) -> Seen:
    """Send descriptors with requests: as many as fit into a message, and sockets whose last close lingers a minute."""
    seen: Seen = {"sent": 0, "refused": 0}
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    others = []
    files = [os.open("/dev/null", os.O_RDONLY) for _number in range(253)]
    while time.monotonic() < until:
        slow = socket.socket()
        slow.connect(listening.getsockname())
        others.append(listening.accept()[0])
        slow.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                slow.send(b"x" * 65536)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        for passed in ([slow.fileno()], files, [slow.fileno()]):
            connection = connected()
            if connection is None:
                continue
            try:
                socket.send_fds(connection, [GET[: random.choice((1, len(GET)))]], passed)
                seen["sent"] += 1
            except PermissionError:
                seen["refused"] += 1
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
            except OSError:
                pass
            if random.random() < 0.5:
                others.append(connection)
            else:
                connection.close()
        # Only the service still has it open.
        slow.close()
        if len(others) > 500:
            break
    # The attack lasts its full time, even if the service is stuck.
    time.sleep(max(0, until - time.monotonic()))
    return seen


def busy(until: float) -> Seen:
    """Hold as many connections as possible, and send the next request on each as soon as its response arrives."""
    waiting = select.epoll()
    byte_count = 0
    held = {one.fileno(): one for one in (connected(GET) for _number in range(500)) if one}
    for number in held:
        waiting.register(number, select.EPOLLIN)
    while time.monotonic() < until and held:
        for number, _event in waiting.poll(0.1):
            data = pull(held[number])
            if data == b"" or not push(held[number], GET):
                waiting.unregister(number)
                held.pop(number).close()
            byte_count += len(data or b"")
    return {"bytes": byte_count}


def churn(until: float) -> Seen:
    """Open a new connection for each request, from four processes."""
    for _process in range(3):
        if os.fork() == 0:
            break
    count = 0
    while time.monotonic() < until:
        connection = connected(GET)
        if connection is not None:
            connection.setblocking(True)
            connection.settimeout(2)
            with contextlib.suppress(OSError):
                connection.recv(4096)
            connection.close()
            count += 1
    return {"requests": count}


ATTACKS: dict[str, Callable[[float], Seen]] = {
    attack.__name__: attack
    for attack in (
        silence,
        dripping,
        pipelining,
        unread,
        slow_readers,
        bodies,
        streams,
        resuming,
        frames,
        pings,
        changes,
        attributes,
        waits,
        heads,
        endless,
        exits,
        forks,
        queue,
        halves,
        oddities,
        descriptors,
        busy,
        churn,
    )
}


def main() -> None:
    """Run the attack and print what it counted."""
    # PR_SET_PDEATHSIG: a test ends nsenter, which started this process.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # The target is the service. Sharing the processors between containers is a matter of control groups.
    os.nice(10)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    leader = os.getpid()
    seen = ATTACKS[sys.argv[1]](time.monotonic() + float(sys.argv[2]))
    if os.getpid() == leader:
        gather()
        sys.stdout.write(json.dumps(seen))
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
