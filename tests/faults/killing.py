"""Kills a process just before a chosen system call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: All calls that change files or shared memory, and their locks. Between two of these, nothing changes for other
#: processes.
CALLS = (
    "write,pwrite64,fsync,fdatasync,ftruncate,fallocate,rename,unlink,openat,close,fcntl,mmap,munmap,utimensat,"
    "fchown,fchmod"
)

#: Runs the operator's command repeatedly, each time in a child that is forked after all imports and waits for a line.
_COMMANDS = """
import os, sys
from guestapi.cli.main import main
words = lambda number: [word.replace("NUMBER", number) for word in sys.argv[1:]]
main(words("0"), standalone_mode=False)
while number := sys.stdin.readline().strip():
    child = os.fork()
    if not child:
        sys.stdin.readline()
        main(words(number), standalone_mode=False)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def killed_before(pid: int, count: int, calls: str = CALLS) -> Iterator[None]:
    """Kill the thread group of `pid` when a thread of it enters its `count`-th of these calls."""
    inject = f"inject={calls}:signal=KILL:when={count}"
    strace = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject, "-p", str(pid)]
    with subprocess.Popen(strace, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "attached" in line, line
        try:
            yield
        finally:
            # Not terminate(): strace would wait for the remains of the killed threads.
            process.kill()


class KilledCommands:
    """The operator's command, to be killed."""

    def __init__(self, config: Path, *words: str) -> None:
        """Start the command.

        Args:
            config: guestapi.toml.
            words: the command's arguments; ``NUMBER`` in them is replaced by a number. It runs once with 0, at once.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", _COMMANDS, "--config", str(config), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _send(self, word: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def _hear(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def run(self, number: int, count: int) -> bool:
        """Run it with this number, killed before its `count`-th call; return whether it ended before that."""
        self._send(number)
        with killed_before(self._hear(), count):
            self._send("go")
            code = self._hear()
        assert code in (0, -9)
        return code == 0

    def end(self) -> None:
        """End the program."""
        self._process.communicate()
