"""The observations of the sources podman and docker with real engines: the operator's settings, none of an image."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
from collections.abc import Iterator

import pytest

from guestapi.callers.namespaces import examine
from guestapi.errors import SourceError
from guestapi.settings import DockerSettings, ListenSocket, PodmanSettings, Settings, SourcesSettings
from guestapi.sources.docker_api import EngineError
from guestapi.sources.doorbell import Ring
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.podman import DOCKER, PODMAN, EngineChanges, EngineSource
from tests.harness.containers import BASE
from tests.harness.engines import Docker, Podman, RealEngine
from tests.harness.holding import HoldingHook
from tests.harness.images import ContainerImage
from tests.harness.waiting import TIMEOUT, until

pytestmark = pytest.mark.root


class SeenEngine:
    """An engine, its source, and a directory that stands for guestapi's socket directory."""

    def __init__(self, engine: RealEngine) -> None:
        self.engine = engine
        self.place = engine.path / "guestapi"
        self.place.mkdir()
        self.mount = f"--volume={self.place}:/dev/incus"

    def source(self, *, annotations: bool = False) -> EngineSource:
        """Return the source with its settings."""
        socket = str(self.engine.socket)
        sources = SourcesSettings(
            podman=PodmanSettings(socket=socket, annotations=annotations),
            docker=DockerSettings(socket=socket, annotations=annotations),
        )
        listener = (ListenSocket(path=str(self.place / "sock")),)
        runtime = PODMAN if isinstance(self.engine, Podman) else DOCKER
        return EngineSource(runtime, Settings(listener=listener, sources=sources))

    def all(self) -> dict[str, Observed | Problem]:
        """Return all observations, by name."""
        found = {}
        for one in self.source().observe({}):
            assert isinstance(one, (Observed, Problem))
            found[one.name] = one
        return found

    def one(self, key: str, *, annotations: bool = False) -> Observed:
        """Return the observation of one container."""
        found = self.source(annotations=annotations).observe_one(key, None)
        assert isinstance(found, Observed)
        return found

    def run(self, name: str, *options: str) -> str:
        """Start a container with guestapi's mount; return its id."""
        return self.engine.run(name, self.engine.plain, self.mount, *options)


#: Docker has no hooks, no annotations, and no containers without a cgroup.
only_podman = pytest.mark.parametrize("seen", [Podman], indirect=True)


@pytest.fixture(scope="module", params=[Podman, Docker])
def seen(request: pytest.FixtureRequest) -> Iterator[SeenEngine]:
    """Each engine."""
    with request.param() as engine:
        yield SeenEngine(engine)


@pytest.fixture(autouse=True)
def clean(seen: SeenEngine) -> Iterator[None]:
    """Remove all containers after each test."""
    yield
    seen.engine.remove_all()


def kill(pid: int) -> None:
    """Kill a process with SIGKILL, and wait for its end."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
    finally:
        os.close(pidfd)


def test_name_and_key(seen: SeenEngine) -> None:
    """A container with guestapi's mount has its complete id as key; one without the mount is not observed."""
    key = seen.run("web", "--hostname=inside")
    seen.engine.run("other", seen.engine.plain)
    found = seen.all()
    assert found.keys() == {"web"}
    web = found["web"]
    assert isinstance(web, Observed)
    assert (web.key, web.project, web.hostname, web.config) == (key, "default", "inside", {})
    assert web.init == examine(seen.engine.pid("web"))
    assert web.init is not None
    assert web.init.root_uid == (BASE if isinstance(seen.engine, Podman) else 0)
    assert web.problems == ()


def test_generated_host_name_is_ignored(seen: SeenEngine) -> None:
    """A host name that an engine derives from the id is ignored; the container's name is the better one."""
    assert seen.one(seen.run("web")).hostname is None


