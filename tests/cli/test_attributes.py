"""`guestapi attributes`: show, get, wait and known-hosts; nothing that a guest has said drives a terminal."""

from __future__ import annotations

import base64
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestapi.cli.known_hosts import read_keys
from guestapi.model import Init
from guestapi.store import permissions, steps
from guestapi.store.attributes import AttributeReport, Outcome
from guestapi.store.lookup import get_instance
from guestapi.store.writing import Writer
from tests.cli.command import Done, Guestapi
from tests.cli.test_habits import on_terminal
from tests.harness.service import COMMAND

#: What a hostile instance would say: escape sequences, other controls, text from right to left, halves of characters.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\u202eadmin\x9b31m\x00".encode() + b"\xff\n"
ED25519 = "ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(range(32))).decode()


@pytest.fixture
def running(c1: Guestapi) -> Guestapi:
    """The command, with a running instance c1 that may have attributes."""
    with Writer(c1.settings).change() as change:
        steps.start(change, get_instance(change, "default", "c1"), Init(100, 5, "boot", 7))
        permissions.allow(change, "default", None, "attributes")
    return c1


def put(guestapi: Guestapi, path: str, value: bytes | None) -> None:
    """Have c1 say something."""
    writer = Writer(guestapi.settings)
    with writer.change() as change:
        one = get_instance(change, "default", "c1")
    assert writer.record_all([AttributeReport(one, path, value)])[0] in (Outcome.CREATED, Outcome.DONE)


def test_show(running: Guestapi) -> None:
    """The list is by path, with sizes; JSON has text as text and other bytes in base64."""
    put(running, "b/c", b"\xff\0")
    put(running, "a/b", "ä\n".encode())
    rows = [line.split() for line in running.good("attributes", "show", "c1").splitlines()]
    assert rows[0] == ["ATTRIBUTE", "BYTES", "WRITTEN", "VALUE"]
    assert [(row[0], row[1], row[3]) for row in rows[1:]] == [("a/b", "3", "ä\\n"), ("b/c", "2", "\\xff\\x00")]
    found = running("attributes", "show", "c1", "--format", "json").json
    assert [(one["path"], one["bytes"], one["value"], one["base64"]) for one in found] == [
        ("a/b", 3, "ä\n", None),
        ("b/c", 2, None, "/wA="),
    ]
    assert found[0]["written"][:2] == "20"
    assert "no instance 'c2'" in running.fails("attributes", "show", "c2")


def test_get(running: Guestapi) -> None:
    """In a pipe, the value is printed byte for byte."""
    put(running, "a/b", HOSTILE)
    done = subprocess.run(
        [COMMAND, "--config", running.config, "attributes", "get", "c1", "a/b"], capture_output=True, check=True
    )
    assert done.stdout == HOSTILE
    assert "a/c is not set" in running.fails("attributes", "get", "c1", "a/c")
    for path in ("a", "a/b/c", "a/../c", "../b", "a/ b"):
        assert "is not an attribute" in running.misuse("attributes", "get", "c1", path)


@pytest.mark.parametrize(
    "words",
    [
        ("attributes", "show", "c1"),
        ("attributes", "show", "c1", "--truncate"),
        ("attributes", "show", "c1", "--format", "json"),
        ("attributes", "get", "c1", "a/b"),
        ("attributes", "wait", "c1", "a/b"),
        ("export", "c1", "--attributes"),
        ("events", "c1", "--since", "0", "--type", "attribute"),
    ],
)
def test_terminals(running: Guestapi, words: tuple[str, ...]) -> None:
    """On a terminal, no byte of a value gets through that is not printable."""
    put(running, "a/b", HOSTILE)
    written = running_events(running, words) if words[0] == "events" else on_terminal(running, *words, NO_COLOR="1")
    assert "a/b" in written or "owned" in written
    # JSON and YAML leave text from right to left as it is.
    allowed = "\n\u202e" if words[-1] in ("json", "--attributes") else "\n"
    assert [letter for letter in written if not letter.isprintable() and letter not in allowed] == []


