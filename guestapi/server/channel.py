"""A connected socket, as a greenlet reads and writes it: others have their turn, and every wait has a deadline.

This file knows no HTTP but where lines end, for `body.Source`.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any

from gevent.hub import get_hub
from greenlet import getcurrent

from guestapi.http.errors import ProtocolError
from guestapi.server.stream import LateError
from guestapi.server.turns import LARGE, Turns

if TYPE_CHECKING:
    from greenlet import greenlet

#: Bytes a read asks for. More than any head that is not an attack.
READ = 65536
#: From this size on a body is sent beside its head (sendmsg), not copied behind it.
_COPY = 16384
#: Event type of a gevent loop's io watcher.
_WRITABLE = 2


class Channel:
    """A socket and the greenlet that has it (`body.Source`, `stream.Peer`, `transfer.Peer`)."""

    __slots__ = (
        "_buffer",
        "_deadline",
        "_greenlet",
        "_hub",
        "_joined",
        "_reading",
        "_send_seconds",
        "_socket",
        "_timer",
        "_turns",
        "_waiting",
        "_wakeable",
        "_writable",
    )

    def __init__(self, sock: socket.SocketType, send_seconds: float) -> None:
        """Args:
        sock: as accepted; belongs to this object from now on.
        send_seconds: until the client must have taken what is sent to it, unless something else is said.
        """
        sock.setblocking(False)
        self._socket = sock
        self._send_seconds = send_seconds
        self._hub = get_hub()
        self._turns: Turns | None = None
        self._joined = False
        self._writable: Any = None
        self._timer: Any = None
        self._greenlet: greenlet = getcurrent()
        self._buffer = b""
        self._deadline = 0.0
        self._waiting = self._reading = False
        self._wakeable = False

    def attach(self, turns: Turns) -> None:
        """The calling greenlet has the socket from now on, and takes its turns from these."""
        self._greenlet = getcurrent()
        self._turns = turns

    def close(self) -> None:
        """Away with it."""
        if self._timer is not None:
            self._timer.close()
        if self._turns is not None:
            self._turns.forget(self._socket.fileno())
        if self._writable is not None:
            self._writable.close()
        self._socket.close()

    def abort(self) -> None:
        """The worker's time is up."""
        self.shut_down(socket.SHUT_RDWR)

    def shut_down(self, how: int) -> None:
        """shutdown(2), as far as the client has left something to shut."""
        try:
            self._socket.shutdown(how)
        except OSError:
            pass  # The client was quicker.

    # What `transfer.Peer` and `stream.Peer` ask for.

    def fileno(self) -> int:
        """The socket."""
        return self._socket.fileno()

    def wait_writable(self) -> None:
        """Give way to others until the client can take more; raises LateError when the deadline passes first."""
        if self._writable is None:
            self._writable = self._hub.loop.io(self._socket.fileno(), _WRITABLE)
        self._wait(self._writable)

    def send_within(self, seconds: float, data: bytes) -> None:
        """Send all; raises LateError if the client does not take it in time, and OSError if it is gone."""
        self._send(data, b"", seconds)

    def wait_readable(self) -> None:
        """Wait until the client has sent something, or `wake` is called, without a deadline."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self._wakeable = True
        try:
            self._wait_turn()
        finally:
            self._wakeable = False

    def wake(self) -> None:
        """End `wait_readable`, if that is what the connection is doing; may be called from any greenlet."""
        if self._wakeable:
            # Once: whoever calls next finds it awake.
            self._wakeable = False
            self._hub.loop.run_callback(self._come)

    def read_available(self, size: int) -> bytes | None:
        """What the client has sent, at most `size` bytes; b"" at its end, None if there is nothing."""
        try:
            return self._socket.recv(size)
        except BlockingIOError:
            return None

    def hurry(self, seconds: float) -> None:
        """Let what is being waited for come within so long, or not at all; may be called from any greenlet."""
        if time.monotonic() + seconds < self._deadline:
            self.set_deadline(seconds)

    def give_way(self, size: int = 0) -> None:
        """Let others have their turn before so many bytes are looked at; no deadline counts meanwhile."""
        assert self._turns is not None
        self._turns.again(self._greenlet.switch, size)
        self._hub.switch()

    def receive_within(self, seconds: float, size: int) -> bytes:
        """What the client sends next, at most `size` bytes, b"" at its end; raises LateError if it does not in time."""
        self.set_deadline(seconds)
        return self._receive(size)

    # What `body.Source` asks for.

    def peek_line(self, limit: int) -> bytes:
        """The next line, left in place."""
        while (end := self._buffer.find(b"\n", 0, limit)) < 0:
            if len(self._buffer) >= limit:
                raise ProtocolError(400, "a line of the chunked body is too long")
            self._buffer += self._receive_body()
        return self._buffer[: end + 1]

    def take(self, size: int) -> bytes:
        """The next bytes of the body."""
        if not self._buffer:
            self._buffer = self._receive_body()
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def send_interim(self, response: bytes) -> None:
        """Send an interim response, within the time that the body has."""
        self._send(response, b"", max(0.001, self._deadline - time.monotonic()))

    def _receive_body(self) -> bytes:
        try:
            data = self._receive_fairly()
        except LateError:
            raise ProtocolError(400, "the body did not come in time") from None
        if not data:
            raise ProtocolError(400, "the body is cut short")
        return data

    # Waiting.

    def _receive(self, size: int = READ) -> bytes:
        """What the client sends next, b"" at its end. Others have their turn first."""
        while True:
            self._wait_turn()
            try:
                return self._socket.recv(size)
            except BlockingIOError:
                continue

    def _receive_fairly(self) -> bytes:
        """As `_receive`; whoever sends so much at a time that it takes long to look at waits for another turn."""
        data = self._receive()
        if len(data) >= LARGE:
            self.give_way(len(data))
        return data

    def _send(self, head: bytes, content: bytes, seconds: float | None = None) -> None:
        """Send all, in one call if the client keeps up; within so many seconds, or those that an answer may take."""
        if len(content) < _COPY:
            head += content
            content = b""
        try:
            sent = self._socket.sendmsg([head, content]) if content else self._socket.send(head)
        except BlockingIOError:
            sent = 0
        size = len(head)
        if sent < size + len(content):
            self._send_rest(head[sent:], memoryview(content)[max(0, sent - size) :], seconds or self._send_seconds)

    def _send_rest(self, head: bytes, content: memoryview, seconds: float) -> None:
        self.set_deadline(seconds)
        for left in (memoryview(head), content):
            while left:
                self.wait_writable()
                try:
                    left = left[self._socket.send(left) :]
                except BlockingIOError:
                    continue

    def _wait_turn(self) -> None:
        """Give way until the client has sent something and it is this connection's turn; raises LateError."""
        if not self._joined:
            assert self._turns is not None
            self._turns.join(self._socket.fileno(), self._resume)
            self._joined = True
        self._waiting = self._reading = True
        try:
            self._hub.switch()
        finally:
            self._waiting = self._reading = False

    def _resume(self) -> bool:
        if self._reading:
            self._greenlet.switch()
            return True
        self._joined = False
        return False

    def _come(self) -> None:
        # Otherwise it has come by itself meanwhile; or it is closed, and its greenlet serves another connection.
        if self._reading:
            self._greenlet.switch()

    def _wait(self, watcher: Any) -> None:
        """Give way to the event loop until `watcher` fires; raises LateError when the deadline passes first."""
        self._waiting = True
        watcher.start(self._greenlet.switch)
        try:
            self._hub.switch()
        finally:
            watcher.stop()
            self._waiting = False

    def set_deadline(self, seconds: float) -> None:
        """Let waits end `seconds` from now.

        PERF: the timer is left alone where it would go off too early, and looks again then: on a busy connection this
        costs one comparison, not a timer for each request.
        """
        now = time.monotonic()
        sooner = now + seconds < self._deadline
        self._deadline = now + seconds
        if self._timer is None or sooner:
            self._arm(seconds)

    def _arm(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.close()
        self._timer = self._hub.loop.timer(seconds)
        self._timer.start(self._on_timer)

    def _on_timer(self) -> None:
        left = self._deadline - time.monotonic()
        if self._waiting and left <= 0:
            self._greenlet.throw(LateError)
        else:
            # Not waiting means at work: look again a little later.
            self._arm(max(left, 0.1))
