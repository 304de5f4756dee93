"""podman and Docker with their followers: who is registered, as what, and what happens when anything goes wrong."""

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
from tests.harness.engines import CURL, Docker, Engine, Podman
from tests.harness.followers import RealFollower, hook_program, instances, status
from tests.harness.following import until
from tests.harness.images import Image
from tests.harness.service import COMMAND, Service

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

SHIPPED = Path(__file__).parents[2] / "conf/oci-guestapi.json"
UNKNOWN = "pid not in container?"


class Host:
    """An engine, a service, and the follower between them."""

    def __init__(self, engine: Engine, service: Service) -> None:
        self.engine, self.service = engine, service
        self.source = "podman" if isinstance(engine, Podman) else "docker"
        self.mount = f"--volume={service.socket.parent}:/dev/incus"
        self.follower = RealFollower(service, self.source)

    def run(self, name: str, *options: str, check: bool = True) -> str:
        """A container with our mount; its id."""
        return self.engine.run(name, self.engine.plain, self.mount, *options, check=check)

    def is_running(self, name: str, besides: int = 0) -> bool:
        """Whether the instance runs, with another init than `besides`."""
        one = instances(self.service).get(name, {})
        return one.get("status") == "running" and one["pid"] == self.engine.pid(name) != besides

    def wait_for(self, name: str, wanted: str) -> None:
        """Wait until an instance is running, stopped or gone."""
        until(lambda: status(self.service, name) == wanted, f"{name} is {status(self.service, name)}, not {wanted}")


@pytest.fixture(scope="module", params=[Podman, Docker])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """Each engine, with a follower of its own."""
    with request.param() as engine:
        toml = (
            f'[hooks.template]\n"user.template" = "yes"\n[sources]\ndoorbells = "{{root}}/doorbells"\n'
            f'[sources.podman]\nsocket = "{engine.socket}"\n[sources.docker]\nsocket = "{engine.socket}"\n'
        )
        service = Service(dialects=["incus"])
        service.write_config(toml.replace("{root}", str(service.root)))
        with service:
            made = Host(engine, service)
            if isinstance(engine, Podman):
                install_hook(engine, service)
            with made.follower:
                yield made


def install_hook(podman: Podman, service: Service) -> None:
    """The file for hooks.d as it is shipped, but for where the hook and its configuration are."""
    document = json.loads(SHIPPED.read_text())
    command = document["hook"]["args"][2]
    assert "/opt/guestapi/bin/guestapi-hook podman" in command
    document["hook"]["args"][2] = f"exec /usr/bin/python3 -IS {hook_program()} --config {service.config} podman"
    (podman.hooks / SHIPPED.name).write_text(json.dumps(document))


#: What Docker has not: hooks and annotations.
only_podman = pytest.mark.parametrize("host", [Podman], indirect=True)


@pytest.fixture(autouse=True)
def clean(host: Host) -> Iterator[None]:
    """Each test has the engine for itself, and a store without instances."""
    yield
    host.engine.remove_all()
    until(lambda: all(one["status"] != "running" for one in host.service.listed()), "something runs")
    for name in instances(host.service):
        host.service.command("instance", "remove", name, check=False)


def kill(pid: int) -> None:
    """SIGKILL, and wait until the process is gone."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
    finally:
        os.close(pidfd)


def test_first_request_is_answered(host: Host) -> None:
    """The container's very first program asks, and is answered: it is registered, or waits until it is."""
    out = host.engine.once(host.engine.plain, "http://x/1.0/config/user.template", host.mount)
    assert out == "yes"


def test_name_and_host_name(host: Host) -> None:
    """The instance has the container's name; its host name is the one that the operator gave, else the name."""
    host.run("web")
    host.run("db", "--hostname=inside")
    until(lambda: host.is_running("web") and host.is_running("db"), "both")
    assert "local-hostname: web" in host.engine.ask("web", "/1.0/meta-data")
    assert "local-hostname: inside" in host.engine.ask("db", "/1.0/meta-data")
    assert instances(host.service)["web"]["pid"] == host.engine.pid("web")


