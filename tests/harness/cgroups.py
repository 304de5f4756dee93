"""Control groups of the tests' own, by a mount that only the command here sees."""

from __future__ import annotations

import subprocess
import tempfile

from tests.harness.waiting import until


def remove_cgroup(name: str) -> None:
    """Remove a cgroup of version 2 below the root, with all below it. Whatever was in it has been killed."""
    with tempfile.TemporaryDirectory() as place:
        script = f"mount -t cgroup2 cgroup2 {place}; find {place}/{name} -depth -type d -exec rmdir {{}} +"
        command = ["unshare", "--mount", "/bin/sh", "-c", script]
        until(
            lambda: subprocess.run(command, check=False, capture_output=True).returncode == 0,
            f"the end of all processes of the cgroup {name}",
        )
