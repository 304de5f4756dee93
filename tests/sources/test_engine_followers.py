"""podman and Docker with their followers: which containers are registered, with which configuration, and failures."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.callers.namespaces import examine
from tests.docs.test_guides import block
from tests.harness.containers import Container
from tests.harness.engines import CURL, Docker, Podman, RealEngine
from tests.harness.followers import RealFollower, hook_program, instances, status
from tests.harness.images import ContainerImage
from tests.harness.service import COMMAND, Service
from tests.harness.waiting import TIMEOUT, until

pytestmark = pytest.mark.root

SHIPPED = Path(__file__).parents[2] / "conf/oci-guestapi.json"
UNKNOWN = "pid not in container?"


class EngineHost:
    """An engine, a service, and the follower between them."""

    def __init__(self, engine: RealEngine, service: Service) -> None:
        self.engine, self.service = engine, service
        self.source = "podman" if isinstance(engine, Podman) else "docker"
        self.mount = f"--volume={service.socket.parent}:/dev/incus"
        self.follower = RealFollower(service, self.source)

    def run(self, name: str, *options: str, check: bool = True) -> str:
        """Start a container with guestapi's mount; return its id."""
        return self.engine.run(name, self.engine.plain, self.mount, *options, check=check)

    def is_running(self, name: str, besides: int = 0) -> bool:
        """Return whether the instance runs with the container's init, other than `besides`."""
        one = instances(self.service).get(name, {})
        return one.get("status") == "running" and one["pid"] == self.engine.pid(name) != besides

    def wait_for(self, name: str, wanted: str) -> None:
        """Wait until an instance is running, stopped or gone."""
        until(lambda: status(self.service, name) == wanted, f"{name} is {status(self.service, name)}, not {wanted}")


@pytest.fixture(scope="module", params=[Podman, Docker])
def host(request: pytest.FixtureRequest) -> Iterator[EngineHost]:
    """Each engine, with a follower of its own."""
    with request.param() as engine:
        toml = (
            f'[hooks.template]\n"user.template" = "yes"\n[sources]\ndoorbells = "{{root}}/doorbells"\n'
            f'[sources.podman]\nsocket = "{engine.socket}"\n[sources.docker]\nsocket = "{engine.socket}"\n'
        )
        service = Service(dialects=["incus"])
        service.write_config(toml.replace("{root}", str(service.root)))
        with service:
            made = EngineHost(engine, service)
            if isinstance(engine, Podman):
                install_hook(engine, service)
            with made.follower:
                yield made


def install_hook(podman: Podman, service: Service) -> None:
    """Install the shipped file for hooks.d, with other paths of the hook and its configuration."""
    document = json.loads(SHIPPED.read_text())
    command = document["hook"]["args"][2]
    assert "/opt/guestapi/bin/guestapi-hook podman" in command
    document["hook"]["args"][2] = f"exec /usr/bin/python3 -IS {hook_program()} --config {service.config} podman"
    (podman.hooks / SHIPPED.name).write_text(json.dumps(document))


#: Docker has no hooks and no annotations.
only_podman = pytest.mark.parametrize("host", [Podman], indirect=True)


@pytest.fixture(autouse=True)
def clean(host: EngineHost) -> Iterator[None]:
    """Remove all containers and instances after each test."""
    yield
    host.engine.remove_all()
    until(lambda: all(one["status"] != "running" for one in host.service.listed()), "the end of all containers")
    for name in instances(host.service):
        host.service.command("instance", "remove", name, check=False)


def kill(pid: int) -> None:
    """Kill a process with SIGKILL, and wait for its end."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], TIMEOUT)[0]
    finally:
        os.close(pidfd)


def test_first_request_is_answered(host: EngineHost) -> None:
    """The first request of a container's first program is answered: before, or after a wait for its registration."""
    out = host.engine.once(host.engine.plain, "http://x/1.0/config/user.template", host.mount)
    assert out == "yes"


def test_name_and_host_name(host: EngineHost) -> None:
    """The instance has the container's name; its host name is the operator's, or else the instance's name."""
    host.run("web")
    host.run("db", "--hostname=inside")
    until(lambda: host.is_running("web") and host.is_running("db"), "both")
    assert "local-hostname: web" in host.engine.ask("web", "/1.0/meta-data")
    assert "local-hostname: inside" in host.engine.ask("db", "/1.0/meta-data")
    assert instances(host.service)["web"]["pid"] == host.engine.pid("web")


