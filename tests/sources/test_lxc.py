"""Debian's LXC with the shipped configuration snippet: unprivileged containers register themselves, and vanish."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from guestapi.callers.namespaces import is_alive
from guestapi.model import Init
from guestapi.sources.lxc import hooked as lxc
from guestapi.sources.register import Report, ReportError
from tests.harness.containers import BASE
from tests.harness.lxc import Lxc
from tests.harness.service import COMMAND, Service


def made(service: Service, name: str, base: int = BASE) -> Lxc:
    """A container whose hooks register it with the service."""
    return Lxc(service.root, name, f"{COMMAND} --config {service.config}", service.socket.parent, base)


def init_of(service: Service, name: str) -> Init:
    """The registered init of an instance."""
    init = service.instance(name).init
    assert init is not None
    return init


@pytest.fixture(scope="module")
def hooked() -> Iterator[Service]:
    """A service whose hooks have a template."""
    toml = '[hooks.template]\n"user.foo" = "from the template"\n'
    with Service(toml=toml, dialects=["incus"]) as running:
        yield running


def state(service: Service, name: str) -> str:
    """What `guestapi instance list` says of it."""
    found: dict[str, Any] = next(one for one in service.listed() if one["name"] == name)
    return str(found["status"])


@pytest.mark.root
def test_registered_before_its_first_instruction(hooked: Service) -> None:
    """An unknown container is added with the template and its own devices; its very first request is answered."""
    with made(hooked, "first") as container:
        container.start()
        wait = "until [ -e /tmp/answer ]; do sleep 0.02; done; cat /tmp/answer"
        assert container.run("sh", "-c", wait).out == "from the template 0\n"
        assert state(hooked, "first") == "running"
        devices = hooked.instance("first").devices
        assert devices["usr"] == {"type": "disk", "source": "/usr", "path": "/usr", "readonly": "true"}
        assert devices["root"] == {"type": "disk", "path": "/"}
        assert "dev-incus" not in devices
    assert state(hooked, "first") == "stopped"


@pytest.mark.root
def test_known_container_keeps_its_own(hooked: Service) -> None:
    """An instance that the operator has added before is not touched by the template, and runs anew at each start."""
    hooked.add("known", None, {"user.foo": "its own"})
    with made(hooked, "known") as container:
        container.start()
        first = init_of(hooked, "known")
        assert container.ask("/1.0/config/user.foo") == "its own"
        container.stop()
        assert state(hooked, "known") == "stopped"
        container.start()
        assert init_of(hooked, "known") != first
        assert container.ask("/1.0/config/user.foo") == "its own"


@pytest.mark.root
def test_two_at_once(hooked: Service) -> None:
    """Two containers with different ID maps see their own data alone."""
    with made(hooked, "one") as one, made(hooked, "two", BASE + 65536) as two:
        one.start()
        two.start()
        hooked.configure("one", user_foo="1")
        hooked.configure("two", user_foo="2")
        assert (one.ask("/1.0/config/user.foo"), two.ask("/1.0/config/user.foo")) == ("1", "2")
        assert "local-hostname: two\n" in two.ask("/1.0/meta-data")


@pytest.mark.root
def test_nested_container(hooked: Service) -> None:
    """A container inside a container, made with what is at hand there, is part of the outer instance."""
    with made(hooked, "outer") as container:
        container.start()
        nested = "unshare --pid --fork --mount-proc --uts curl -s --unix-socket /dev/incus/sock http://x/1.0/meta-data"
        assert "local-hostname: outer\n" in container.run("/usr/bin/sh", "-c", nested).out


@pytest.mark.root
def test_monitor_is_killed(hooked: Service) -> None:
    """kill -9 of the monitor runs no hook: the instance is seen to be dead, and is well again at its next start."""
    with made(hooked, "killed") as container:
        container.start()
        init = init_of(hooked, "killed")
        assert init.pid == container.pid
        status = Path(f"/proc/{init.pid}/status").read_text()
        monitor = next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:"))
        os.kill(int(monitor), signal.SIGKILL)
        until = time.monotonic() + 10
        while is_alive(init):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert state(hooked, "killed") == "dead"
        assert "ended without notice: killed" in hooked.command("check", check=False).stdout
        container.start()
        assert state(hooked, "killed") == "running"
        assert container.ask("/1.0/config/user.foo") == "from the template"


@pytest.mark.root
@pytest.mark.parametrize("policy", ["continue", "refuse"])
def test_failure_of_the_hook(policy: str) -> None:
    """A name that cannot be an instance's: the container starts regardless, or does not, as the operator wants."""
    with (
        Service(toml=f'[hooks]\non-failure = "{policy}"\n', dialects=["incus"]) as own,
        made(own, "not_a_label") as container,
    ):
        started = container.command("lxc-start", check=False)
        assert (started.returncode == 0) == (policy == "continue")
        assert own.listed() == []


def report(environ: Mapping[str, str], *arguments: str) -> Report:
    """What a hook would report."""
    return lxc.report(environ, arguments)


def test_both_versions_of_the_hook_interface() -> None:
    """``lxc.hook.version`` 0 passes name, section and type as arguments, with more behind; 1 in the environment."""
    assert report({"LXC_NAME": "a", "LXC_PID": "5"}, "a", "lxc", "start-host").pid == 5
    assert report({"LXC_NAME": "a", "LXC_PID": "5", "LXC_HOOK_TYPE": "start-host"}).pid == 5
    assert report({"LXC_NAME": "a"}, "a", "lxc", "stop", "user:/proc/1/fd/3", "mnt:/proc/1/fd/4").pid is None
    assert report({"LXC_NAME": "a", "LXC_HOOK_TYPE": "post-stop"}).pid is None


@pytest.mark.parametrize(
    ("environ", "arguments"),
    [({}, ()), ({"LXC_NAME": "a"}, ("a", "lxc", "mount")), ({"LXC_NAME": "a"}, ("a", "lxc", "start-host"))],
)
def test_not_what_lxc_says(environ: Mapping[str, str], arguments: tuple[str, ...]) -> None:
    """No name, another hook, no PID: each is one sentence."""
    with pytest.raises(ReportError, match=r"lxc\.hook|start-host"):
        report(environ, *arguments)


def test_devices_of_a_configuration(tmp_path: Path) -> None:
    """NICs and bind mounts appear by the names that they have inside; includes are followed, even into a circle."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "net.conf").write_text(
        f"lxc.net.1.type = macvlan\nlxc.net.1.link = eno1\nlxc.include = {tmp_path}/config\n"
    )
    (tmp_path / "config").write_text(
        "# lxc.net.9.type = veth\nlxc.net.0.type = veth\nlxc.net.0.link = br0\nlxc.net.0.name = lan\n"
        "lxc.net.0.hwaddr = 00:16:3e:00:00:01\nlxc.net.2.type = empty\n"
        "lxc.mount.entry = /srv/my\\040files srv/files none bind,ro 0 0\n"
        "lxc.mount.entry = proc proc proc nodev 0 0\nlxc.mount.entry = /x dev/incus none bind 0 0\n"
        f"lxc.include = {tmp_path}/more\nlxc.include = /nowhere\n"
    )
    assert lxc.devices(tmp_path / "config") == {
        "lan": {"type": "nic", "name": "lan", "nictype": "bridged", "parent": "br0", "hwaddr": "00:16:3e:00:00:01"},
        "eth1": {"type": "nic", "name": "eth1", "nictype": "macvlan", "parent": "eno1"},
        "srv-files": {"type": "disk", "source": "/srv/my files", "path": "/srv/files", "readonly": "true"},
    }
