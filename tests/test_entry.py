"""The program `guestapi`: a hook rings without loading the operator's command, which gets all other arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import guestapi
from guestapi import entry


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


@pytest.fixture
def stored(tmp_path: Path) -> list[str]:
    """The program and the options of a configuration whose store has an instance c1."""
    config = tmp_path / "guestapi.toml"
    config.write_text(f'[store]\nurl = "sqlite:///{tmp_path}/store.db"\n')
    program = [sys.executable, "-c", "from guestapi.entry import main; main()", "--config", str(config)]
    subprocess.run([*program, "instance", "add", "c1", "-c", "user.a=1", "-d", "eth0,type=nic"], check=True)
    return program


PRINTING = ["config get c1 user.a", "instance list", "instance list -f json", "instance show c1", "export --all"]


def _full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def _closed() -> None:
    os.close(1)


@pytest.mark.parametrize("words", PRINTING)
@pytest.mark.parametrize(("spoil", "why"), [(_full, "No space left on device"), (_closed, "Bad file descriptor")])
def test_unwritable_output(stored: list[str], words: str, spoil: Callable[[], None], why: str) -> None:
    """Output that cannot be written is an error of one sentence, also if the descriptor is closed."""
    done = subprocess.run(
        [*stored, *words.split()],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=spoil,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stderr) == (1, f"Error: cannot write the output: {why}\n")


@pytest.mark.parametrize("words", ["config set c1 user.a=2", "instance rename c1 c2", "device unset c1 eth0 name"])
def test_closed_streams(stored: list[str], words: str) -> None:
    """A command that prints nothing works without any standard stream."""
    done = subprocess.run([*stored, *words.split()], check=False, preexec_fn=lambda: os.closerange(0, 3))
    assert done.returncode == 0


def test_interrupt_while_modules_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C before a command runs ends the program with a word and exit code 1, as one while it runs does."""

    def interrupted(_words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "_run_command", interrupted)
    monkeypatch.setattr(sys, "argv", ["guestapi", "instance", "list"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "Aborted!\n"