def test_life(seen: SeenEngine) -> None:
    """The key survives renames and restarts; a stopped container has no init, and a removed one is gone."""
    key = seen.run("web")
    first = seen.one(key).init
    seen.engine("rename", "web", "shop")
    seen.engine("restart", "--time=0", "shop")
    again = seen.one(key)
    assert (again.name, again.init == first) == ("shop", False)
    assert again.init == examine(seen.engine.pid("shop"))
    seen.engine("stop", "--time=0", "shop")
    assert seen.one(key).init is None
    seen.engine("rm", "shop")
    assert seen.source().observe_one(key, None) is None
    assert seen.all() == {}


def test_killed_init(seen: SeenEngine) -> None:
    """A container whose init was killed does not run, whatever the engine reports."""
    key = seen.run("web")
    if isinstance(seen.engine, Podman):
        # conmon would notice the end.
        kill(int(seen.engine.inspect("web")["State"]["ConmonPid"]))
    kill(seen.engine.pid("web"))
    found = seen.one(key)
    assert (found.init, found.problems) == (None, ())


@only_podman
def test_without_cgroups(seen: SeenEngine) -> None:
    """The init of a container without a cgroup of its own is recognised by its start time."""
    key = seen.run("web", "--cgroups=disabled")
    assert seen.one(key).init == examine(seen.engine.pid("web"))


def strangers(seen: SeenEngine) -> ContainerImage:
    """Return an untrusted image, with metadata that imitates what 0.1 and other tools obeyed."""
    return ContainerImage(
        seen.engine.rootfs,
        annotations={
            "guestapi.enable": "true",
            "guestapi.name": "web",
            "guestapi.config.user.evil": "1",
            "guestapi.config.security.guestapi.images": "true",
            "io.container.manager": "nobody",
            "io.kubernetes.cri-o.Name": "web",
        },
        labels={"guestapi.name": "web", "guestapi.config.user.evil": "1", "guestapi.config.security.guestapi": "false"},
        environment=["PATH=/usr/bin:/bin", "HOSTNAME=web"],
        volumes=["/dev/incus", str(seen.place), "/dev/lxd", "/var/lib/incus/guestapi"],
    )


def test_image_metadata_has_no_effect(seen: SeenEngine) -> None:
    """Metadata of an image never makes an instance, and gives the operator's container no name, key or device."""
    image = seen.engine.load(strangers(seen), "stranger")
    seen.engine.run("alone", image)
    key = seen.engine.run("mounted", image, f"--volume={seen.place}:/dev/incus")
    assert seen.all().keys() == {"mounted"}
    found = seen.one(key)
    assert (found.name, found.hostname, found.config, found.devices) == ("mounted", None, {}, {})
    # The operator gets no problem report about an image's metadata.
    assert found.problems == ()


def test_trusted_annotations(seen: SeenEngine) -> None:
    """With ``annotations = true`` annotations are configuration, except switches of the guest API; never a name."""
    image = seen.engine.load(strangers(seen), "trusted")
    found = seen.one(seen.engine.run("mine", image, seen.mount, "--label=guestapi.config.user.a=b"), annotations=True)
    assert (found.name, found.config) == ("mine", {"user.evil": "1", "user.a": "b"})
    assert ["security." in problem for problem in found.problems] == [True]


def test_operators_volume(seen: SeenEngine) -> None:
    """A named volume that shows guestapi's directory counts as the mount, running or not; another volume does not."""
    options = ("--opt=type=none", "--opt=o=bind", f"--opt=device={seen.place}")
    seen.engine("volume", "create", *options, "ours")
    seen.engine("volume", "create", "theirs")
    try:
        key = seen.engine.run("web", seen.engine.plain, "--volume=ours:/dev/incus", "--volume=theirs:/srv/data:ro")
        seen.engine.run("other", seen.engine.plain, "--volume=theirs:/dev/incus")
        assert seen.all().keys() == {"web"}
        assert seen.one(key).devices == {
            "srv-data": {"type": "disk", "source": "theirs", "path": "/srv/data", "readonly": "true"}
        }
        seen.engine("stop", "--time=0", "web")
        assert seen.all().keys() == {"web"}
    finally:
        seen.engine.remove_all()
        seen.engine("volume", "rm", "ours", "theirs")


