"""A clock for processes of tests, which can be set."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.scratch import SCRATCH


class ManualClock:
    """A clock within one process that a test sets.

    Attributes:
        now: seconds.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


class Clock:
    """The clock of the processes that are started with `environment`: they get their time from clock.c."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "moved"
        self.set(0)
        library = directory / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_FILE": str(self._file)}

    def set(self, seconds: int) -> None:
        """Set the clock ahead of the real time by this many seconds."""
        self._file.write_text(str(seconds))


@contextmanager
def moved_clock() -> Iterator[Clock]:
    """A clock for processes of any user."""
    directory = Path(tempfile.mkdtemp(prefix="guestapi-clock-", dir=SCRATCH))
    directory.chmod(0o755)
    try:
        yield Clock(directory)
    finally:
        shutil.rmtree(directory)