def test_untrusted_image(host: EngineHost) -> None:
    """Labels and annotations of an image, which 0.1 obeyed, give it no name, key or switch."""
    words = {
        "guestapi.enable": "true",
        "guestapi.name": "web",
        "guestapi.config.user.template": "evil",
        "guestapi.config.security.guestapi.images": "true",
    }
    image = ContainerImage(host.engine.rootfs, words, words, volumes=["/dev/incus", str(host.service.socket.parent)])
    stranger = host.engine.load(image, "stranger")
    host.run("web")
    until(lambda: host.is_running("web"), "web")
    host.service.configure("web", user_secret="s")
    # It has no socket of guestapi, whatever volumes it declares.
    host.engine.run("unmounted", stranger)
    # The operator mounts the socket, and sets nothing else.
    host.engine.run("mounted", stranger, host.mount)
    until(lambda: host.is_running("mounted"), "mounted")
    found = instances(host.service)
    assert found.keys() == {"web", "mounted"}
    assert found["mounted"]["config"] == {"user.template": "yes"}
    assert host.engine.ask("mounted", "/1.0/config") == '["/1.0/config/user.template"]'
    assert host.engine.ask("web", "/1.0/config/user.secret") == "s"
    assert host.is_running("web")


def test_name_of_another_owner(host: EngineHost) -> None:
    """A container with the name of another owner's running instance is refused; check names both."""
    with Container(host.service.binds, hostname="web") as other:
        host.service.add("web", other, {"user.secret": "s"})
        before = instances(host.service)["web"]
        host.run("web", check=False)
        until(lambda: "web" in host.service.command("check", check=False).stdout, "a finding")
        until(lambda: "not registered" in host.service.command("check", check=False).stdout, "a refusal")
        assert host.engine.ask("web", "/1.0/config/user.secret") == UNKNOWN
        assert other.ask("/1.0/config/user.secret").text == "s"
        assert instances(host.service)["web"] == before
        # With a free name, it is registered at once, or at the next look.
        host.engine("rename", "web", "shop")
        until(lambda: host.is_running("shop"), "shop")
        assert host.engine.ask("shop", "/1.0/config/user.template") == "yes"
    host.service.command("instance", "stop", "web", check=False)


def test_restart_and_rename(host: EngineHost) -> None:
    """After a restart and a rename it is the same instance, with the operator's settings."""
    host.run("web")
    until(lambda: host.is_running("web"), "web")
    host.service.command("config", "set", "web", "user.mine=kept")
    before = instances(host.service)["web"]
    host.engine("restart", "--time=0", "web")
    until(lambda: host.is_running("web", besides=before["pid"]), "web with another init")
    host.engine("rename", "web", "shop")
    until(lambda: host.is_running("shop"), "shop")
    after = instances(host.service)["shop"]
    assert (after["uuid"], after["config"]["user.mine"]) == (before["uuid"], "kept")
    assert host.engine.ask("shop", "/1.0/config/user.mine") == "kept"
    assert "web" not in instances(host.service)


def test_stop_and_removal_keep_settings(host: EngineHost) -> None:
    """A removed container's instance stays only with settings of the operator's, which the next of its name gets."""
    host.run("web")
    host.run("db")
    until(lambda: host.is_running("web") and host.is_running("db"), "both")
    host.service.command("config", "set", "db", "user.mine=kept")
    for name in ("web", "db"):
        host.engine("stop", "--time=0", name)
        host.wait_for(name, "stopped")
        host.engine("rm", name)
    host.wait_for("web", "")
    host.wait_for("db", "stopped")
    host.run("db")
    until(lambda: host.is_running("db"), "db anew")
    assert host.engine.ask("db", "/1.0/config/user.mine") == "kept"


