"""The source libvirt, with a stand-in for virsh: domains that have a vsock device, and their VMMs.

tests/sources/test_libvirt_daemon.py has a real libvirtd, and tests/machine/test_virtual_libvirt.py also ones
that run with a CID.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.callers import machines
from guestapi.callers.machines import find_vsock
from guestapi.errors import SourceError
from guestapi.model import vsock_place
from guestapi.settings import Settings
from guestapi.sources import libvirt, programs
from guestapi.sources.doorbell import Ring
from guestapi.sources.libvirt import LibvirtError, LibvirtSource, parse
from guestapi.sources.observed import Observed
from guestapi.sources.source import Unclear
from tests.harness.vmm import Vmm
from tests.harness.waiting import TIMEOUT

WEB, DB = "0d7c2ff8-8a55-4b0e-8a4c-3d2f5d2b6a01", "0d7c2ff8-8a55-4b0e-8a4c-3d2f5d2b6a02"

#: Knows the domains whose XML is in its directory, and does what virsh does with the commands that the source uses.
_VIRSH = """#!/bin/sh
set -f
[ "$1 $2 $3 $4" = "--readonly --quiet --connect qemu:///system" ] || exit 3
shift 4
[ ! -e "{place}/down" ] || exit 1
case "$*" in
"list --all --uuid") ls "{place}" ;;
dumpxml*) echo "$*" | tr ';' '\\n' | while read -r verb key; do cat "{place}/$key"; done ;;
*) exit 3 ;;
esac
"""


def domain(
    uuid: str, name: str, cid: str | None = "42", *, running: bool = True, vsock: bool = True, more: str = ""
) -> str:
    """Return a domain as `virsh dumpxml` prints it; `cid` None: libvirt chooses one at the start."""
    address = "" if cid is None else f" address='{cid}'"
    device = f"<vsock model='virtio'><cid auto='no'{address}/></vsock>" if vsock else ""
    number = " id='1'" if running else ""
    return f"""<domain type='kvm'{number}>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <metadata><x xmlns="http://example.org/"><domain><uuid>{DB}</uuid></domain></x></metadata>
  <devices>{device}{more}</devices>
</domain>

"""


class LibvirtHost:
    """What libvirt has, and the source that looks at it."""

    def __init__(self, path: Path) -> None:
        self.place = path / "domains"
        self.running, self.defined = path / "run", path / "etc"
        for directory in (self.place, self.running, self.defined):
            directory.mkdir()
        virsh = path / "virsh"
        virsh.write_text(_VIRSH.replace("{place}", str(self.place)))
        virsh.chmod(0o755)
        self.source = LibvirtSource(Settings())

    def define(self, uuid: str, text: str) -> None:
        """Have virsh print a domain."""
        (self.place / uuid).write_text(text)

    def started(self, name: str, pid: int) -> None:
        """Write the PID file of a domain."""
        (self.running / f"{name}.pid").write_text(f"{pid}\n")

    def all(self) -> list[object]:
        """Look at all domains."""
        return list(self.source.observe({}))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LibvirtHost:
    """A host whose libvirt has no domain."""
    made = LibvirtHost(tmp_path)
    monkeypatch.setattr(libvirt, "_RUNNING", str(made.running))
    monkeypatch.setattr(libvirt, "_DEFINED", str(made.defined))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return made


@pytest.fixture
def vmm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vmm]:
    """The VMM of domain web, with a command line like libvirt's."""
    device = '{"driver":"vhost-vsock-pci","id":"vsock0","guest-cid":42,"vhostfd":"3","bus":"pci.5"}'
    with Vmm("-name", "guest=web", "-uuid", WEB, "-device", device) as running:
        monkeypatch.setattr(machines, "HOST_NODE", str(running.node))
        yield running


@pytest.mark.root
def test_a_running_domain(host: LibvirtHost, vmm: Vmm) -> None:
    """A domain with a CID is a virtual machine of its name; its UUID is its key, its VMM holds the CID."""
    nic = "<interface type='bridge'><mac address='52:54:00:11:22:33'/><source bridge='br0'/></interface>"
    host.define(WEB, domain(WEB, "web", more=nic))
    host.started("web", vmm.pid)
    (found,) = host.all()
    assert isinstance(found, Observed)
    assert (found.key, found.uuid, found.project, found.name) == (WEB, WEB, "default", "web")
    assert found.type == "virtual-machine"
    assert found.init is not None
    assert (found.init.pid, found.init.namespace) == (vmm.pid, vsock_place(42))
    assert found.init.user_namespace == find_vsock(vmm.pid)
    # libvirt does not know the interface's name inside.
    assert found.devices == {}
    assert found.config == {}
    assert host.source.observe_one(WEB, None) == found


def test_domains_that_do_not_run_or_have_no_vsock(host: LibvirtHost) -> None:
    """A domain that does not run exists; one without a vsock device is not an instance, nor is one that is gone."""
    host.define(WEB, domain(WEB, "web", None, running=False))
    host.define(DB, domain(DB, "db", vsock=False))
    (found,) = host.all()
    assert isinstance(found, Observed)
    assert (found.key, found.init) == (WEB, None)
    assert host.source.observe_one(DB, None) is None
    (host.place / WEB).unlink()
    assert host.source.observe_one(WEB, None) is None
    assert host.source.observe_one("; echo no key", None) is None


