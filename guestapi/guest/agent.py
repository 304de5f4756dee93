#!/usr/bin/env python3
"""In a virtual machine: offers the guest API at /dev/incus/sock and /dev/lxd/sock, and forwards to the host over vsock.

One file for Python 3.7 and newer, without other packages: copy it into the machine as /usr/local/sbin/guestapi-agent,
with guestapi-agent.socket and guestapi-agent.service. It forwards bytes and understands none of them. The host does not
see which user of the machine asks, so this program is what keeps users other than root out.
"""

import argparse
import errno
import os
import select
import signal
import socket
import struct
import sys
import time
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

#: The sockets, and the port of the host at which each is answered: the dialect of Incus, and that of LXD.
SOCKETS = {"/dev/incus/sock": 8444, "/dev/lxd/sock": 8445}
#: The host (vsock(7), VMADDR_CID_HOST). It is the same on every host and whatever CID this machine has.
HOST = 2
#: Bytes that wait in each direction of a connection. Who sends more has to wait.
BUFFER = 65536
#: The most connections of root, and of other users, at a time.
MOST, MOST_REFUSED = 1024, 64
#: Seconds for which the host is asked again if it does not answer: longer than a restart of its service.
HOST_SECONDS = 20.0
#: Seconds between two attempts.
PAUSE = 0.1
#: Seconds that one attempt may take.
ATTEMPT_SECONDS = 5.0
#: Seconds that a client has to send the request that is refused, and to read the refusal.
REFUSAL_SECONDS = 3.0
#: Seconds that a client has to close a connection that the host has ended, and that the host has to take what is left
#: of a client that is gone.
END_SECONDS = 30.0
#: struct ucred (unix(7), SO_PEERCRED): pid, uid, gid.
UCRED = struct.Struct("iII")
#: What ends a request's head, and the longest one that is waited for before a refusal.
HEAD_END, LONGEST_HEAD = b"\r\n\r\n", 65536
#: The first descriptor that systemd passes (sd_listen_fds(3)).
FIRST_DESCRIPTOR = 3

#: The refusals, as the host words them.
NOT_ROOT = ("401 Unauthorized", "Access denied for non-root user\n")
NO_HOST = ("500 Internal Server Error", "the host does not answer, try again\n")
TOO_MANY = ("429 Too Many Requests", "too many connections of this instance\n")


def say(text: str) -> None:
    """Write a line to standard error, which is the journal."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def refusal(answer: Tuple[str, str]) -> bytes:
    """A whole response that ends the connection."""
    status, text = answer
    body = text.encode()
    lines = ["HTTP/1.1 " + status, "Content-Type: text/plain; charset=utf-8", "X-Content-Type-Options: nosniff"]
    lines += ["Content-Length: %d" % len(body), "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


class Loop:
    """Waits for sockets and for times."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        #: By descriptor: the socket, what is waited for, and what is called.
        self._wanted: Dict[int, Tuple[socket.socket, int, Callable[[int], None]]] = {}
        self._timers: Dict[object, Tuple[float, Callable[[], None]]] = {}

    def want(self, sock: socket.socket, events: int, call: Callable[[int], None]) -> None:
        """Call `call` with what a socket is ready for, among `events`; 0: nothing is waited for."""
        number = sock.fileno()
        before = self._wanted.get(number)
        if not events:
            if before:
                self._poll.unregister(number)
                del self._wanted[number]
            return
        if not before:
            self._poll.register(number, events)
        elif before[1] != events:
            self._poll.modify(number, events)
        self._wanted[number] = (sock, events, call)

    def at(self, key: object, seconds: Optional[float], call: Callable[[], None]) -> None:
        """Call `call` once in so many seconds, in the place of what was to be called for `key`; None: call nothing."""
        if seconds is None:
            self._timers.pop(key, None)
        else:
            self._timers[key] = (time.monotonic() + seconds, call)

    def run(self) -> None:
        """Wait once, and call what there is to call."""
        timeout = 1.0
        if self._timers:
            timeout = max(0.0, min(timeout, min(when for when, _ in self._timers.values()) - time.monotonic()))
        found = [(self._wanted[number][0], ready) for number, ready in self._poll.poll(timeout)]
        for sock, ready in found:
            # What was called before may have closed it, and its number may be another's.
            wanted = self._wanted.get(sock.fileno())
            if wanted is None or wanted[0] is not sock:
                continue
            if ready & (select.EPOLLHUP | select.EPOLLERR):
                # To read or to write shows why.
                ready |= READ | WRITE | HUP
            if ready & wanted[1]:
                wanted[2](ready & wanted[1])
        now = time.monotonic()
        for name, (when, call) in list(self._timers.items()):
            if when <= now and self._timers.get(name, (0.0, None))[0] == when:
                del self._timers[name]
                call()


#: HUP: the other side is closed, and not only its sending.
READ, WRITE, HUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP


