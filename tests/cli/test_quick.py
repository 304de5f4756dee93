"""The fast path of `config get` and `config set`: the modules that it loads, and its equality with the command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from guestapi import defaults
from guestapi.cli.quick import parse, read_options
from guestapi.errors import GuestapiError
from guestapi.settings import Settings, load
from tests.cli.command import Guestapi
from tests.harness.service import COMMAND

#: Modules that the two commands do not need. `inspect`, which dataclasses import, takes longest.
DEAR = {"argparse", "asyncio", "click", "gevent", "logging", "msgspec", "pathlib", "rich", "sqlalchemy", "subprocess"}
DEAR |= {"inotify_simple", "urllib", "uuid", "yaml", "falcon", "gunicorn", "httpx", "ctypes", "difflib", "http"}


def loaded(guestapi: Guestapi, *words: str) -> set[str]:
    """Return the modules that the installed program loads for a command, after those with which Python starts."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", COMMAND, *words],
        env={"GUESTAPI_CONFIG": str(guestapi.config), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    lines = re.findall(r"^import time: +\d+ \| +\d+ \| ( *)(\S+)$", done.stderr, re.MULTILINE)
    names = [name for _indent, name in lines]
    return set(names[names.index("site") + 1 :])


@pytest.mark.parametrize("words", [("get", "c1", "user.a"), ("set", "c1", "user.a=7"), ("set", "c1", "user.a", "8")])
def test_loaded_modules(c1: Guestapi, words: tuple[str, ...]) -> None:
    """A command loads only the listed modules, so one more makes this test fail."""
    found = loaded(c1, "config", *words)
    assert "guestapi.store.engine" in found
    assert {name for name in found if name.split(".")[0] in DEAR} == set()
    assert {name for name in found if name.startswith("guestapi.")} <= {
        *(f"guestapi.{one}" for one in ("cli", "defaults", "encoding", "entry", "errors", "known", "model", "names")),
        # What a change leaves in the journal.
        *("guestapi.audit", "guestapi.audit_log", "guestapi.store.recorded"),
        *(f"guestapi.cli.{one}" for one in ("quick", "values", "words")),
        *(
            f"guestapi.store.{one}"
            for one in ("bell", "changes", "engine", "errors", "files", "layer_rows", "layers", "lookup")
        ),
        *(f"guestapi.store.{one}" for one in ("rows", "steps", "tables", "transaction", "view", "writing")),
        *("guestapi.store", "guestapi.switches"),
    }


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("config get c1 user.a", ("get", None, "default", ("c1", "user.a"))),
        ("config get --project p c1 user.a", ("get", None, "p", ("c1", "user.a"))),
        ("--project=p config get c1 user.a", ("get", None, "p", ("c1", "user.a"))),
        ("--config f config set c1 a=1 b=2", ("set", "f", "default", ("c1", "a=1", "b=2"))),
        ("config set c1 a 1", ("set", None, "default", ("c1", "a", "1"))),
        ("config set c1", None),
        ("config get c1", None),
        ("config get c1 a b", None),
        ("config get c1 a --format json", None),
        ("config get c1 a --help", None),
        ("config get -- c1 a", None),
        ("config get c1 a --project", None),
        ("config get c1 a --project p --project q", None),
        ("config get c1 a --config f", None),
        ("--fleet config get c1 a", None),
        ("config --fleet set c1 a=1", None),
        ("config show c1", None),
        ("instance list config", None),
        ("config", None),
        ("", None),
    ],
)
def test_calls_with_a_fast_path(words: str, call: tuple[object, ...] | None) -> None:
    """Only a valid call of one of the two commands, with no other option, takes the fast path."""
    assert parse(words.split()) == call