def test_strangers_image(host: Host) -> None:
    """An image that says what 0.1 obeyed gets nothing, takes no name, sets no switch; the one it names is unharmed."""
    words = {
        "guestapi.enable": "true",
        "guestapi.name": "web",
        "guestapi.config.user.template": "evil",
        "guestapi.config.security.guestapi.images": "true",
    }
    image = Image(host.engine.rootfs, words, words, volumes=["/dev/incus", str(host.service.socket.parent)])
    stranger = host.engine.load(image, "stranger")
    host.run("web")
    until(lambda: host.is_running("web"), "web")
    host.service.configure("web", user_secret="s")
    # It has no socket of ours, whatever it declares.
    host.engine.run("unmounted", stranger)
    # The operator mounts it, and asks for nothing else.
    host.engine.run("mounted", stranger, host.mount)
    until(lambda: host.is_running("mounted"), "mounted")
    found = instances(host.service)
    assert found.keys() == {"web", "mounted"}
    assert found["mounted"]["config"] == {"user.template": "yes"}
    assert host.engine.ask("mounted", "/1.0/config") == '["/1.0/config/user.template"]'
    assert host.engine.ask("web", "/1.0/config/user.secret") == "s"
    assert host.is_running("web")


def test_name_of_another_owner(host: Host) -> None:
    """A name that another owner's running instance has is refused; that one notices nothing, and check names both."""
    with Container(host.service.binds, hostname="web") as other:
        host.service.add("web", other, {"user.secret": "s"})
        before = instances(host.service)["web"]
        host.run("web", check=False)
        until(lambda: "web" in host.service.command("check", check=False).stdout, "a finding")
        until(lambda: "not registered" in host.service.command("check", check=False).stdout, "a refusal")
        assert host.engine.ask("web", "/1.0/config/user.secret") == UNKNOWN
        assert other.ask("/1.0/config/user.secret").text == "s"
        assert instances(host.service)["web"] == before
        # Out of the way, it is registered at once, or at the next look.
        host.engine("rename", "web", "shop")
        until(lambda: host.is_running("shop"), "shop", 80)
        assert host.engine.ask("shop", "/1.0/config/user.template") == "yes"
    host.service.command("instance", "stop", "web", check=False)


def test_restart_and_rename(host: Host) -> None:
    """Restarted, and renamed, it stays the same instance, with what the operator has set."""
    host.run("web")
    until(lambda: host.is_running("web"), "web")
    host.service.command("config", "set", "web", "user.mine=kept")
    before = instances(host.service)["web"]
    host.engine("restart", "--time=0", "web")
    until(lambda: host.is_running("web", besides=before["pid"]), "web anew")
    host.engine("rename", "web", "shop")
    until(lambda: host.is_running("shop"), "shop")
    after = instances(host.service)["shop"]
    assert (after["uuid"], after["config"]["user.mine"]) == (before["uuid"], "kept")
    assert host.engine.ask("shop", "/1.0/config/user.mine") == "kept"
    assert "web" not in instances(host.service)


def test_stop_and_removal(host: Host) -> None:
    """Stopped, it stays; removed, it is gone, but for what the operator has set: the next of its name has that."""
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


