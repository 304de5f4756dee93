#!/usr/bin/env python3
"""Runs a command for a limited time, then ends everything that it has started and that is still there.

    tools/supervise.py SECONDS COMMAND [ARGUMENT]...

Also daemons and orphans end: they become children of this process, wherever they have been started. The exit code is
the command's; 124 if it took too long, as timeout(1) says it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

#: sys/prctl.h: orphans of descendants become children of this process; and its own parent's end is its end.
_PR_SET_CHILD_SUBREAPER, _PR_SET_PDEATHSIG = 36, 1

#: timeout(1).
_TOO_LONG = 124


def main() -> int:
    """The command."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TOO_LONG))
    process = subprocess.Popen(sys.argv[2:], start_new_session=True)
    try:
        return abs(process.wait(float(sys.argv[1])))
    except subprocess.TimeoutExpired:
        return _TOO_LONG
    finally:
        end_children()


def end_children() -> None:
    """Kill what descends from this process, until nothing does."""
    while True:
        with open("/proc/thread-self/children") as file:
            children = [int(pid) for pid in file.read().split()]
        if not children:
            return
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.exit(main())
