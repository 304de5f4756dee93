"""crun and runc with their follower and hook: which containers are registered, and what ends them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.harness.followers import RealFollower, hook_program, instances, status
from tests.harness.oci import OciRuntime
from tests.harness.service import COMMAND, Service
from tests.harness.waiting import until

pytestmark = pytest.mark.root

UNKNOWN = "pid not in container?"
CURL = ("curl", "-sS", "--max-time", "10", "--unix-socket", "/dev/incus/sock")


class OciHost:
    """crun and runc, a service, and the follower between them."""

    def __init__(self, crun: OciRuntime, runc: OciRuntime, service: Service) -> None:
        self.crun, self.runc, self.service = crun, runc, service
        self.mounts = [(path, inside) for path, inside in service.binds]
        self.follower = RealFollower(service, "oci")
        self.hook = ["/usr/bin/python3", "-IS", str(hook_program()), "--config", str(service.config), "oci"]

    def is_running(self, name: str, runtime: OciRuntime) -> bool:
        """Return whether the instance runs with the container's init."""
        one = instances(self.service).get(name, {})
        return one.get("status") == "running" and one["pid"] == runtime.pid(name)


@pytest.fixture
def host() -> Iterator[OciHost]:
    """Both runtimes, and their follower."""
    with OciRuntime("crun") as crun, OciRuntime("runc") as runc:
        service = Service(dialects=["incus"])
        service.write_config(
            f'[hooks.template]\n"user.template" = "yes"\n[sources]\ndoorbells = "{service.root}/doorbells"\n'
            f'[sources.oci]\nroots = ["{crun.root}", "{runc.root}"]\n'
        )
        with service:
            made = OciHost(crun, runc, service)
            with made.follower:
                yield made


def test_first_request_is_answered(host: OciHost) -> None:
    """With the hook, the container is registered before its program runs."""
    answer = host.crun.path / "answer"
    answer.mkdir(mode=0o777)
    answer.chmod(0o777)
    ask = ("sh", "-c", f"{' '.join(CURL)} http://x/1.0/config/user.template >/answer/it 2>&1; sleep 1000")
    for runtime in (host.crun, host.runc):
        (answer / "it").unlink(missing_ok=True)
        mounts = [*host.mounts, (answer, "/answer")]
        runtime.start(f"by-{runtime.kind}", runtime.bundle("b", mounts, arguments=ask, hook=host.hook))
        until(lambda: (answer / "it").exists() and (answer / "it").read_text(), "an answer")
        assert (answer / "it").read_text() == "yes", host.follower.log.read_text()


def test_ids_with_a_common_beginning(host: OciHost) -> None:
    """Two containers whose ids share 12 characters are two instances with separate configurations."""
    names = ("exampleproject-db-1", "exampleproject-web-1")
    bundle = host.crun.bundle("b", host.mounts)
    for name in names:
        host.crun.start(name, bundle)
        until(lambda name=name: host.is_running(name, host.crun), name)  # type: ignore[misc]  # mypy infers no default
        host.service.command("config", "set", name, f"user.password={name}")
    for name in names:
        assert host.crun.execute(name, *CURL, "http://x/1.0/config/user.password") == name
        assert "local-hostname: inside-b" in host.crun.execute(name, *CURL, "http://x/1.0/meta-data")


def test_one_id_of_two_runtimes(host: OciHost) -> None:
    """A second runtime's container with the same name is refused, and named by check; the first is unaffected."""
    host.crun.start("web", host.crun.bundle("b", host.mounts))
    until(lambda: host.is_running("web", host.crun), "web")
    host.service.configure("web", user_secret="s")
    host.runc.start("web", host.runc.bundle("b", host.mounts))
    until(lambda: "not registered" in host.service.command("check", check=False).stdout, "a refusal")
    assert host.runc.execute("web", *CURL, "http://x/1.0/config/user.secret").strip() == UNKNOWN
    assert host.crun.execute("web", *CURL, "http://x/1.0/config/user.secret") == "s"
    # When the first container is deleted, the other one gets the name.
    host.service.command("config", "unset", "web", "user.secret")
    host.crun("delete", "--force", "web")
    until(lambda: host.is_running("web", host.runc), "the other")
    assert host.runc.execute("web", *CURL, "http://x/1.0/config/user.template") == "yes"


def test_life(host: OciHost) -> None:
    """A dead container stays until it is deleted; changes without a follower are written when one runs again."""
    bundle = host.runc.bundle("b", host.mounts)
    host.runc.start("web", bundle)
    until(lambda: host.is_running("web", host.runc), "web")
    pidfd = os.pidfd_open(host.runc.pid("web"))
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)
    until(lambda: status(host.service, "web") == "stopped", "its end")
    host.follower.kill()
    host.runc("delete", "web")
    host.runc.start("later", bundle)
    host.follower.start()
    until(lambda: host.is_running("later", host.runc), "later")
    until(lambda: status(host.service, "web") == "", "web is gone")


def test_hook_of_0_1(host: OciHost) -> None:
    """`guestapi hook oci` in bundles of 0.1, at start and end, rings the doorbell of the follower."""
    old = [str(COMMAND), "--config", str(host.service.config), "hook", "oci"]
    bundle = host.crun.bundle("b", host.mounts, hook=["/bin/sh", "-c", f"exec {' '.join(old)}"])
    host.crun.start("web", bundle)
    assert host.is_running("web", host.crun)
    stopped = b'{"ociVersion":"1.0","id":"web","status":"stopped","bundle":"/nowhere"}'
    done = subprocess.run(old, input=stopped, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert host.is_running("web", host.crun)


@pytest.mark.parametrize("state", [b"", b"nonsense", b"[" * 100_000, b'{"id":"web","pid":1,"bundle":"/nowhere"}'])
def test_hook_with_garbage(host: OciHost, state: bytes) -> None:
    """With malformed input the container starts; the hook and the follower report the reason in one line."""
    done = subprocess.run(host.hook, input=state, capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.endswith(b"the container goes on without\n")
    assert instances(host.service) == {}
    assert "hook: " in host.follower.log.read_text()
