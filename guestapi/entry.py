"""What the command ``guestapi`` runs: the operator's command, or, without loading any of that, what is in a hurry.

A container waits for its hook, and so do all that start with it: the library of the command line alone takes ten times
as long as a ring. Scripts call ``config get`` and ``config set`` in loops.
"""

from __future__ import annotations

import errno
import os
import sys

#: What a device that is full or broken, or a descriptor that is closed, answers to what is written.
_UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})

#: Sources whose hooks ring a follower's doorbell and do nothing else.
RINGING = frozenset({"lxc", "nspawn", "oci", "podman"})


def main() -> None:
    """Run the command that ``sys.argv`` holds."""
    words = sys.argv[1:]
    # --config FILE or --config=FILE may come first.
    at = 0
    if words and words[0].startswith("--config"):
        at = 1 if "=" in words[0] else 2
    if words[at : at + 1] == ["hook"] and words[at + 1 : at + 2] and words[at + 1] in RINGING and "--help" not in words:
        from guestapi.sources import hook

        sys.argv[1:] = words[:at] + words[at + 1 :]
        sys.exit(hook.main())
    _open_closed_streams()
    try:
        try:
            _run_command(words)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        # While modules were loaded; a command that runs says the same.
        sys.stderr.write("Aborted!\n")
        sys.exit(1)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        # What is still buffered is written at the end once more: to nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        target = "the output" if error.filename is None else error.filename
        sys.stderr.write(f"Error: cannot write {target}: {error.strerror}\n")
        sys.exit(1)


def _open_closed_streams() -> None:
    """Give the program the standard streams that its caller closed: Python has none then, and files get their numbers.

    Output that nobody can read is an error as soon as there is any, as with other programs: descriptor 1 cannot be
    written.
    """
    if sys.stdin is None:
        _open_null(0, os.O_RDONLY)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the program ends
    if sys.stdout is None:
        _open_null(1, os.O_RDONLY)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the program ends
    if sys.stderr is None:
        _open_null(2, os.O_WRONLY)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the program ends


def _open_null(descriptor: int, flags: int) -> None:
    """Open /dev/null as `descriptor`, which is closed."""
    opened = os.open(os.devnull, flags)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)


def _run_command(words: list[str]) -> None:
    """Run ``config get`` and ``config set`` without the library of the command line, and all else with it."""
    if "config" in words:
        from guestapi.cli import quick

        code = quick.run(words)
        if code is not None:
            # PERF: everything is written and closed. To take the interpreter apart takes as long as the command itself.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    from guestapi.cli.main import main as command

    command()
