"""Kills a process just before one of its system calls, whichever is wanted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: All that changes files or memory shared with others, and the locks in between. What a process does between two of
#: these, nobody else can see.
CALLS = (
    "write,pwrite64,fsync,fdatasync,ftruncate,fallocate,rename,unlink,openat,close,fcntl,mmap,munmap,utimensat,"
    "fchown,fchmod"
)

#: Runs the operator's command again and again, each time in a child that is forked when all is imported, and that
#: waits for a word first.
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
            # Not to be asked: it would wait for what is left of the threads that it has killed.
            process.kill()


class Commands:
    """The operator's command, to be killed."""

    def __init__(self, config: Path, *words: str) -> None:
        """Start the command.

        Args:
            config: guestapi.toml.
            words: of the command; ``NUMBER`` in them is another number each time. It runs once with 0, at once.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", _COMMANDS, "--config", str(config), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _say(self, word: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def _hear(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def run(self, number: int, count: int) -> bool:
        """Run it with this number, killed before its `count`-th call; whether it came to its end before."""
        self._say(number)
        with killed_before(self._hear(), count):
            self._say("go")
            code = self._hear()
        assert code in (0, -9)
        return code == 0

    def end(self) -> None:
        """No more of it."""
        self._process.communicate()
