"""The program `guestapi`: a hook rings without loading the operator's command, which gets all other arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import guestapi


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the program as its script does, and print the loaded modules at the end."""
    code = (
        "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from guestapi.entry import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
    )


@pytest.mark.parametrize("source", ["lxc", "nspawn"])
def test_hook(tmp_path: Path, source: str) -> None:
    """A hook without a follower reports it, and lets the container start; no module of the command is loaded."""
    config = tmp_path / "guestapi.toml"
    config.write_text(f'sources.doorbells = "{tmp_path}"\n')
    for words in (["--config", str(config)], [f"--config={config}"]):
        done = run(*words, "hook", source)
        assert done.returncode == 0
        assert f"no service listens at {tmp_path}/{source}.sock" in done.stderr
        assert {"click", "msgspec", "sqlite3", "json", "socket"} & set(done.stderr.split()) == set()


def test_end(tmp_path: Path) -> None:
    """The hooks of 0.1 for a container's end do nothing, and report no missing follower."""
    config = f"--config={tmp_path}/nothing.toml"
    assert "nobody" not in run(config, "hook", "lxc", "web", "lxc", "stop").stderr
    assert "nobody" not in run(config, "hook", "nspawn", "stop", "web").stderr


def test_refuse(tmp_path: Path) -> None:
    """With on-failure = "refuse" a container that is not registered does not start."""
    config = tmp_path / "guestapi.toml"
    config.write_text(f'[hooks]\non-failure = "refuse"\n[sources]\ndoorbells = "{tmp_path}"\n')
    done = run("--config", str(config), "hook", "lxc")
    assert done.returncode == 1
    assert "the container does not start" in done.stderr
    # An unreadable configuration counts as "continue".
    config.write_text(f'[hooks\non-failure = "refuse"\ndoorbells = "{tmp_path}"\n')
    assert run("--config", str(config), "hook", "lxc").returncode == 0


def test_command() -> None:
    """All other arguments are for the operator's command, also the help of a hook."""
    assert guestapi.__version__ in run("--version").stdout
    assert run("hook", "lxc", "--help").stdout.startswith("Usage: ")
    assert run("--config").returncode == 2
