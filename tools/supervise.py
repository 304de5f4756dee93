#!/usr/bin/env python3
"""Runs a command for a limited time, then kills all its remaining processes.

    tools/supervise.py SECONDS COMMAND [ARGUMENT]...

Daemons and orphans are killed, too, because they become children of this process. The exit code is the command's, or
124 after a timeout, as for timeout(1).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

#: From sys/prctl.h: orphaned descendants become children of this process, and it ends with its own parent.
_PR_SET_CHILD_SUBREAPER, _PR_SET_PDEATHSIG = 36, 1

#: The exit code of timeout(1).
_TOO_LONG = 124


def main() -> int:
    """Run the command."""
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
    """Kill the descendants of this process until there are none."""
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