def running_events(guestapi: Guestapi, words: tuple[str, ...]) -> str:
    """The first line of a command that goes on."""
    with subprocess.Popen(
        [COMMAND, "--config", guestapi.config, *words], stdout=subprocess.PIPE, text=True, env={"LANG": "C.UTF-8"}
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
    return line


Waiting = Callable[..., tuple[threading.Thread, list[Done]]]


@pytest.fixture
def waiting(running: Guestapi) -> Iterator[Waiting]:
    """Begins to wait in a thread; returns the thread, and a list that gets what the command has done."""
    threads = []

    def begin(*words: str) -> tuple[threading.Thread, list[Done]]:
        done: list[Done] = []
        thread = threading.Thread(target=lambda: done.append(running("attributes", "wait", "c1", "a/b", *words)))
        thread.start()
        threads.append(thread)
        return thread, done

    yield begin
    for thread in threads:
        thread.join(30)


def test_wait(running: Guestapi, waiting: Waiting) -> None:
    """The command ends when the attribute is set, with its value; another attribute does not end it."""
    thread, done = waiting("--timeout", "30")
    put(running, "a/c", b"other")
    thread.join(0.5)
    assert done == []
    put(running, "a/b", b"value")
    thread.join(30)
    assert (done[0].code, done[0].out, done[0].err) == (0, "value", "")
    assert running.good("attributes", "wait", "c1", "a/b") == "value"


def test_wait_for_a_value(running: Guestapi, waiting: Waiting) -> None:
    """With --value, another value does not end the wait."""
    put(running, "a/b", b"starting")
    thread, done = waiting("--value", "ready", "--timeout", "30")
    thread.join(0.5)
    assert done == []
    put(running, "a/b", b"ready")
    thread.join(30)
    assert (done[0].code, done[0].out) == (0, "ready")


def test_wait_ends(running: Guestapi, waiting: Waiting) -> None:
    """When the time is over, and when the instance is removed, the command exits with 1 and a sentence."""
    began = time.monotonic()
    assert "c1: a/b was not set within 0.3 s" in running.fails("attributes", "wait", "c1", "a/b", "--timeout", "0.3")
    assert time.monotonic() - began < 10
    assert "no instance 'c2'" in running.fails("attributes", "wait", "c2", "a/b")
    thread, done = waiting()
    with Writer(running.settings).change() as change:
        steps.remove(change, get_instance(change, "default", "c1"))
    thread.join(30)
    assert done[0].code == 1
    assert "no instance 'c1'" in done[0].err


def generate(directory: Path, kind: str) -> str:
    """A public key of ssh-keygen, without its comment."""
    file = directory / kind
    bits = ["-b", "1024"] if kind == "rsa" else ["-b", kind[5:]] if kind.startswith("ecdsa") else []
    words = ["-q", "-N", "", "-C", "root@c1 its key", "-t", kind[:5] if bits and kind != "rsa" else kind, *bits]
    subprocess.run(["ssh-keygen", *words, "-f", file], check=True)
    return " ".join(file.with_suffix(".pub").read_text().split()[:2])


# A machine that runs the fast tests may have no ssh-keygen.
@pytest.mark.root
def test_known_hosts(running: Guestapi, tmp_path: Path) -> None:
    """Each key of ssh-keygen is printed once, without its comment; ssh-keygen finds it under each name."""
    kinds = ("ed25519", "rsa", "ecdsa256", "ecdsa384", "ecdsa521")
    keys = [generate(tmp_path, kind) for kind in kinds]
    for kind in kinds:
        put(running, f"hostkeys/{kind}", (tmp_path / f"{kind}.pub").read_bytes())
    put(running, "hostkeys/all", "\r\n\n".join(keys).encode())
    put(running, "hostkeysx/other", generate(tmp_path, "dsa").encode())
    out = running.good("attributes", "known-hosts", "c1")
    assert sorted(out.splitlines()) == sorted(f"c1 {key}" for key in keys)
    named = running.good("attributes", "known-hosts", "c1", "--host", "10.0.0.7", "--host", "[fe80::1]:2222")
    assert {line.split()[0] for line in named.splitlines()} == {"10.0.0.7,[fe80::1]:2222"}
    (tmp_path / "known_hosts").write_text(named)
    for host in ("10.0.0.7", "[fe80::1]:2222"):
        found = subprocess.run(["ssh-keygen", "-F", host, "-f", tmp_path / "known_hosts"], capture_output=True)
        assert found.stdout.count(b"found: line") == len(keys)


def keys_of(value: str) -> list[str]:
    """The keys of a value."""
    return read_keys(value.encode())[0]


@pytest.mark.parametrize(
    "value",
    [
        "",
        "ssh-ed25519",
        ED25519[:-4],
        ED25519[:-8] + "AAAA",
        f"@cert-authority * {ED25519}",
        f"* {ED25519}",
        f"c2,{ED25519}",
        ED25519.replace("ssh-ed25519", "ssh-dss", 1),
        ED25519.replace("ssh-ed25519", "ssh-rsa", 1),
        f"SSH-ED25519 {ED25519.split()[1]}",
        "ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x1f" + bytes(31)).decode(),
        "ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519" + b"\0\0\0\x20" + bytes(32) + b"\0\0\0\0").decode(),
        "ssh-ed25519 " + base64.b64encode(b"\xff\xff\xff\xff").decode(),
        "ssh-ed25519 ===",
        "ssh-ed25519 é",
        "ecdsa-sha2-nistp256 "
        + base64.b64encode(b"\0\0\0\x13ecdsa-sha2-nistp256\0\0\0\x08nistp384\0\0\0\x01x").decode(),
        "ecdsa-sha2-nistp256 " + base64.b64encode(b"\0\0\0\x13ecdsa-sha2-nistp256\0\0\0\x08nistp256\0\0\0\0").decode(),
        "ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(32) + b"\0\0\0\x01x").decode(),
    ],
)
def test_no_key(value: str) -> None:
    """What is not exactly a key of a known type is none; above all, nothing that names a host or has a marker."""
    assert keys_of(value) == []


