"""One connection, from accept to close: read a head, call the application, send the answer, and again.

Fair: before every read a connection waits its turn in the event loop, even if it knows that there is more to read, so
nobody is served twice while others are not served once. Bounded: every wait has a deadline.
"""

from __future__ import annotations

import io
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import gevent
from gevent.hub import get_hub
from gevent.threadpool import ThreadPool
from greenlet import getcurrent

from guestapi.api.content import ChangedFileError, Content
from guestapi.api.handover import HANDOVER, Handover
from guestapi.callers.identify import Caller, Identifier
from guestapi.model import Instance
from guestapi.notifications.events import Form
from guestapi.server.body import Body
from guestapi.server.http import Environ, Head, ProtocolError, ends_head, error_response, parse_head, response_head
from guestapi.server.stream import GOING_AWAY, LateError, Pings, Stream
from guestapi.server.transfer import DISK_THREADS, send_content
from guestapi.settings import Limits
from guestapi.store.schema import StoreError

if TYPE_CHECKING:
    from greenlet import greenlet

log = logging.getLogger(__name__)

#: Bytes a read asks for. More than any head that is not an attack.
_READ = 65536
#: From this size on a body is sent beside its head (sendmsg), not copied behind it.
_COPY = 16384
#: Event types of a gevent loop's io watcher.
_READABLE, _WRITABLE = 1, 2

#: How long, and how often, more is read from a client that is being refused (Go's net/http: 500 ms).
_LINGER_SECONDS, _LINGER_READS = 0.5, 32

_NOTHING = io.BytesIO()


class Service:
    """What all connections of a worker share. `worker.GuestWorker` makes one."""

    def __init__(
        self,
        application: Callable[..., Iterable[bytes]],
        identifier: Identifier,
        limits: Limits,
        answered: Callable[[Answer], None],
        refused: Callable[[Caller | None, str, int, str], None],
        *,
        multiprocess: bool,
    ) -> None:
        """Args:
        application: the WSGI application.
        identifier: who is at the other end of a socket.
        limits: sizes and times.
        answered: called after each response of the application.
        refused: called with caller, dialect, status and text of what the server itself refuses.
        multiprocess: there are other workers (``wsgi.multiprocess``).
        """
        self.application = application
        self.identifier = identifier
        self.limits = limits
        self.answered = answered
        self.refused = refused
        self.connections: set[Connection] = set()
        self.pings = Pings()
        self.disk = ThreadPool(DISK_THREADS)
        self.stopping = False
        self._held: dict[int | None, int] = {}
        self.environ = {
            "wsgi.version": (1, 0),
            "wsgi.multithread": True,
            "wsgi.multiprocess": multiprocess,
            "wsgi.run_once": False,
            "wsgi.errors": sys.stderr,
            "SCRIPT_NAME": "",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "0",
            "REMOTE_ADDR": "",
        }

    def enter(self, instance_id: int | None) -> bool:
        """Count a connection of an instance, or of all unknown callers together; False if it has too many."""
        held = self._held.get(instance_id, 0)
        if held >= self.limits.connections_per_instance:
            return False
        self._held[instance_id] = held + 1
        return True

    def leave(self, instance_id: int | None) -> None:
        """The opposite of `enter`."""
        left = self._held[instance_id] - 1
        if left:
            self._held[instance_id] = left
        else:
            del self._held[instance_id]


class Answer:
    """What became of a request: for the logs and for gunicorn's hooks, which know such an object as ``resp``."""

    __slots__ = ("caller", "dialect", "environ", "headers", "seconds", "sent", "status")

    def __init__(
        self,
        environ: Environ,
        caller: Caller,
        dialect: str,
        status: str,
        headers: list[tuple[str, str]],
        sent: int,
        seconds: float,
    ) -> None:
        self.environ = environ
        self.caller = caller
        self.dialect = dialect
        self.status = status
        self.headers = headers
        self.sent = sent
        self.seconds = seconds

    @property
    def instance(self) -> Instance | None:
        """The instance that was admitted, if one was."""
        return self.environ.get("guestapi.instance")


