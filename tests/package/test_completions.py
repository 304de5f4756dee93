"""zsh and fish complete `guestapi` and `guestctl` with the installed files, as somebody does who presses Tab."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

import pytest

from guestapi.guest import guestctl
from guestapi.store import steps
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.service import COMMAND
from tests.harness.waiting import until

#: Not because they need root, but so that the fast tests need no zsh and no fish.
pytestmark = pytest.mark.root

CHECKOUT = Path(__file__).parents[2]
#: Of zsh: press Ctrl-X to write the line to the file `lines`, and to clear it.
_SETUP = """\
{get}
note() {{ print -r -- "$BUFFER|" >>{place}/lines; BUFFER= }}
zle -N note; bindkey '^X' note; bindkey '^I' complete-word
print ready >{place}/ready
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files as `make install` names them: guestapi's and guestctl's of each shell."""
    directory = tmp_path_factory.mktemp("completions")
    subprocess.run([sys.executable, "tools/manual.py", directory], cwd=CHECKOUT, check=True)
    for name in ("guestapi", "guestctl"):
        shutil.copy(directory / f"{name}.zsh", directory / f"_{name}")
    return directory


@pytest.fixture
def guestapi(tmp_path: Path) -> Guestapi:
    """The command, with the instances `c1` and `web`."""
    command = Guestapi(tmp_path)
    with Writer(command.settings, create=True).change() as change:
        for name in ("c1", "web"):
            steps.add(change, "default", name)
    return command


def environment() -> dict[str, str]:
    """Return an environment in which the shells find the programs."""
    return {**os.environ, "PATH": f"{COMMAND.parent}:{os.environ['PATH']}", "TERM": "dumb"}


def verbs_and_options() -> tuple[list[str], list[str]]:
    """Return the commands of guestctl, and the options of all of them."""
    (verbs,) = (action.choices for action in guestctl.parser()._actions if isinstance(action.choices, dict))
    parsers = [guestctl.parser(), *verbs.values()]
    return list(verbs), sorted({word for each in parsers for word in each._option_string_actions if word[:2] == "--"})


def shortest(word: str, among: list[str]) -> str:
    """Return the shortest beginning of a word that no other word has."""
    beginnings = (word[:length] for length in range(1, len(word) + 1))
    return next((one for one in beginnings if not any(o.startswith(one) for o in among if o != word)), word)


#: How zsh gets the completions: from the files of a directory by itself, or by `eval`, as docs/operations.md says.
LOADED = "fpath=({place} $fpath); autoload -Uz compinit; compinit -D -u"
PRINTED = 'autoload -Uz compinit; compinit -D -u; eval "$(guestapi completion zsh)"'


class Zsh:
    """An interactive zsh at a terminal."""

    def __init__(self, files: Path, get: str = LOADED) -> None:
        """Start it.

        Args:
            files: a directory with completion files.
            get: how zsh gets the completions.
        """
        self._lines = files / "lines"
        self._lines.write_text("")
        ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            ["zsh", "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), start_new_session=True
        )
        os.close(theirs)
        self._terminal = ours
        # Read, so that zsh can go on writing.
        threading.Thread(target=self._drain, daemon=True).start()
        (files / "ready").unlink(missing_ok=True)
        os.write(ours, _SETUP.format(place=files, get=get.format(place=files)).encode())
        until((files / "ready").exists, "zsh")

    def __enter__(self) -> Zsh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def tab(self, typed: str) -> str:
        """Type this and press Tab; return the line."""
        before = self._lines.read_text()
        os.write(self._terminal, typed.encode() + b"\t\x18")
        until(lambda: len(self._lines.read_text().splitlines()) > len(before.splitlines()), "the line")
        return self._lines.read_text()[len(before) :].rstrip("\n").removesuffix("|")

    def _drain(self) -> None:
        try:
            while os.read(self._terminal, 4096):
                pass
        except OSError:
            pass  # The shell has ended.
        finally:
            os.close(self._terminal)


def fish(files: Path, name: str, typed: str) -> list[str]:
    """Return what fish offers for a line of the command `name`."""
    script = f"source {files}/{name}.fish; complete --do-complete '{typed}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stderr == ""
    # A description follows a tab.
    return [re.split(r"\t", line)[0] for line in done.stdout.splitlines()]


def test_zsh_completes_guestctl(files: Path) -> None:
    """Each command is completed from its beginning, and each option, before or after the command."""
    verbs, options = verbs_and_options()
    with Zsh(files) as zsh:
        for verb in verbs:
            assert zsh.tab(f"guestctl {shortest(verb, verbs)}") == f"guestctl {verb} "
        for option in options:
            for line in ("guestctl ", "guestctl get user.role "):
                assert zsh.tab(line + shortest(option, options)) == f"{line}{option} "


def test_fish_completes_guestctl(files: Path) -> None:
    """Each command and each option is offered, and no file."""
    verbs, options = verbs_and_options()
    assert set(fish(files, "guestctl", "guestctl ")) == set(verbs)
    assert set(fish(files, "guestctl", "guestctl get --")) >= set(options)


@pytest.mark.parametrize("get", [LOADED, PRINTED], ids=["loaded", "printed"])
def test_zsh_completes_guestapi(files: Path, guestapi: Guestapi, get: str) -> None:
    """Commands are completed, also at the second level, and instances by the store that a line names; every time."""
    line = f"guestapi --config {guestapi.config} instance show "
    with Zsh(files, get) as zsh:
        assert zsh.tab("guestapi inst") == "guestapi instance "
        assert zsh.tab("guestapi instance unr") == "guestapi instance unregister "
        assert zsh.tab(line + "w") == f"{line}web "


def test_fish_completes_guestapi(files: Path, guestapi: Guestapi) -> None:
    """As for zsh."""
    assert fish(files, "guestapi", "guestapi inst") == ["instance"]
    assert fish(files, "guestapi", "guestapi instance unr") == ["unregister"]
    assert fish(files, "guestapi", f"guestapi --config {guestapi.config} instance show ") == ["c1", "web"]
