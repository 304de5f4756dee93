"""crun and runc without podman or Docker: the observations of their containers, with the real runtimes."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.callers.namespaces import examine
from guestapi.errors import SourceError
from guestapi.settings import ListenSocket, OciSettings, Settings, SourcesSettings
from guestapi.sources.doorbell import Ring
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.oci import Directories, OciSource
from guestapi.sources.source import Unclear
from tests.harness.containers import BASE
from tests.harness.holding import HoldingHook
from tests.harness.oci import OciRuntime
from tests.harness.waiting import TIMEOUT

pytestmark = pytest.mark.root


class SeenRuntime:
    """A runtime, its source, and a directory that stands for guestapi's socket directory."""

    def __init__(self, runtime: OciRuntime) -> None:
        self.runtime = runtime
        self.place = runtime.path / "guestapi"
        self.place.mkdir()
        self.ours = (self.place, "/dev/incus")

    def source(self, *, annotations: bool = False, roots: tuple[str, ...] = ()) -> OciSource:
        """Return the source with its settings."""
        oci = OciSettings(roots=roots or (str(self.runtime.root),), annotations=annotations)
        listener = (ListenSocket(path=str(self.place / "sock")),)
        return OciSource(Settings(listener=listener, sources=SourcesSettings(oci=oci)))

    def all(self) -> dict[str, Observed]:
        """Return all observations, by name."""
        found = {}
        for one in self.source().observe({}):
            assert isinstance(one, Observed)
            found[one.name] = one
        return found


@pytest.fixture(params=["crun", "runc"])
def seen(request: pytest.FixtureRequest) -> Iterator[SeenRuntime]:
    """Each runtime."""
    with OciRuntime(request.param) as runtime:
        yield SeenRuntime(runtime)


def kill(pid: int) -> None:
    """Kill a process with SIGKILL, and wait for its end."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], TIMEOUT)[0]
    finally:
        os.close(pidfd)


def test_ids_with_a_common_prefix(seen: SeenRuntime) -> None:
    """Two containers whose ids share the first 12 characters are two instances, each with its own init."""
    bundle = seen.runtime.bundle("b", [seen.ours, (seen.runtime.path, "/srv/data")])
    names = ("exampleproject-db-1", "exampleproject-web-1")
    keys = {name: seen.runtime.start(name, bundle) for name in names}
    found = seen.all()
    assert found.keys() == set(names)
    for name, one in found.items():
        assert one.key == keys[name]
        assert one.init == examine(seen.runtime.pid(name))
        assert one.init is not None
        assert (one.init.root_uid, one.hostname) == (BASE, "inside-b")
        assert one.devices == {"srv-data": {"type": "disk", "source": str(seen.runtime.path), "path": "/srv/data"}}
    assert found[names[0]].init != found[names[1]].init


def test_container_without_the_mount(seen: SeenRuntime) -> None:
    """A container without guestapi's mount is not observed, nor is one with another directory of the same name."""
    false = seen.runtime.path / "false/guestapi"
    false.mkdir(parents=True)
    seen.runtime.start("plain", seen.runtime.bundle("plain", []))
    seen.runtime.start("false", seen.runtime.bundle("false-bundle", [(false, "/dev/incus")]))
    assert seen.all() == {}


def test_ended(seen: SeenRuntime) -> None:
    """A dead container, whose entry the runtime keeps, has no init; it is gone when it is deleted."""
    key = seen.runtime.start("web", seen.runtime.bundle("b", [seen.ours]))
    kill(seen.runtime.pid("web"))
    assert seen.all()["web"].init is None
    seen.runtime("delete", "web")
    assert seen.all() == {}
    assert seen.source().observe_one(key, None) is None


def test_reused_pid(seen: SeenRuntime) -> None:
    """A recorded PID with another start time than the recorded one is not accepted as the init."""
    key = seen.runtime.start("web", seen.runtime.bundle("b", [seen.ours]))
    file = Path(key) / ("status" if seen.runtime.kind == "crun" else "state.json")
    text = file.read_text()
    document = json.loads(text)
    started = "process-start-time" if seen.runtime.kind == "crun" else "init_process_start"
    file.write_text(json.dumps({**document, started: document[started] - 1}))
    try:
        assert seen.all()["web"].init is None
    finally:
        # So that the runtime ends the container.
        file.write_text(text)


def test_bundles_of_podman_are_ignored(seen: SeenRuntime) -> None:
    """A bundle in podman's storage is left to podman's source, whatever its annotations say."""
    seen.runtime.bundle("x", [seen.ours], annotations={"io.container.manager": "nobody"})
    stored = seen.runtime.path / "vfs-containers/web/userdata"
    stored.parent.mkdir(parents=True)
    (seen.runtime.path / "x").rename(stored)
    seen.runtime.start("web", stored)
    assert seen.all() == {}


