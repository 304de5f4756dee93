"""A connected socket, as the greenlet that serves it reads and writes it.

Rules: every wait has a deadline unless it says otherwise, and lets other connections proceed. This module knows nothing
of HTTP but where a line ends, because `http.body` reads lines.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

from gevent.hub import get_hub
from greenlet import getcurrent, greenlet

from guestapi.http.errors import ProtocolError
from guestapi.server.scheduler import InstanceQueue

#: How many bytes one read asks for. Only an attack has a larger head.
READ_SIZE = 65536
#: From this size on, in bytes, a body is sent beside its head with sendmsg(2) instead of copied behind it.
_COPY_BELOW = 16384
#: Event type of an io watcher of gevent's loop.
_WRITABLE = 2
#: Seconds after which a deadline that passed while the greenlet was at work is checked again.
_RECHECK_SECONDS = 0.1


class DeadlineError(Exception):
    """A deadline passed while the client was waited for."""


class _Wait(Enum):
    """What the greenlet waits for."""

    NOTHING = "nothing"
    INPUT = "input"
    INPUT_OR_WAKE = "input or wake"
    OUTPUT = "output"
    TURN = "turn"


#: PERF: the members by names of the module, because an enumeration looks its members up slowly (0.1 µs each).
_NOTHING, _INPUT, _INPUT_OR_WAKE, _OUTPUT = _Wait.NOTHING, _Wait.INPUT, _Wait.INPUT_OR_WAKE, _Wait.OUTPUT
_TURN = _Wait.TURN


class LateLooks:
    """Looks at connections at the end of an iteration of the event loop, before the loop waits.

    Most clients close a connection as soon as they have their answer. While others are served in the same iteration,
    they have the time for it. Who has closed by then needs neither a place in an epoll set nor a timer.
    """

    def __init__(self) -> None:
        self._loop = get_hub().loop
        self._due: list[Callable[[], None]] = []

    def add(self, look: Callable[[], None]) -> None:
        """Have `look` called once. It must not raise."""
        if not self._due:
            self._loop.run_callback(self._run)
        self._due.append(look)

    def _run(self) -> None:
        due, self._due = self._due, []
        for look in due:
            look()


class Transport:
    """A socket and the greenlet that serves it.

    It implements `http.body.ByteSource`, `event_stream.StreamPeer` and `sendfile.FilePeer`.

    Attributes:
        received: bytes that were received and not consumed yet. Only methods of this class change it.
        on_backlog: called with the number of bytes that begin to wait for the client, and with the negative number
            when they no longer wait; None if nobody counts them.
        guard: called before anything is sent. It raises ConnectionResetError if it might reach somebody else. None: it
            cannot, as with every Unix socket.
    """

    __slots__ = (
        "_deadline",
        "_greenlet",
        "_hub",
        "_queue",
        "_queued",
        "_send_seconds",
        "_socket",
        "_timer",
        "_wait",
        "_writable",
        "guard",
        "on_backlog",
        "received",
    )

    def __init__(self, sock: socket.SocketType, send_seconds: float) -> None:
        """Take ownership of an accepted socket.

        Args:
            sock: as accepted.
            send_seconds: how long the client has to accept what is sent, unless a method says otherwise.
        """
        sock.setblocking(False)
        self._socket = sock
        self._send_seconds = send_seconds
        self._hub = get_hub()
        self._queue: InstanceQueue | None = None
        self._queued = False
        self._writable: Any = None
        self._timer: Any = None
        self._greenlet: greenlet = getcurrent()
        self._deadline = 0.0
        self._wait: _Wait = _NOTHING
        self.received = b""
        self.on_backlog: Callable[[int], None] | None = None
        self.guard: Callable[[], None] | None = None

    @property
    def attached(self) -> bool:
        """Whether `attach` was called."""
        return self._queue is not None

    def attach(self, queue: InstanceQueue) -> None:
        """Let the calling greenlet serve the socket, scheduled by `queue`."""
        self._greenlet = getcurrent()
        self._queue = queue

    def close(self) -> None:
        """Close the socket."""
        if self._timer is not None:
            self._timer.close()
        if self._queue is not None:
            self._queue.forget(self._socket.fileno())
        if self._writable is not None:
            self._writable.close()
        self._socket.close()

    def abort(self) -> None:
        """Shut the connection down in both directions, whatever its greenlet is doing."""
        self.shut_down(socket.SHUT_RDWR)

    def shut_down(self, how: int) -> None:
        """Call shutdown(2). An error means that the client was quicker, and is ignored."""
        try:
            self._socket.shutdown(how)
        except OSError:
            pass  # The client was quicker.

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return self._socket.fileno()

    @property
    def sock(self) -> socket.SocketType:
        """The socket, to ask the kernel about its peer."""
        return self._socket

    # Receiving.

    def receive(self) -> int:
        """Wait for the client and add what it sends to `received`. Other connections are served first.

        Returns:
            The number of bytes; 0 at the end of the client's input.

        Raises:
            DeadlineError: the client sent nothing in time.
            OSError: the connection is lost.
        """
        # PERF: `_receive` written out. Every request comes through here.
        while True:
            self._wait_for_input(_INPUT)
            try:
                data = self._socket.recv(READ_SIZE)
            except BlockingIOError:
                continue
            self.received += data
            return len(data)

    def receive_late(self, looks: LateLooks) -> int:
        """As `receive`, for a client that is expected to close the connection now. If it has sent more, it waits."""
        self._wait = _TURN
        looks.add(self._look)
        try:
            found: bytes | bool = self._hub.switch()
        finally:
            self._wait = _NOTHING
        if isinstance(found, bool):
            # It has not closed, and was waited for.
            size = self.receive_now()
            return self.receive() if size is None else size
        self.received += found
        if found:
            self.give_way()
        return len(found)

    def receive_now(self) -> int | None:
        """Add what the client has sent to `received`, without waiting.

        Returns:
            The number of bytes; 0 at the end of the client's input; None if there are none yet.
        """
        data = self.read_available(READ_SIZE)
        if data is None:
            return None
        self.received += data
        return len(data)

    def consume(self, size: int) -> None:
        """Remove the first `size` bytes from `received`."""
        self.received = self.received[size:]

    def discard(self) -> bytes:
        """Remove and return all of `received`."""
        data, self.received = self.received, b""
        return data

    def read_available(self, size: int) -> bytes | None:
        """Read at most `size` bytes without waiting; b"" at the end of the input, None if there are none yet."""
        try:
            return self._socket.recv(size)
        except BlockingIOError:
            return None

    def receive_within(self, seconds: float, size: int) -> bytes:
        """Wait at most `seconds` for input and read at most `size` bytes; b"" at its end.

        Raises:
            DeadlineError: the client sent nothing in time.
            OSError: the connection is lost.
        """
        self.set_deadline(seconds)
        return self._receive(size)

    def wait_readable(self) -> bool:
        """Wait for input, or until `wake` is called, without a deadline.

        Returns:
            Whether there is input, as far as was seen: what was not seen ends the next wait.
        """
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self._deadline = 0.0
        return self._wait_for_input(_INPUT_OR_WAKE)

    def wait_for_wake(self) -> None:
        """As `wait_readable`, with a deadline.

        Raises:
            DeadlineError: the deadline passes first.
        """
        self._wait_for_input(_INPUT_OR_WAKE)

    def wake(self) -> None:
        """End `wait_readable` or `wait_for_wake`, if the greenlet is there. Any greenlet may call this."""
        if self._wait is _INPUT_OR_WAKE:
            # Once is enough: the next caller finds it awake.
            self._wait = _INPUT
            assert self._queue is not None
            self._queue.requeue_woken(self._switch_if_waiting)

    def give_way(self) -> None:
        """Let other connections proceed. No deadline counts meanwhile."""
        assert self._queue is not None
        self._queue.requeue(self._greenlet.switch)
        self._hub.switch()

    # Reading a body (`http.body.ByteSource`).

    def peek_line(self, limit: int) -> bytes:
        """Return the next line with its LF, and leave it in place.

        Raises:
            ProtocolError: it is longer than `limit` bytes, or does not come in time.
        """
        while (end := self.received.find(b"\n", 0, limit)) < 0:
            if len(self.received) >= limit:
                raise ProtocolError(400, "a line of the chunked body is too long")
            self._receive_body()
        return self.received[: end + 1]

    def take(self, size: int) -> bytes:
        """Remove and return the next bytes, at least one and at most `size`.

        Raises:
            ProtocolError: they do not come in time.
        """
        if not self.received:
            self._receive_body()
        taken, self.received = self.received[:size], self.received[size:]
        return taken

    def send_interim(self, response: bytes) -> None:
        """Send an interim response, before the deadline of the body."""
        self.send(response, b"", max(0.001, self._deadline - time.monotonic()))

    def _receive_body(self) -> None:
        try:
            size = self.receive()
        except DeadlineError:
            raise ProtocolError(400, "the body did not come in time") from None
        if not size:
            raise ProtocolError(400, "the body is cut short")

    # Sending.

    def send(self, head: bytes, content: bytes = b"", seconds: float | None = None) -> None:
        """Send everything, in one system call if the client keeps up.

        Args:
            head: first bytes.
            content: bytes that follow them.
            seconds: how long the client has to accept them; None for ``send_seconds``.

        Raises:
            DeadlineError: the client did not accept them in time.
            OSError: the connection is lost.
        """
        if self.guard is not None:
            self.guard()
        if len(content) < _COPY_BELOW:
            head += content
            content = b""
        try:
            sent = self._socket.sendmsg([head, content]) if content else self._socket.send(head)
        except BlockingIOError:
            sent = 0
        size = len(head)
        if sent < size + len(content):
            self._send_rest(head[sent:], memoryview(content)[max(0, sent - size) :], seconds or self._send_seconds)

    def send_within(self, seconds: float, data: bytes) -> None:
        """As `send`, with `seconds` to accept `data`."""
        self.send(data, b"", seconds)

    def wait_writable(self) -> None:
        """Wait until the client accepts more, and for a turn to send it.

        Raises:
            DeadlineError: the deadline passes first.
            OSError: the connection is lost.
        """
        if self._writable is None:
            self._writable = self._hub.loop.io(self._socket.fileno(), _WRITABLE)
        self._wait = _OUTPUT
        if self._timer is None:
            self._start_timer(self._deadline - time.monotonic())
        self._writable.start(self._on_writable)
        try:
            self._hub.switch()
        finally:
            self._writable.stop()
            self._wait = _NOTHING
        if self.guard is not None:
            self.guard()

    def _send_rest(self, head: bytes, content: memoryview, seconds: float) -> None:
        size, on_backlog = len(head) + len(content), self.on_backlog
        if on_backlog is not None:
            on_backlog(size)
        try:
            self.set_deadline(seconds)
            for left in (memoryview(head), content):
                while left:
                    self.wait_writable()
                    try:
                        left = left[self._socket.send(left) :]
                    except BlockingIOError:
                        continue
        finally:
            if on_backlog is not None:
                on_backlog(-size)

    # Deadlines.

    def set_deadline(self, seconds: float) -> None:
        """Let waits end `seconds` from now.

        PERF: a timer is started when something is waited for. One that would fire too early is kept, and checks again
        when it fires. On a busy connection this costs one comparison instead of a timer for each request.
        """
        until = time.monotonic() + seconds
        if self._timer is not None and until < self._deadline:
            self._start_timer(seconds)
        self._deadline = until

    def hurry(self, seconds: float) -> None:
        """Move the deadline to `seconds` from now, if it is later. Any greenlet may call this."""
        if time.monotonic() + seconds < self._deadline:
            self.set_deadline(seconds)

    def _start_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.close()
        self._timer = self._hub.loop.timer(max(seconds, 0.0))
        self._timer.start(self._on_timer)

    def _on_timer(self) -> None:
        left = self._deadline - time.monotonic()
        if self._wait is not _NOTHING and self._wait is not _TURN and left <= 0:
            self._greenlet.throw(DeadlineError)
        else:
            # The greenlet does not wait for its client, so it is at work, or others are.
            self._start_timer(max(left, _RECHECK_SECONDS))

    # Waiting.

    def _receive(self, size: int) -> bytes:
        while True:
            self._wait_for_input(_INPUT)
            try:
                return self._socket.recv(size)
            except BlockingIOError:
                continue

    def _wait_for_input(self, wait: _Wait) -> bool:
        """Wait; return whether there is input."""
        self._await_input(wait)
        try:
            has_input: bool = self._hub.switch()
        finally:
            self._wait = _NOTHING
        return has_input

    def _await_input(self, wait: _Wait) -> None:
        """Have `_on_turn` called when there is input, and the timer when the deadline passes."""
        if not self._queued:
            assert self._queue is not None
            self._queue.join(self._socket.fileno(), self._on_turn)
            self._queued = True
        if self._timer is None and self._deadline:
            self._start_timer(self._deadline - time.monotonic())
        self._wait = wait

    def _look(self) -> None:
        """See whether the client of `receive_late` has closed; if not, wait for it."""
        try:
            found = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            self._await_input(_INPUT)
            return
        except OSError:
            found = b""
        self._greenlet.switch(found)

    def _on_turn(self) -> bool:
        """The queue reports input. Return whether it was waited for."""
        if self._wait is _INPUT or self._wait is _INPUT_OR_WAKE:
            self._greenlet.switch(True)
            return True
        self._queued = False
        return False

    def _on_writable(self) -> None:
        """The client accepts more. Copying it into the socket takes time, so it takes a turn like a request."""
        if self._queue is None:
            self._greenlet.switch()
            return
        self._writable.stop()
        self._wait = _TURN
        self._queue.requeue(self._switch_on_turn)

    def _switch_on_turn(self) -> None:
        if self._wait is _TURN:
            self._greenlet.switch()

    def _switch_if_waiting(self) -> None:
        # Otherwise input came meanwhile; or the socket is closed, and the greenlet serves another connection.
        if self._wait is _INPUT or self._wait is _INPUT_OR_WAKE:
            self._greenlet.switch(False)
