"""The doorbell of a follower: a Unix socket at which the hooks of one runtime ring (`guestapi.sources.hook` says how).

Rules: only root may ring, and a ring has bounds in bytes and in seconds. A ring that is cut, garbage or too long gets
one sentence as its answer and in the journal. Nothing here blocks: the follower's loop says when there is something to
read, and no hook keeps another waiting.
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

#: How many hooks may wait to be accepted, and how many that were accepted may wait for their answers.
_BACKLOG, CONNECTIONS = 4096, 1024
#: Bytes of a ring at the most: a state on standard input, and some variables.
RING_BYTES = STATE_BYTES + (1 << 16)
#: Seconds until a ring must be whole. The hook itself gives up after two.
RING_SECONDS = 3.0
_READ = 1 << 16
#: Bytes of an answer at the most, so that it is sent at once, and the hook reads all of it.
_ANSWER_BYTES = 2048


class RingError(SourceError):
    """What came was no ring."""


@dataclass(frozen=True, slots=True)
class Ring:
    """What a hook said.

    Attributes:
        source: the runtime, like ``lxc``.
        arguments: what the runtime called its hook with.
        environ: those variables of the hook's environment that this source's follower is told.
        state: what the hook had on standard input; empty for runtimes that give nothing there.
        hostname: the host name that the runtime has set inside, if the hook could tell.
    """

    source: str
    arguments: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    state: bytes = b""
    hostname: str | None = None


def parse(data: bytes) -> Ring:
    """A ring from the bytes that came.

    Raises:
        RingError: they are not whole, or no ring.
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
    """A hook that has rung, and waits for its answer."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.since = time.monotonic()
        self.data = bytearray()

    def fileno(self) -> int:
        """For select and its like."""
        return self._connection.fileno()

    def receive(self) -> bytes | None:
        """What has come; None: nothing yet. Empty: the hook has said all."""
        try:
            return self._connection.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return None

    def answer(self, refused: str | None = None) -> None:
        """Let the hook go.

        Args:
            refused: why the container was not registered, in one sentence; None: it was.
        """
        text = "ok" if refused is None else "no " + " ".join(refused.split())
        try:
            self._connection.send(text.encode(errors="replace")[:_ANSWER_BYTES] + b"\n")
        except OSError:
            pass  # It has given up.
        self._connection.close()


class DoorbellServer:
    """Listens for hooks. Belongs to a follower's loop, whose selector it uses; each key's ``data`` is what to call."""

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
            rung: called for each ring; has to see to it that the caller is answered, sooner or later.
            spoilt: called for what was no ring: perhaps a container starts of which the hook could not tell.

        Raises:
            SourceError: another follower listens there, or nobody can.
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
            # In one step: a hook finds the old socket, on which nobody listens, or this one.
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
        """Listen no more. Who has rung keeps its connection."""
        self._selector.unregister(self._socket)
        self.path.unlink(missing_ok=True)
        self._socket.close()
        os.close(self._lock)

    def tidy(self) -> None:
        """Send those away that have not finished in time. To be called once a second or so."""
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
            # PERF: a hook has mostly said all by now.
            self._read(caller)
        # Those that wait are in the kernel's queue.
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
            part = b""  # Reset: what has come is all there is.
        if part is None:
            return
        caller.data += part
        if not part and not caller.data:
            # Somebody who wanted to know whether a follower is there, or a hook that was killed.
            self._forget(caller)
            caller.answer("nothing was said")
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