class Flow:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.waiting = b""
        #: The source sends no more; the target was told so; the target takes no more, so what comes is dropped.
        self.ended = self.done = self.dropping = False

    def pull(self) -> None:
        """Take what the source has."""
        try:
            data = self.source.recv(BUFFER - len(self.waiting))
        except BlockingIOError:
            return
        except OSError:
            # A reset is an end, too: what came before it goes to the target.
            data = b""
        if not data:
            self.ended = True
        elif not self.dropping:
            self.waiting += data

    def push(self) -> None:
        """Give the target what it takes."""
        if self.waiting:
            try:
                sent = self.target.send(self.waiting)
            except BlockingIOError:
                return
            except OSError:
                # It may have sent an answer before it was closed, so the other direction goes on.
                self.dropping = True
                sent = len(self.waiting)
            self.waiting = self.waiting[sent:]
        if self.ended and not self.waiting and not self.done:
            self.done = True
            try:
                self.target.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # It is gone.

    def leave(self) -> None:
        """Carry nothing any more: the target is gone."""
        self.ended = self.done = True
        self.waiting = b""

    @property
    def reads(self) -> bool:
        """Whether more of the source can be taken."""
        return not self.ended and len(self.waiting) < BUFFER


class ForwardedConnection:
    """A connection of root: forwarded to the host in both directions, each with an end of its own."""

    def __init__(self, agent: "Agent", client: socket.socket, port: int) -> None:
        self._agent, self._client, self._port = agent, client, port
        self._until = time.monotonic() + agent.host_seconds
        self._host: Optional[socket.socket] = None
        self._flows: List[Flow] = []
        #: One side has ended, so the rest has a time limit; and the client has closed its connection.
        self._ending = self._gone = False
        # What a client has sent that does not wait for the host is dropped.
        agent.loop.want(client, HUP, lambda _events: self.close())

    def dial(self) -> None:
        """Connect to the host, without waiting for it."""
        try:
            self._host = self._agent.open_host()
            code = self._host.connect_ex(self._agent.host_address(self._port))
        except OSError as error:
            code = error.errno or errno.EIO
        if code == 0:
            self._begin()
        elif code in (errno.EINPROGRESS, errno.EAGAIN) and self._host is not None:
            self._agent.loop.want(self._host, WRITE, self._on_dialled)
            self._agent.loop.at(self, ATTEMPT_SECONDS, self._on_failure)
        else:
            self._on_failure()

    def _on_dialled(self, _events: int) -> None:
        assert self._host is not None
        if self._host.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._on_failure()
        else:
            self._begin()

    def _on_failure(self) -> None:
        """The host did not answer this time."""
        if self._host is not None:
            self._agent.loop.want(self._host, 0, self._on_dialled)
            self._host.close()
            self._host = None
        if time.monotonic() < self._until:
            self._agent.loop.at(self, PAUSE, self.dial)
            return
        self._agent.forget(self)
        self._agent.loop.want(self._client, 0, self._on_client)
        self._agent.refuse(self._client, NO_HOST)

    def _begin(self) -> None:
        assert self._host is not None
        loop = self._agent.loop
        loop.at(self, None, self.dial)
        loop.want(self._host, 0, self._on_dialled)
        self._flows = [Flow(self._client, self._host), Flow(self._host, self._client)]
        self._update()

    def _on_client(self, events: int) -> None:
        if events & HUP:
            # What it has sent goes to the host; nobody reads the answer.
            self._gone = True
            self._flows[1].leave()
        self._move(self._flows[0], self._flows[1], events)

    def _on_host(self, events: int) -> None:
        self._move(self._flows[1], self._flows[0], events)

    def _move(self, incoming: Flow, outgoing: Flow, events: int) -> None:
        """A socket is ready: `incoming` is what comes from it, `outgoing` what goes to it."""
        if events & READ and incoming.reads:
            incoming.pull()
            incoming.push()
        if events & WRITE:
            outgoing.push()
        self._update()

    def _update(self) -> None:
        assert self._host is not None
        to_host, to_client = self._flows
        if to_host.done and to_client.done:
            self.close()
            return
        loop = self._agent.loop
        if to_client.done and not self._ending:
            # The host has closed it, or does not send any more: which of both cannot be seen. Or the client is gone.
            self._ending = True
            loop.at(self, END_SECONDS, self.close)
        client = (READ if to_host.reads else 0) | (WRITE if to_client.waiting else 0) | (0 if self._gone else HUP)
        host = (READ if to_client.reads else 0) | (WRITE if to_host.waiting else 0)
        loop.want(self._client, client, self._on_client)
        loop.want(self._host, host, self._on_host)

    def close(self) -> None:
        """End both sides."""
        loop = self._agent.loop
        loop.at(self, None, self.dial)
        for sock, call in ((self._client, self._on_client), (self._host, self._on_host)):
            if sock is not None:
                loop.want(sock, 0, call)
                sock.close()
        self._agent.forget(self)