def test_hostile_keys(running: Guestapi) -> None:
    """A line is made of the key alone, whatever stands around it; what is none is named, and the rest printed."""
    assert keys_of(f" {ED25519}\x1b[2J comment\n\t{ED25519} x\n") == [ED25519]
    put(running, "hostkeys/a", f"@cert-authority * {ED25519}\n* {ED25519}\n{ED25519} \x1b[2J\n".encode())
    put(running, "hostkeys/b", HOSTILE)
    done = running("attributes", "known-hosts", "c1")
    assert (done.code, done.out) == (0, f"c1 {ED25519}\n")
    assert done.err.splitlines() == [
        "Warning: hostkeys/a: a line is not a public key of an SSH host",
        "Warning: hostkeys/b: it is not a public key of an SSH host",
    ]
    put(running, "hostkeys/a", None)
    assert running("attributes", "known-hosts", "c1").code == 1


def test_hosts(running: Guestapi) -> None:
    """A pattern, a list and a name that ssh would not take for one host are refused."""
    put(running, "hostkeys/a", ED25519.encode())
    for host in ("*", "c?", "a,b", "!c1", "a b", "|1|x", "@revoked", "#", "-x", "", "[c1]", "[c1]:x", "c1\n*"):
        assert "is not a host" in running.misuse("attributes", "known-hosts", "c1", "--host", host)
    with Writer(running.settings).change() as change:
        steps.rename(change, get_instance(change, "default", "c1"), "default", "a,b")
    assert "say with --host" in running.fails("attributes", "known-hosts", "a,b")
    assert running.good("attributes", "known-hosts", "a,b", "--host", "ab") == f"ab {ED25519}\n"


def test_nothing_published(running: Guestapi) -> None:
    """Without a key, the command fails with a sentence, and prints nothing."""
    assert "c1 has published no SSH host key" in running.fails("attributes", "known-hosts", "c1")
