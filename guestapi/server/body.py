"""The body of a request, read only when it is asked for: by the application, or to get to the next request."""

from __future__ import annotations

import io
import re
from typing import Protocol

from guestapi.server.http import CONTINUE, ProtocolError

#: RFC 9112, section 7.1: the size in hexadecimal, then perhaps extensions, which nobody uses; as for Go and h11, there
#: is no white space before them.
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[^\r\n]*)?\r\n")
#: RFC 9110, section 5: a name of tchar, and printable text or bytes from 0x80 on. What frames a message comes too late
#: there (section 6.5.1).
_TRAILER = re.compile(rb"(?!(?i:content-length|transfer-encoding):)[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n")
#: How long a chunk's first line, or the whole trailer section, may be.
_LINE = 4096


class Source(Protocol):
    """Where a body's bytes come from: `connection.Connection`."""

    def peek_line(self, limit: int) -> bytes:
        """The next line up to and with its LF, left in place; raises ProtocolError if it is longer than `limit`."""
        ...

    def take(self, size: int) -> bytes:
        """The next bytes, at least one and at most `size`; raises ProtocolError if they do not come in time."""
        ...

    def say(self, response: bytes) -> None:
        """Send to the client."""
        ...


class Body(io.RawIOBase):
    """``wsgi.input`` of a request that has a body.

    Reading raises `ProtocolError` if the body is too large, malformed, cut or late; ``failure`` keeps it, since the
    application may not have let it through.
    """

    def __init__(self, source: Source, length: int | None, limit: int, expects: bool) -> None:
        """Args:
        source: the connection.
        length: of the body in bytes; None if it comes in chunks.
        limit: how many bytes are taken at most.
        expects: the client wants to hear ``100 Continue`` first.
        """
        self._source = source
        self._chunked = length is None
        self._left = length or 0
        self._limit = limit
        self._expects = expects
        self._ended = length == 0
        self.failure: ProtocolError | None = None

    @property
    def untouched(self) -> bool:
        """The client still waits for ``100 Continue``: it may send the body or not, so nothing can follow."""
        return self._expects and not self._ended

    def readable(self) -> bool:
        """Always: what io.RawIOBase asks for."""
        return True

    # typeshed wants any buffer; io hands these two.
    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """As io.RawIOBase: at least one byte, or 0 at the end."""
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """The rest."""
        return b"".join(iter(lambda: self._next(65536), b""))

    def drain(self) -> None:
        """Read the rest and forget it."""
        while self._next(65536):
            pass

    def _next(self, size: int) -> bytes:
        if self.failure is not None:
            raise self.failure
        try:
            if self._expects:
                self._expects = False
                self._source.say(CONTINUE)
            if self._chunked and self._left == 0 and not self._ended:
                self._next_chunk()
            if self._ended:
                return b""
            data = self._source.take(min(size, self._left))
            self._left -= len(data)
            if self._left == 0:
                if self._chunked:
                    self._expect_line(b"\r\n", "a chunk is longer than it says")
                else:
                    self._ended = True
            return data
        except ProtocolError as error:
            self.failure = error
            raise

    def _next_chunk(self) -> None:
        line = self._source.peek_line(_LINE)
        found = _CHUNK.fullmatch(line)
        if found is None:
            raise ProtocolError(400, "the size of a chunk is malformed")
        self._source.take(len(line))
        self._left = int(found[1], 16)
        self._limit -= self._left
        if self._limit < 0:
            raise ProtocolError(413, "the body is too large")
        if self._left == 0:
            self._skip_trailers()
            self._ended = True

    def _skip_trailers(self) -> None:
        left = _LINE
        while (line := self._source.peek_line(left)) != b"\r\n":
            if not _TRAILER.fullmatch(line):
                raise ProtocolError(400, "the trailer section is malformed")
            self._source.take(len(line))
            left -= len(line)
        self._source.take(2)

    def _expect_line(self, line: bytes, otherwise: str) -> None:
        if self._source.peek_line(len(line)) != line:
            raise ProtocolError(400, otherwise)
        self._source.take(len(line))
