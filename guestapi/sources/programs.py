"""Asks a runtime by its own program, within a bound of seconds and bytes."""

from __future__ import annotations

import os
import select
import subprocess
import time

from guestapi.errors import SourceError

#: Most seconds of an answer: the follower's looks wait for it.
_SECONDS = 5.0


class ProgramError(SourceError):
    """A program cannot be run, takes too long, or prints too much."""


def run(*words: str, named: str, most: int, package: str) -> tuple[int, bytes]:
    """Run a program to its end.

    Args:
        words: the program and its arguments.
        named: what an error calls it.
        most: bytes that it may print.
        package: Debian's package of it, for the error.

    Returns:
        its exit status and what it printed.

    Raises:
        ProgramError: see there; the program was killed.
    """
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"},
        )
    except OSError as error:
        raise ProgramError(f"{words[0]}: {error.strerror}", f"is {package} installed?") from None
    assert process.stdout is not None
    until = time.monotonic() + _SECONDS
    text = bytearray()
    with process:
        try:
            while True:
                ready, _none, _none = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
                if not ready:
                    raise ProgramError(f"{named}: no whole answer in {_SECONDS:g} s")
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    break
                text += part
                if len(text) > most:
                    raise ProgramError(f"{named}: the answer has more than {most >> 20} MiB")
        except BaseException:
            process.kill()
            raise
        try:
            code = process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            raise ProgramError(f"{named}: does not end") from None
    return code, bytes(text)
