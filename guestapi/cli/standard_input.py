"""Whether standard input was meant for a command that can do without.

A command in a loop (``while read name; do guestapi instance add "$name"; done <names``) has the loop's input as its
own, and one that is called by ssh or a service has a pipe to which nobody ever writes. Neither may be read.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import stat
import sys

from guestapi.errors import OperatorError

#: Bytes that are looked at, and SPLICE_F_NONBLOCK of splice(2).
_LOOK, _NONBLOCK = 4096, 2
#: Lines of names, paths, numbers and options: what loops read. A definition has a colon behind each key.
_WORDS = re.compile(rb"[\w./@=,+\- \t\r\n]*\Z")


def read_definition_text(file: str | None, *, asked: bool = True) -> bytes | None:
    """The definition that a command was given.

    Args:
        file: what ``--file`` names, ``-`` for standard input; None: it was not given.
        asked: standard input is read for nothing else.

    Returns:
        Its text; None: none was given. Without ``--file``, that is standard input if it is a file that is read from its
        beginning, or a pipe that holds more than words by then.

    Raises:
        OperatorError: the file cannot be read.
    """
    if file not in (None, "-"):
        try:
            with open(str(file), "rb") as opened:
                return opened.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no file can be called so"
            raise OperatorError(f"{file}: {reason}", "--file takes a definition as 'show' prints it") from None
    if file is None and not (asked and _is_meant()):
        return None
    text = sys.stdin.buffer.read()
    return text if text.strip() or file is not None else None


def _is_meant() -> bool:
    try:
        descriptor = sys.stdin.fileno()
        kind = os.fstat(descriptor).st_mode
    except (OSError, ValueError, AttributeError):
        # It is closed, or no file at all: within a program that calls the command, it is what that gives it.
        return sys.stdin is not None and not sys.stdin.closed
    if stat.S_ISREG(kind):
        return os.lseek(descriptor, 0, os.SEEK_CUR) == 0
    if not stat.S_ISFIFO(kind) or not select.select([descriptor], [], [], 0)[0]:
        return False
    return _WORDS.match(_peek(descriptor)) is None


def _peek(descriptor: int) -> bytes:
    """What a pipe holds, left where it is (tee(2))."""
    ours, theirs = os.pipe()
    try:
        count = ctypes.CDLL(None, use_errno=True).tee(descriptor, theirs, _LOOK, _NONBLOCK)
        return os.read(ours, _LOOK) if count > 0 else b""
    finally:
        os.close(ours)
        os.close(theirs)