@pytest.mark.root
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no PID file", "No such file"),
        ("no PID", "this is not a PID"),
        ("another domain's PID", "is another one's VMM"),
        ("another CID", "has CID 42, not 43"),
        ("no CID yet", "has no CID yet"),
        ("device closed", "has no vsock device"),
        ("ended", "no process"),
    ],
)
def test_a_vmm_that_is_not_the_domains(host: LibvirtHost, vmm: Vmm, case: str, reason: str) -> None:
    """A process that is not proven to be the domain's VMM, and to hold its CID, is never taken for it."""
    uuid = DB if case == "another domain's PID" else WEB
    cid = {"another CID": "43", "no CID yet": None}.get(case, "42")
    host.define(uuid, domain(uuid, "web", cid))
    if case != "no PID file":
        host.started("web", vmm.pid)
    if case == "no PID":
        (host.running / "web.pid").write_text("self\n")
    if case == "device closed":
        vmm.close_device()
    if case == "ended":
        vmm.kill()
    (found,) = host.all()
    assert isinstance(found, Unclear)
    assert found.key == uuid
    assert reason in found.reason
    assert host.source.observe_one(uuid, None) == found


def test_many_domains(host: LibvirtHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Domains are asked for some at a time, and each is seen once; one that virsh cannot tell of stays as it is."""
    monkeypatch.setattr(libvirt, "_AT_ONCE", 3)
    keys = [f"0d7c2ff8-8a55-4b0e-8a4c-0000000000{number}" for number in range(10, 18)]
    for number, key in enumerate(keys):
        host.define(key, domain(key, f"vm{number}", running=False))
    host.define(keys[4], "")
    seen = {one.key: type(one) for one in host.source.observe({})}
    assert seen == {key: Unclear if key == keys[4] else Observed for key in keys}
    assert isinstance(host.source.observe_one(keys[4], None), Unclear)


def test_libvirt_that_cannot_be_asked(host: LibvirtHost) -> None:
    """If libvirt does not answer, that is an error, and not a host without domains."""
    host.define(WEB, domain(WEB, "web"))
    (host.place / "down").touch()
    with pytest.raises(SourceError, match="cannot reach libvirt"):
        host.all()
    with pytest.raises(SourceError, match="cannot reach libvirt"):
        host.source.observe_one(WEB, None)


@pytest.mark.parametrize(
    "text",
    [
        b"<domain>",
        b"<domain><name>web</name></domain>",
        b"<domain><uuid>no-uuid</uuid><name>web</name></domain>",
        domain(WEB, "").encode(),
        domain(WEB, "../web").encode(),
    ],
)
def test_malformed_answers(text: bytes) -> None:
    """What is no domain as libvirt documents it is an error."""
    with pytest.raises(LibvirtError):
        parse(text)


@pytest.mark.parametrize(("address", "cid"), [("42", 42), ("4294967294", 4294967294), ("-1", None), ("0x2a", None)])
def test_addresses(address: str, cid: int | None) -> None:
    """A CID is a decimal number."""
    found = parse(domain(WEB, "web", address).encode())[WEB]
    assert found is not None
    assert found.cid == cid


def test_changes(host: LibvirtHost) -> None:
    """Starts and ends of known domains name these; of unknown ones, and definitions, they ask for a look at all."""
    host.define(WEB, domain(WEB, "web", running=False))
    host.all()
    changes = host.source.changes()

    def told() -> frozenset[str] | None:
        assert select.select([changes], [], [], TIMEOUT)[0]
        return changes.read()

    host.started("web", 1)
    assert told() == frozenset({WEB})
    (host.running / "web.pid").unlink()
    assert told() == frozenset({WEB})
    host.started("db", 1)
    assert told() is None
    (host.defined / "db.xml.new").write_text("")
    (host.defined / "db.xml.new").rename(host.defined / "db.xml")
    assert told() is None
    # Its status changes with what its guest does.
    (host.running / "web.xml").write_text("")
    assert told() == frozenset()
    changes.close()


def test_a_host_without_libvirt(host: LibvirtHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories that are missing, or vanish, and a missing virsh, are errors with a hint."""
    changes = host.source.changes()
    host.running.rmdir()
    with pytest.raises(SourceError, match="is gone"):
        changes.read()
    changes.close()
    with pytest.raises(SourceError, match=r"'systemctl start libvirtd\.service'"):
        host.source.changes()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SourceError, match="is libvirt-clients installed"):
        host.all()


def test_a_program_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that prints too much, or does not end, is killed."""
    with pytest.raises(SourceError, match="more than 1 MiB"):
        programs.run("yes", named="it", most=1 << 20, package="coreutils")
    monkeypatch.setattr(programs, "_SECONDS", 0.2)
    with pytest.raises(SourceError, match=r"^it: no whole answer in 0\.2 s"):
        programs.run("sleep", "1000", named="it", most=1 << 20, package="coreutils")
    assert programs.run("sh", "-c", "echo a; exit 3", named="it", most=1 << 20, package="dash") == (3, b"a\n")


def test_no_doorbell(host: LibvirtHost) -> None:
    """Nothing can be registered by a ring: libvirt has no hook of ours."""
    assert host.source.at_doorbell(Ring("libvirt", ("start", "web"))) is None
