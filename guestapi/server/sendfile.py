"""Sends a body with files from the page cache into the socket by sendfile(2), without copying them through Python.

sendfile(2) waits for the disk when a page is not in memory, and the whole event loop would wait with it. So before each
window of a file, a few of its pages are requested without waiting (preadv2(2), RWF_NOWAIT, 1 µs each). If they are in
memory, as with an image that several instances download, the loop's own thread sends the window: with all of it in
threads, ten downloads together reached half the rate (2.7 instead of 5.6 GiB/s), and other clients waited three times
as long. If they are not, a thread of a small pool reads the window first and asks the kernel for the next one.
posix_fadvise(2) alone is not enough, because it does not tell when the pages are in memory. docs/images.md has the
measurements.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from guestapi.wsgi import Content, FilePart

#: The most bytes that one sendfile(2) sends before other connections proceed. A socket accepts no more than its buffer
#: at a time anyway (net.core.wmem_default, 208 KiB).
SLICE = 256 * 1024
#: How many bytes of a file are probed, and read by a thread, at a time.
WINDOW = 1024 * 1024
#: Distance in bytes of the pages that are probed: the kernel reads ahead by as much (queue/read_ahead_kb).
_PROBE = 128 * 1024
#: How many windows are read at the same time. They must not occupy the threads that write the store.
DISK_THREADS = 4


class FilePeer(Protocol):
    """What sending a file needs of the connection. `transport.Transport` implements it."""

    def fileno(self) -> int:
        """Return the descriptor of the socket, which is non-blocking."""
        ...

    def send_within(self, seconds: float, data: bytes) -> None:
        """Send all of `data`; raises DeadlineError or OSError."""
        ...

    def set_deadline(self, seconds: float) -> None:
        """Let `wait_writable` end `seconds` from now."""
        ...

    def wait_writable(self) -> None:
        """Wait until the client accepts more; raises DeadlineError."""
        ...


def send_content(peer: FilePeer, content: Content, seconds: float, in_thread: Callable[..., Any]) -> None:
    """Send all of `content`.

    Args:
        peer: the connection.
        content: to send.
        seconds: how long the client may accept nothing at all.
        in_thread: calls a function with a tuple of arguments, as ``apply`` of gevent's ThreadPool.

    Raises:
        DeadlineError: the client does not accept it.
        ChangedFileError: a file was changed. Its last bytes were not sent.
        OSError: the connection is lost.
    """
    for piece in content.pieces:
        if isinstance(piece, bytes):
            peer.send_within(seconds, piece)
        else:
            _send_part(peer, piece, seconds, in_thread)


def _send_part(peer: FilePeer, part: FilePart, seconds: float, in_thread: Callable[..., Any]) -> None:
    offset = window_end = part.offset
    end = part.offset + part.length
    while offset < end:
        if offset >= window_end:
            window_end = min(offset + WINDOW, end)
            if not _in_memory(part.descriptor, offset, window_end - offset):
                try:
                    in_thread(_read, (part.descriptor, offset, window_end - offset))
                except OSError as error:
                    raise part.error(str(error.strerror)) from None
            # The deadline is for the client, not for the disk.
            peer.set_deadline(seconds)
        peer.wait_writable()
        count = min(SLICE, window_end - offset)
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
    """Tell whether a part of a file can be read at once, judging by some of its pages."""
    byte = bytearray(1)
    try:
        for position in (*range(offset, offset + length, _PROBE), offset + length - 1):
            os.preadv(descriptor, [byte], position, os.RWF_NOWAIT)
    except OSError:
        # EAGAIN, or EOPNOTSUPP from a file system that cannot tell.
        return False
    return True


def _read(descriptor: int, offset: int, length: int) -> None:
    """Read a part of a file into the page cache and begin with the next one. Waits for the disk."""
    os.posix_fadvise(descriptor, offset, length + WINDOW, os.POSIX_FADV_WILLNEED)
    block = bytearray(_PROBE)
    while length > 0 and (read := os.preadv(descriptor, [memoryview(block)[:length]], offset)):
        offset += read
        length -= read
