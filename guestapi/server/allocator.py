"""How the C library keeps freed memory: so that a worker gives back what a large value took."""

from __future__ import annotations

import ctypes

#: malloc.h of glibc.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

#: From this size on, in bytes, a block is mapped by itself, and unmapped when it is freed.
MAPPED_BYTES = 256 * 1024


def give_back_large_blocks() -> None:
    """Have large blocks of memory returned to the kernel when they are freed. Only glibc has to be told.

    By itself glibc raises the size from which on it does that, up to 32 MiB, as soon as such a block is freed. Values
    of 2 MiB then come to lie between others in the heaps of up to ten threads, which keep the space.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        # Threads share the heap of the main thread: they run one at a time as it is.
        mallopt(_M_ARENA_MAX, 1)
