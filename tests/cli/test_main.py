"""The command as a whole: configuration, exit codes, one sentence for each error, and completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import guestapi as package
from guestapi.cli.grouping import Verb
from guestapi.cli.main import main
from guestapi.store import steps
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.service import COMMAND, USER
from tests.store.processes import database, other_process
from tools.reference import find_commands

#: Commands that take --fleet, but for those that are only for this host.
OF_FLEETS = ("apply", "config", "device", "export", "instance", "profile", "project")
OF_THIS_HOST = ("instance register", "instance unregister")
#: What commands need beside what their parameters say.
NEEDED = {"instance wait": ["--running"], "export": ["--all"]}


def completed(guestapi: Guestapi, line: str, **environment: str) -> list[str]:
    """Return bash's completions for the last word of a line."""
    words = line.split(" ")
    asked = {"_GUESTAPI_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    environment = {"GUESTAPI_CONFIG": str(guestapi.config), **asked, **environment}
    done = CliRunner().invoke(main, [], prog_name="guestapi", env=environment)
    assert done.stderr == ""
    return [offer.partition(",")[2] for offer in done.stdout.splitlines() if offer]


def test_version_and_help(guestapi: Guestapi) -> None:
    """The program prints its version, and help for every command, without a configuration."""
    guestapi.config = Path("/nowhere")
    assert package.__version__ in guestapi.program("--version").out
    for words in ([], ["instance"], ["instance", "add"], ["config", "set"], ["device", "add"], ["check"], ["serve"]):
        for flag in ("--help", "-h"):
            assert guestapi.good(*words, flag).startswith(" ".join(["Usage: guestapi", *words]))


def test_hooks_load_what_they_need(guestapi: Guestapi) -> None:
    """A container waits for its hook, so the hook does not import what only other commands need."""
    guestapi.good("instance", "add", "c1")
    code = (
        "import sys\nfrom guestapi.cli.main import main\n"
        "main(['hook', 'nspawn', 'stop', 'c1'], standalone_mode=False)\nprint(*sys.modules)"
    )
    environment = {"GUESTAPI_CONFIG": str(guestapi.config)}
    out = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert "guestapi.store.writing" in out.split()
    assert {"falcon", "gevent", "gunicorn", "rich"} & set(out.split()) == set()


@pytest.mark.parametrize("words", [["frobnicate"], ["--nothing"], ["instance", "frobnicate"], ["completion", "tcsh"]])
def test_misuse_is_exit_2(guestapi: Guestapi, words: list[str]) -> None:
    """A command or option that does not exist is named, with exit 2."""
    assert words[-1] in guestapi.misuse(*words)


def words_of(command: click.Command, file: Path) -> list[str]:
    """What a command must be given; `file` is there."""
    words = []
    for parameter in command.params:
        if not parameter.required:
            continue
        if isinstance(parameter, click.Option):
            words.append(parameter.opts[0])
        if isinstance(parameter.type, click.Choice):
            words.append(str(parameter.type.choices[0]))
        elif parameter.name in ("files", "file"):
            words.append(str(file))
        else:
            words.append({"kind": "nic", "seconds": "60s"}.get(str(parameter.name), "a=1"))
    return words


@pytest.mark.parametrize(
    ("name", "command"),
    [(name, one) for name, one in find_commands(main, "guestapi") if not isinstance(one, click.Group)],
)
def test_fleet_or_not(guestapi: Guestapi, name: str, command: click.Command) -> None:
    """With --fleet, a command asks the fleet's database, or refuses before it does anything; none is for this host."""
    assert isinstance(command, Verb)
    file = guestapi.directory / "definition.yaml"
    file.write_text("name: web\n")
    path = name.removeprefix("guestapi ")
    words = [*path.split(), *words_of(command, file), *NEEDED.get(path, [])]
    before = sorted(guestapi.directory.iterdir())
    error = guestapi.fails("--fleet", *words, stdin="name: web\n")
    if path.split()[0] in OF_FLEETS and path not in OF_THIS_HOST:
        assert error.startswith("fleet.url is not set; ")
    else:
        assert error == "this command is not about instances of a fleet; leave --fleet out"
    assert sorted(guestapi.directory.iterdir()) == before


def test_which_configuration(guestapi: Guestapi, tmp_path: Path) -> None:
    """--config takes precedence over $GUESTAPI_CONFIG; a missing named file is an error."""
    (tmp_path / "other").mkdir()
    other = Guestapi(tmp_path / "other")
    guestapi.good("instance", "add", "one")
    other.good("instance", "add", "two")
    assert "one" in guestapi.program("instance", "list").out
    assert "two" in guestapi.program("--config", str(other.config), "instance", "list").out
    done = guestapi.program("instance", "list", environment={"GUESTAPI_CONFIG": "/nowhere/x"})
    assert (done.code, done.out) == (1, "")
    assert "/nowhere/x" in done.err
    other.config = Path("/nowhere/y")
    assert "/nowhere/y" in other.fails("instance", "list")


@pytest.mark.parametrize(
    ("toml", "named"), [("[stor]", "stor"), ("[store]\nurl = 'postgresql://x'", "store.url"), ("[", "not TOML")]
)
def test_wrong_configuration(guestapi: Guestapi, toml: str, named: str) -> None:
    """With an invalid configuration every command fails with one sentence."""
    guestapi.config.write_text(toml)
    for words in (["instance", "list"], ["instance", "add", "c1"], ["config", "set", "c1", "a=1"]):
        assert named in guestapi.fails(*words)


def test_no_store_yet(guestapi: Guestapi) -> None:
    """Reading a store that does not exist is an error that states how to create it, and creates nothing."""
    for words in (["instance", "list"], ["instance", "show", "c1"], ["config", "get", "c1", "a"]):
        assert "guestapi instance add" in guestapi.fails(*words)
    assert not database(guestapi.settings).exists()


def test_store_in_use(c1: Guestapi) -> None:
    """While another process locks the store, reading works, and writing fails after the configured time."""
    code = "with Writer(settings).change():\n    send('in')\n    receive()\n"
    with other_process(c1.settings, code) as other:
        assert other.read_line() == "in"
        assert [one["name"] for one in c1.state()] == ["c1"]
        assert "try again" in c1.fails("config", "set", "c1", "user.a=9")
        other.write_line("done")
        other.done()
    c1.good("config", "set", "c1", "user.a=9")


def test_program_errors_have_no_traceback(c1: Guestapi) -> None:
    """The installed program reports an operator's error in one line on standard error, with exit code 1."""
    database(c1.settings).write_bytes(b"garbage" * 1000)
    for words in (["instance", "list"], ["config", "set", "c1", "a=1"]):
        done = c1.program(*words)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("Error: ")
        assert done.err.count("\n") == 1


@pytest.mark.root
def test_other_user_gets_a_sentence(c1: Guestapi) -> None:
    """A user without access to store and configuration gets an error of one line, no traceback."""
    done = subprocess.run(
        [COMMAND, "--config", c1.config, "instance", "list"],
        capture_output=True,
        text=True,
        check=False,
        user=USER,
        group=USER,
        extra_groups=[],
        cwd="/",
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_output_into_a_closed_pipe(c1: Guestapi) -> None:
    """`guestapi instance list | head -0` ends quietly."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [COMMAND, "--config", c1.config, "instance", "list"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert b"Traceback" not in process.stderr
    assert process.returncode != 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(guestapi: Guestapi, shell: str) -> None:
    """Each shell gets a script that calls this program; bash accepts its own."""
    script = guestapi.good("completion", shell)
    assert "_GUESTAPI_COMPLETE" in script
    assert f"{shell}_complete" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_completion_of_commands(guestapi: Guestapi) -> None:
    """Commands and options are completed, without a store."""
    asked = {"_GUESTAPI_COMPLETE": "bash_complete", "COMP_WORDS": "guestapi co", "COMP_CWORD": "1"}
    assert guestapi.program(environment=asked).out.split() == ["plain,completion", "plain,config"]
    assert set(completed(guestapi, "guestapi instance ")) == {
        *("add", "info", "list", "move", "register", "remove", "rename", "show", "unregister", "wait")
    }
    assert "--pid" in completed(guestapi, "guestapi instance start c1 --p")


def test_completion_of_instances(guestapi: Guestapi) -> None:
    """Instances are completed by name, from the given project or the default one."""
    with Writer(guestapi.settings, create=True).change() as change:
        for project, name in (("default", "c1"), ("default", "c2"), ("default", "web"), ("p", "c3")):
            steps.add(change, project, name)
    assert completed(guestapi, "guestapi config set c") == ["c1", "c2"]
    assert completed(guestapi, "guestapi device add ") == ["c1", "c2", "web"]
    assert completed(guestapi, "guestapi instance show --project p ") == ["c3"]
    assert completed(guestapi, f"guestapi --config {guestapi.config} instance show w", GUESTAPI_CONFIG="/no") == ["web"]


def test_completion_without_a_store(guestapi: Guestapi) -> None:
    """Without a store or configuration there are no completions and no messages."""
    assert completed(guestapi, "guestapi instance show ") == []
    assert completed(guestapi, "guestapi instance show ", GUESTAPI_CONFIG="/nowhere") == []
