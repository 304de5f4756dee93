"""Debian's LXC with the shipped configuration snippet and a real follower: instances match what LXC made."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from guestapi.callers.namespaces import is_alive
from guestapi.model import Init
from guestapi.store import steps
from guestapi.store.lookup import get_instance, list_problems
from guestapi.store.view import view
from tests.harness.containers import BASE
from tests.harness.following import HOOK, RunningFollower, install_hook
from tests.harness.lxc import Lxc
from tests.harness.service import COMMAND, Service
from tests.harness.waiting import TIMEOUT, until

pytestmark = pytest.mark.root

_CURL = ("/usr/bin/curl", "-s", "--unix-socket", "/dev/incus/sock")
#: The file /etc/guestapi/lxc-guestapi.conf of guestapi 0.1.
OLD_SNIPPET = """
lxc.mount.entry = /var/lib/incus/guestapi dev/incus none bind,create=dir 0 0
lxc.hook.start-host = COMMAND hook lxc
lxc.hook.stop = COMMAND hook lxc
lxc.hook.post-stop = COMMAND hook lxc
"""


class LxcHost:
    """A service, and LXC containers that a follower registers with it."""

    def __init__(self, toml: str = "") -> None:
        self.service = Service(toml=toml, dialects=["incus"])
        self.path = self.service.root / "lxc"
        self.path.mkdir()
        self.follower = RunningFollower(self.service, sources=f'[sources.lxc]\npaths = ["{self.path}"]\n', start=False)
        self._made: list[Lxc] = []

    def __enter__(self) -> LxcHost:
        self.service.__enter__()
        self.follower.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.follower.kill()
        for container in self._made:
            container.stop(check=False)
        self.service.__exit__(*error)

    def made(self, name: str, base: int | None = BASE, *, path: Path | None = None, **options: str) -> Lxc:
        """Make a container that includes the shipped file, with these options."""
        hook = f"{install_hook(self.service.root)} --config {self.service.config}"
        container = Lxc(path or self.path, name, hook, self.service.socket.parent, base, **options)
        self._made.append(container)
        return container

    def find(self, name: str) -> dict[str, Any] | None:
        """Return an instance from `guestapi instance list`, or None."""
        return next((one for one in self.service.listed() if one["name"] == name), None)

    def status(self, name: str) -> str | None:
        """Return an instance's status; None: there is no such instance."""
        found = self.find(name)
        return str(found["status"]) if found else None

    def init(self, name: str) -> Init:
        """Return an instance's registered init."""
        init = self.service.instance(name).init
        assert init is not None
        return init

    def devices(self, name: str) -> Mapping[str, Mapping[str, str]]:
        """Return an instance's devices, without those that each container of these tests has."""
        found = self.service.instance(name).devices
        return {name: device for name, device in found.items() if name not in ("root", "usr", "lib", "lib64")}

    def problems(self) -> str:
        """Return the recorded problems, one a line."""
        with view(self.service.settings.store.url) as store:
            return "\n".join(f"{one.name}: {one.reason}" for one in list_problems(store, "lxc"))


@pytest.fixture(scope="module")
def host() -> Iterator[LxcHost]:
    """A host whose containers get a template."""
    with LxcHost(toml='[hooks.template]\n"user.foo" = "from the template"\n') as one:
        yield one


def test_registered_before_its_first_instruction(host: LxcHost) -> None:
    """A new container is registered with the template and its devices before its first request, which is answered."""
    first = host.made("first")
    first.start()
    wait = "until [ -e /tmp/answer ]; do sleep 0.02; done; cat /tmp/answer"
    assert first.run("sh", "-c", wait).out == "from the template 0\n"
    assert host.status("first") == "running"
    devices = host.service.instance("first").devices
    assert devices["usr"] == {"type": "disk", "source": "/usr", "path": "/usr", "readonly": "true"}
    assert devices["root"] == {"type": "disk", "path": "/"}
    assert "dev-incus" not in devices
    first.stop()
    until(lambda: host.status("first") == "stopped", "its end")


