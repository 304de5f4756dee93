"""Whether standard input was meant for a command that can do without.

A command in a loop (``while read name; do guestapi instance add "$name"; done <names``) has the loop's input as its
own, and one that is called by a service may have a pipe to which nobody ever writes. Neither may be read.

A pipe that a process above this one has open for reading, too, is taken for a loop's. Any other was made for this
command, as by ``generate | guestapi instance add web``, and its writer gets some time to begin.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import stat
import sys
from collections.abc import Iterator

import click

from guestapi.errors import OperatorError

#: Seconds that the writer of a pipe has to begin.
_BEGIN_SECONDS = 2.0
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
        beginning, a pipe for this command alone whose writer begins in time, or another one that holds more than words.

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
    if not stat.S_ISFIFO(kind):
        return False
    if _is_shared(descriptor):
        return bool(select.select([descriptor], [], [], 0)[0]) and _WORDS.match(_peek(descriptor)) is None
    if select.select([descriptor], [], [], _BEGIN_SECONDS)[0]:
        return True
    click.echo(
        f"nothing came from standard input within {_BEGIN_SECONDS:g} s, so it was not read; '--file -' waits for it",
        err=True,
    )
    return False


def _is_shared(descriptor: int) -> bool:
    """Whether a process above this one may read from the same pipe."""
    pipe = os.readlink(f"/proc/self/fd/{descriptor}")
    return any(_reads(pid, pipe) for pid in _ancestors())


def _ancestors() -> Iterator[int]:
    pid = os.getppid()
    while pid > 1:
        yield pid
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            return  # It has ended.


def _reads(pid: int, pipe: str) -> bool:
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        # It has ended, or is of another user, as sshd and sudo are: not the loop that has started this command.
        return False
    for number in numbers:
        try:
            if os.readlink(f"/proc/{pid}/fd/{number}") == pipe and _can_read(pid, number):
                return True
        except OSError:
            continue  # Closed meanwhile.
    return False


def _can_read(pid: int, number: str) -> bool:
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as file:
        flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
    return flags & os.O_ACCMODE != os.O_WRONLY


def _peek(descriptor: int) -> bytes:
    """What a pipe holds, left where it is (tee(2))."""
    ours, theirs = os.pipe()
    try:
        count = ctypes.CDLL(None, use_errno=True).tee(descriptor, theirs, _LOOK, _NONBLOCK)
        return os.read(ours, _LOOK) if count > 0 else b""
    finally:
        os.close(ours)
        os.close(theirs)
