"""Virtual machines of libvirt that have a vsock device.

Rules: libvirt is asked by virsh, through its read-only socket, which domains there are and what each has. A domain
with a CID is an instance; its UUID is its key, and its name is the instance's. Its VMM is the process that libvirt has
written into its PID file, if that process has the domain's UUID on its command line and holds the CID. A guest can
choose none of these. Domains of libvirt's users (qemu:///session) are left out. Network interfaces are not devices:
libvirt does not know their names inside.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import inotify_simple
from inotify_simple import INotify

from guestapi.callers.machines import NotAMachineError, examine_machine
from guestapi.errors import SourceError
from guestapi.model import Init
from guestapi.settings import Settings
from guestapi.sources.doorbell import Ring
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.processes import arguments
from guestapi.sources.programs import run
from guestapi.sources.source import Unclear

#: The directories of libvirt's driver for QEMU: PID files of what runs (src/qemu/qemu_process.c), and definitions.
_RUNNING, _DEFINED = "/run/libvirt/qemu", "/etc/libvirt/qemu"
#: Most bytes of an answer, and most domains that one is asked for. A domain has 5 to 10 KiB.
_BYTES, _AT_ONCE = 32 << 20, 100
#: What a read-only connection may ask does not include changes (virsh(1), --readonly).
_VIRSH = ("virsh", "--readonly", "--quiet", "--connect", "qemu:///system")
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: Most bytes of a PID file that are read.
_PID_BYTES = 64


class LibvirtError(SourceError):
    """libvirt cannot be asked, or its answer is malformed."""


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain that has a vsock device.

    Attributes:
        uuid: its UUID, which libvirt gives to one domain only.
        name: its name. It has no slash.
        running: libvirt has started it.
        cid: its context ID; None: it gets one when it starts.
    """

    uuid: str
    name: str
    running: bool
    cid: int | None


class LibvirtSource:
    """The domains of this host's system libvirt."""

    name = "libvirt"

    def __init__(self, settings: Settings) -> None:
        """Describe the source.

        Args:
            settings: the project of its instances.
        """
        self._project = settings.hooks.project
        #: Name to UUID, as of the latest look at all domains.
        self._keys: Mapping[str, str] = {}

    def observe(self, known: Mapping[str, Init | None]) -> Iterator[Observed | Unclear]:
        """Observe all domains that have a vsock device, running or not.

        Args:
            known: the inits that the store has, by UUID.

        Raises:
            SourceError: libvirt cannot be asked.
        """
        listed = _list()
        names = {}
        waiting = iter(listed)
        while keys := list(islice(waiting, _AT_ONCE)):
            found = _domains(keys)
            for key in keys:
                if key not in found:
                    yield Unclear(key, f"virsh does not tell of domain {key}")
                elif (domain := found[key]) is not None:
                    names[domain.name] = key
                    yield self._describe(domain)
        self._keys = names

    def observe_one(self, key: str, known: Init | None) -> Observed | Unclear | Problem | None:
        """Observe one domain; None: it is gone, or has no vsock device.

        Args:
            key: its UUID.
            known: the init that the store has of it.

        Raises:
            SourceError: libvirt cannot be asked.
        """
        if not _UUID.fullmatch(key):
            return None
        found = _domains([key])
        if key not in found:
            return Unclear(key, f"virsh does not tell of domain {key}") if key in _list() else None
        domain = found[key]
        return None if domain is None else self._describe(domain)

    def at_doorbell(self, ring: Ring) -> Observed | Problem | None:
        """Observe nothing: libvirt has no hook of ours."""
        return None

    def changes(self) -> DomainChanges:
        """Watch libvirt's directories.

        Raises:
            SourceError: libvirt has never run here.
        """
        return DomainChanges(self)

    def key_of(self, name: str) -> str | None:
        """Return the UUID of a domain that the latest look has seen; None: it has not.

        Args:
            name: of the domain.
        """
        return self._keys.get(name)

    def _describe(self, domain: Domain) -> Observed | Unclear:
        if not domain.running:
            init = None
        else:
            try:
                init = _find_vmm(domain)
            except (NotAMachineError, LibvirtError) as error:
                # It may be starting or ending.
                return Unclear(domain.uuid, f"domain {domain.name}: {error}")
        return Observed(
            domain.uuid,
            self._project,
            domain.name,
            "virtual-machine",
            init=init,
            uuid=domain.uuid,
        )


