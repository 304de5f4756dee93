"""The commands of CI: the same here and on a hosted runner, and all of them exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
SCRIPT = (CHECKOUT / ".ci/run").read_text()


def test_hosted_ci_runs_the_script() -> None:
    """The workflow file runs .ci/run with CI=true, and has no list of commands of its own."""
    workflow = (CHECKOUT / ".github/workflows/ci.yml").read_text()
    assert "run: bash .ci/run" in workflow
    assert 'CI: "true"' in workflow
    assert not re.search(r"^\s*- run: make\b", workflow, re.MULTILINE)


def test_commands_exist() -> None:
    """Every 'make' in the script names a target of the Makefile. `make test-debian13` runs `make test-fast`."""
    targets = re.findall(r"^(?:[^#\n]*[ \t])?make ([a-z0-9-]+)", SCRIPT, re.MULTILINE)
    assert {"lint", "test", "test-newest", "test-debian13", "test-machine", "demo"} <= set(targets)
    inside = subprocess.run(["make", "-n", "test-debian13"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert re.search(r" -- make test-fast demo test-podman test-guestctl$", inside.stdout, re.MULTILINE)
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=CHECKOUT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_names_each_target() -> None:
    """'make help' has a line for each target that a person may use."""
    output = subprocess.run(["make", "help"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-fast", "test-newest", "lint", "update", "install", "uninstall"):
        assert re.search(rf"^make {target} +\w", output, re.MULTILINE), target
