"""A hook that blocks its container's start until a test lets it go on."""

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
    """The hook's program, at `path`. It ends when the block of `held` does."""

    def __init__(self, path: Path) -> None:
        """Make the program.

        Args:
            path: the path of the program.
        """
        self.path = path
        path.write_text(_SCRIPT)
        path.chmod(0o755)
        for pipe in ("here", "go"):
            os.mkfifo(f"{path}.{pipe}")

    @contextmanager
    def held(self, seconds: float = 20) -> Iterator[bytes]:
        """Wait until a runtime has called the hook; yield the hook's standard input."""
        here = os.open(f"{self.path}.here", os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert select.select([here], [], [], seconds)[0], "the hook was not called"
            # The hook's last command opens the other end.
            go = os.open(f"{self.path}.go", os.O_WRONLY)
            try:
                yield Path(f"{self.path}.state").read_bytes()
            finally:
                os.close(go)
        finally:
            os.close(here)
