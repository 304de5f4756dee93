"""`guestapi config`: the configuration of an instance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.store.processes import log_entries


def test_set_get_unset(c1: Guestapi) -> None:
    """A key that was set can be read, one that was unset cannot; the other keys stay."""
    c1.good("config", "set", "c1", "user.new=x", "user.a=changed")
    assert c1.good("config", "get", "c1", "user.new") == "x\n"
    assert c1.good("config", "get", "c1", "user.a") == "changed\n"
    c1.good("config", "unset", "c1", "user.new", "user.b", "user.never")
    assert c1("config", "show", "c1", "--format", "json").json == {"user.a": "changed"}
    assert "user.new" in c1.fails("config", "get", "c1", "user.new")


@pytest.mark.parametrize("value", ["a=b", "=", " ", "é\U0001f600", "-x", "--project", "a@b", "1\n2", "%s", "[b]x[/b]"])
def test_values_are_stored_unchanged(c1: Guestapi, value: str) -> None:
    """Everything after the first = is the value, unchanged."""
    c1.good("config", "set", "c1", f"user.x={value}")
    assert c1("config", "show", "c1", "--format", "json").json["user.x"] == value
    assert c1("config", "get", "c1", "user.x", "--format", "json").json == value
    assert c1.good("config", "get", "c1", "user.x") == value + "\n"


def test_empty_value_unsets(c1: Guestapi) -> None:
    """KEY= unsets a key."""
    c1.good("config", "set", "c1", "user.a=")
    assert c1.shown("c1")["config"] == {"user.b": "2"}


@pytest.mark.parametrize("content", ["#cloud-config\r\n\né\0\n", "x", "", "x" * 2 * 1024 * 1024])
def test_value_from_a_file(c1: Guestapi, tmp_path: Path, content: str) -> None:
    """KEY=@FILE sets the content of the file, byte for byte, at least up to 2 MiB."""
    (tmp_path / "value").write_bytes(content.encode())
    c1.good("config", "set", "c1", f"user.a=@{tmp_path}/value")
    assert c1.shown("c1")["config"].get("user.a", "") == content


def test_value_from_standard_input(c1: Guestapi) -> None:
    """KEY=@- sets the content of standard input."""
    c1.good("config", "set", "c1", "user.a=@-", stdin=b"one\r\ntwo\n")
    assert c1.shown("c1")["config"]["user.a"] == "one\r\ntwo\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"\xff\xfe", "UTF-8"), (b"x" * 16 * 1024 * 1024, "16777216")],
)
def test_value_from_a_wrong_file(c1: Guestapi, tmp_path: Path, content: bytes | None, words: str) -> None:
    """A file that is missing, too large or no text is an error of one sentence, and no key of the command is set."""
    if content is not None:
        (tmp_path / "value").write_bytes(content)
    sentence = c1.fails("config", "set", "c1", "user.new=1", f"user.a=@{tmp_path}/value", "user.b=3")
    assert words in sentence
    assert len(sentence) < 300
    assert c1.shown("c1")["config"] == {"user.a": "1", "user.b": "2"}


@pytest.mark.parametrize("wrong", ["\x01=x", f"{'k' * 1025}=x", "\x9b31m=x"])
def test_set_is_all_or_nothing(c1: Guestapi, wrong: str) -> None:
    """If one key of a command is invalid, none is set, and there is no event."""
    log = log_entries(c1.settings)
    c1.fails("config", "set", "c1", "user.a=9", wrong, "user.new=9")
    assert c1.shown("c1")["config"] == {"user.a": "1", "user.b": "2"}
    assert log_entries(c1.settings) == log


@pytest.mark.parametrize(
    "words",
    [
        ["set", "c1"],
        ["set"],
        ["set", "c1", "user.a=9", "user.b"],
        ["set", "c1", "user.a=9", "=x"],
        ["set", "c1", "user.a=9", "user.a=8"],
        ["unset", "c1"],
        ["get", "c1"],
        ["get", "c1", "user.a", "user.b"],
        ["show"],
        ["show", "c1", "--format", "yaml"],
        ["sett", "c1", "user.a=9"],
    ],
)
def test_called_wrongly(c1: Guestapi, words: list[str]) -> None:
    """Wrong usage exits with 2 and sets nothing."""
    assert c1.misuse("config", *words)
    assert c1.shown("c1")["config"] == {"user.a": "1", "user.b": "2"}


def test_unset_refuses_an_invalid_key(c1: Guestapi) -> None:
    """An invalid key is refused by unset, too, and no other key is unset."""
    c1.fails("config", "unset", "c1", "user.a", "")
    assert c1.shown("c1")["config"] == {"user.a": "1", "user.b": "2"}


def test_several_keys_are_one_change(c1: Guestapi) -> None:
    """The changed keys of a command give one change with their events, sorted by name."""
    before = len(log_entries(c1.settings))
    c1.good("config", "set", "c1", "user.z=1", "user.a=1", "user.c=1", "user.b=")
    news = [json.loads(metadata)["key"] for _, metadata, _ in log_entries(c1.settings)[before:]]
    assert news == ["user.b", "user.c", "user.z"]


def test_show_as_a_table(c1: Guestapi) -> None:
    """show prints a line for each key; --truncate shortens long values."""
    c1.good("config", "set", "c1", "user.long=first\nsecond", "user.markup=[red]x[/red]")
    assert "user.long    first\\nsecond\n" in c1.good("config", "show", "c1")
    lines = c1.good("config", "show", "c1", "--truncate").splitlines()
    (long,) = [line for line in lines if "user.long" in line]
    assert "first" in long
    assert "12 bytes" in long
    assert not any("second" in line for line in lines)
    assert any("user.markup" in line and "[red]x[/red]" in line for line in lines)


def test_origin(c1: Guestapi) -> None:
    """The operator's value takes precedence over the source's, and --origin shows the origin."""
    observed = Observed("id", "default", "web", config={"user.a": "source", "user.b": "source"})
    with Writer(c1.settings).change() as change:
        assert reconcile(change, "podman", [observed]) == []
    c1.good("config", "set", "web", "user.a=operator", "user.c=operator")
    assert c1("config", "show", "web", "--origin", "--format", "json").json == {
        "user.a": {"value": "operator", "origin": "operator"},
        "user.b": {"value": "source", "origin": "podman"},
        "user.c": {"value": "operator", "origin": "operator"},
    }
    assert c1("config", "show", "web", "--format", "json").json["user.a"] == "operator"
    out = c1.good("config", "show", "web", "--origin")
    assert "ORIGIN" in out
    assert [line.split()[2] for line in out.splitlines() if "user." in line] == ["operator", "podman", "operator"]
    done = c1("config", "unset", "web", "user.a", "user.c")
    assert (done.code, done.err) == (0, "web still has user.a from podman\n")
    assert c1("config", "show", "web", "--format", "json").json == {"user.a": "source", "user.b": "source"}