@pytest.mark.parametrize(
    "words",
    [
        ("get", "c1", "user.a"),
        ("get", "c1", "user.none"),
        ("get", "c2", "user.a"),
        ("get", "c1", "user.a", "--project", "p"),
        ("get", "c1", "user.\x1b"),
        ("set", "c1", "user.a=9"),
        ("set", "c1", "user.a", "9"),
        ("set", "c1", "user.a="),
        ("set", "c1", "user.a"),
        ("set", "c1", "a=1", "a=2"),
        ("set", "c1", "user.a=@-", "user.b=@-"),
        ("set", "c1", "user.a=@/nowhere"),
        ("set", "c2", "user.a=9"),
        ("set", "c1", "security.devlxd=maybe"),
        ("set", "c1", "limits.memroy=1GiB"),
        ("set", "c1", "user.\n=1"),
    ],
)
def test_fast_path_equals_the_command(c1: Guestapi, words: tuple[str, ...]) -> None:
    """Exit code, output, errors and store are the same with the fast path and without it."""
    first = c1.program("config", *words)
    before = c1.state()
    c1.good("config", "set", "c1", "user.a=1")
    c1.good("config", "unset", "c1", "limits.memroy")
    if first.code == 0 and words[0] == "set":
        assert before != c1.state()
    second = c1("config", *words)
    assert (first.code, first.out, first.err) == (second.code, second.out, second.err)
    assert before == c1.state() or first.code != 0


FILES = [
    "",
    "[store]\nlock_seconds = 1",
    "[store]\nlock_seconds = 3600.0\nconfiguration_bytes = 1048576",
    "[store]\nlock_seconds = 0",
    "[store]\nlock_seconds = 3601",
    "[store]\nlock_seconds = true",
    "[store]\nlock_seconds = nan",
    "[store]\nconfiguration_bytes = 1048575",
    "[store]\nconfiguration_bytes = 1048576.0",
    "[store]\nurl = 7",
    "[store]\nuri = 'x'",
    "store = 7",
    "[events]\nkeep_entries = 1\nkeep_seconds = 1",
    "[events]\nkeep_entries = 0",
    "[events]\nkeep_entries = 10000001",
    "[events]\nkeep_seconds = 0",
    "[stor]",
    "[limits]\nbody = 2048",
    "[",
    "x = '\xff'",
]


@pytest.mark.parametrize("text", FILES)
def test_fast_path_reads_the_same_settings(tmp_path: Path, text: str) -> None:
    """The fast path reads the same settings as the command; a file that the command would refuse is left to it."""
    file = tmp_path / "guestapi.toml"
    file.write_text(text, encoding="latin-1")
    try:
        whole = load(file)
    except GuestapiError:
        assert read_options(str(file)) is None
        return
    options = read_options(str(file))
    assert options is not None
    for table in ("store", "events"):
        for field in msgspec.structs.fields(getattr(whole, table)):
            assert getattr(getattr(options, table), field.name) == getattr(getattr(whole, table), field.name)


def test_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration file that was named must exist; the default one may be missing."""
    monkeypatch.delenv(defaults.FILE_VARIABLE, raising=False)
    monkeypatch.setattr(defaults, "FILE", str(tmp_path / "none.toml"))
    options = read_options(None)
    assert options is not None
    assert options.store.url == Settings().store.url
    assert read_options(str(tmp_path / "none.toml")) is None
    monkeypatch.setenv(defaults.FILE_VARIABLE, str(tmp_path / "none.toml"))
    assert read_options(None) is None


def test_tables_are_those_of_the_settings() -> None:
    """The accepted tables of the configuration are those of `Settings`."""
    assert {field.encode_name for field in msgspec.structs.fields(Settings)} - {"file"} == defaults.TABLES


def test_closed_pipe(c1: Guestapi) -> None:
    """`guestapi config get ... | head -0` ends with 1 and without an error message."""
    reading = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reading.wait()
    done = subprocess.run(
        [COMMAND, "--config", c1.config, "config", "get", "c1", "user.a"],
        stdout=reading.stdin,
        stderr=subprocess.PIPE,
        check=False,
    )
    assert reading.stdin is not None
    reading.stdin.close()
    assert (done.returncode, done.stderr) == (1, b"")