def test_mount_is_compared_by_inode(seen: SeenEngine) -> None:
    """A link to guestapi's directory counts as the mount; a directory elsewhere with the same name does not."""
    link, false = seen.engine.path / "link", seen.engine.path / "false/guestapi"
    link.symlink_to(seen.place)
    false.mkdir(parents=True)
    seen.engine.run("linked", seen.engine.plain, f"--volume={link}:/dev/incus")
    seen.engine.run("false", seen.engine.plain, f"--volume={false}:/dev/incus")
    assert seen.all().keys() == {"linked"}


def test_mounts_are_disks(seen: SeenEngine) -> None:
    """Other mounts of the operator's are disks named by their path; a name that occurs twice is a problem."""
    for name in ("one", "two"):
        (seen.engine.path / name).mkdir(exist_ok=True)
    one, two = seen.engine.path / "one", seen.engine.path / "two"
    key = seen.run("web", f"--volume={one}:/srv/a:ro", f"--volume={two}:/srv-a", f"--volume={two}:/srv/b")
    found = seen.one(key)
    assert found.devices is not None
    assert found.devices["srv-b"] == {"type": "disk", "source": str(two), "path": "/srv/b"}
    assert found.devices.keys() == {"srv-a", "srv-b"}
    (problem,) = found.problems
    assert "/srv" in problem


def test_shared_pid_namespace(seen: SeenEngine) -> None:
    """A container that shares another's PID namespace is a problem and no instance; the other is unaffected."""
    key = seen.run("web")
    init = seen.one(key).init
    seen.run("sidecar", f"--pid=container:{key}")
    found = seen.all()
    sidecar, web = found["sidecar"], found["web"]
    assert isinstance(sidecar, Problem)
    assert sidecar.refused
    assert "shares the PID namespace of another container" in sidecar.reason
    assert isinstance(web, Observed)
    assert web.init == init


def test_events(seen: SeenEngine) -> None:
    """The start, rename, end and removal of a container each give its id."""
    events = seen.source().changes()
    try:
        key = seen.run("web")
        assert key in wait(events)
        for words in (["rename", "web", "shop"], ["kill", "shop"], ["rm", "--force", "shop"]):
            seen.engine(*words)
            assert key in wait(events), words
    finally:
        events.close()


def read_all(events: EngineChanges) -> None:
    """Read until the stream ends."""
    while select.select([events], [], [], 10)[0]:
        events.read()


def wait(events: EngineChanges) -> frozenset[str]:
    """Return the next ids from the stream."""
    while True:
        assert select.select([events], [], [], TIMEOUT)[0]
        found = events.read()
        assert found is not None
        if found:
            return found


def test_stopped_engine(seen: SeenEngine) -> None:
    """A stopped engine is an error with a hint what to do; its event stream ends."""
    events = seen.source().changes()
    seen.engine.stop()
    try:
        with pytest.raises(EngineError, match=r"systemctl enable --now (podman|docker)\.socket"):
            list(seen.source().observe({}))
        assert select.select([events], [], [], 10)[0]
        with pytest.raises(EngineError):
            # Earlier events may come first.
            read_all(events)
    finally:
        events.close()
        seen.engine.start()


@only_podman
def test_annotations_of_0_1_are_problems(seen: SeenEngine) -> None:
    """A container with annotations that 0.1 obeyed has problems that state the replacement."""
    annotations = ("--annotation=guestapi.enable=true", "--annotation=guestapi.name=web")
    key = seen.run("mine", *annotations, "--annotation=guestapi.config.user.role=frontend")
    found = seen.one(key)
    assert (found.name, found.config) == ("mine", {})
    assert any("'podman rename'" in problem for problem in found.problems)
    assert any("guestapi config set mine" in problem for problem in found.problems)
    assert seen.one(seen.run("web", *annotations)).problems == ()


#: The infra containers of pods take no options.
_PODS = (
    '[containers]\ncgroups = "disabled"\nnetns = "none"\ndefault_ulimits = ["nofile=1024:4096", "nproc=1000:1000"]\n'
)