class DomainChanges:
    """Starts, ends, definitions and removals of domains. `read` never blocks.

    Of what libvirt writes about a running domain only the PID file counts: the rest changes with what its guest does,
    which must not cause work here.
    """

    def __init__(self, source: LibvirtSource) -> None:
        """Begin.

        Args:
            source: whose domains they are.

        Raises:
            SourceError: libvirt has never run here.
        """
        flags = inotify_simple.flags
        self._source = source
        try:
            self._inotify = INotify()
        except OSError as error:
            raise LibvirtError(f"{_RUNNING} cannot be watched: {error.strerror}") from None
        try:
            # A VMM keeps its PID file open, so that it is not closed when it has been written.
            changes = flags.CREATE | flags.MODIFY | flags.MOVED_TO | flags.DELETE | flags.DELETE_SELF
            self._running = self._inotify.add_watch(_RUNNING, changes)
            self._inotify.add_watch(_DEFINED, changes)
        except OSError as error:
            self._inotify.close()
            hint = "'systemctl start libvirtd.service' makes it"
            raise LibvirtError(f"{_RUNNING} or {_DEFINED}: {error.strerror}", hint) from None

    def fileno(self) -> int:
        """For poll(2)."""
        return int(self._inotify.fileno())

    def close(self) -> None:
        """End it."""
        self._inotify.close()

    def read(self) -> frozenset[str] | None:
        """Return the UUIDs of domains that were started or have ended; None: look at all.

        Raises:
            SourceError: a directory is gone.
        """
        flags = inotify_simple.flags
        found = set()
        all_of_them = False
        for event in self._inotify.read(timeout=0):
            if event.mask & (flags.IGNORED | flags.DELETE_SELF):
                raise LibvirtError(f"{_RUNNING} or {_DEFINED} is gone")
            if event.mask & flags.Q_OVERFLOW:
                all_of_them = True
                continue
            name, suffix = os.path.splitext(event.name)
            if suffix != (".pid" if event.wd == self._running else ".xml"):
                continue
            key = self._source.key_of(name) if suffix == ".pid" else None
            if key is None:
                all_of_them = True
            else:
                found.add(key)
        return None if all_of_them else frozenset(found)


def parse(text: bytes) -> dict[str, Domain | None]:
    """Read domains from what `virsh dumpxml` has printed, one after the other.

    Returns:
        UUID to domain; None: it has no vsock device.

    Raises:
        LibvirtError: it is not what libvirt documents (libvirt.org/formatdomain.html).
    """
    try:
        root = ET.fromstring(b"<domains>" + text + b"</domains>")
    except ET.ParseError as error:
        raise LibvirtError(f"virsh dumpxml prints no XML: {error}") from None
    found: dict[str, Domain | None] = {}
    for one in root.iterfind("domain"):
        uuid, name = one.findtext("uuid", ""), one.findtext("name", "")
        if not _UUID.fullmatch(uuid) or not name or "/" in name:
            raise LibvirtError(f"virsh dumpxml tells of domain {name[:40]!r} with UUID {uuid[:40]!r}")
        if (device := one.find("devices/vsock")) is None:
            found[uuid] = None
            continue
        element = device.find("cid")
        address = "" if element is None else element.get("address", "")
        cid = int(address) if re.fullmatch("[0-9]{1,10}", address) else None
        found[uuid] = Domain(uuid, name, one.get("id") is not None, cid)
    return found


def _find_vmm(domain: Domain) -> Init:
    """Find the VMM of a running domain.

    Raises:
        LibvirtError: libvirt has no PID file of it, or a wrong one.
        NotAMachineError: it does not hold its CID.
    """
    path = f"{_RUNNING}/{domain.name}.pid"
    try:
        with open(path, "rb", buffering=0) as file:
            text = file.read(_PID_BYTES).strip()
    except OSError as error:
        raise LibvirtError(f"{path}: {error.strerror}") from None
    if not re.fullmatch(b"[1-9][0-9]{0,6}", text):
        raise LibvirtError(f"{path}: this is not a PID")
    if domain.cid is None:
        raise LibvirtError("it has no CID yet")
    pid = int(text)
    init = examine_machine(pid, domain.cid)
    words = arguments(pid)
    # The file may be of an earlier run, and its PID another domain's now.
    if ("-uuid", domain.uuid) not in pairwise(words):
        raise LibvirtError(f"process {pid} is another one's VMM")
    return init


def _list() -> list[str]:
    """Return the UUIDs of all domains.

    Raises:
        SourceError: libvirt cannot be asked.
    """
    code, text = _virsh("list", "--all", "--uuid")
    if code != 0:
        raise LibvirtError("virsh list cannot reach libvirt", "'systemctl status libvirtd.socket libvirtd.service'")
    return [line for line in text.decode(errors="replace").split() if _UUID.fullmatch(line)]


def _domains(keys: Sequence[str]) -> dict[str, Domain | None]:
    """Return domains by UUID; those that virsh does not tell of are missing.

    Raises:
        SourceError: libvirt cannot be asked.
    """
    _code, text = _virsh(";".join(f"dumpxml {key}" for key in keys))
    return parse(text)


def _virsh(*words: str) -> tuple[int, bytes]:
    return run(*_VIRSH, *words, named=f"virsh {words[0].split()[0]}", most=_BYTES, package="libvirt-clients")
