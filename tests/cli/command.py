"""The operator's command for tests: within this process, which is quick, or as the program that is installed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from guestapi.cli.main import main
from guestapi.settings import Settings, StoreSettings
from tests.harness.service import COMMAND


@dataclass(frozen=True)
class Done:
    """What came of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, parsed."""
        assert self.code == 0, self.err
        return json.loads(self.out)


class Guestapi:
    """`guestapi --config FILE`, with a store of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "guestapi.toml"
        self.config.write_text(f'[store]\nurl = "sqlite:///{directory}/store.db"\nlock_seconds = 0.2\n')
        self.settings = Settings(store=StoreSettings(url=f"sqlite:///{directory}/store.db"))

    def __call__(self, *words: str, stdin: str | bytes = "") -> Done:
        """Run a command; what it does must be expected by it."""
        done = CliRunner().invoke(main, ["--config", str(self.config), *words], input=stdin, prog_name="guestapi")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Done(done.exit_code, done.stdout, done.stderr)

    def good(self, *words: str, stdin: str | bytes = "") -> str:
        """Run a command that must succeed without a word of complaint: what it prints."""
        done = self(*words, stdin=stdin)
        assert (done.code, done.err) == (0, "")
        return done.out

    def fails(self, *words: str, stdin: str | bytes = "") -> str:
        """Run a command that must fail with exit 1 and nothing printed: its one sentence, and its hint if any."""
        done = self(*words, stdin=stdin)
        assert (done.code, done.out) == (1, "")
        error, *hints = done.err.splitlines()
        assert error.startswith("Error: ")
        assert [hint.startswith("Hint: ") for hint in hints] in ([], [True])
        assert all(line.isprintable() for line in (error, *hints))
        return "; ".join([error.removeprefix("Error: "), *(hint.removeprefix("Hint: ") for hint in hints)])

    def misuse(self, *words: str) -> str:
        """Run a command that is called wrongly, exit 2: what it says, after how it is called."""
        done = self(*words)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("Usage: guestapi ")
        return done.err.rpartition("Error: ")[2].strip()

    def state(self) -> Any:
        """All instances, as JSON."""
        return self("instance", "list", "--format", "json").json

    def shown(self, name: str, project: str = "default") -> Any:
        """One instance, as JSON."""
        return self("instance", "show", name, "--project", project, "--format", "json").json

    def program(self, *words: str | bytes, environment: Mapping[str, str] | None = None) -> Done:
        """Run the installed program in a process of its own, with the configuration named in the environment."""
        done = subprocess.run(
            [COMMAND, *words],
            env={"GUESTAPI_CONFIG": str(self.config), "PATH": "/usr/bin:/bin", **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return Done(done.returncode, done.stdout, done.stderr)
