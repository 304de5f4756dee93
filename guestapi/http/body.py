"""The body of a request. It is read when the application asks for it, or to reach the next request."""

from __future__ import annotations

import io
import re
from typing import Protocol

from guestapi.http.errors import ProtocolError
from guestapi.http.response import CONTINUE

#: RFC 9112, section 7.1: the size in hexadecimal, then optional extensions, which are ignored. As with Go and h11, no
#: white space may stand before them.
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[^\r\n]*)?\r\n")
#: RFC 9110, section 5: a name of tchar; printable text or bytes from 0x80 on. Fields that frame a message are forbidden
#: in a trailer section (section 6.5.1).
_TRAILER = re.compile(rb"(?!(?i:content-length|transfer-encoding):)[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n")
#: The longest first line of a chunk, and the longest trailer section, in bytes.
_LINE = 4096
#: The most chunks and trailer fields of a body together. Each takes time in which no other client is served, and an
#: honest client sends few in a body of 64 KiB.
_LINES = 256


class ByteSource(Protocol):
    """Where a body's bytes come from. The server's transport implements it."""

    def peek_line(self, limit: int) -> bytes:
        """Return the next line with its LF, and leave it in place.

        Raises:
            ProtocolError: it is longer than `limit` bytes, or does not come in time.
        """
        ...

    def take(self, size: int) -> bytes:
        """Remove and return the next bytes, at least one and at most `size`.

        Raises:
            ProtocolError: they do not come in time.
        """
        ...

    def send_interim(self, response: bytes) -> None:
        """Send an interim response to the client."""
        ...


class Body(io.RawIOBase):
    """The ``wsgi.input`` of a request that has a body.

    Reading raises `ProtocolError` if the body is too large, malformed, cut short or late.

    Attributes:
        failure: the error that reading raised, since the application may have caught it.
    """

    def __init__(self, source: ByteSource, length: int | None, limit: int, expects: bool) -> None:
        """Prepare to read; nothing is read yet.

        Args:
            source: where the bytes come from.
            length: bytes of the body; None if it comes in chunks.
            limit: the most bytes that are accepted.
            expects: whether the client waits for ``100 Continue``.
        """
        self._source = source
        self._chunked = length is None
        self._left = length or 0
        self._limit = limit
        self._expects = expects
        self._lines = _LINES
        self._ended = length == 0
        self.failure: ProtocolError | None = None

    @property
    def untouched(self) -> bool:
        """Whether the client still waits for ``100 Continue``. It may omit the body, so no request can follow."""
        return self._expects and not self._ended

    def readable(self) -> bool:
        """Return True, as io.RawIOBase requires."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # io passes these two
        """Fill `buffer` as io.RawIOBase requires: with at least one byte, or none at the end."""
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Read the rest of the body."""
        return b"".join(iter(lambda: self._next(65536), b""))

    def drain(self) -> None:
        """Read the rest of the body and discard it."""
        while self._next(65536):
            pass

    def _next(self, size: int) -> bytes:
        if self.failure is not None:
            raise self.failure
        try:
            if self._expects:
                self._expects = False
                self._source.send_interim(CONTINUE)
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
        self._count_line()
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
            self._count_line()
            if not _TRAILER.fullmatch(line):
                raise ProtocolError(400, "the trailer section is malformed")
            self._source.take(len(line))
            left -= len(line)
        self._source.take(2)

    def _count_line(self) -> None:
        self._lines -= 1
        if self._lines < 0:
            raise ProtocolError(400, f"the body has more than {_LINES} chunks")

    def _expect_line(self, line: bytes, otherwise: str) -> None:
        if self._source.peek_line(len(line)) != line:
            raise ProtocolError(400, otherwise)
        self._source.take(len(line))
