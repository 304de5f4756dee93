"""Common to all commands: output to terminals and pipes, without control characters of guests."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import unicodedata

import pytest

from guestapi.store import steps
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.waiting import TIMEOUT

#: Clears the screen and sets the title, in seven and in eight bits, rings the bell, moves back, deletes.
EVIL = "a\x1b[2J\x1b]0;owned\x07b\x9b31m\rc\x08\x7f\u0085"
#: Rich's own escape sequences for colours and weights.
STYLE = re.compile(r"\x1b\[[0-9;]*m")


def on_terminal(guestapi: Guestapi, commands: list[list[str]]) -> str:
    """Return the output of these commands, run in one process on a terminal."""
    code = "import sys, json; from guestapi.cli.main import main\nfor words in json.loads(sys.argv[1]):\n"
    code += "    main(['--config', sys.argv[2], *words], standalone_mode=False)"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(commands), guestapi.config],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={"TERM": "xterm", "COLUMNS": "200", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:
        pass  # EIO: the other side is closed.
    os.close(ours)
    assert process.wait(TIMEOUT) == 0
    return written.decode()


@pytest.mark.parametrize("form", ["table", "json"])
def test_values_do_not_drive_the_terminal(guestapi: Guestapi, form: str) -> None:
    """Control characters in values are not written to a terminal; the other characters are."""
    with Writer(guestapi.settings, create=True).change() as change:
        steps.add(change, "default", "c1", config={"user.evil": EVIL}, devices={"d": {"type": "disk", "path": EVIL}})
    commands = [["config", "show", "c1"], ["device", "list", "c1"], ["instance", "show", "c1"]]
    if form == "json":
        commands += [["config", "get", "c1", "user.evil"]]
    written = on_terminal(guestapi, [[*words, "--format", form] for words in commands])
    written = STYLE.sub("", written).replace("\r\n", "\n")
    assert written.count("owned") == len(commands) + 1
    assert not {c for c in written if unicodedata.category(c) == "Cc"} - {"\n"}


@pytest.mark.parametrize(
    "words",
    [
        ["instance", "show", EVIL],
        ["instance", "show", "c1", "--project", EVIL],
        ["instance", "add", EVIL],
        ["instance", "add", "c2", "--uuid", EVIL],
        ["instance", "add", "c2", "--location", EVIL],
        ["config", "get", "c1", EVIL],
        ["config", "set", "c1", f"{EVIL}=1"],
        ["config", "set", "c1", f"user.a=@{EVIL}"],
        ["device", "add", "c1", EVIL, "nic"],
        ["device", "remove", "c1", EVIL],
        ["config", "set", "c1", f"{EVIL}=1", f"{EVIL}=2"],
    ],
    ids=lambda words: " ".join(words).replace(EVIL, "EVIL"),
)
def test_errors_do_not_drive_the_terminal(c1: Guestapi, words: list[str]) -> None:
    """Names in errors are quoted without their control characters."""
    done = c1(*words)
    assert done.code in (1, 2)
    assert not {c for c in done.err if unicodedata.category(c) == "Cc"} - {"\n"}


def test_pipe_has_no_width(c1: Guestapi) -> None:
    """Output to a pipe is neither wrapped nor truncated."""
    value = "x" * 110
    c1.good("device", "set", "c1", "eth0", *(f"user.option{number}={value}" for number in range(5)))
    (line,) = [line for line in c1.program("device", "list", "c1").out.splitlines() if "eth0" in line]
    assert line.count(value) == 5


def test_json_of_any_text(guestapi: Guestapi) -> None:
    """JSON output is the exact value, with any characters."""
    with Writer(guestapi.settings, create=True).change() as change:
        steps.add(change, "default", "c1", config={"user.evil": EVIL + "\0é\U0001f600\u2028"})
    assert guestapi("config", "get", "c1", "user.evil", "--format", "json").json == EVIL + "\0é\U0001f600\u2028"


def test_arguments_that_are_no_text(c1: Guestapi) -> None:
    """Arguments that are not valid UTF-8 are refused in one sentence, as key, value and name, without any change."""
    done = c1.program(b"config", b"set", b"c1", b"user.ok=1", b"user.a=\xff")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    # Python's form of such arguments (PEP 383).
    c1.fails("config", "set", "c1", "user.ok=1", "user.\udcff=1")
    c1.fails("instance", "add", "c\udcff")
    c1.fails("instance", "add", "c2", "--project", "p\udcff")
    c1.fails("device", "add", "c1", "d\udcff", "nic")
    c1.fails("device", "set", "c1", "eth0", "mtu=1", "name=\udcff")
    assert c1.shown("c1")["config"] == {"user.a": "1", "user.b": "2"}
    assert c1.shown("c1")["devices"] == {"eth0": {"type": "nic", "name": "eth0"}}
    assert len(c1.state()) == 1


@pytest.mark.parametrize(("environment", "form"), [({}, "table"), ({"LC_ALL": "C"}, "json")])
def test_hooks_have_no_locale(c1: Guestapi, environment: dict[str, str], form: str) -> None:
    """In the minimal environment of a hook or a unit, text is written as UTF-8."""
    c1.good("config", "set", "c1", "user.a=é\U0001f600")
    done = c1.program("instance", "show", "c1", "--format", form, environment=environment)
    assert (done.code, done.err) == (0, "")
    assert "é\U0001f600" in done.out