# crun 1.8 can do this only with podman's preparation.
@pytest.mark.parametrize("seen", ["runc"], indirect=True)
def test_shared_pid_namespace(seen: SeenRuntime) -> None:
    """A container in another's PID namespace is a problem and no instance."""
    seen.runtime.start("web", seen.runtime.bundle("b", [seen.ours]))
    other = seen.runtime.bundle("c", [seen.ours], pid_namespace=f"/proc/{seen.runtime.pid('web')}/ns/pid")
    seen.runtime.start("sidecar", other)
    found = {one.name: one for one in seen.source().observe({}) if not isinstance(one, Unclear)}
    assert isinstance(found["web"], Observed)
    assert isinstance(found["sidecar"], Problem)
    assert found["sidecar"].refused


@pytest.mark.parametrize("trusted", [False, True])
def test_annotations(seen: SeenRuntime, trusted: bool) -> None:
    """Annotations are configuration only if the operator trusts them, and never a name or a switch."""
    given = {
        "guestapi.name": "other",
        "guestapi.config.user.a": "b",
        "guestapi.config.security.guestapi": "false",
    }
    key = seen.runtime.start("web", seen.runtime.bundle("b", [seen.ours], annotations=given))
    found = seen.source(annotations=trusted).observe_one(key, None)
    assert isinstance(found, Observed)
    assert (found.name, found.config) == ("web", {"user.a": "b"} if trusted else {})
    assert len(found.problems) == trusted


def held(seen: SeenRuntime, source: OciSource) -> Observed | Problem | None:
    """Return a source's answer at the doorbell, for a container that waits for its hook."""
    hook = HoldingHook(seen.runtime.path / "hook")
    bundle = seen.runtime.bundle("b", [seen.ours], hook=[str(hook.path)])
    starting = threading.Thread(target=lambda: seen.runtime.start("web", bundle))
    starting.start()
    try:
        with hook.held() as state:
            return source.at_doorbell(Ring("oci", state=state))
    finally:
        starting.join()


def test_doorbell_before_the_first_instruction(seen: SeenRuntime) -> None:
    """During the hook, before the runtime has recorded the container, its bundle gives the observation."""
    found = held(seen, seen.source(roots=("/nowhere", str(seen.runtime.root))))
    assert isinstance(found, Observed)
    assert (found.name, found.key) == ("web", f"{seen.runtime.root}/web")
    assert found.init == examine(seen.runtime.pid("web"))
    assert found == seen.all()["web"]


def test_doorbell_of_another_state_directory(seen: SeenRuntime) -> None:
    """A container in a state directory that is not configured is an error that names the setting."""
    with pytest.raises(SourceError, match=r"sources\.oci\.roots"):
        held(seen, seen.source(roots=("/nowhere",)))


def wait(changes: Directories) -> frozenset[str] | None:
    """Return the next reported changes."""
    while True:
        assert select.select([changes], [], [], TIMEOUT)[0]
        found = changes.read()
        if found is None or found:
            return found


def test_changes(seen: SeenRuntime) -> None:
    """A new state directory asks for a full look; a container is reported when it is started and deleted."""
    changes = seen.source().changes()
    try:
        bundle = seen.runtime.bundle("b", [seen.ours])
        first = seen.runtime.start("one", bundle)
        assert wait(changes) is None
        while select.select([changes], [], [], 0.3)[0]:
            changes.read()
        second = seen.runtime.start("two", bundle)
        assert wait(changes) == frozenset({second})
        assert isinstance(seen.source().observe_one(second, None), Observed)
        while select.select([changes], [], [], 0.3)[0]:
            changes.read()
        seen.runtime("delete", "--force", "one")
        assert first in (wait(changes) or ())
    finally:
        changes.close()


def test_both_runtimes_at_once() -> None:
    """A crun and a runc container with the same id have two keys; the reconciler registers one of them."""
    with OciRuntime("crun") as crun, OciRuntime("runc") as runc:
        seen = SeenRuntime(crun)
        keys = {runtime.start("web", runtime.bundle("b", [seen.ours])) for runtime in (crun, runc)}
        source = seen.source(roots=(str(crun.root), str(runc.root)))
        assert {one.key for one in source.observe({}) if isinstance(one, Observed)} == keys


@pytest.mark.parametrize("content", ["", "{", "null", '{"pid":"x"}', "[" * 100_000])
@pytest.mark.parametrize("file", ["status", "state.json"])
def test_garbage_in_a_state_directory(tmp_path: Path, file: str, content: str) -> None:
    """A registered container with an unreadable state is unclear, so the store keeps it; others are ignored."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / file).write_text(content)
    oci = OciSettings(roots=(str(tmp_path),))
    source = OciSource(Settings(sources=SourcesSettings(oci=oci)))
    assert list(source.observe({})) == []
    (found,) = source.observe({f"{tmp_path}/web": None})
    assert isinstance(found, Unclear)
    assert found.reason.isprintable()
