"""podman with the hooks.d file that is shipped: containers register themselves."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.harness import rootfs
from tests.harness.containers import BASE
from tests.harness.service import COMMAND, Service

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

SHIPPED = Path(__file__).parents[2] / "conf/oci-guestapi.json"

#: podman wants a machine that has cgroup2 only; crun keeps its notes in one place for all storages.
_NAMESPACE = """
mount --make-rprivate / && mount -t cgroup2 cgroup2 /sys/fs/cgroup &&
mkdir -p /run/crun && mount -t tmpfs tmpfs /run/crun && echo ready && read end
"""
_UNPRIVILEGED = [f"--uidmap=0:{BASE}:65536", f"--gidmap=0:{BASE}:65536"]
#: Without these it needs controllers of cgroup2, and limits that it may raise, which a development machine has not.
_MODEST = ["--cgroups=disabled", "--ulimit=nofile=1024:4096", "--ulimit=nproc=1000:1000", "--network=none"]
_ASK = ["curl", "-sS", "--max-time", "10", "--unix-socket", "/dev/incus/sock"]
_FOREVER = ["sleep", "1000"]

#: By their names after ``guestapi.``
Annotations = Mapping[str, str]
NO_ANNOTATIONS: Annotations = {}


class Podman:
    """podman with a storage of its own, and a hook for `service`."""

    def __init__(self, service: Service, directory: Path) -> None:
        self.service = service
        self.rootfs = directory / "rootfs"
        rootfs.make(self.rootfs)
        for path in [self.rootfs, *self.rootfs.rglob("*")]:
            os.chown(path, BASE, BASE, follow_symlinks=False)
        hooks = directory / "hooks"
        hooks.mkdir()
        command = directory / "guestapi"
        command.write_text(f'#!/bin/sh\nexec {COMMAND} --config {service.config} "$@"\n')
        command.chmod(0o755)
        # The file as it is shipped, but for where the command is.
        shipped = SHIPPED.read_text()
        assert shipped.count("/usr/local/bin/guestapi") == 2
        (hooks / SHIPPED.name).write_text(shipped.replace("/usr/local/bin/guestapi", str(command)))
        self._namespace = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", _NAMESPACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._namespace.stdout is not None
        assert self._namespace.stdout.readline() == b"ready\n"
        places = {name: str(directory / name) for name in ("root", "runroot", "tmpdir")}
        self._command = [
            *("nsenter", "-t", str(self._namespace.pid), "-m", "podman", "--storage-driver=vfs"),
            *("--cgroup-manager=cgroupfs", "--events-backend=none", f"--hooks-dir={hooks}"),
            *(f"--{name}={path}" for name, path in places.items()),
        ]

    def close(self) -> None:
        """Remove all containers."""
        self("rm", "--all", "--force", "--time=0", check=False)
        self._namespace.communicate()

    def __call__(self, *words: str, check: bool = True) -> str:
        """Run a command of podman; what it prints on standard output and, if it may fail, on standard error."""
        done = subprocess.run(
            [*self._command, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout if check else done.stdout + done.stderr

    def run(
        self,
        *command: str,
        annotations: Annotations = NO_ANNOTATIONS,
        options: tuple[str, ...] = (),
        check: bool = True,
    ) -> str:
        """``podman run``: a container that runs `command`; what it printed, with ``--detach`` its ID."""
        told = [f"--annotation=guestapi.{key}={value}" for key, value in annotations.items()]
        binds = [f"--volume={path}:{inside}" for path, inside in self.service.binds]
        words = [*_MODEST, *_UNPRIVILEGED, *binds, *told, *options, "--rootfs", str(self.rootfs), *command]
        return self("run", *words, check=check).strip()

    def start(self, annotations: Annotations, *options: str) -> str:
        """A container that runs until it is told to end; its ID."""
        return self.run(*_FOREVER, annotations=annotations, options=("--detach", *options))

    def once(self, url: str, annotations: Annotations = NO_ANNOTATIONS) -> str:
        """A container that asks for `url`, prints the answer and ends."""
        return self.run(*_ASK, url, annotations=annotations, options=("--rm",))

    def ask(self, container: str, path: str) -> str:
        """A request from inside a running container."""
        return self("exec", container, *_ASK, f"http://x{path}")

    def inspect(self, container: str, field: str) -> str:
        """What podman knows of it."""
        return self("container", "inspect", "--format", "{{" + field + "}}", container).strip()


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    """podman, and a service whose instances are containers of it alone."""
    toml = '[hooks.template]\n"user.template" = "yes"\n"user.foo" = "template"\n'
    with Service(toml=toml) as service, tempfile.TemporaryDirectory(prefix="guestapi-podman-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        running = Podman(service, Path(name))
        try:
            yield running
        finally:
            running.close()


def named(name: str, **config: str) -> Annotations:
    """The annotations of a container that wants to be registered, with keys below ``user.``"""
    keys = {f"config.user.{key}": value for key, value in config.items()}
    return {"enable": "true", "name": name, **keys}


def status(podman: Podman) -> dict[str, str]:
    """Instances and whether they run, as `guestapi instance list` says."""
    return {one["name"]: one["status"] for one in podman.service.listed()}


def kill(pid: int) -> None:
    """SIGKILL, and wait until the process is gone."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        assert ended.poll(10_000)
    finally:
        os.close(pidfd)


