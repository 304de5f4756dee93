"""The doorbell of a follower: a Unix socket at which the hooks of one runtime ring (`guestapi.sources.hook` says how).

Rules: only root may ring, and a ring is bounded in bytes and in seconds. A ring that is incomplete, malformed or too
long gets one sentence as its answer and in the journal. Nothing here blocks: the follower's loop calls when a socket
is readable, and no hook waits for another.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from selectors import EVENT_READ, BaseSelector

from guestapi.callers.credentials import credentials
from guestapi.errors import SourceError
from guestapi.sources.hook import STATE_BYTES

log = logging.getLogger(__name__)

#: Most hooks that wait to be accepted, and most accepted ones that wait for their answers.
_BACKLOG, CONNECTIONS = 4096, 1024
#: Most bytes of a ring: a state on standard input, and some variables.
RING_BYTES = STATE_BYTES + (1 << 16)
#: Seconds until a ring must be complete. The hook itself gives up after two.
RING_SECONDS = 3.0
_READ = 1 << 16
#: Most bytes of an answer, so that one send and one read are enough.
_ANSWER_BYTES = 2048


class RingError(SourceError):
    """The bytes that were received are not a ring."""


@dataclass(frozen=True, slots=True)
class Ring:
    """The content of a ring.

    Attributes:
        source: the runtime, like ``lxc``.
        arguments: the hook's arguments.
        environ: the variables of the hook's environment that this source uses.
        state: the hook's standard input; empty for runtimes that write nothing there.
        hostname: the host name that the runtime has set inside, if the hook could read it.
    """

    source: str
    arguments: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    state: bytes = b""
    hostname: str | None = None


def parse(data: bytes) -> Ring:
    """Parse a ring.

    Raises:
        RingError: the bytes are incomplete, or no ring.
    """
    if not data.endswith(b"\0\0"):
        raise RingError(f"a ring of {len(data)} bytes was cut off in the middle")
    fields = data[:-2].split(b"\0")
    if len(fields) < 2 or fields[0] != b"1":
        raise RingError("what was rung is not of version 1", "use the hook of the installed guestapi")
    arguments, environ, state, hostname = [], {}, b"", None
    for one in fields[2:]:
        kind, value = one[:1], one[1:]
        if kind == b"a":
            arguments.append(os.fsdecode(value))
        elif kind == b"e":
            name, _equals, text = os.fsdecode(value).partition("=")
            environ[name] = text
        elif kind == b"h":
            hostname = value.decode(errors="replace")
        elif kind == b"i":
            state = value
        else:
            raise RingError("what was rung has a field of no known kind")
    return Ring(os.fsdecode(fields[1]), tuple(arguments), environ, state, hostname)


class DoorbellCaller:
    """A connected hook, which waits for its answer."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.since = time.monotonic()
        self.data = bytearray()

    def fileno(self) -> int:
        """For select and its like."""
        return self._connection.fileno()

    def receive(self) -> bytes | None:
        """Read what is there; None: nothing yet. Empty: the hook has sent everything."""
        try:
            return self._connection.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return None

    def answer(self, refused: str | None = None) -> None:
        """Answer the hook, which then ends.

        Args:
            refused: one sentence why the container was not registered; None: it was.
        """
        text = "ok" if refused is None else "no " + " ".join(refused.split())
        try:
            self._connection.send(text.encode(errors="replace")[:_ANSWER_BYTES] + b"\n")
        except OSError:
            pass  # It has given up.
        self._connection.close()


class DoorbellServer:
    """Listens for hooks, with the selector of the follower's loop; the ``data`` of each key is the function to call."""

    def __init__(
        self,
        selector: BaseSelector,
        path: Path,
        rung: Callable[[Ring, DoorbellCaller], None],
        spoilt: Callable[[], None] = lambda: None,
    ) -> None:
        """Listen.

        Args:
            selector: of the loop.
            path: of the socket; its directory is made if it is missing.
            rung: called for each ring; must answer the caller, at once or later.
            spoilt: called when a ring could not be used, because a container may have started that is now unknown.

        Raises:
            SourceError: another follower listens there, or the socket cannot be made.
        """
        self.path = path
        self._selector = selector
        self._rung, self._spoilt = rung, spoilt
        self._callers: set[DoorbellCaller] = set()
        self._full = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # Kept until the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # By rename, so that a hook finds either the old socket, on which no process listens, or this one.
            new = path.with_suffix(".new")
            new.unlink(missing_ok=True)
            self._socket.bind(str(new))
            new.chmod(0o600)
            self._socket.listen(_BACKLOG)
            new.rename(path)
        except BlockingIOError:
            raise SourceError(f"another follower listens at {path}", "there can be one of each source") from None
        except OSError as error:
            raise SourceError(f"{path}: cannot listen: {error.strerror}") from None
        selector.register(self._socket, EVENT_READ, self._accept)

    def close(self) -> None:
        """Stop listening. Hooks that are connected stay connected."""
        self._selector.unregister(self._socket)
        self.path.unlink(missing_ok=True)
        self._socket.close()
        os.close(self._lock)

    def tidy(self) -> None:
        """Refuse the hooks whose rings are not complete in time. The loop calls this about once a second."""
        late = [caller for caller in self._callers if caller.since < time.monotonic() - RING_SECONDS]
        for caller in late:
            self._refuse(caller, RingError(f"a hook has not said all within {RING_SECONDS:g} s"))

    def _accept(self) -> None:
        while len(self._callers) < CONNECTIONS:
            try:
                connection, _address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    log.error("%s: a hook cannot be accepted: %s", self.path, error.strerror)
                    return
                raise
            connection.setblocking(False)
            uid = credentials(connection).uid
            if uid != 0:
                log.error("%s: user %d has rung, who is not root", self.path, uid)
                connection.close()
                continue
            caller = DoorbellCaller(connection)
            self._callers.add(caller)
            self._selector.register(caller, EVENT_READ, lambda caller=caller: self._read(caller))
            # PERF: most rings are complete by now.
            self._read(caller)
        # Further hooks wait in the kernel's queue.
        self._selector.unregister(self._socket)
        self._full = True

    def _forget(self, caller: DoorbellCaller) -> None:
        self._callers.discard(caller)
        self._selector.unregister(caller)
        if self._full and len(self._callers) < CONNECTIONS // 2:
            self._full = False
            self._selector.register(self._socket, EVENT_READ, self._accept)

    def _refuse(self, caller: DoorbellCaller, error: SourceError) -> None:
        self._forget(caller)
        log.error("%s: %s", self.path, error)
        caller.answer(str(error))
        self._spoilt()

    def _read(self, caller: DoorbellCaller) -> None:
        try:
            part = caller.receive()
        except OSError:
            part = b""  # Connection reset: no more bytes come.
        if part is None:
            return
        caller.data += part
        if not part and not caller.data:
            # A connection to test whether a follower listens, or a hook that was killed.
            self._forget(caller)
            caller.answer("the message is empty")
            self._spoilt()
            return
        try:
            if len(caller.data) > RING_BYTES:
                raise RingError(f"a hook has said more than {RING_BYTES} bytes")
            if part and not caller.data.endswith(b"\0\0"):
                return
            ring = parse(bytes(caller.data))
            if ring.source != self.path.stem:
                raise RingError(f"a hook of {ring.source[:40]!r} has rung")
        except RingError as error:
            self._refuse(caller, error)
            return
        self._forget(caller)
        caller.data.clear()
        self._rung(ring, caller)
