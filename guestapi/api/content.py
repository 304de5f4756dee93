"""A body that is not held in memory: bytes, and parts of open files, in a row.

A resource makes a `Content` its response's stream. It is an iterable of bytes as PEP 3333 wants it, so any WSGI server
can send it; ours knows it, and has the kernel send the files without reading them (`server.transfer`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: Bytes that are read at a time when nobody knows better.
_BLOCK = 65536


class ChangedFileError(OSError):
    """A file was changed or cut, or cannot be read, while it is being sent; the text is for the operator."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """A part of an open file.

    Attributes:
        descriptor: of the file.
        offset, length: the part, in bytes.
        size, mtime_ns: how the whole file looked when it was opened. What was sent is good only if it still does.
    """

    descriptor: int
    offset: int
    length: int
    size: int
    mtime_ns: int

    def check(self) -> None:
        """Raise ChangedFileError if the file does not look as it did."""
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise self.fault("was changed")

    def fault(self, what: str) -> ChangedFileError:
        """The error that says what has become of the file."""
        return ChangedFileError(f"{os.readlink(f'/proc/self/fd/{self.descriptor}')}: {what} while it was being sent")


class Content:
    """Pieces of a body, in order, and the descriptors that they need, which are its own."""

    __slots__ = ("_descriptors", "length", "pieces")

    def __init__(self, pieces: Sequence[bytes | FilePart], descriptors: Sequence[int]) -> None:
        self.pieces = tuple(pieces)
        self.length = sum(len(piece) if isinstance(piece, bytes) else piece.length for piece in pieces)
        self._descriptors = list(descriptors)

    def __iter__(self) -> Iterator[bytes]:
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
        """Close the files; PEP 3333 has the server call this."""
        while self._descriptors:
            os.close(self._descriptors.pop())
