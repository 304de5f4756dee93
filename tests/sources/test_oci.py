"""What OCI runtimes tell their hooks, understood; and the hook command, which never keeps a container waiting."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from guestapi.cli.main import main
from guestapi.sources.oci_hooked import report
from guestapi.sources.register import Report, ReportError
from tests.harness.containers import Container
from tests.harness.service import COMMAND

#: As podman 4.3.1 has crun 1.8.1 say it in createRuntime, and says it itself in poststop.
ID = "4c968e2d83da5e58786057a40629ec4ffcb029d43760237a45fb3879b77aacfe"
CREATED = {
    "ociVersion": "1.0",
    "id": ID,
    "pid": 28982,
    "root": "/srv/rootfs",
    "bundle": "/var/lib/containers/userdata",
    "status": "created",
    "annotations": {"guestapi.enable": "true", "guestapi.config.user.foo": "bar", "io.container.manager": "libpod"},
}
STOPPED = {"ociVersion": "1.0.2-dev", "id": ID, "status": "stopped", "annotations": {"guestapi.enable": "true"}}


def state(document: Mapping[str, Any], **other: Any) -> bytes:
    """The document as a runtime writes it, with `other` fields; None takes one away."""
    return json.dumps({key: value for key, value in {**document, **other}.items() if value is not None}).encode()


def test_created() -> None:
    """A container without a name is named after its ID, and passes with it; its keys come along."""
    assert report(state(CREATED)) == Report(ID[:12], 28982, {"user.foo": "bar"}, passing=True)


def test_named() -> None:
    """One with a name stays."""
    annotations = {"guestapi.name": "web"}
    assert report(state(CREATED, annotations=annotations)) == Report("web", 28982)
    assert report(state(STOPPED, annotations=annotations)) == Report("web", None)


def test_stopped_has_no_pid() -> None:
    """The end needs no PID, and one that is there means nothing: it may be somebody else's by now."""
    assert report(state(STOPPED)) == report(state(STOPPED, pid=1)) == Report(ID[:12], None, passing=True)


@pytest.mark.parametrize("annotations", [None, {}])
def test_annotations_may_be_missing(annotations: dict[str, str] | None) -> None:
    """The specification makes them optional."""
    assert report(state(CREATED, annotations=annotations)) == Report(ID[:12], 28982, passing=True)


@pytest.mark.parametrize("status", ["creating", "created", "running", None])
def test_any_status_but_stopped_is_alive(status: str | None) -> None:
    """crun and runc differ in what they call a container whose init waits for its hooks."""
    assert report(state(CREATED, status=status)).pid == 28982


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 10_000,
        state(CREATED, id=None),
        state(CREATED, id=""),
        state(CREATED, id=7),
        state(CREATED, pid=None),
        state(CREATED, pid=0),
        state(CREATED, pid=-1),
        state(CREATED, pid=True),
        state(CREATED, pid="28982"),
        state(CREATED, pid=1.5),
        state(CREATED, annotations=["a"]),
        state(CREATED, annotations="a"),
        state(CREATED, annotations={"guestapi.name": 7}),
        state(CREATED, annotations={"guestapi.config.user.foo": None}),
        state(CREATED)[:-1],
        state(CREATED, id="\ud800"),
        state(STOPPED, annotations={"guestapi.name": "\ud800"}),
        state(STOPPED, annotations={"guestapi.name": "a\nb"}),
    ],
    ids=lambda text: text[:40].decode("latin-1"),
)
def test_no_state(text: bytes) -> None:
    """What is no state, or none of a living container, is said to be so in one sentence."""
    with pytest.raises(ReportError) as caught:
        report(text)
    assert str(caught.value).isprintable()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.binary()
    | _JSON.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({}, optional=dict.fromkeys(["id", "pid", "status", "annotations"], _JSON)).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_anything_is_a_report_or_an_error(text: bytes) -> None:
    """Whatever comes in: a report with a name, or ReportError, and no other exception."""
    try:
        assert report(text).name
    except ReportError:
        pass


