"""What files of images are called, and what they begin and end with. No I/O but reads of a file that is open."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from typing import NamedTuple

#: What files of images are called (linuxcontainers.org/incus/docs/main/reference/image_format/), and nothing else: it
#: ends up in a header field.
_EXTENSION = re.compile(r"(?:(?:\.tar)?\.(?:gz|xz|bz2|zst|lzma|lz4)|\.(?:tar|tgz|txz|squashfs|qcow2|img|iso|raw))\Z")
#: Root file systems of virtual machines.
DISKS = frozenset({".qcow2", ".img", ".raw"})
#: How many bytes from the beginning of a file tell what it is: an ISO 9660 descriptor is at 32 KiB.
_LOOK = 36864
#: struct squashfs_super_block (fs/squashfs/squashfs_fs.h): s_magic, then bytes_used at 40.
_SQUASHFS_BYTES = struct.Struct("<40xQ")
_TAR_BLOCK = 512

WHAT_IS_TAKEN = "images are tar archives, squashfs, qcow2, ISO 9660 and raw disks, compressed or not"


class _Format(NamedTuple):
    """A format of files.

    Attributes:
        name: as an operator knows it.
        place, magic: bytes that each file has, and where (magic(5)).
        is_whole: tells from the first bytes, the last ones and the size whether the file is not cut short.
    """

    name: str
    place: int
    magic: bytes
    is_whole: Callable[[bytes, bytes, int], bool] = lambda _first, _last, _size: True


_FORMATS = (
    _Format("gzip", 0, b"\x1f\x8b", lambda _first, _last, size: size > 18),
    # The XZ file format, section 2.1.1.2: the stream ends with "YZ", and every size is a multiple of four.
    _Format("xz", 0, b"\xfd7zXZ\0", lambda _first, last, size: size % 4 == 0 and last.rstrip(b"\0").endswith(b"YZ")),
    _Format("bzip2", 0, b"BZh"),
    _Format("zstd", 0, b"\x28\xb5\x2f\xfd"),
    _Format("lz4", 0, b"\x04\x22\x4d\x18"),
    _Format("lzma", 0, b"]\0\0"),
    _Format(
        "squashfs",
        0,
        b"hsqs",
        lambda first, _last, size: len(first) >= 96 and _SQUASHFS_BYTES.unpack_from(first)[0] <= size,
    ),
    _Format("qcow2", 0, b"QFI\xfb", lambda first, _last, _size: len(first) >= 72),
    _Format("ISO 9660", 32769, b"CD001"),
    # Two blocks of zeros end an archive (tar(5)).
    _Format("tar", 257, b"ustar", lambda _first, last, size: size % _TAR_BLOCK == 0 and not any(last[-_TAR_BLOCK:])),
    _Format("disk", 510, b"\x55\xaa"),
    _Format("disk", 512, b"EFI PART"),
)


def extension(name: str) -> str:
    """The end of a file's name that says what it is, in lower case; empty if it says nothing."""
    found = _EXTENSION.search(name.lower())
    return found[0] if found else ""


def fault(name: str, descriptor: int) -> str | None:
    """Tell why a file is none of an image.

    Args:
        name: of the file.
        descriptor: the file, a regular one, at its beginning; it is there again afterwards.

    Returns:
        The end of a sentence about it; None if it may be one. An empty file may be one here.
    """
    size = os.fstat(descriptor).st_size
    first = os.pread(descriptor, _LOOK, 0)
    if not first:
        return None
    last = os.pread(descriptor, 1024, max(0, size - 1024))
    for one in _FORMATS:
        if first[one.place : one.place + len(one.magic)] == one.magic:
            return None if one.is_whole(first, last, size) else f"is {one.name}, but cut short"
    if extension(name) in DISKS - {".qcow2"} and any(first):
        # A file system without a partition table, for example.
        return None
    reason = "whatever its name says" if extension(name) else "by its name and its beginning"
    return f"is not an image, {reason}"