def test_registered_before_its_own_process(podman: Podman) -> None:
    """The container's very first program asks, and is answered: by its annotations, else by the template."""
    urls = [f"http://x/1.0/config/user.{key}" for key in ("foo", "template")]
    out = podman.run(*_ASK, "-w", "\n", *urls, annotations=named("first", foo="bar"), options=("--rm",))
    assert out.splitlines() == ["bar", "yes"]


def test_name_is_the_annotation(podman: Podman) -> None:
    """guestapi.name is the host name that the instance is told, and its name in the list; it stays when it ended."""
    container = podman.start(named("named"), "--rm")
    assert status(podman)["named"] == "running"
    assert "local-hostname: named" in podman.ask(container, "/1.0/meta-data")
    podman("stop", "--time=0", container)
    assert status(podman)["named"] == "stopped"


@pytest.mark.parametrize("annotations", [{}, {"name": "silent"}, {"enable": "false", "name": "silent"}])
def test_not_without_the_annotation(podman: Podman, annotations: dict[str, str]) -> None:
    """Who does not say guestapi.enable=true is not registered, and gets the answer that strangers get."""
    before = status(podman)
    out = podman.once("http://x/1.0", annotations)
    assert out == "pid not in container?"
    assert status(podman) == before


def test_unnamed_is_named_after_its_id_and_vanishes(podman: Podman) -> None:
    """Without a name it is the ID as podman shows it, for as long as it runs."""
    container = podman.start({"enable": "true"}, "--rm")
    assert status(podman)[container[:12]] == "running"
    podman("stop", "--time=0", container)
    assert container[:12] not in status(podman)


def test_two_at_once(podman: Podman) -> None:
    """Two containers of one root file system see their own values and nobody else's."""
    names = ("left", "right")
    both = {name: podman.start(named(name, **{"me": name, name: "x"}), "--rm") for name in names}
    for name, container in both.items():
        assert podman.ask(container, "/1.0/config/user.me") == name
        keys = json.loads(podman.ask(container, "/1.0/config"))
        assert {key.rpartition(".")[2] for key in keys} == {"me", name, "template", "foo"}
    podman("stop", "--time=0", both["left"])
    assert (status(podman)["left"], status(podman)["right"]) == ("stopped", "running")
    assert podman.ask(both["right"], "/1.0/config/user.me") == "right"
    podman("stop", "--time=0", both["right"])


def test_restart(podman: Podman) -> None:
    """`podman restart` is a stop and a start: the new process is the instance, with what the operator set meanwhile."""
    container = podman.start(named("again"))
    podman.service.command("config", "set", "again", "user.mine=kept")
    before = podman.inspect(container, ".State.Pid")
    podman("restart", "--time=0", container)
    after = podman.inspect(container, ".State.Pid")
    assert before != after
    (found,) = (one for one in podman.service.listed() if one["name"] == "again")
    assert (found["status"], str(found["pid"])) == ("running", after)
    assert podman.ask(container, "/1.0/config/user.mine") == "kept"
    podman("rm", "--force", "--time=0", container)
    assert status(podman)["again"] == "stopped"


def test_command_that_cannot_be_run(podman: Podman) -> None:
    """A container whose program is missing was registered; podman calls no hook at its end, but it is seen dead."""
    out = podman.run("/no/such/program", annotations=named("failing"), options=("--rm",), check=False)
    assert "no/such/program" in out
    assert status(podman)["failing"] == "dead"
    podman.service.command("instance", "remove", "failing")


def test_dead_without_its_hook(podman: Podman) -> None:
    """conmon killed: the container goes on and is answered; its init killed too: dead, and nobody becomes it."""
    container = podman.start(named("struck", secret="s"))
    init = int(podman.inspect(container, ".State.Pid"))
    kill(int(podman.inspect(container, ".State.ConmonPid")))
    assert status(podman)["struck"] == "running"
    assert podman.ask(container, "/1.0/config/user.secret") == "s"
    kill(init)
    assert status(podman)["struck"] == "dead"
    assert re.search("ended without notice: .*struck", podman.service.command("check", check=False).stdout)
    # The kernel hands the namespace's number to one of the next.
    for _ in range(4):
        assert podman.once("http://x/1.0/config") == "pid not in container?"
    other = podman.start(named("other"), "--rm")
    assert "user.secret" not in podman.ask(other, "/1.0/config")
    podman("stop", "--time=0", other)
    # Podman finds out, and calls no hook either.
    podman("rm", "--force", "--time=0", container)
    assert status(podman)["struck"] == "dead"


def test_goes_on_without_registration(podman: Podman) -> None:
    """A name that no instance can have: the container starts all the same, unknown."""
    out = podman.once("http://x/1.0", named("not_a_name"))
    assert out == "pid not in container?"
    assert "not_a_name" not in status(podman)


def test_refused(podman: Podman) -> None:
    """With on-failure = "refuse" the same container does not start; podman says that it was the hook."""
    podman.service.write_config('[hooks]\non-failure = "refuse"\n')
    try:
        out = podman.run(*_ASK, "http://x/1.0", annotations=named("not_a_name"), options=("--rm",), check=False)
        assert "pid not in container?" not in out
        assert re.search("error executing hook .*exit code: 1", out)
    finally:
        podman.service.write_config('[hooks.template]\n"user.template" = "yes"\n"user.foo" = "template"\n')