def test_settings_of_the_operator(host: LxcHost) -> None:
    """An instance that the operator added before keeps its settings, and gets a new run at each start."""
    host.service.add("known", None, {"user.foo": "its own"})
    known = host.made("known")
    known.start()
    first = host.init("known")
    assert known.ask("/1.0/config/user.foo") == "its own"
    known.stop()
    until(lambda: host.status("known") == "stopped", "its end")
    known.start()
    assert host.init("known") != first
    assert known.ask("/1.0/config/user.foo") == "its own"


def test_two_containers_with_different_maps(host: LxcHost) -> None:
    """Two containers with different ID maps read only their own data."""
    one, two = host.made("one"), host.made("two", BASE + 65536)
    one.start()
    two.start()
    host.service.configure("one", user_foo="1")
    host.service.configure("two", user_foo="2")
    assert (one.ask("/1.0/config/user.foo"), two.ask("/1.0/config/user.foo")) == ("1", "2")
    assert "local-hostname: two\n" in two.ask("/1.0/meta-data")


def test_nested_container(host: LxcHost) -> None:
    """A namespace that a program in a container creates belongs to the outer instance."""
    outer = host.made("outer")
    outer.start()
    # It mounts nothing, as --mount-proc would: the AppArmor profile that LXC gives to its containers forbids that.
    unshare = "unshare --pid --fork --uts --mount --propagation unchanged"
    nested = f"{unshare} curl -s --unix-socket /dev/incus/sock http://x/1.0/meta-data"
    assert "local-hostname: outer\n" in outer.run("/usr/bin/sh", "-c", nested).out


def test_without_an_id_map(host: LxcHost) -> None:
    """A privileged container is registered, although its init has more capabilities than the follower."""
    privileged = host.made("privileged", None)
    privileged.start()
    assert privileged.ask("/1.0/config/user.foo") == "from the template"


