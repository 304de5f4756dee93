"""What the command ``guestapi`` runs: the operator's command, or, without loading any of that, what is in a hurry.

A container waits for its hook, and so do all that start with it: the library of the command line alone takes ten times
as long as a ring. Scripts call ``config get`` and ``config set`` in loops.
"""

from __future__ import annotations

import os
import sys

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