class Hook:
    """`guestapi hook oci` as a program, with a store of its own."""

    def __init__(self, directory: Path) -> None:
        self.config = directory / "guestapi.toml"
        self.store = directory / "store.db"
        self.settings()

    def settings(self, more: str = "") -> None:
        """Write guestapi.toml."""
        self.config.write_text(f'[store]\nurl = "sqlite:///{self.store}"\nlock_seconds = 30\n{more}')

    def __call__(self, text: bytes) -> tuple[int, str, float]:
        """Exit code, standard error, and how many seconds it took. Podman calls poststop without any PATH."""
        began = time.monotonic()
        command = [str(COMMAND), "--config", str(self.config), "hook", "oci"]
        done = subprocess.run(command, input=text, capture_output=True, check=False, env={}, timeout=30)
        assert done.stdout == b""
        return done.returncode, done.stderr.decode(), time.monotonic() - began

    def registers(self, text: bytes) -> None:
        """It must do so without a word."""
        assert self(text)[:2] == (0, "")

    def instances(self) -> dict[str, Any]:
        """What `guestapi instance list` says, by name."""
        return {one["name"]: one for one in json.loads(self.operator("instance", "list", "--format", "json"))}

    def operator(self, *words: str) -> str:
        """Run another command, in this process, which is quicker: what it prints."""
        done = CliRunner().invoke(main, ["--config", str(self.config), *words], catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def locked(self) -> Iterator[sqlite3.Connection]:
        """Another writer's transaction holds the store meanwhile."""
        other = sqlite3.connect(self.store, isolation_level=None, check_same_thread=False)
        try:
            other.execute("BEGIN IMMEDIATE")
            yield other
        finally:
            other.close()


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    """The hook, with an empty store."""
    made = Hook(tmp_path)
    made.operator("instance", "add", "other")
    return made


@pytest.fixture
def container() -> Iterator[Container]:
    """Whose init can be registered, and which may be ended."""
    with Container() as running:
        yield running


def created(container: Container, **annotations: str) -> bytes:
    """The state of a container of that init; ``name`` is the annotation guestapi.name."""
    named = {f"guestapi.{key}": value for key, value in annotations.items()}
    # CREATED is JSON, whose values have any type; its annotations are a mapping.
    return state(CREATED, pid=container.pid, annotations={**CREATED["annotations"], **named})  # type: ignore[dict-item]


@pytest.mark.root
def test_unknown_is_added_with_the_template(hook: Hook, container: Container) -> None:
    """[hooks.template] is the configuration of who was unknown; its annotations come on top; it vanishes at its end."""
    hook.settings('[hooks]\nproject = "pods"\n[hooks.template]\n"user.foo" = "theirs"\n"user.more" = "yes"\n')
    hook.registers(created(container))
    one = hook.instances()[ID[:12]]
    assert (one["status"], one["pid"], one["project"]) == ("running", container.pid, "pods")
    assert one["config"] == {"user.foo": "bar", "user.more": "yes"}
    container.kill()
    hook.registers(state(STOPPED))
    assert ID[:12] not in hook.instances()


@pytest.mark.root
def test_known_keeps_its_own(hook: Hook, container: Container) -> None:
    """A known one gets nothing from the template; what it brings along is set, the rest stays, also at its end."""
    hook.settings('[hooks.template]\n"user.more" = "yes"\n')
    hook.operator("instance", "add", "web", "--config", "user.mine=kept")
    hook.registers(created(container, name="web"))
    one = hook.instances()["web"]
    assert (one["status"], one["config"]) == ("running", {"user.foo": "bar", "user.mine": "kept"})
    container.kill()
    hook.registers(state(STOPPED, annotations={"guestapi.name": "web"}))
    one = hook.instances()["web"]
    assert (one["status"], one["config"]) == ("stopped", {"user.foo": "bar", "user.mine": "kept"})


@pytest.mark.root
def test_late_end_of_a_namesake(hook: Hook, container: Container) -> None:
    """The end of a container that had the name before, told late, does not stop the one that has it now."""
    hook.registers(created(container, name="web"))
    hook.registers(state(STOPPED, annotations={"guestapi.name": "web"}))
    assert hook.instances()["web"]["status"] == "running"


def test_end_of_an_unknown_one(hook: Hook) -> None:
    """An end that is told twice, or of who was never registered, is nothing to complain of."""
    hook.registers(state(STOPPED))
    assert hook.instances().keys() == {"other"}


@pytest.mark.root
@pytest.mark.parametrize(("on_failure", "code"), [("continue", 0), ("refuse", 1)])
def test_store_is_locked_for_long(hook: Hook, container: Container, on_failure: str, code: int) -> None:
    """Another process holds the store: it gives up long before others would, says so, and refuses only if it shall."""
    hook.settings(f'[hooks]\non-failure = "{on_failure}"\n')
    with hook.locked():
        exit_code, said, seconds = hook(created(container, name="web"))
    assert exit_code == code
    assert said.count("\n") == 1
    assert "oci hook: " in said
    # Two seconds, and what a machine under load adds; `lock_seconds` is 30.
    assert seconds < 15
    assert "web" not in hook.instances()


@pytest.mark.root
def test_store_is_busy_for_a_moment(hook: Hook, container: Container) -> None:
    """Another writer for one second, which is longer than one try and shorter than two: registered all the same."""
    with hook.locked() as other:
        timer = threading.Timer(1.0, lambda: other.execute("COMMIT"))
        timer.start()
        try:
            exit_code, said, seconds = hook(created(container, name="web"))
        finally:
            timer.join()
    assert (exit_code, said) == (0, "")
    assert seconds > 0.9
    assert hook.instances()["web"]["status"] == "running"


@pytest.mark.parametrize("on_failure", ["continue", "refuse"])
def test_input_that_does_not_end(hook: Hook, on_failure: str) -> None:
    """A runtime that never closes standard input: the limit of two seconds holds there too."""
    hook.settings(f'[hooks]\non-failure = "{on_failure}"\n')
    reading, writing = os.pipe()
    began = time.monotonic()
    try:
        done = subprocess.run(
            [COMMAND, "--config", hook.config, "hook", "oci"],
            stdin=reading,
            capture_output=True,
            check=False,
            text=True,
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert 1.9 < time.monotonic() - began < 15
    assert "not done within 2 s" in done.stderr
    assert done.returncode == (on_failure == "refuse")


@pytest.mark.parametrize(
    "text",
    [
        b"nonsense",
        state(CREATED, pid=os.getpid()),
        state(CREATED, pid=1 << 70),
        state(CREATED, annotations={"guestapi.name": "not_a_name"}),
        state(CREATED, annotations={"guestapi.name": "\ud800"}),
        state(STOPPED, annotations={"guestapi.name": "\x00\n\x1b[2J"}),
        state(STOPPED, annotations={"guestapi.name": "\ud800"}),
        state(CREATED, id="\ud800"),
    ],
    ids=lambda text: text[:40].decode("latin-1"),
)
def test_what_cannot_be_registered(hook: Hook, text: bytes) -> None:
    """Nonsense, no container's init, no name: the container goes on, with one line on standard error at most."""
    exit_code, said, _seconds = hook(text)
    assert exit_code == 0
    assert said.count("\n") <= 1
    assert said.rstrip("\n").isprintable()
    assert hook.instances().keys() == {"other"}


@pytest.mark.root
@pytest.mark.parametrize("key", ["", "\ud800", "user.\n", "k" * 300])
def test_odd_keys(hook: Hook, container: Container, key: str) -> None:
    """An annotation that cannot be a key keeps all from being registered, rather than half of it."""
    text = state(CREATED, pid=container.pid, annotations={f"guestapi.config.{key}": "x", "guestapi.name": "web"})
    exit_code, said, _seconds = hook(text)
    assert exit_code == 0
    assert said.count("\n") == 1
    assert "web" not in hook.instances()