def test_monitor_is_killed(host: LxcHost) -> None:
    """After kill -9 of the monitor, which runs no hook, the end is noticed, and the next start works."""
    container = host.made("killed")
    container.start()
    init = host.init("killed")
    assert init.pid == container.pid
    stat = Path(f"/proc/{init.pid}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
    until(lambda: not is_alive(init), "its end")
    until(lambda: host.status("killed") == "stopped", "a follower that sees it")
    container.start()
    assert host.status("killed") == "running"
    assert container.ask("/1.0/config/user.foo") == "from the template"


def test_reboot_from_inside(host: LxcHost) -> None:
    """A container that reboots is registered with its new init before that runs."""
    container = host.made("rebooting")
    container.start()
    before = host.init("rebooting")
    container.run("/bin/busybox", "rm", "/tmp/answer")
    container.run("/bin/busybox", "reboot", "-f")
    until(lambda: not is_alive(before), "its end")
    until(lambda: container.run("cat", "/tmp/answer").out == "from the template 0\n", "its first request")
    assert host.init("rebooting").pid == container.pid


def test_device_changes_between_two_starts(host: LxcHost) -> None:
    """A renamed NIC and a removed mount take effect at the next start; the operator's devices stay."""
    container = host.made(
        "changing", config="lxc.net.0.type = veth\nlxc.net.0.name = lan0\nlxc.mount.entry = /srv srv none bind 0 0\n"
    )
    container.start()
    assert set(host.devices("changing")) == {"lan0", "srv"}
    with host.service.writer.change() as change:
        changing = get_instance(change, "default", "changing")
        steps.replace_devices(change, changing, {"disk1": {"type": "disk", "path": "/mine"}})
    container.stop()
    container.configure("lxc.net.0.type = veth\nlxc.net.0.name = wan0\n")
    container.start()
    devices = host.devices("changing")
    assert set(devices) == {"wan0", "disk1"}
    assert devices["disk1"]["path"] == "/mine"


def test_assigned_nic_names(host: LxcHost) -> None:
    """A NIC without a configured name has the one that LXC or the kernel gave it in the container."""
    phys = f"gl{os.getpid() % 100_000}"
    subprocess.run(["ip", "link", "add", phys, "type", "veth", "peer", "name", f"{phys}p"], check=True)
    try:
        config = 'lxc.net.0.type = empty\nlxc.net.3.type = "veth"\nlxc.net.3.hwaddr = 00:16:3e:xx:xx:xx\n'
        config += f"lxc.net.7.type = phys\nlxc.net.7.link = {phys}\n"
        container = host.made("naming", config=config)
        container.start()
        devices = host.devices("naming")
        inside = container.run("/bin/busybox", "ip", "link").out
        assert set(devices) == {"eth0", phys}
        address = devices["eth0"]["hwaddr"]
        assert address.startswith("00:16:3e:")
        assert "xx" not in address
        assert address in inside
        container.stop()
    finally:
        subprocess.run(["ip", "link", "delete", f"{phys}p"], check=False)


def test_mounts_that_lxc_made(host: LxcHost) -> None:
    """The devices match the actual mounts: absolute, dotted and escaped targets, fstab files, optional entries."""
    where = host.service.root / "sources of mounts"
    where.mkdir()
    for name in ("a b", "absolute", "dotted", "listed"):
        (where / name).mkdir()
    entry = str(where).replace(" ", "\\040")
    fstab = host.service.root / "fstab"
    fstab.write_text(f"{entry}/listed listed none bind,ro,create=dir 0 0\n")
    container = host.made(
        "mounting",
        config=f"lxc.mount.fstab = {fstab}\nlxc.mount.entry = {entry}/absolute ROOTFS/srv none bind 0 0\n"
        f"lxc.mount.entry = {entry}/dotted ./dot/ted none bind,create=dir 0 0\n"
        f"lxc.mount.entry = {entry}/a\\040b with\\040blank none bind,create=dir 0 0\n"
        f"lxc.mount.entry = {entry}/missing missing none bind,optional,create=dir 0 0\n"
        "lxc.mount.entry = tmpfs tmp tmpfs defaults 0 0\n",
    )
    container.start()
    assert host.devices("mounting") == {
        "srv": {"type": "disk", "source": f"{where}/absolute", "path": "/srv"},
        "dot-ted": {"type": "disk", "source": f"{where}/dotted", "path": "/dot/ted"},
        "with blank": {"type": "disk", "source": f"{where}/a b", "path": "/with blank"},
        "listed": {"type": "disk", "source": f"{where}/listed", "path": "/listed", "readonly": "true"},
    }


def test_devices_that_are_problems(host: LxcHost) -> None:
    """Two mounts with one device name, and one whose name is too long, are problems and affect no other device."""
    long = "/".join(["x" * 200] * 6)
    container = host.made(
        "folding",
        config="lxc.mount.entry = /srv a/b none bind,create=dir 0 0\n"
        "lxc.mount.entry = /opt a-b none bind,create=dir 0 0\n"
        f"lxc.mount.entry = /srv {long} none bind,create=dir 0 0\n",
    )
    container.start()
    assert container.ask("/1.0/config/user.foo") == "from the template"
    assert [one["path"] for one in host.devices("folding").values()] == ["/a/b"]
    problems = host.problems()
    assert "folding" in problems
    assert "guests do not see the mount at /a-b" in problems
    assert "xxx" in problems


def test_hostname(host: LxcHost) -> None:
    """The host name is the container's own, also with a dot in it, and when it is read after the start."""
    container = host.made("naming2", config="lxc.uts.name = inside.example.org\n")
    container.start()
    assert "local-hostname: inside.example.org\n" in container.ask("/1.0/meta-data")


def test_any_name(host: LxcHost) -> None:
    """Names that are no host names, names of copies, and names too long for a socket's address are registered."""
    for name in ("under_score", "index-", "l" * 90):
        container = host.made(name, config="lxc.uts.name = short\n")
        container.start()
        assert container.ask("/1.0/config/user.foo") == "from the template"
        container.stop()
    origin = host.made("origin")
    copied = origin.command("lxc-copy", "-e", check=False)
    assert "Created" in copied.stdout, copied.stderr
    name = copied.stdout.split()[1]
    assert "_" in name
    until(lambda: host.status(name) == "running", "the copy")
    subprocess.run(["lxc-stop", "-k", "-P", str(host.path), "-n", name], check=True)
    until(lambda: host.status(name) is None, "the removal of the ephemeral container")


def test_changes_without_a_running_follower(host: LxcHost) -> None:
    """Starts, ends and restarts that happened without a follower are written when one runs again."""
    config = "lxc.net.0.type = veth\nlxc.uts.name = x.example\n"
    before, restarted, ended = (host.made(name, config=config) for name in ("before", "restarted", "ended"))
    for container in (before, restarted, ended):
        container.start()
    devices = host.devices("before")
    host.follower.kill()
    ended.stop()
    restarted.stop()
    restarted.start()
    missed = host.made("missed", config="lxc.net.5.type = veth\nlxc.uts.name = y.example\n")
    missed.start()
    # Changes by a hostile root in the container must not be written.
    before.run("/bin/busybox", "ip", "link", "set", "eth0", "name", "evil0")
    missed.run("/bin/busybox", "ip", "link", "set", "eth0", "name", "evil0")
    missed.run("/bin/busybox", "hostname", "evil")
    host.follower.start()
    until(lambda: host.status("missed") == "running", "the missed start")
    until(lambda: host.status("ended") == "stopped", "the missed end")
    assert host.init("restarted").pid == restarted.pid
    assert host.devices("before") == devices
    missed_nic = host.devices("missed")["eth0"]
    assert (missed_nic["type"], missed_nic["nictype"]) == ("nic", "p2p")
    assert "local-hostname: y.example\n" in missed.ask("/1.0/meta-data")
    assert "local-hostname: x.example\n" in before.ask("/1.0/meta-data")
    assert "missed" in host.problems()


def test_destroyed(host: LxcHost) -> None:
    """The instance of a destroyed container is removed, unless it has settings of the operator's."""
    plain, set_up = host.made("plain"), host.made("set-up")
    for container in (plain, set_up):
        container.start()
    host.service.configure("set-up", user_foo="mine")
    for container in (plain, set_up):
        container.stop()
        container.command("lxc-destroy")
    until(lambda: host.status("plain") is None, "its removal")
    assert host.status("set-up") == "stopped"
    again = host.made("set-up")
    again.start()
    assert again.ask("/1.0/config/user.foo") == "mine"


def test_attributes_of_a_destroyed_container(host: LxcHost) -> None:
    """What a container says of itself stays over its restart, and is gone when it is destroyed.

    One that is made anew under its name has none, whether the instance was removed or has stayed for it.
    """
    attributes = "/1.0/guestapi/attributes"
    host.service.command("policy", "allow", "attributes")
    names = ("said", "said-kept")
    for name in names:
        container = host.made(name)
        container.start()
        url = f"http://x{attributes}/app/version"
        said = container.run(*_CURL, "-w", "%{http_code}", "-X", "PUT", "--data-binary", name, url)
        assert said.out == "201"
        container.stop()
        container.start()
        assert container.ask(f"{attributes}/app/version") == name
        container.stop()
    host.service.configure("said-kept", user_foo="mine")
    for name in names:
        until(lambda name=name: host.status(name) == "stopped", "its end")  # type: ignore[misc]  # bound
        assert host.service.command("attributes", "get", name, "app/version").stdout == name
        subprocess.run(["lxc-destroy", "-P", str(host.path), "-n", name], check=True)
    until(lambda: host.status("said") is None, "its removal")
    until(lambda: host.service.command("attributes", "show", "said-kept", "-f", "json").stdout == "[]\n", "its release")
    assert host.status("said-kept") == "stopped"
    with closing(sqlite3.connect(host.service.settings.store.url.removeprefix("sqlite:///"))) as database:
        assert database.execute("SELECT count(*) FROM attributes").fetchone() == (0,)
    for name in names:
        again = host.made(name)
        again.start()
        assert again.ask(attributes) == "[]\n"
        assert again.ask(f"{attributes}/app/version") == "not found\n"
    host.service.command("policy", "disallow", "attributes")


def test_twelve_at_once(host: LxcHost) -> None:
    """Twelve containers that start at once are all registered before their first request."""
    some = [host.made(f"crowd{number}") for number in range(12)]
    started = [
        subprocess.Popen([*one.enter, "lxc-start", "-P", str(one.path), "-n", one.name], stdin=subprocess.DEVNULL)
        for one in some
    ]
    assert [one.wait(TIMEOUT) for one in started] == [0] * 12
    for one in some:
        wait = "until [ -e /tmp/answer ]; do sleep 0.02; done; cat /tmp/answer"
        assert one.run("sh", "-c", wait).out == "from the template 0\n"
        one.stop()


def test_other_lxcpath(host: LxcHost) -> None:
    """A container of an lxcpath that is not followed starts, and the journal states what to do."""
    path = host.service.root / "other"
    path.mkdir()
    elsewhere = host.made("elsewhere", path=path)
    elsewhere.start()
    assert host.status("elsewhere") is None
    assert "add its lxcpath to 'paths' under [sources.lxc]" in host.follower.log.read_text()


def test_installed_by_an_older_version(host: LxcHost) -> None:
    """The configuration that 0.1 installed still works: its command rings the doorbell, only at starts."""
    snippet = OLD_SNIPPET.replace("COMMAND", f"{COMMAND} --config {host.service.config}")
    container = host.made("older", snippet=snippet)
    container.start()
    assert container.ask("/1.0/config/user.foo") == "from the template"
    began = time.monotonic()
    container.stop()
    assert time.monotonic() - began < 10
    until(lambda: host.status("older") == "stopped", "its end")


@pytest.mark.parametrize("policy", ["continue", "refuse"])
def test_start_without_a_follower(policy: str) -> None:
    """Without a follower a container starts at once, or does not start, according to the policy."""
    with LxcHost(toml=f'[hooks]\non-failure = "{policy}"\n') as own:
        own.follower.kill()
        container = own.made("alone")
        started = container.command("lxc-start", check=False)
        assert (started.returncode == 0) == (policy == "continue")
        assert own.service.listed() == []
        if policy == "continue":
            own.follower.start()
            until(lambda: own.status("alone") == "running", "the follower that starts later")


def test_name_in_two_lxcpaths() -> None:
    """A container with the name of one in another lxcpath is refused until the first one is destroyed."""
    with LxcHost() as own:
        other = own.service.root / "other"
        other.mkdir()
        own.follower.kill()
        text = own.service.config.read_text()
        own.service.config.write_text(text.replace(f'["{own.path}"]', f'["{own.path}", "{other}"]'))
        own.follower.start()
        first, second = own.made("same"), own.made("same", path=other)
        first.start()
        own.service.configure("same", user_foo="secret")
        init = own.init("same")
        second.start()
        assert own.init("same") == init
        assert first.ask("/1.0/config/user.foo") == "secret"
        assert "secret" not in second.ask("/1.0/config/user.foo")
        problems = own.problems()
        assert "same: it is not registered" in problems
        first.stop()
        first.command("lxc-destroy")
        second.stop()
        second.start()
        until(lambda: own.status("same") == "running", "the second container, with the free name")


def test_wrong_calls_of_the_hook(host: LxcHost) -> None:
    """The hook reports a wrong call in one sentence, and never prevents a start."""
    hook: list[str | Path] = [*HOOK, "--config", host.service.config, "lxc"]
    for environ, sentence in (
        ({}, "LXC_NAME is not set"),
        ({"LXC_NAME": "x"}, "for lxc.hook.start-host, not for ''"),
        ({"LXC_NAME": "x", "LXC_HOOK_TYPE": "start-host"}, "LXC_PID is not a PID"),
        ({"LXC_NAME": "x", "LXC_HOOK_TYPE": "start-host", "LXC_PID": str(os.getpid())}, "host's PID namespace"),
        ({"LXC_NAME": "x", "LXC_HOOK_TYPE": "start-host", "LXC_PID": "4194304"}, "no process 4194304"),
    ):
        done = subprocess.run(hook, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert sentence in done.stderr
        assert done.stderr.endswith("; the container goes on without\n")
