"""A body with files in it, from the page cache into the socket by sendfile(2): nothing of them passes through Python.

sendfile waits for the disk when a page is not in memory, and with it would the whole event loop. So before each
window of a file, a few of its pages are asked for without waiting (preadv2(2), RWF_NOWAIT, 1 µs each). Are they
there, as with an image that several instances fetch, the loop's own thread sends: with all of it in threads, ten
downloads together came to half as much (2.7 instead of 5.6 GiB/s), and others waited three times as long. Are they
not, a thread of a small pool reads the window first, and has the kernel begin with the next one meanwhile.
posix_fadvise(2) alone would not do: it does not say when the pages have come. docs/images.md has what was measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from guestapi.wsgi import Content, FilePart

#: Bytes that one sendfile call may send before others have their turn. A socket takes no more than its buffer at a
#: time anyway (net.core.wmem_default, 208 KiB).
SLICE = 256 * 1024
#: Bytes whose presence in memory is looked at, and that a thread reads, at a time.
WINDOW = 1024 * 1024
#: Distance of the pages that are looked at: the kernel reads ahead by as much (queue/read_ahead_kb).
_PROBE = 128 * 1024
#: How many windows are read at the same time. They must not take the threads in which the store is written.
DISK_THREADS = 4


class Peer(Protocol):
    """The connection, as a transfer needs it: `connection.Connection`."""

    def fileno(self) -> int:
        """The socket, non-blocking."""
        ...

    def send_within(self, seconds: float, data: bytes) -> None:
        """Send all; raises LateError, or OSError."""
        ...

    def set_deadline(self, seconds: float) -> None:
        """Let `wait_writable` end so many seconds from now."""
        ...

    def wait_writable(self) -> None:
        """Give way to others until the socket takes more; raises LateError."""
        ...


def send_content(peer: Peer, content: Content, seconds: float, in_thread: Callable[..., Any]) -> None:
    """Send all of it.

    Args:
        peer: whom to.
        content: what.
        seconds: how long the client may take nothing at all.
        in_thread: calls a function with arguments, as ``apply`` of gevent's ThreadPool.

    Raises:
        LateError: the client does not take it.
        ChangedFileError: a file is not what it was. Its last bytes have not been sent.
        OSError: the client is gone.
    """
    for piece in content.pieces:
        if isinstance(piece, bytes):
            peer.send_within(seconds, piece)
        else:
            _send_part(peer, piece, seconds, in_thread)


def _send_part(peer: Peer, part: FilePart, seconds: float, in_thread: Callable[..., Any]) -> None:
    offset = there = part.offset
    end = part.offset + part.length
    while offset < end:
        if offset >= there:
            there = min(offset + WINDOW, end)
            if not _in_memory(part.descriptor, offset, there - offset):
                try:
                    in_thread(_read, (part.descriptor, offset, there - offset))
                except OSError as error:
                    raise part.error(str(error.strerror)) from None
            # Time runs for the client, not for the disk.
            peer.set_deadline(seconds)
        peer.wait_writable()
        count = min(SLICE, there - offset)
        if offset + count == end:
            part.check()
        try:
            sent = os.sendfile(peer.fileno(), part.descriptor, offset, count)
        except BlockingIOError:
            continue
        except ConnectionError:
            raise
        except OSError as error:
            raise part.error(str(error.strerror)) from None
        if not sent:
            raise part.error("was cut short")
        offset += sent
        peer.set_deadline(seconds)


def _in_memory(descriptor: int, offset: int, length: int) -> bool:
    """Whether a part of a file can be read at once, judging by some of its pages."""
    byte = bytearray(1)
    try:
        for position in (*range(offset, offset + length, _PROBE), offset + length - 1):
            os.preadv(descriptor, [byte], position, os.RWF_NOWAIT)
    except OSError:
        # EAGAIN; or EOPNOTSUPP from a file system that cannot tell.
        return False
    return True


def _read(descriptor: int, offset: int, length: int) -> None:
    """Have a part of a file in memory, and the next one on its way; waits for the disk."""
    os.posix_fadvise(descriptor, offset, length + WINDOW, os.POSIX_FADV_WILLNEED)
    block = bytearray(_PROBE)
    while length > 0 and (read := os.preadv(descriptor, [memoryview(block)[:length]], offset)):
        offset += read
        length -= read
