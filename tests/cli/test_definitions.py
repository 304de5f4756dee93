"""Definitions: `add`, `apply` and `edit` accept the output of `show` and `export`, byte for byte."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestapi.cli.definitions import as_document, parse, to_yaml
from guestapi.errors import OperatorError
from guestapi.model import Init
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import steps
from guestapi.store.definitions import Definition
from guestapi.store.lookup import get_instance, get_layers
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.service import COMMAND
from tests.harness.waiting import TIMEOUT
from tests.store.processes import log_entries

#: Any text that a value can be: control characters, all kinds of line ends, YAML, and invalid characters.
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from("\n\r\t \0\x1b\x7f\x85\xa0\u2028\ufeff\ufffe:#-'\"|>{}[]&*!%@`?,~0xé😀")),
    st.sampled_from(["", "true", "null", "~", "1", "1e3", "0o7", "2026-11-26", "=", "<<", "---", "...", "- a", "a: b"]),
)

AWKWARD = {
    "user.script": "#!/bin/sh\n\necho 'é'\n",
    "user.spaces": "  two\n trailing \n\n",
    "user.crlf": "a\r\nb\r\n",
    "user.binary": "\0\x01\x1b[2J\x7f\x85\u2028\ufeff",
    "user.yes": "yes",
    "user.number": "007",
    "user.latin": "Ã©Â€",
}


@given(st.dictionaries(TEXT.filter(bool), TEXT, max_size=5))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_texts_are_parsed_unchanged(config: dict[str, str]) -> None:
    """A printed definition is parsed to the same texts."""
    definition = Definition("c1", config=config, devices={"d": {"type": "disk", **config}}, profiles=("default",))
    printed = to_yaml(as_document(definition))
    assert parse(printed.encode(), "x") == [definition]
    # Other YAML parsers read the same.
    assert yaml.safe_load(printed)["config"] == config


@given(st.lists(st.dictionaries(st.just("user.a"), TEXT, max_size=1), min_size=2, max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_several_documents_in_a_stream(configs: list[dict[str, str]]) -> None:
    """Several definitions are printed as the documents of one stream."""
    wanted = [Definition(f"c{number}", config=config) for number, config in enumerate(configs)]
    assert parse(to_yaml(*map(as_document, wanted)).encode(), "x") == wanted


@pytest.fixture
def awkward(guestapi: Guestapi) -> Guestapi:
    """The command; the instance web has all kinds of values, devices, a location and a profile."""
    guestapi.good("profile", "create", "small", "limits.cpu=1")
    with Writer(guestapi.settings, create=True).change() as change:
        steps.add(
            change, "default", "web", location="n1", config=AWKWARD, devices={"eth0": {"type": "nic", "mtu": "1"}}
        )
    guestapi.good("profile", "assign", "web", "small")
    return guestapi


def test_show_and_add(awkward: Guestapi, tmp_path: Path) -> None:
    """add accepts the output of show from a file and from standard input; show then prints the same bytes."""
    before = awkward.good("instance", "show", "web")
    definition = tmp_path / "web.yaml"
    definition.write_bytes(before.encode())
    program: list[str | Path] = [COMMAND, "--config", awkward.config, "instance"]
    ways: list[tuple[list[str], str]] = [(["--file", str(definition)], "/dev/null")]
    ways += [(["--file", "-"], str(definition)), ([], str(definition))]
    for words, stdin in ways:
        awkward.good("instance", "remove", "web")
        with open(stdin, "rb") as opened:
            done = subprocess.run([*program, "add", "web", *words], stdin=opened, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        shown = subprocess.run([*program, "show", "web"], stdin=subprocess.DEVNULL, capture_output=True, check=True)
        assert shown.stdout == before.encode()
    awkward.good("instance", "remove", "web")
    awkward.good("instance", "add", "web", stdin=before)
    assert awkward.good("instance", "show", "web") == before
    assert awkward.shown("web")["config"] == {"limits.cpu": "1", **AWKWARD}


def test_heredoc(guestapi: Guestapi) -> None:
    """A definition can be a here-document of a script."""
    script = f"{COMMAND} --config {guestapi.config} instance add web <<EOF\nconfig:\n  user.a: '1'\nEOF\n"
    subprocess.run(["sh", "-c", script], check=True)
    assert guestapi.shown("web")["config"] == {"user.a": "1"}


@pytest.mark.parametrize(
    "pieces", [("config:\n", "  user.a: '1'\n"), ("config", ": {user.a: '1'}"), ("con", "fig:\n  user.a: 1")]
)
def test_slow_pipe(guestapi: Guestapi, pieces: tuple[str, str]) -> None:
    """A definition may come in pieces, and begin late, through a pipe that is this command's alone."""
    with subprocess.Popen(
        [COMMAND, "--config", guestapi.config, "instance", "add", "web"], stdin=subprocess.PIPE, text=True
    ) as run:
        assert run.stdin is not None
        for piece in pieces:
            # Longer than the command takes to begin, as a rule; what it shows does not depend on it.
            time.sleep(0.3)
            run.stdin.write(piece)
            run.stdin.flush()
        run.stdin.close()
        assert run.wait(TIMEOUT) == 0
    assert guestapi.shown("web")["config"] == {"user.a": "1"}


