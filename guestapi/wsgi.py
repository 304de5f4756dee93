"""The contract between server and application: WSGI (PEP 3333) and what guestapi adds to it.

The server calls the application with an `Environ` that has, besides what PEP 3333 requires, `RAW_PATH`, `RAW_URI`,
`CALLER` and `DIALECT`. The application answers in one of four ways:

- It returns a list of bytes. If it sets `CACHEABLE`, the server may answer the same request of the same caller again
  with these bytes, as long as the store has the same `INSTANCE`.
- It returns a `Content`, of which parts are files. The server sends those with sendfile(2).
- It sets `HANDOVER`. Then the server ignores the response and turns the connection into a stream of events.
- It sets `WAIT`. Then the server ignores the response, and calls the application with the same request again, with this
  waiter as `WAITED`, when the waiter is due or over.

The application sets `INSTANCE` when it knows whose request it is, and `EXCEEDED_LIMIT` when it refuses a request for
exceeding a limit; both are for the log. Reading ``wsgi.input`` raises OSError if the client sends no proper body. The
server then discards the application's response and sends its own.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final, TypedDict

from guestapi.callers.identify import Caller
from guestapi.model import Instance
from guestapi.notifications.events import EventFormat
from guestapi.notifications.subscription import Subscription
from guestapi.notifications.waiting import Waiter

#: The path as it was sent, percent-encoded, without the query. Set by the server.
RAW_PATH: Final = "RAW_PATH"
#: The whole request target as it was sent. Set by the server.
RAW_URI: Final = "RAW_URI"
#: The query, where there is one, while Falcon has the request. Falcon would parse QUERY_STRING, which takes
#: milliseconds, for every resource. Set by the application.
QUERY: Final = "guestapi.query"
#: Who sent the request: a `Caller`. Set by the server.
CALLER: Final = "guestapi.caller"
#: True if the caller was identified an instant ago, after the request had come: what was read then holds, and nothing
#: else has happened in this process since. Set by the server for the first request of a connection.
JUST_IDENTIFIED: Final = "guestapi.just_identified"
#: Name of the dialect of the socket. Set by the server.
DIALECT: Final = "guestapi.dialect"
#: The `Instance` that the request is about, or None. Set by the application.
INSTANCE: Final = "guestapi.instance"
#: True if the response depends on nothing but the request and `INSTANCE`. Set by the application.
CACHEABLE: Final = "guestapi.cacheable"
#: Template of the route that answers the request, like ``/1.0/config/{key}``; not set if there is none. Set by the
#: application, and counted.
ROUTE: Final = "guestapi.route"
#: Name of the setting in ``[limits]`` that the request exceeded. Set by the application.
EXCEEDED_LIMIT: Final = "guestapi.exceeded_limit"
#: The `Handover` that takes the place of a response. Set by the application.
HANDOVER: Final = "guestapi.handover"

#: The `Waiter` that the request has to wait for. Set by the application.
WAIT: Final = "guestapi.wait"
#: The `Waiter` that the request has waited for. Set by the server.
WAITED: Final = "guestapi.waited"

#: The keys that server and application use by name. Header fields (``HTTP_...``) are read as from any WSGI environ.
Environ = TypedDict(
    "Environ",
    {
        "REQUEST_METHOD": str,
        "SCRIPT_NAME": str,
        "PATH_INFO": str,
        "QUERY_STRING": str,
        "SERVER_NAME": str,
        "SERVER_PORT": str,
        "SERVER_PROTOCOL": str,
        "REMOTE_ADDR": str,
        "wsgi.version": tuple[int, int],
        "wsgi.input": io.RawIOBase | io.BufferedIOBase,
        "wsgi.errors": IO[str],
        "wsgi.multithread": bool,
        "wsgi.multiprocess": bool,
        "wsgi.run_once": bool,
        "RAW_PATH": str,
        "RAW_URI": str,
        "guestapi.query": str,
        "guestapi.caller": Caller,
        "guestapi.just_identified": bool,
        "guestapi.dialect": str,
        "guestapi.instance": Instance | None,
        "guestapi.cacheable": bool,
        "guestapi.route": str,
        "guestapi.exceeded_limit": str,
        "guestapi.handover": "Handover",
        "guestapi.wait": Waiter,
        "guestapi.waited": Waiter,
    },
    total=False,
)

#: Header fields of a response, in order.
Headers = list[tuple[str, str]]
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]

#: Bytes that `Content` reads at a time when a server iterates over it.
_BLOCK = 65536


class ChangedFileError(OSError):
    """A file was changed or cut, or cannot be read, while it is being sent. The text is for the operator."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """A part of an open file.

    Attributes:
        descriptor: file descriptor, open for reading.
        offset: first byte of the part.
        length: bytes of the part.
        size: bytes of the whole file when it was opened.
        mtime_ns: modification time of the file when it was opened, in nanoseconds of Unix time.
    """

    descriptor: int
    offset: int
    length: int
    size: int
    mtime_ns: int

    def check(self) -> None:
        """Compare the file with what it was when it was opened.

        Raises:
            ChangedFileError: its size or modification time differs, so what was sent of it is not to be trusted.
        """
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise self.error("was changed")

    def error(self, what: str) -> ChangedFileError:
        """Make the error that says what happened to the file, like ``was changed``."""
        return ChangedFileError(f"{os.readlink(f'/proc/self/fd/{self.descriptor}')}: {what} while it was being sent")


class Content:
    """A response body of bytes and parts of files, in order, that is not held in memory.

    It is an iterable of bytes as PEP 3333 requires, so any WSGI server can send it.

    Attributes:
        pieces: bytes and file parts, in order.
        length: bytes of the whole body.
    """

    __slots__ = ("_descriptors", "length", "pieces")

    def __init__(self, pieces: Sequence[bytes | FilePart], descriptors: Sequence[int]) -> None:
        """Take ownership of `descriptors`: `close` closes them."""
        self.pieces = tuple(pieces)
        self.length = sum(len(piece) if isinstance(piece, bytes) else piece.length for piece in pieces)
        self._descriptors = list(descriptors)

    def __iter__(self) -> Iterator[bytes]:
        """Read the body.

        Raises:
            ChangedFileError: a file was changed meanwhile.
        """
        for piece in self.pieces:
            if isinstance(piece, bytes):
                yield piece
                continue
            sent = 0
            while sent < piece.length:
                block = os.pread(piece.descriptor, min(_BLOCK, piece.length - sent), piece.offset + sent)
                sent += len(block)
                if not block or sent == piece.length:
                    piece.check()
                yield block

    def close(self) -> None:
        """Close the files. PEP 3333 requires the server to call this."""
        while self._descriptors:
            os.close(self._descriptors.pop())


@dataclass(frozen=True, slots=True)
class Handover:
    """A stream of events that takes the place of a response. Its subscription exists already.

    Attributes:
        status: code and reason of the response that begins the stream, like ``101 Switching Protocols``.
        headers: header fields of that response.
        event_format: how events are written.
        subscription: the events to send.
    """

    status: str
    headers: tuple[tuple[str, str], ...]
    event_format: EventFormat
    subscription: Subscription