@only_podman
def test_member_of_a_pod(seen: SeenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member of a pod is an instance with its own name and the pod's host name; the pod itself is none."""
    conf = seen.engine.path / "containers.conf"
    conf.write_text(_PODS)
    monkeypatch.setenv("CONTAINERS_CONF", str(conf))
    image = seen.engine.load(ContainerImage(seen.engine.rootfs), "pod")[-1]
    infra = (f"--infra-image={image}", "--infra-command=sleep 1000")
    seen.engine("pod", "create", "--name=shop", "--share=uts,ipc", *infra)
    try:
        for name in ("web", "db"):
            seen.engine("run", "--detach", "--pod=shop", f"--name={name}", seen.mount, image, "sleep", "1000")
        found = seen.all()
        assert found.keys() == {"web", "db"}
        assert [one.hostname for one in found.values() if isinstance(one, Observed)] == ["shop", "shop"]
        assert {one.init for one in found.values() if isinstance(one, Observed)} == {
            examine(seen.engine.pid(name)) for name in ("web", "db")
        }
    finally:
        seen.engine("pod", "rm", "--force", "shop")


@only_podman
def test_restart_policy(seen: SeenEngine) -> None:
    """A container that podman restarts has the same key and another init."""
    key = seen.run("web", "--restart=always")
    first = seen.one(key).init
    assert first is not None
    kill(first.pid)
    until(lambda: seen.one(key).init not in (None, first), "it runs again")
    assert seen.one(key).init == examine(seen.engine.pid("web"))


@only_podman
def test_doorbell_before_the_first_instruction(seen: SeenEngine) -> None:
    """While a hook runs, podman's API does not answer; bundle and conmon give name, init and host name."""
    hook = HoldingHook(seen.engine.path / "hook")
    shipped = {"version": "1.0.0", "hook": {"path": str(hook.path)}, "when": {"hasBindMounts": True}}
    assert isinstance(seen.engine, Podman)
    file = seen.engine.hooks / "test.json"
    file.write_text(json.dumps({**shipped, "stages": ["createRuntime"]}))
    done: list[str] = []
    (seen.engine.path / "data").mkdir()
    options = ("--hostname=inside", f"--volume={seen.engine.path}/data:/srv/data:ro", "--volume=named:/srv/named")
    starting = threading.Thread(target=lambda: done.append(seen.run("web", *options)))
    source = seen.source()
    changes = source.changes()
    starting.start()
    try:
        with hook.held() as state:
            # podman's API answers no request now.
            found = source.at_doorbell(Ring("podman", state=state))
            # The container is observed again when the API answers.
            assert wait(changes) == {json.loads(state)["id"]}
        starting.join(TIMEOUT)
    finally:
        changes.close()
        file.unlink()
    assert isinstance(found, Observed)
    assert found == seen.one(done[0])
    assert (found.key, found.name, found.hostname, found.config) == (done[0], "web", "inside", {})
    assert found.init == examine(seen.engine.pid("web"))
    assert found.init is not None
    assert found.init.root_uid == BASE
    assert found.devices is not None
    assert found.devices.keys() == {"srv-data", "srv-named"}


@only_podman
def test_doorbell_of_another_container(seen: SeenEngine) -> None:
    """A ring at the end of a container, and one with a bundle that is not podman's, register nothing."""
    source = seen.source()
    stopped = {"id": "a" * 64, "status": "stopped", "bundle": "/nowhere"}
    assert source.at_doorbell(Ring("podman", state=json.dumps(stopped).encode())) is None


@pytest.mark.parametrize("state", [b"", b"{", b"null", b'{"id":7}', b'{"id":"a/b"}', b'{"id":"a"}', b"[" * 100_000])
@only_podman
def test_doorbell_garbage(seen: SeenEngine, state: bytes) -> None:
    """A malformed state is an error."""
    with pytest.raises(SourceError, match=r"hook|id of a container|config\.json|OCI") as caught:
        seen.source().at_doorbell(Ring("podman", state=state))
    assert str(caught.value).isprintable()