def test_pipe_without_a_writer_that_begins(guestapi: Guestapi) -> None:
    """After two seconds without data, add goes on without a definition, and says so."""
    with subprocess.Popen(
        [COMMAND, "--config", guestapi.config, "instance", "add", "web"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stderr is not None
        assert run.stderr.read() == (
            "nothing came from standard input within 2 s, so it was not read; '--file -' waits for it\n"
        )
        assert run.wait(TIMEOUT) == 0
    assert guestapi.shown("web")["config"] == {}


def test_open_pipe(guestapi: Guestapi) -> None:
    """add does not wait for a pipe without data that another process reads, too, as a loop does."""
    ours, theirs = os.pipe()
    with os.fdopen(ours) as reading, os.fdopen(theirs, "w"):
        subprocess.run([COMMAND, "--config", guestapi.config, "instance", "add", "web"], stdin=reading, check=True)
    assert guestapi.shown("web")["config"] == {}


def test_copy(awkward: Guestapi) -> None:
    """The definition of an instance can be used for another one; options take precedence over it."""
    definition = awkward.good("instance", "show", "web")
    awkward.good("instance", "add", "copy", "--config", "user.yes=no", "--location", "n2", stdin=definition)
    web, copy = awkward.shown("web"), awkward.shown("copy")
    assert copy["uuid"] != web["uuid"]
    assert copy["location"] == "n2"
    assert copy["config"] == {**web["config"], "user.yes": "no"}
    assert copy["devices"] == web["devices"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("config: [1, 2]", "config is a mapping, not a list"),
        ("config: {a: [1]}", "'a' is text, not a list"),
        ("config: x", "config is a mapping, not text"),
        ("devices: {eth0: nic}", "device eth0 is a mapping, not text"),
        ("devices: {eth0: {mtu: '1'}}", "a type is needed"),
        ("profiles: small", "profiles is a list of names, not text"),
        ("profiles: [none]", "no profile 'none'"),
        ("type: vm", "container or virtual-machine"),
        ("uuid: 7", "uuid '7'"),
        ("conifg: {}", "'conifg'"),
        ("config: {a: 1, a: 2}", "a key stands there twice"),
        ("config: {security.devlxd: maybe}", "true or false"),
        ("- name: a\n- name: b/c", "has 2 definitions"),
        ("just words", "not a definition of an instance, but text"),
        ("a: b: c", "line 1"),
        ("\x01: x", "character"),
        (b"a: \xff", "UTF-8"),
        ("[" * 5000, "nest"),
        ("name: [a]", "is text, not a list"),
    ],
)
def test_add_refuses_a_definition(guestapi: Guestapi, tmp_path: Path, text: str | bytes, named: str) -> None:
    """An invalid definition is refused in one sentence, and nothing is added."""
    guestapi.good("instance", "add", "other")
    file = tmp_path / "definition"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert named in guestapi.fails("instance", "add", "web", "--file", str(file))
    assert guestapi.fails("apply", "-f", str(file))
    assert [one["name"] for one in guestapi.state()] == ["other"]


def test_other_properties_are_ignored(guestapi: Guestapi) -> None:
    """Properties that only `show --format json` or Incus print are accepted and ignored."""
    guestapi.good("instance", "add", "web", "--config", "user.a=1")
    shown = guestapi.good("instance", "show", "web", "-f", "json")
    guestapi.good("instance", "remove", "web")
    guestapi.good("instance", "add", "web", "--file", "-", stdin=shown)
    assert guestapi.good("instance", "show", "web", "-f", "json") == shown
    incus = "architecture: x86_64\nconfig:\n  user.b: 2\nephemeral: false\nstateful: false\ndescription: ''\nname: x\n"
    guestapi.good("instance", "add", "other", "--file", "-", stdin=incus)
    assert guestapi.shown("other")["config"] == {"user.b": "2"}


def test_edit(awkward: Guestapi, tmp_path: Path) -> None:
    """edit accepts a definition on standard input; a difference is one change, an equal definition none."""
    before = awkward.good("instance", "show", "web")
    log = len(log_entries(awkward.settings))
    awkward.good("config", "edit", "web", stdin=before)
    assert len(log_entries(awkward.settings)) == log
    awkward.good("config", "edit", "web", stdin=before.replace("user.yes: 'yes'", "user.yes: 'no'"))
    assert awkward.shown("web")["config"]["user.yes"] == "no"
    assert len(log_entries(awkward.settings)) == log + 1
    assert "rename" in awkward.fails("config", "edit", "web", stdin=before.replace("name: web", "name: other"))
    assert "has UUID" in awkward.fails("config", "edit", "web", stdin="uuid: 6ba7b810-9dad-41d1-80b4-00c04fd430c8")
    assert "is a container" in awkward.fails("config", "edit", "web", stdin="type: virtual-machine")
    awkward.good("config", "edit", "web", stdin="config: {}")
    assert awkward.shown("web")["config"] == {}


def test_definition_has_only_the_operators_values(c1: Guestapi) -> None:
    """The definition of a source's instance has only the operator's values; edit does not change the source's."""
    nic = {"type": "nic", "name": "eth0"}
    observed = Observed(
        "id", "default", "web", config={"user.a": "source"}, devices={"eth0": nic}, init=Init(9, 9, "b", 9)
    )
    with Writer(c1.settings).change() as change:
        assert reconcile(change, "podman", [observed]) == []
    c1.good("config", "set", "web", "user.b=mine")
    c1.good("device", "set", "web", "eth0", "mtu=1400")
    before = c1.good("instance", "show", "web")
    assert before.startswith("# source: podman, key: id\n")
    assert yaml.safe_load(before)["config"] == {"user.b": "mine"}
    log = len(log_entries(c1.settings))
    c1.good("config", "edit", "web", stdin=before)
    assert len(log_entries(c1.settings)) == log
    c1.good("config", "edit", "web", stdin="profiles: [default]\n")
    with Writer(c1.settings).change() as change:
        layers = get_layers(change, get_instance(change, "default", "web"))
    assert layers.source.config == {"user.a": "source"}
    assert not layers.operator


def test_parse_errors_name_the_place() -> None:
    """An error names the file, the instance and the line."""
    with pytest.raises(OperatorError, match=r"^dir/a\.yaml: web: config"):
        parse(b"name: web\nconfig: 1", "dir/a.yaml")
    with pytest.raises(OperatorError, match=r"^a\.yaml: line 3: "):
        parse(b"name: web\nconfig:\n\t- x", "a.yaml")
    with pytest.raises(OperatorError, match="a definition has no name"):
        parse(b"config: {}", "a.yaml")
    assert parse(b"---\n---\n", "a.yaml") == []
