"""A hook that holds its container until a test lets it go."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SCRIPT = """#!/bin/sh
cat >"$0.state"
echo >"$0.here"
cat "$0.go" >/dev/null
"""


class HoldingHook:
    """The hook's program, at `path`. It ends when the block of `held` does, and not before."""

    def __init__(self, path: Path) -> None:
        """Make the program.

        Args:
            path: where it is made.
        """
        self.path = path
        path.write_text(_SCRIPT)
        path.chmod(0o755)
        for pipe in ("here", "go"):
            os.mkfifo(f"{path}.{pipe}")

    @contextmanager
    def held(self, seconds: float = 20) -> Iterator[bytes]:
        """Wait until a runtime has called it; what it was told on standard input."""
        here = os.open(f"{self.path}.here", os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert select.select([here], [], [], seconds)[0], "the hook was not called"
            # Its reader comes with the hook's last command.
            go = os.open(f"{self.path}.go", os.O_WRONLY)
            try:
                yield Path(f"{self.path}.state").read_bytes()
            finally:
                os.close(go)
        finally:
            os.close(here)
