"""`make demo`: its output is in the README, it works below a closed directory, and it explains a failure."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.enterable import CHECKOUT
from tests.harness.scratch import SCRATCH

pytestmark = pytest.mark.root

#: Run by /bin/sh in a mount namespace: puts the checkout ($1) below a directory with mode 0700 ($2), then runs the
#: rest.
CLOSED = """
set -e
mount --bind "$1" /mnt
mount -t tmpfs -o mode=0700 tmpfs "$2"
mkdir "$1"
mount --bind /mnt "$1"
umount /mnt
cd "$1"
shift 2
exec "$@"
"""

#: Patterns that vary from run to run, and their replacements.
VARYING = (
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"),
    (r'"location":"[^"]*"', '"location":"HOST"'),
    (r"--pid \d+", "--pid PID"),
    (r"PID +SOURCE", "PID SOURCE"),
    (r"Ready +\d+", "Ready PID"),
    (r"PID +UID", "PID UID"),
    (r"user\.password +\d+", "user.password PID"),
    (r"took [\d.]+ s", "took SECONDS s"),
)


def demo(*words: str, before: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the demo as `make demo` does."""
    command = [*(before or []), sys.executable, "-m", "tests.demo", *words]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)


def normalised(text: str) -> list[str]:
    """Return the lines of an output, with varying parts replaced."""
    found = []
    for line in text.strip().splitlines():
        for pattern, replacement in VARYING:
            line = re.sub(pattern, replacement, line)
        found.append(line)
    return found


def shown(command: str) -> str:
    """Return the output that the README shows for a command: the rest of its block."""
    blocks = re.findall(r"```console\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(f"# {command}\n"))
    return str(block.partition("\n")[2])


def test_readme_shows_the_output() -> None:
    """The README's block equals the output, except for varying parts."""
    done = demo("namespaces")
    assert (done.returncode, done.stderr) == (0, "")
    assert normalised(done.stdout) == normalised(shown("make demo"))


def test_with_lxc() -> None:
    """With LXC installed, the container is one of LXC, which registers itself; the steps are the same."""
    assert shutil.which("lxc-start"), "make test installs it"
    done = demo()
    assert (done.returncode, done.stderr) == (0, "")
    printed, readme = normalised(done.stdout), normalised(shown("make demo"))
    steps = [line for line in readme if line.startswith("  c1#")]
    assert [line for line in printed if line.startswith("  c1#")] == steps
    assert "host# lxc-start c1" in printed
    assert not any("instance start" in line for line in printed)


def test_run_mounted_noexec() -> None:
    """Debian's initramfs mounts /run noexec; then the container's root file system is elsewhere."""
    script = 'mount -t tmpfs -o noexec tmpfs /run && exec "$@"'
    done = demo(before=["unshare", "--mount", "/bin/sh", "-c", script, "noexec"])
    assert (done.returncode, done.stderr) == (0, "")


def test_below_a_closed_directory() -> None:
    """The demo works below a directory with mode 0700, such as /root, which the service's user cannot enter."""
    before = ["unshare", "--mount", "/bin/sh", "-c", CLOSED, "closed", str(CHECKOUT), str(CHECKOUT.parent)]
    done = demo("namespaces", before=before)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("It has removed everything that it made.\n")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can enter, unlike pytest's own ones."""
    with tempfile.TemporaryDirectory(prefix="guestapi-", dir=SCRATCH) as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_failure_is_explained(open_directory: Path) -> None:
    """A failing step ends the demo with the service's log and the reason; nothing is left behind."""
    # The program that starts the service as another user.
    setpriv = open_directory / "setpriv"
    setpriv.write_text("#!/bin/sh\necho 'broken on purpose' >&2\nexit 1\n")
    setpriv.chmod(0o755)
    done = demo("namespaces", before=["env", f"PATH={open_directory}:{os.environ['PATH']}"])
    assert done.returncode == 1
    assert "The log of the service:" in done.stderr
    assert "broken on purpose" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("The demo failed: curl http://x/: ")
    left = re.search(SCRATCH + r"/guestapi-demo-\w+", done.stderr)
    assert left is not None
    assert not Path(left[0]).exists()