def test_twelve_at_once(host: EngineHost) -> None:
    """Twelve containers that start at once are all registered, each with its own init."""
    names = [f"c{number}" for number in range(12)]
    threads = [threading.Thread(target=host.run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    until(lambda: all(status(host.service, name) == "running" for name in names), "all of them")
    found = instances(host.service)
    assert {name: found[name]["pid"] for name in names} == {name: host.engine.pid(name) for name in names}


def test_changes_without_a_follower(host: EngineHost) -> None:
    """Without a follower containers start and end as usual; a new follower brings the store up to date."""
    host.run("ends")
    until(lambda: host.is_running("ends"), "ends")
    host.follower.kill()
    try:
        host.engine("rm", "--force", *(("--time=0",) if host.source == "podman" else ()), "ends")
        host.run("begins")
    finally:
        host.follower.start()
    until(lambda: host.is_running("begins"), "begins")
    host.wait_for("ends", "")
    assert host.engine.ask("begins", "/1.0/config/user.template") == "yes"


def test_init_is_killed(host: EngineHost) -> None:
    """The end of an init that was killed is noticed at once, even if podman's conmon is killed, too."""
    host.run("web")
    until(lambda: host.is_running("web"), "web")
    if isinstance(host.engine, Podman):
        kill(int(host.engine.inspect("web")["State"]["ConmonPid"]))
        assert host.engine.ask("web", "/1.0/config/user.template") == "yes"
    kill(host.engine.pid("web"))
    until(lambda: status(host.service, "web") != "running", "its end")
    host.run("other")
    until(lambda: host.is_running("other"), "other")


def test_command_that_cannot_be_run(host: EngineHost) -> None:
    """A container whose program is missing is not registered as running."""
    out = host.engine("run", "--name=web", *host.engine.modest, host.mount, *host.engine.plain, "/no/such", check=False)
    assert "/no/such" in out
    until(lambda: status(host.service, "web") in ("", "stopped"), status(host.service, "web"))


def test_shared_pid_namespace(host: EngineHost) -> None:
    """A container that shares another's PID namespace is named by check, and gets the other instance's answers."""
    host.run("web")
    until(lambda: host.is_running("web"), "web")
    host.run("sidecar", f"--pid=container:{host.engine.inspect('web')['Id']}")
    until(lambda: "sidecar" in host.service.command("check", check=False).stdout, "a finding")
    assert "local-hostname: web" in host.engine.ask("sidecar", "/1.0/meta-data")
    assert host.is_running("web")


@only_podman
def test_registered_before_its_own_process(host: EngineHost) -> None:
    """The hook registers the container before its program runs, without podman's API."""
    host.engine.stop(signal.SIGKILL)
    try:
        out = host.engine(
            *("run", "--rm", "--name=web", *host.engine.modest, host.mount, *host.engine.plain, *CURL),
            *("http://x/1.0/config/user.template", "http://x/1.0/meta-data"),
        )
    finally:
        host.engine.start()
    assert out.startswith("yes")
    assert "local-hostname: web" in out
    host.wait_for("web", "")


@only_podman
def test_containers_of_0_1(host: EngineHost) -> None:
    """An instance of a 0.1 hook is adopted with its UUID; keys from its annotations become the operator's."""
    annotations = ("--annotation=guestapi.enable=true", "--annotation=guestapi.config.user.role=frontend")
    host.follower.kill()
    hook = host.engine.path / "hooks" / SHIPPED.name
    kept = hook.read_text()
    hook.unlink()
    try:
        host.run("web", *annotations)
        # As 0.1 stored it: without an owner, with the configuration of the annotations.
        with_init = host.service.add("web", None, {"user.role": "frontend"})
        host.service.command("instance", "start", "web", "--pid", str(host.engine.pid("web")))
    finally:
        hook.write_text(kept)
        host.follower.start()
    until(lambda: instances(host.service)["web"].get("source") == "podman", "its owner")
    found = instances(host.service)["web"]
    assert (found["uuid"], found["status"]) == (with_init.uuid, "running")
    assert found["config"] == {"user.role": "frontend", "user.template": "yes"}
    # check states how to replace the annotations.
    assert "guestapi.config.user.role" in host.service.command("check", check=False).stdout
    assert examine(host.engine.pid("web")) == host.service.instance("web").init


@only_podman
def test_annotation_with_a_running_name(host: EngineHost) -> None:
    """An annotation with another instance's name has no effect: the container has its own name."""
    with Container(host.service.binds, hostname="web") as other:
        host.service.add("web", other, {"user.secret": "s"})
        before = instances(host.service)["web"]
        annotations = ("--annotation=guestapi.enable=true", "--annotation=guestapi.name=web")
        host.run("mine", *annotations)
        until(lambda: host.is_running("mine"), "mine")
        assert "user.secret" not in host.engine.ask("mine", "/1.0/config")
        assert instances(host.service)["web"] == before
        assert other.ask("/1.0/config/user.secret").text == "s"
        until(lambda: "'podman rename'" in host.service.command("check", check=False).stdout, "a finding")
    host.service.command("instance", "stop", "web", check=False)


@only_podman
@pytest.mark.parametrize("policy", ["continue", "refuse"])
def test_hook_never_prevents_a_start(host: EngineHost, policy: str, tmp_path: Path) -> None:
    """Without a follower, or as a user that may not ring, the hook prints nothing, and the container starts."""
    config = tmp_path / "guestapi.toml"
    config.write_text(f'[hooks]\non-failure = "{policy}"\n[sources]\ndoorbells = "{tmp_path}/nobody"\n')
    state = json.dumps({"id": "a" * 64, "pid": os.getpid(), "bundle": "/nowhere", "status": "created"}).encode()
    hook = ["/usr/bin/python3", "-IS", str(hook_program()), "--config", str(config), "podman"]
    for become in ([], ["setpriv", "--reuid=1000", "--clear-groups"]):
        done = subprocess.run([*become, *hook], input=state, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("host", [Docker], indirect=True)
def test_dockers_documented_commands(host: EngineHost) -> None:
    """The commands of docs/docker.md work, from `docker run` on, with a test image that has curl as `debian`."""
    host.engine.load(ContainerImage(host.engine.rootfs), "debian")
    client = host.engine.command()
    environment = {
        **host.engine.environment(),
        "GUESTAPI_CONFIG": str(host.service.config),
        "PATH": f"{COMMAND.parent}:{os.environ['PATH']}",
    }
    typed = [command for command, _shown in block("docs/docker.md", "make install") if "systemctl" not in command]
    assert len(typed) == 5
    for command in typed[1:]:
        words = command.replace("/var/lib/incus/guestapi", str(host.service.socket.parent))
        words = words.replace("sleep infinity", "sleep 1000").replace("docker ", f"{' '.join(client)} ", 1)
        done = subprocess.run(["sh", "-c", words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        if "docker run" in command:
            until(lambda: host.is_running("web"), "web")
    assert done.stdout == "frontend"
