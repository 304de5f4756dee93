"""Virtual machines of the source nspawn, with a stand-in for machinectl: which process is the VMM of a machine.

tests/sources/test_follower_units.py has containers with a real machined, tests/machine/test_virtual_machined.py virtual
machines that run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.callers import machines
from guestapi.callers.machines import find_vsock
from guestapi.model import Init, vsock_place
from guestapi.settings import Settings
from guestapi.sources import nspawn
from guestapi.sources.nspawn import NspawnSource
from guestapi.sources.observed import Observed
from guestapi.sources.source import Unclear
from tests.harness.vmm import Vmm

pytestmark = pytest.mark.root

QEMU = ("-name", "web", "-device", "vhost-vsock-pci,guest-cid=42,vhostfd=3")

#: Knows the machines that are files of its directory: the first line is for `list`, the rest for `show`.
_MACHINECTL = """#!/bin/sh
case "$*" in
"list --output=json --no-pager --quiet")
    for file in {place}/*; do [ ! -e "$file" ] || head -n 1 "$file"; done |
        sed '1s/^/[/; $s/$/]/; $!s/$/,/' ;;
"show --property=Name --property=Leader --property=TimestampMonotonic "*)
    shift 4
    for name; do
        [ -e "{place}/$name" ] || exit 1
        tail -n +2 "{place}/$name"
        echo
    done ;;
*) exit 3 ;;
esac
"""
#: A leader that has started no VMM yet.
_WAIT = "import sys; print('ready', flush=True); sys.stdin.read()"


class NspawnHost:
    """What machined has, and the source that looks at it."""

    def __init__(self, path: Path) -> None:
        self.place, self.kept = path / "machines", path / "kept"
        self.place.mkdir()
        self.kept.mkdir()
        machinectl = path / "machinectl"
        machinectl.write_text(_MACHINECTL.replace("{place}", str(self.place)))
        machinectl.chmod(0o755)
        self.source = NspawnSource(Settings())

    def register(
        self, name: str, leader: int, *, kind: str = "vm", service: str = "systemd-vmspawn", age: float = 60.0
    ) -> None:
        """Have machined know a machine since `age` seconds."""
        line = json.dumps({"machine": name, "class": kind, "service": service, "os": "", "addresses": ""})
        since = int((time.monotonic() - age) * 1e6)
        (self.place / name).write_text(f"{line}\nName={name}\nLeader={leader}\nTimestampMonotonic={since}\n")

    def all(self, known: dict[str, Init | None] | None = None) -> list[object]:
        """Look at everything."""
        return list(self.source.observe(known or {}))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NspawnHost:
    """A host whose machined knows nothing."""
    made = NspawnHost(tmp_path)
    monkeypatch.setattr(nspawn, "_KEPT", (f"{made.kept}/{{}}",))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return made


@pytest.fixture
def vmm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vmm]:
    """The VMM of machine web, of root's, with a command line like that of systemd-vmspawn's QEMU."""
    with Vmm(*QEMU, user=0) as running:
        monkeypatch.setattr(machines, "HOST_NODE", str(running.node))
        yield running


def test_a_vmm_that_is_the_leader(host: NspawnHost, vmm: Vmm) -> None:
    """A machine whose leader is a VMM is a virtual machine of its name, with the CID of the command line."""
    host.register("web", vmm.pid)
    (found,) = host.all()
    assert isinstance(found, Observed)
    assert (found.key, found.project, found.name, found.type) == ("web", "default", "web", "virtual-machine")
    assert found.init is not None
    assert (found.init.pid, found.init.namespace) == (vmm.pid, vsock_place(42))
    assert found.init.user_namespace == find_vsock(vmm.pid)
    assert host.source.observe_one("web", None) == found


def test_a_vmm_below_the_leader(host: NspawnHost, vmm: Vmm) -> None:
    """The VMM may be a child of the leader, which may have the same words on its command line."""
    host.register("web", os.getpid())
    (found,) = host.all()
    assert isinstance(found, Observed)
    assert found.init is not None
    assert found.init.pid == vmm.pid


def test_what_is_no_instance(host: NspawnHost, vmm: Vmm) -> None:
    """A machine without a CID, one of libvirt's and one whose leader is another user's are no instances."""
    with Vmm("-name", "mute", held=False, user=0) as mute, Vmm(*QEMU) as others:
        host.register("mute", mute.pid)
        host.register("qemu-1-web", vmm.pid, service="libvirt-qemu")
        host.register("other", others.pid)
        assert host.all() == []


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("starting", "has not begun yet"),
        ("ended", "has just ended"),
        ("device closed", "has no vsock device"),
        ("two VMMs", "both have a vsock device"),
    ],
)
def test_what_is_not_clear(host: NspawnHost, vmm: Vmm, case: str, reason: str) -> None:
    """While a machine starts or ends, or if it has several VMMs, what the store has of it stays."""
    host.register("web", vmm.pid)
    if case == "starting":
        with subprocess.Popen([sys.executable, "-c", _WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as leader:
            host.register("web", leader.pid, age=0)
            (found,) = host.all()
            host.register("web", leader.pid)
            assert host.all() == []
    elif case == "two VMMs":
        with Vmm(*QEMU, user=0):
            host.register("web", os.getpid())
            (found,) = host.all()
    else:
        vmm.close_device() if case == "device closed" else vmm.kill()
        (found,) = host.all()
    assert isinstance(found, Unclear)
    assert found.key == "web"
    assert reason in found.reason


def test_a_machine_that_does_not_run(host: NspawnHost, vmm: Vmm) -> None:
    """What is stopped exists as long as its image does; whether it is a virtual machine, the store knows."""
    (host.kept / "web").touch()
    (found,) = host.all({"web": None})
    assert isinstance(found, Observed)
    assert (found.key, found.type, found.init, found.devices) == ("web", None, None, None)
    (host.kept / "web").unlink()
    assert host.all({"web": None}) == []
