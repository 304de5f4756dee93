"""A daemon with instances that hang, are malformed or change: the rest is mirrored, and check names the problem."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from guestapi.mirror import daemon
from guestapi.mirror.daemon_model import DaemonError
from guestapi.model import Instance
from guestapi.records import SourceStatus
from guestapi.store.images import directory
from guestapi.store.lookup import list_images, list_instances, list_sources, read_entries
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.containers import Container
from tests.harness.service import COMMAND
from tests.harness.waiting import until
from tests.mirror.stub import Stub

CHECKOUT = Path(__file__).parents[2]
FIRST, SECOND = "11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555"


@pytest.fixture
def guestapi(tmp_path: Path) -> Guestapi:
    """The command, with an empty store."""
    command = Guestapi(tmp_path)
    Writer(command.settings, create=True)
    return command


def instance(name: str, status: str = "Running", **config: str) -> dict[str, Any]:
    """Return an instance as the daemon describes it; ``user_a`` means ``user.a``."""
    expanded = {key.replace("_", "."): value for key, value in config.items()}
    return {"name": name, "type": "container", "status": status, "expanded_config": expanded}


@contextmanager
def mirrored(guestapi: Guestapi, answers: Mapping[str, object]) -> Iterator[Stub]:
    """Run a mirror of a daemon with these answers."""
    path = guestapi.directory / "daemon"
    with Stub(path, answers) as stub:
        words = [str(COMMAND), "--config", str(guestapi.config), "mirror", "incus", "--socket", str(path)]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield stub
        finally:
            process.kill()
            process.wait()


def known(guestapi: Guestapi) -> dict[str, Instance]:
    """Return the instances of the store, by name."""
    with view(guestapi.settings.store.url) as store:
        return {one.name: one for one in list_instances(store)}


def wait(what: Callable[[], object]) -> None:
    """Poll until a condition holds."""
    until(what, "the expected state", pause=0.05)


def finding(guestapi: Guestapi) -> str:
    """Return the failure of the mirror that `guestapi check` reports."""
    found: list[dict[str, Any]] = []

    def is_wrong() -> bool:
        findings = json.loads(guestapi("check", "--format", "json").out)
        found[:] = [one for one in findings if one["check"] == "mirror incus" and not one["ok"]]
        return bool(found) and "no contact yet" not in found[0]["text"]

    wait(is_wrong)
    return str(found[0]["text"])


def test_instance_that_hangs(guestapi: Guestapi) -> None:
    """An instance whose state request hangs does not keep the others from being mirrored."""
    instances = {name: instance(name) for name in ("a", "hung", "z")}
    answers: dict[str, object] = {"/1.0/instances": list(instances.values())}
    answers |= {f"/1.0/instances/{name}": one for name, one in instances.items()}
    answers |= {f"/1.0/instances/{name}/state": {"pid": 0} for name in ("a", "z")}
    with mirrored(guestapi, answers) as stub:
        stub.answers["/1.0/instances/hung/state"] = stub.over.wait
        wait(lambda: known(guestapi).keys() == {"a", "z"})
        assert "hung in project default is not mirrored" in finding(guestapi)
        stub.answers["/1.0/instances/z"] = instance("z", user_a="1")
        stub.announce("instance-updated", "/1.0/instances/z")
        wait(lambda: known(guestapi)["z"].config == {"user.a": "1"})
        # Its storage works again, and an event reports a change.
        stub.answers["/1.0/instances/hung/state"] = {"pid": 0}
        stub.announce("instance-updated", "/1.0/instances/hung")
        wait(lambda: "hung" in known(guestapi))


def test_a_burst_is_batched(guestapi: Guestapi) -> None:
    """Of 300 changes at once the mirror asks for fewer; what it tells is in their order, and the last one is told.

    A change that lasts until the mirror has it is told, too.
    """
    answers: dict[str, object] = {"/1.0/instances": [instance("a", "Stopped", user_n="0")]}
    with mirrored(guestapi, answers) as stub:
        wait(lambda: "a" in known(guestapi))
        before = len(stub.asked)
        for number in range(1, 301):
            stub.answers["/1.0/instances/a"] = instance("a", "Stopped", user_n=str(number))
            stub.announce("instance-updated", "/1.0/instances/a")
        wait(lambda: known(guestapi)["a"].config == {"user.n": "300"})
        stub.answers["/1.0/instances/a"] = instance("a", "Stopped", user_n="301")
        stub.announce("instance-updated", "/1.0/instances/a")
        wait(lambda: known(guestapi)["a"].config == {"user.n": "301"})
        assert len(stub.asked) - before < 300
    with view(guestapi.settings.store.url) as store:
        entries = read_entries(store, 0, 1000).found
    told = [json.loads(entry.metadata) for entry in entries if entry.type == "config"]
    values = [int(one["value"]) for one in told]
    assert values == sorted(set(values))
    assert values[-2:] == [300, 301]
    # Each begins with what the one before told.
    assert [int(one["old_value"]) for one in told[1:]] == values[:-1]


@pytest.mark.root
def test_instance_replaced_after_the_list(guestapi: Guestapi) -> None:
    """An instance that starts between the list and its examination is mirrored with its present configuration."""
    with Container() as container:
        earlier = instance("c1", user_a="earlier", volatile_uuid=FIRST)
        now = instance("c1", user_a="now", volatile_uuid=SECOND)
        answers = {
            "/1.0/instances": [earlier],
            "/1.0/instances/c1": now,
            "/1.0/instances/c1/state": {"pid": container.pid},
        }
        with mirrored(guestapi, answers):
            wait(lambda: "c1" in known(guestapi))
            found = known(guestapi)["c1"]
            assert found.init is not None
            assert (found.init.pid, found.uuid, found.config) == (container.pid, SECOND, {"user.a": "now"})


def test_instance_that_cannot_be_read(guestapi: Guestapi) -> None:
    """An instance with a malformed description is named by check, and the others are mirrored."""
    answers: dict[str, object] = {
        "/1.0/instances": [
            instance("a", "Stopped", user_me="a"),
            {"name": "odd", "type": "container", "status": "Running", "expanded_config": {"user.a": ["1"]}},
            instance("index-", "Stopped", user_me="index-"),
        ]
    }
    with mirrored(guestapi, answers):
        wait(lambda: known(guestapi).keys() == {"a", "index-"})
        assert "odd in project default is not mirrored" in finding(guestapi)
    assert known(guestapi)["index-"].host_name == "index-"


def test_endless_answer(guestapi: Guestapi) -> None:
    """Of an endless answer the client reads only up to its limit, and raises an error."""
    with patch.object(daemon, "_ANSWER_BYTES", 1 << 16), Stub(guestapi.directory / "daemon", {}) as stub:
        stub.answers["/1.0/instances"] = [instance("a", user_data="x" * (1 << 17))]
        client = daemon.DaemonClient(str(guestapi.directory / "daemon"))
        with pytest.raises(DaemonError, match="the answer is larger than"):
            client.instances()
        stub.answers["/1.0/instances"] = []
        assert client.instances() == ([], {})
        client.close()


def test_images_that_are_refused_and_forgotten(guestapi: Guestapi) -> None:
    """An image that the daemon cannot export is named by check, others are mirrored; `--forget` removes copies."""
    content = "an image"
    good, bad = hashlib.sha256(content.encode()).hexdigest(), "0" * 64
    answers: dict[str, object] = {
        "/1.0/instances": [instance("c1", "Stopped", security_guestapi_images="true")],
        "/1.0/images": [{"fingerprint": fingerprint, "public": True} for fingerprint in (bad, good)],
        f"/1.0/images/{bad}/export": OSError("the member that has it is away"),
        f"/1.0/images/{good}/export": content,
    }

    def copies() -> list[str]:
        with view(guestapi.settings.store.url) as store:
            return [image.fingerprint for image in list_images(store)]

    with mirrored(guestapi, answers):
        wait(lambda: known(guestapi) and copies() == [good])
        assert "the member that has it is away" in finding(guestapi)
    assert "its 1 instances and 1 images" in guestapi.good("mirror", "incus", "--forget")
    assert (known(guestapi), copies()) == ({}, [])
    assert list(directory(guestapi.settings).iterdir()) == []


_SERVE = """
import sys, time
from pathlib import Path
from tests.mirror.stub import Stub
from tests.harness.waiting import until
with Stub(Path(sys.argv[1]), {"/1.0/instances": []}):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_hanging_daemon_leaves_one_sentence_in_the_journal(guestapi: Guestapi) -> None:
    """A daemon that hangs until its mirror gives it up is one line of the log; when it answers again, check is content.

    The next time is one more line.
    """
    path, log = guestapi.directory / "daemon", guestapi.directory / "log"
    mirror = [str(COMMAND), "--config", str(guestapi.config), "mirror", "incus", "--socket", str(path)]

    def status() -> SourceStatus | None:
        with view(guestapi.settings.store.url) as store:
            return next(iter(list_sources(store)), None)

    def follows() -> bool:
        known = status()
        return known is not None and known.connected and not known.fault

    def is_lost() -> bool:
        known = status()
        return known is not None and not known.connected

    command = [sys.executable, "-c", _SERVE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT) as stub:
        assert stub.stdout is not None
        assert stub.stdout.readline() == b"ready\n"
        with log.open("wb") as stderr, subprocess.Popen(mirror, stdin=subprocess.DEVNULL, stderr=stderr) as process:
            try:
                for times in (1, 2):
                    wait(follows)
                    stub.send_signal(signal.SIGSTOP)
                    wait(is_lost)
                    stub.send_signal(signal.SIGCONT)
                    wait(follows)
                    lines = log.read_text().splitlines()
                    assert len(lines) == times, lines
                    assert "instances get the last known answers until it is back" in lines[-1]
            finally:
                process.kill()
                stub.kill()


def test_hanging_daemon_is_an_error_of_one_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stopped daemon is an error of one sentence, and no library logs a traceback."""
    path = tmp_path / "daemon"
    command = [sys.executable, "-c", _SERVE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            with patch.object(daemon, "_SIGN_OF_LIFE_SECONDS", 0.2), daemon.DaemonClient(str(path)).events() as events:
                process.send_signal(signal.SIGSTOP)
                with pytest.raises(DaemonError, match=r"^\S+: the daemon gives no sign of life in 0\.2 s$"):
                    next(events)
        finally:
            process.kill()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(5)
    assert caplog.text == ""
