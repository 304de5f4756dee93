"""A daemon of which a part hangs, refuses or has just changed: the rest is mirrored, and the operator is told."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from guestapi.mirror import daemon
from guestapi.model import Instance
from guestapi.store.images import directory
from guestapi.store.lookup import list_images, list_instances
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.containers import Container
from tests.harness.service import COMMAND
from tests.mirror.stub import Stub

#: Seconds until what must happen is given up.
PATIENCE = 30.0
FIRST, SECOND = "11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555"


@pytest.fixture
def guestapi(tmp_path: Path) -> Guestapi:
    """The command, and a store in which nothing is yet."""
    command = Guestapi(tmp_path)
    Writer(command.settings, create=True)
    return command


def instance(name: str, status: str = "Running", **config: str) -> dict[str, Any]:
    """An instance as the daemon has it; ``user_a`` means ``user.a``."""
    expanded = {key.replace("_", "."): value for key, value in config.items()}
    return {"name": name, "type": "container", "status": status, "expanded_config": expanded}


@contextmanager
def mirrored(guestapi: Guestapi, answers: Mapping[str, object]) -> Iterator[Stub]:
    """A mirror of a daemon that answers so."""
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
    """What the store has."""
    with view(guestapi.settings.store.url) as store:
        return {one.name: one for one in list_instances(store)}


def wait(what: Callable[[], object]) -> None:
    """Wait until that is so."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def finding(guestapi: Guestapi) -> str:
    """What `guestapi check` says of a mirror with which something is wrong."""
    found: list[dict[str, Any]] = []

    def is_wrong() -> bool:
        findings = json.loads(guestapi("check", "--format", "json").out)
        found[:] = [one for one in findings if one["check"] == "mirror incus" and not one["ok"]]
        return bool(found) and "no contact yet" not in found[0]["text"]

    wait(is_wrong)
    return str(found[0]["text"])


def test_instance_that_hangs(guestapi: Guestapi) -> None:
    """An instance of which the daemon cannot tell, because its storage hangs, keeps no other from being mirrored."""
    instances = {name: instance(name) for name in ("a", "hung", "z")}
    answers: dict[str, object] = {"/1.0/instances": list(instances.values())}
    answers |= {f"/1.0/instances/{name}": one for name, one in instances.items()}
    answers |= {f"/1.0/instances/{name}/state": {"pid": 0} for name in ("a", "z")}
    with mirrored(guestapi, answers) as stub:
        stub.answers["/1.0/instances/hung/state"] = stub.over.wait
        wait(lambda: known(guestapi).keys() == {"a", "z"})
        assert "hung in project default is not mirrored" in finding(guestapi)
        stub.answers["/1.0/instances/z"] = instance("z", user_a="1")
        stub.tell("instance-updated", "/1.0/instances/z")
        wait(lambda: known(guestapi)["z"].config == {"user.a": "1"})
        # It is well again, and something happens to it.
        stub.answers["/1.0/instances/hung/state"] = {"pid": 0}
        stub.tell("instance-updated", "/1.0/instances/hung")
        wait(lambda: "hung" in known(guestapi))


@pytest.mark.root
def test_instance_that_is_another_since_it_was_listed(guestapi: Guestapi) -> None:
    """Who starts while all are compared is known with the configuration of that very start, not with an earlier one."""
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
    """An instance that is described in a way that nobody understands is named, and costs the others nothing."""
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


def test_answer_without_end(guestapi: Guestapi) -> None:
    """A daemon whose answer is larger than any can be costs the mirror no more than that bound, and is told of."""
    with patch.object(daemon, "_ANSWER_BYTES", 1 << 16), Stub(guestapi.directory / "daemon", {}) as stub:
        stub.answers["/1.0/instances"] = [instance("a", user_data="x" * (1 << 17))]
        client = daemon.Daemon(str(guestapi.directory / "daemon"))
        with pytest.raises(daemon.DaemonError, match="the answer is larger than"):
            client.instances()
        stub.answers["/1.0/instances"] = []
        assert client.instances() == ([], {})
        client.close()


def test_images_that_are_refused_and_forgotten(guestapi: Guestapi) -> None:
    """An image that the daemon cannot give keeps no other away, and is named; `--forget` takes copies away."""
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