class RefusedConnection:
    """A connection that gets one response, when its request is here."""

    def __init__(self, agent: "Agent", client: socket.socket, answer: Tuple[str, str]) -> None:
        self._agent, self._client, self._answer = agent, client, answer
        self._received = b""
        self._sent = False
        agent.loop.want(client, READ, self._on_input)
        agent.loop.at(self, REFUSAL_SECONDS, self._send)

    def _on_input(self, _events: int) -> None:
        try:
            data = self._client.recv(BUFFER)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not data:
            if not self._sent and self._received:
                self._send()
            self.close()
        elif not self._sent:
            # The end may be divided between two reads.
            self._received = (self._received + data)[-LONGEST_HEAD:]
            if HEAD_END in self._received or len(self._received) >= LONGEST_HEAD:
                self._send()

    def _send(self) -> None:
        """Send the response. What the client sends after it is read and dropped, so that it can read the response."""
        self._sent = True
        self._received = b""
        self._agent.loop.at(self, REFUSAL_SECONDS, self.close)
        try:
            self._client.send(refusal(self._answer))
            self._client.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def close(self) -> None:
        """End it."""
        self._agent.loop.at(self, None, self.close)
        self._agent.loop.want(self._client, 0, self._on_input)
        self._client.close()
        self._agent.forget(self)


class Agent:
    """Accepts connections, and forwards those of root.

    Attributes:
        loop: waits.
        host_seconds: for how long the host is asked again.
    """

    def __init__(self, listening: List[Tuple[socket.socket, int]], host_seconds: float = HOST_SECONDS) -> None:
        self.loop = Loop()
        self.host_seconds = host_seconds
        self._listening = listening
        self._connections: Dict[object, None] = {}
        self._refused: Dict[object, None] = {}
        self._resume()

    def open_host(self) -> socket.socket:
        """A socket for the host that does not block."""
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        sock.setblocking(False)
        return sock

    def host_address(self, port: int) -> Any:
        """Where the host answers."""
        return (HOST, port)

    @property
    def is_full(self) -> bool:
        """Whether there are as many refused connections as there may be."""
        return len(self._refused) >= MOST_REFUSED

    def forget(self, connection: object) -> None:
        """A connection has ended."""
        self._connections.pop(connection, None)
        self._refused.pop(connection, None)

    def refuse(self, client: socket.socket, answer: Tuple[str, str]) -> None:
        """Refuse a connection. When there are very many, the oldest of these ends without an answer."""
        if self.is_full:
            oldest = next(iter(self._refused))
            assert isinstance(oldest, RefusedConnection)
            oldest.close()
        self._refused[RefusedConnection(self, client, answer)] = None

    def _resume(self) -> None:
        for sock, port in self._listening:
            self.loop.want(sock, READ, partial(self._accept, sock, port))

    def _accept(self, sock: socket.socket, port: int, _events: int) -> None:
        try:
            client, _address = sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            say("cannot accept: %s" % error.strerror)
            for one, _port in self._listening:
                self.loop.want(one, 0, lambda _events: None)
            self.loop.at("accept", PAUSE, self._resume)
            return
        client.setblocking(False)
        _pid, uid, _gid = UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
        if uid != 0:
            self.refuse(client, NOT_ROOT)
        elif len(self._connections) >= MOST:
            self.refuse(client, TOO_MANY)
        else:
            connection = ForwardedConnection(self, client, port)
            self._connections[connection] = None
            connection.dial()

    def run(self, stopped: Callable[[], bool]) -> None:
        """Forward until `stopped`, which is asked at least once a second."""
        while not stopped():
            self.loop.run()


def activated() -> List[socket.socket]:
    """The sockets that systemd has passed (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    return [socket.socket(fileno=number) for number in range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + count)]


def bind(path: str) -> socket.socket:
    """Make a socket to which every user may connect."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    os.chmod(path, 0o666)
    sock.listen(1024)
    return sock


def main(words: Optional[List[str]] = None) -> int:
    """Read the command line, and forward until told to stop; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="guestapi-agent",
        description="Forwards /dev/incus/sock and /dev/lxd/sock of this virtual machine to its host, over vsock.",
    )
    parser.add_argument(
        "--listen", action="append", metavar="PATH=PORT", help="instead of the usual sockets; may be repeated"
    )
    given = parser.parse_args(words)
    ports = SOCKETS
    if given.listen:
        ports = {}
        for word in given.listen:
            path, equals, port = word.rpartition("=")
            if not equals or not port.isdigit() or not path.startswith("/"):
                parser.error("--listen %s: PATH=PORT is needed, like /dev/incus/sock=8444" % word)
            ports[path] = int(port)
    try:
        # From systemd, each has the port of its path.
        sockets = activated() or [bind(path) for path in ports]
    except OSError as error:
        say("guestapi-agent: cannot listen: %s" % error)
        return 1
    listening = []
    for sock in sockets:
        sock.setblocking(False)
        listening.append((sock, ports.get(sock.getsockname(), SOCKETS["/dev/incus/sock"])))
    stopping = []  # type: List[int]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stopping.append(received))
    Agent(listening).run(lambda: bool(stopping))
    return 0


if __name__ == "__main__":
    sys.exit(main())
