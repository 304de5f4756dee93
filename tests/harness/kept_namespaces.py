"""New namespaces, prepared by a script, for as long as a process keeps them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


class KeptNamespaces:
    """A process in namespaces of its own, into which other commands are brought by `enter`."""

    def __init__(self, script: str, *words: str | Path, unshare: Sequence[str] = ("--mount", "--net")) -> None:
        """Make the namespaces, and wait until they are prepared.

        Args:
            script: run there by /bin/sh. It prints ``ready`` when all is prepared, and then goes on for ever.
            words: its arguments, from ``$1`` on.
            unshare: which namespaces are new, as options of unshare(1).
        """
        self._process = subprocess.Popen(
            ["unshare", *unshare, "/bin/sh", "-c", script, "sh", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        #: The root directory there.
        self.root = Path(f"/proc/{self.pid}/root")
        if self._read_line() != "ready":
            self.kill()
            raise AssertionError("the namespaces could not be prepared")

    @property
    def pid(self) -> int:
        """The PID of the process that keeps them."""
        return self._process.pid

    def enter(self, *options: str) -> list[str]:
        """Return the beginning of a command that runs there; `options` as of nsenter(1)."""
        return ["nsenter", "-t", str(self.pid), *options]

    def ask(self, line: str) -> str:
        """Send a line to the script; return the line that it answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read_line()

    def wait(self) -> None:
        """Wait until something else has ended the process."""
        self._process.wait()
        self._close()

    def kill(self) -> None:
        """End the process, and with it the namespaces if nothing else is in them."""
        self._process.kill()
        self.wait()

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