class Connection:
    """A connected socket and the greenlet that serves it."""

    def __init__(self, service: Service, sock: socket.socket, dialect: str, *, own: bool = False) -> None:
        """Args:
        service: the worker's.
        sock: as accepted; belongs to this object from now on.
        dialect: of the listening socket.
        own: the worker itself is at the other end, to see whether it answers: no guest's limit is its own.
        """
        self._own = own
        sock.setblocking(False)
        self._service = service
        self._socket = sock
        self._dialect = dialect
        self._hub = get_hub()
        self._readable = self._hub.loop.io(sock.fileno(), _READABLE)
        self._writable: Any = None
        self._timer: Any = None
        self._greenlet: greenlet | None = None
        self._buffer = b""
        self._deadline = 0.0
        self._waiting = False
        self._wakeable = False
        self._in_head = False
        self._caller: Caller | None = None
        self._stream: Stream | None = None

    def start(self) -> None:
        """Serve the connection in a greenlet of its own."""
        self._service.connections.add(self)
        gevent.spawn_raw(self._run)

    def finish(self, *, after_last_requests: bool) -> None:
        """The worker stops: a stream ends at once.

        A connection on which no whole request has come is left alone as long as clients may send their last one. After
        that, what may have arrived already is taken, and no more: who sends later gets EPIPE, so knows that it was
        not even read.
        """
        if self._stream is not None:
            self._stream.close(GOING_AWAY)
        elif self._in_head and after_last_requests:
            self._shut_down(socket.SHUT_RD)

    def abort(self) -> None:
        """The worker's time is up."""
        self._shut_down(socket.SHUT_RDWR)

    def _shut_down(self, how: int) -> None:
        try:
            self._socket.shutdown(how)
        except OSError:
            pass  # The client was quicker.

    def _run(self) -> None:
        self._greenlet = getcurrent()
        try:
            self._caller = caller = self._service.identifier.identify(self._socket)
            if self._own:
                self._serve(caller)
            elif self._service.enter(caller.instance_id):
                try:
                    self._serve(caller)
                finally:
                    self._service.leave(caller.instance_id)
            elif caller.instance_id is None:
                # As any unknown caller: one that will be known in a moment tries again on 500, and only on that.
                self._refuse(500, "pid not in container?")
            else:
                self._refuse(429, "too many connections of this instance", [("Retry-After", "1")])
        except LateError:
            pass  # Nothing to say: a client that is slow in asking is not waiting for an answer.
        except OSError as error:
            log.debug("connection lost: %s", error)
        except StoreError as error:
            log.error("%s", error)
            self._refuse(500, "temporarily unavailable, try again")
        except Exception:
            log.exception("unexpected error on a connection")
        finally:
            self._close()

    def _close(self) -> None:
        self._service.connections.discard(self)
        if self._timer is not None:
            self._timer.close()
        self._readable.close()
        if self._writable is not None:
            self._writable.close()
        self._socket.close()

    def _serve(self, caller: Caller) -> None:
        service = self._service
        confirmed = False
        self.set_deadline(service.limits.head_seconds)
        while True:
            try:
                head = self._read_head()
                if head is None:
                    return
                if not confirmed:
                    self._caller = caller = service.identifier.confirm(self._socket, caller)
                    confirmed = True
                answered = self._respond(head, caller)
            except ProtocolError as error:
                self._refuse(error.status, str(error))
                return
            if isinstance(answered, Handover):
                # Nothing of the request is kept for as long as the stream lasts.
                del head
                self._be_stream(answered)
                return
            if not answered:
                return
            self.set_deadline(service.limits.idle_seconds)

    def _read_head(self) -> Head | None:
        """The next request's head; None if the client has no more."""
        limits = self._service.limits
        self._in_head = True
        if self._buffer:
            # A pipelined request waits its turn as if it came only now.
            gevent.sleep(0)
        else:
            self._buffer = self._receive()
        head = parse_head(self._buffer, limits)
        if head is None:
            if not self._buffer:
                return None
            # The first bytes are there and the rest is not: from here on, time runs for the head.
            self.set_deadline(limits.head_seconds)
            while head is None:
                seen = len(self._buffer)
                more = self._receive()
                if not more:
                    return None
                self._buffer += more
                # Look at it again only when it may be complete, or it is read as often as it has bytes.
                if ends_head(self._buffer, seen) or len(self._buffer) > min(limits.head, limits.request_line):
                    head = parse_head(self._buffer, limits)
        self._buffer = self._buffer[head.size :]
        self._in_head = False
        return head

    def _be_stream(self, handover: Handover) -> None:
        early, self._buffer = self._buffer, b""
        self._stream = Stream(self, handover, self._service.pings, self._service.limits.stream_send_seconds)
        try:
            if not (early and handover.form is Form.WEBSOCKET):
                self._stream.run()
            # RFC 6455, section 4.1: a client sends no frame before it has the answer. As Incus, end without a word.
        finally:
            handover.listener.leave()

    def _respond(self, head: Head, caller: Caller) -> bool | Handover:
        """Answer one request; whether another may follow. Or what the connection is handed over to."""
        service = self._service
        began = time.monotonic()
        environ = head.environ
        environ.update(service.environ)
        environ["guestapi.caller"] = caller
        environ["guestapi.dialect"] = self._dialect
        body: Body | None = None
        if head.length == 0:
            environ["wsgi.input"] = _NOTHING
        else:
            if head.length is not None and head.length > service.limits.body:
                raise ProtocolError(413, f"the body is larger than {service.limits.body} bytes")
            self.set_deadline(service.limits.body_seconds)
            environ["wsgi.input"] = body = Body(self, head.length, service.limits.body, head.expects)
        status, headers = "200 OK", [("Content-Length", "0")]
        content: bytes | Content = b""
        if environ["RAW_PATH"] != "*":
            status, headers, content = self._call(environ)
        try:
            return self._answer(head, caller, body, status, headers, content, began)
        finally:
            if isinstance(content, Content):
                content.close()

    def _answer(
        self,
        head: Head,
        caller: Caller,
        body: Body | None,
        status: str,
        headers: list[tuple[str, str]],
        content: bytes | Content,
        began: float,
    ) -> bool | Handover:
        """Send what the application said, once the request's body is done with; returns as `_respond`."""
        service, environ = self._service, head.environ
        if (handover := environ.pop(HANDOVER, None)) is not None:
            answer = Answer(environ, caller, self._dialect, handover.status, [], 0, time.monotonic() - began)
            service.answered(answer)
            return handover  # type: ignore[no-any-return]
        # CONNECT would make a tunnel of the connection (RFC 9110, section 9.3.6): whatever follows is no request.
        close = not head.keep_alive or service.stopping or environ["REQUEST_METHOD"] == "CONNECT"
        if body is not None:
            if body.failure is not None:
                # The application has seen only a part of it, so its answer is none.
                raise body.failure
            close = close or not self._pass_over(body)
        prefix = response_head(status, headers, protocol=environ["SERVER_PROTOCOL"], close=close)
        if isinstance(content, Content):
            self._send_content(prefix, content)
            sent = content.length
        else:
            self._send(prefix, content)
            sent = len(content)
        answer = Answer(environ, caller, self._dialect, status, headers, sent, time.monotonic() - began)
        service.answered(answer)
        return not close

    def _pass_over(self, body: Body) -> bool:
        """Read what the application has left of a body; whether a request may follow it."""
        if body.untouched:
            return False
        try:
            body.drain()
        except ProtocolError:
            # The answer did not depend on it.
            return False
        return True

    def _call(self, environ: Environ) -> tuple[str, list[tuple[str, str]], bytes | Content]:
        """What the application says, all of it: nothing is sent before it is known to be whole, or its length is."""
        started: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], _exc_info: object = None) -> None:
            started[:] = status, headers

        chunks = self._service.application(environ, start_response)
        if isinstance(chunks, Content):
            return started[0], started[1], chunks
        content = chunks[0] if isinstance(chunks, list) and len(chunks) == 1 else b"".join(chunks)
        return started[0], started[1], content

    def _send_content(self, prefix: bytes, content: Content) -> None:
        """Send what has files in it; each time that the client takes some of it, it has ``send_seconds`` again."""
        seconds = self._service.limits.send_seconds
        self._send(prefix, b"")
        try:
            send_content(self, content, seconds, self._service.disk.apply)
        except ChangedFileError as error:
            # The head is sent. That the end is missing tells the client that it has nothing.
            log.error("%s", error)
            raise

    def _refuse(self, status: int, text: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Answer what cannot be served; the connection ends after it."""
        self._service.refused(self._caller, self._dialect, status, text)
        try:
            self._send(error_response(status, text, headers), b"")
            # The client may be sending still, and must not find the socket closed, or closed with unread bytes in it,
            # before it has seen the answer: read on to its end, but not for long.
            self._shut_down(socket.SHUT_WR)
            self.set_deadline(_LINGER_SECONDS)
            for _read in range(_LINGER_READS):
                if not self._receive():
                    break
        except (OSError, LateError):
            pass  # It does not wait for the answer.

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
            self._wait(self._readable)
        finally:
            self._wakeable = False

    def wake(self) -> None:
        """End `wait_readable`, if that is what the connection is doing; may be called from any greenlet."""
        if self._wakeable:
            # Once: whoever calls next finds it awake.
            self._wakeable = False
            self._hub.loop.run_callback(self._greenlet.switch)  # type: ignore[union-attr]

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

    def give_way(self) -> None:
        """Let others have their turn."""
        gevent.sleep(0)

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

    def say(self, response: bytes) -> None:
        """Send an interim response, within the time that the body has."""
        self._send(response, b"", max(0.001, self._deadline - time.monotonic()))

    def _receive_body(self) -> bytes:
        try:
            data = self._receive()
        except LateError:
            raise ProtocolError(400, "the body did not come in time") from None
        if not data:
            raise ProtocolError(400, "the body is cut short")
        return data

    # Waiting.

    def _receive(self, size: int = _READ) -> bytes:
        """What the client sends next, b"" at its end. Others have their turn first."""
        while True:
            self._wait(self._readable)
            try:
                return self._socket.recv(size)
            except BlockingIOError:
                continue

    def _send(self, head: bytes, content: bytes, seconds: float | None = None) -> None:
        """Send all, in one call if the client keeps up; within so many seconds, or those that an answer may take."""
        try:
            if len(content) < _COPY:
                head += content
                sent = self._socket.send(head)
            else:
                sent = self._socket.sendmsg([head, content])
                if sent < len(head) + len(content):
                    head += content
        except BlockingIOError:
            sent = 0
            head += content if len(content) >= _COPY else b""
        if sent < len(head):
            self._send_rest(memoryview(head)[sent:], seconds or self._service.limits.send_seconds)

    def _send_rest(self, left: memoryview, seconds: float) -> None:
        self.set_deadline(seconds)
        while left:
            self.wait_writable()
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                continue

    def _wait(self, watcher: Any) -> None:
        """Give way to the event loop until `watcher` fires; raises LateError when the deadline passes first."""
        self._waiting = True
        watcher.start(self._greenlet.switch)  # type: ignore[union-attr]
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
            self._greenlet.throw(LateError)  # type: ignore[union-attr]
        else:
            # Not waiting means at work: look again a little later.
            self._arm(max(left, 0.1))
