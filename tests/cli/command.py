"""The operator's command for tests: in this process, which is fast, or as the installed program."""

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
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output, parsed as JSON."""
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
        """Run a command; an unexpected exception is raised."""
        done = CliRunner().invoke(main, ["--config", str(self.config), *words], input=stdin, prog_name="guestapi")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Done(done.exit_code, done.stdout, done.stderr)

    def good(self, *words: str, stdin: str | bytes = "") -> str:
        """Run a command that must succeed without a message on standard error; return its output."""
        done = self(*words, stdin=stdin)
        assert (done.code, done.err) == (0, ""), done.err
        return done.out

    def fails(self, *words: str, stdin: str | bytes = "") -> str:
        """Run a command that must fail with exit code 1 and no output; return its error and its hint, if it has one."""
        done = self(*words, stdin=stdin)
        assert (done.code, done.out) == (1, ""), done.out
        error, *hints = done.err.splitlines()
        assert error.startswith("Error: ")
        assert [hint.startswith("Hint: ") for hint in hints] in ([], [True])
        assert all(line.isprintable() for line in (error, *hints))
        return "; ".join([error.removeprefix("Error: "), *(hint.removeprefix("Hint: ") for hint in hints)])

    def misuse(self, *words: str) -> str:
        """Run a command with wrong usage, which exits with 2; return the message after the usage line."""
        done = self(*words)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("Usage: guestapi ")
        return done.err.rpartition("Error: ")[2].strip()

    def state(self) -> Any:
        """Return all instances."""
        return self("instance", "list", "--format", "json").json

    def shown(self, name: str, project: str = "default") -> Any:
        """Return one instance."""
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