def test_twelve_at_once(host: Host) -> None:
    """All of twelve that start together are registered, and each sees its own."""
    names = [f"c{number}" for number in range(12)]
    threads = [threading.Thread(target=host.run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    until(lambda: all(status(host.service, name) == "running" for name in names), "all of them", 60)
    found = instances(host.service)
    assert {name: found[name]["pid"] for name in names} == {name: host.engine.pid(name) for name in names}


def test_follower_away(host: Host) -> None:
    """Containers that start and end while no follower runs start all the same, and are as they are when it is back."""
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


def test_init_is_killed(host: Host) -> None:
    """An init that was killed is seen to have ended at once, whoever else notices."""
    host.run("web")
    until(lambda: host.is_running("web"), "web")
    if isinstance(host.engine, Podman):
        kill(int(host.engine.inspect("web")["State"]["ConmonPid"]))
        assert host.engine.ask("web", "/1.0/config/user.template") == "yes"
    kill(host.engine.pid("web"))
    until(lambda: status(host.service, "web") != "running", "its end", 5)
    host.run("other")
    until(lambda: host.is_running("other"), "other")


def test_command_that_cannot_be_run(host: Host) -> None:
    """A container whose program is missing was there for a moment; it does not stay as one that runs."""
    out = host.engine("run", "--name=web", *host.engine.modest, host.mount, *host.engine.plain, "/no/such", check=False)
    assert "/no/such" in out
    until(lambda: status(host.service, "web") in ("", "stopped"), status(host.service, "web"))


def test_shared_pid_namespace(host: Host) -> None:
    """Who shares another's PID namespace is named by check, and is answered as the other."""
    host.run("web")
    until(lambda: host.is_running("web"), "web")
    host.run("sidecar", f"--pid=container:{host.engine.inspect('web')['Id']}")
    until(lambda: "sidecar" in host.service.command("check", check=False).stdout, "a finding")
    assert "local-hostname: web" in host.engine.ask("sidecar", "/1.0/meta-data")
    assert host.is_running("web")


@only_podman
def test_registered_before_its_own_process(host: Host) -> None:
    """The hook rings before the container's program runs; podman's API is not needed for that."""
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
def test_containers_of_0_1(host: Host) -> None:
    """A container whose instance a 0.1 hook added, with its annotations: the same instance, the keys the operator's."""
    annotations = ("--annotation=guestapi.enable=true", "--annotation=guestapi.config.user.role=frontend")
    host.follower.kill()
    hook = host.engine.path / "hooks" / SHIPPED.name
    kept = hook.read_text()
    hook.unlink()
    try:
        host.run("web", *annotations)
        # As 0.1 had it: no owner, the configuration that the annotations gave.
        with_init = host.service.add("web", None, {"user.role": "frontend"})
        host.service.command("instance", "start", "web", "--pid", str(host.engine.pid("web")))
    finally:
        hook.write_text(kept)
        host.follower.start()
    until(lambda: instances(host.service)["web"].get("source") == "podman", "its owner")
    found = instances(host.service)["web"]
    assert (found["uuid"], found["status"]) == (with_init.uuid, "running")
    assert found["config"] == {"user.role": "frontend", "user.template": "yes"}
    # check says how to do without the annotations.
    assert "guestapi.config.user.role" in host.service.command("check", check=False).stdout
    assert examine(host.engine.pid("web")) == host.service.instance("web").init


@only_podman
def test_annotation_with_a_running_name(host: Host) -> None:
    """The operator's own annotations name nothing either: the container has its own name, and the other is unharmed."""
    with Container(host.service.binds, hostname="web") as other:
        host.service.add("web", other, {"user.secret": "s"})
        before = instances(host.service)["web"]
        told = ("--annotation=guestapi.enable=true", "--annotation=guestapi.name=web")
        host.run("mine", *told)
        until(lambda: host.is_running("mine"), "mine")
        assert "user.secret" not in host.engine.ask("mine", "/1.0/config")
        assert instances(host.service)["web"] == before
        assert other.ask("/1.0/config/user.secret").text == "s"
        until(lambda: "'podman rename'" in host.service.command("check", check=False).stdout, "a finding")
    host.service.command("instance", "stop", "web", check=False)


@only_podman
@pytest.mark.parametrize("policy", ["continue", "refuse"])
def test_hook_keeps_nobody_from_starting(host: Host, policy: str, tmp_path: Path) -> None:
    """No follower, or a user who may not ring: the hook says nothing, and the container starts."""
    config = tmp_path / "guestapi.toml"
    config.write_text(f'[hooks]\non-failure = "{policy}"\n[sources]\ndoorbells = "{tmp_path}/nobody"\n')
    state = json.dumps({"id": "a" * 64, "pid": os.getpid(), "bundle": "/nowhere", "status": "created"}).encode()
    hook = ["/usr/bin/python3", "-IS", str(hook_program()), "--config", str(config), "podman"]
    for become in ([], ["setpriv", "--reuid=1000", "--clear-groups"]):
        done = subprocess.run([*become, *hook], input=state, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("host", [Docker], indirect=True)
def test_dockers_documented_commands(host: Host) -> None:
    """docs/docker.md, from `docker run` on, with an image of ours in the place of Debian's, which has no curl."""
    host.engine.load(Image(host.engine.rootfs), "debian")
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
