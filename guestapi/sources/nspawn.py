"""Containers of systemd-nspawn and virtual machines of systemd-vmspawn and others, as systemd-machined knows them.

Rules: machined is asked by its commands, since its files are private. Only containers that root has made and that have
our socket's directory mounted are instances. What was started with ``--register=no`` is unknown to machined, and so to
guestapi. machined lists what runs. What is stopped exists as long as its directory or image does, so that a restart
makes no new instance.

A virtual machine's leader is no init: it is the VMM, or the program that has started it. The VMM is the one of these
processes whose command line names a CID (QEMU's ``guest-cid``) and which has a vsock device open. Without a CID, it is
no instance. libvirt's are those of `guestapi.sources.libvirt`. No guest can choose any of this; but machined may let
other users than root register a machine, so the leader must be root's.
"""

from __future__ import annotations

import json
import os
import re
import select
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import inotify_simple
from inotify_simple import INotify

from guestapi.callers.machines import NotAMachineError, command_line_cid, examine_machine
from guestapi.callers.namespaces import NotAnInitError, examine
from guestapi.errors import SourceError
from guestapi.model import Device, Init
from guestapi.settings import Settings
from guestapi.sources import mountinfo, netlink
from guestapi.sources.bundles import disk_devices
from guestapi.sources.doorbell import Ring
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.places import Places
from guestapi.sources.processes import born, children, is_made_by_root, is_roots, parent
from guestapi.sources.programs import run
from guestapi.sources.source import Unclear

#: Where machined has a file for each machine. The content is private; a change shows that something happened.
_DIRECTORY = "/run/systemd/machines"
#: Most bytes of an answer. A machine has some hundred bytes.
_BYTES = 4 << 20
#: Where a container of a name, or its settings, may be kept (systemd-nspawn(1), systemd.nspawn(5)).
_KEPT = ("/var/lib/machines/{}", "/var/lib/machines/{}.raw", "/etc/systemd/nspawn/{}.nspawn")
#: What nspawn itself mounts in each container, besides what every runtime does.
_USUAL = re.compile(r"/run/(host|systemd)(/.*)?|/etc/(resolv\.conf|localtime)")
#: Most seconds since an init's start for which its mounts count as those that nspawn made.
_FRESH_SECONDS = 2.0
_LATE = "guests do not see its devices, since guestapi-nspawn.service did not run when it started"
#: hostname(7), and machined's own rule for a machine's name: listed names become arguments of commands.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")
#: Most processes below a leader, or below nspawn at the doorbell, that are examined.
_PROCESSES = 100
#: Seconds from the doorbell until the init must be there, and from a machine's registration until its VMM must be.
_INIT_SECONDS, _VMM_SECONDS = 1.0, 2.5
#: How libvirt calls itself when it registers a machine (libvirt's src/util/virsystemd.c: ``libvirt-`` and the driver).
_LIBVIRT = "libvirt-"


class MachinedError(SourceError):
    """machined's answer is malformed, or it is not there."""


@dataclass(frozen=True, slots=True)
class _Machine:
    """What machined knows of a machine.

    Attributes:
        name: its name.
        leader: the PID of its leader.
        is_virtual: whether it is a virtual machine.
        age: seconds since its registration.
    """

    name: str
    leader: int
    is_virtual: bool = False
    age: float = 0.0


class NspawnSource:
    """The containers and virtual machines of this host's machined."""

    name = "nspawn"

    def __init__(self, settings: Settings) -> None:
        """Describe the source.

        Args:
            settings: the paths of the guest API's sockets.
        """
        self._project = settings.hooks.project
        self._places = Places.of(settings.guest_listeners)

    def observe(self, known: Mapping[str, Init | None]) -> Iterator[Observed | Unclear | Problem]:
        """Observe all running containers with our mount, virtual machines with a CID, and the known that do not run.

        Args:
            known: the inits that the store has, by name.

        Raises:
            SourceError: machined cannot be asked.
        """
        running = _machines()
        for machine in running:
            found = self._describe(machine, known.get(machine.name))
            if found is not None:
                yield found
        for name in known.keys() - {machine.name for machine in running}:
            stopped = self._stopped(name)
            if stopped is not None:
                yield stopped

    def observe_one(self, key: str, known: Init | None) -> Observed | Unclear | Problem | None:
        """Observe one container or virtual machine; None: it is gone, or no instance.

        Args:
            key: its name.
            known: the init that the store has of it.
        """
        try:
            found = next((one for one in _machines() if one.name == key), None)
        except SourceError as error:
            return Unclear(key, str(error))
        return self._describe(found, known) if found is not None else self._stopped(key)

    def at_doorbell(self, ring: Ring) -> Observed | Problem | None:
        """Observe a container whose unit has just started it (``nspawn start NAME``, with ``MAINPID``).

        Raises:
            SourceError: its init cannot be found.
        """
        action, name = (*ring.arguments, "", "")[:2]
        if action != "start":
            return None
        main = ring.environ.get("MAINPID", "")
        if not _NAME.fullmatch(name) or not re.fullmatch("[1-9][0-9]{0,6}", main):
            raise MachinedError(
                "the hook tells no name and MAINPID", "'guestapi hook nspawn' is for systemd-nspawn@.service"
            )
        until = time.monotonic() + _INIT_SECONDS
        while True:
            for pid in _below(int(main)):
                try:
                    init = examine(pid)
                except NotAnInitError:
                    continue
                found = self._describe(_Machine(name, init.pid), None)
                return None if isinstance(found, Unclear) else found
            if time.monotonic() > until:
                raise MachinedError(f"no container's init is to be found below process {main}")
            select.select([], [], [], 0.01)

    def changes(self) -> Machines:
        """Return the directory with a file for each machine.

        Raises:
            SourceError: there is no machined.
        """
        return Machines()

    def _describe(self, machine: _Machine, known: Init | None) -> Observed | Unclear | None:
        """Observe what runs; None: it is no instance."""
        return self._describe_virtual(machine) if machine.is_virtual else self._describe_container(machine, known)

    def _describe_virtual(self, machine: _Machine) -> Observed | Unclear | None:
        """Observe a virtual machine; None: it has no vsock device, or is not root's."""
        try:
            init = _find_vmm(machine)
        except (MachinedError, NotAMachineError) as error:
            # It may be starting or ending.
            return Unclear(machine.name, f"machine {machine.name}: {error}")
        if init is None:
            return None
        return Observed(machine.name, self._project, machine.name, "virtual-machine", init=init)

    def _describe_container(self, machine: _Machine, known: Init | None) -> Observed | Unclear | None:
        """Observe a container; None: it has not our mount, or is not root's."""
        try:
            init = examine(machine.leader)
            # Mounts are read once: later, root inside may have changed them.
            if init != known and not (is_made_by_root(init.pid) and self._places.look().mounted_in(init.pid)):
                return None
        except (NotAnInitError, ProcessLookupError):
            return None
        except SourceError as error:
            return Unclear(machine.name, str(error))
        devices, problems = (None, ()) if init == known else self._devices(init)
        return Observed(
            machine.name, self._project, machine.name, "container", None, init, {}, devices, problems=problems
        )

    def _stopped(self, name: str) -> Observed | None:
        """Observe what does not run; None: it is gone. What it was, machined does not know any more."""
        if not any(os.path.lexists(place.format(name)) for place in _KEPT):
            return None
        return Observed(name, self._project, name, None, devices=None)

    def _devices(self, init: Init) -> tuple[dict[str, Device], tuple[str, ...]]:
        """Return the devices of a container that has just started, and a sentence for each that cannot be told."""
        if time.time() - born(init) > _FRESH_SECONDS:
            return {}, (_LATE,)
        try:
            # Its parent is systemd-nspawn, whose mount namespace has the sources of the mounts.
            outside = mountinfo.read(parent(init.pid), mountinfo.HOST_BYTES)
            places = {mountinfo.place_of(os.path.realpath(path), outside) for path in self._places.paths}
            own = {place for place in places if place is not None}
            found = mountinfo.disks(mountinfo.read(init.pid), outside, own)
            disks = [disk for path, disk in found.items() if path != "/" and not _USUAL.fullmatch(path)]
            devices, problems = disk_devices(disks)
            return {**devices, **netlink.nics(init.pid), "root": {"type": "disk", "path": "/"}}, problems
        except SourceError as error:
            return {}, (f"guests do not see its devices: {error}",)


class Machines:
    """Changes of machined's list. `read` never blocks."""

    def __init__(self) -> None:
        """Begin.

        Raises:
            SourceError: there is no machined.
        """
        flags = inotify_simple.flags
        try:
            self._inotify = INotify()
        except OSError as error:
            raise MachinedError(f"{_DIRECTORY} cannot be watched: {error.strerror}") from None
        try:
            # A name that begins with a dot is a file that is being written.
            self._inotify.add_watch(_DIRECTORY, flags.MOVED_TO | flags.DELETE | flags.DELETE_SELF)
        except OSError as error:
            self._inotify.close()
            raise MachinedError(f"{_DIRECTORY}: {error.strerror}", "is systemd-machined installed?") from None

    def fileno(self) -> int:
        """For poll(2)."""
        return int(self._inotify.fileno())

    def close(self) -> None:
        """End it."""
        self._inotify.close()

    def read(self) -> frozenset[str] | None:
        """Return the names of machines that were added, changed or removed; None: look at all.

        Raises:
            SourceError: machined's directory is gone.
        """
        flags = inotify_simple.flags
        found = set()
        for event in self._inotify.read(timeout=0):
            if event.mask & (flags.IGNORED | flags.DELETE_SELF):
                raise MachinedError(f"{_DIRECTORY} is gone")
            if event.mask & flags.Q_OVERFLOW:
                return None
            # Links named "unit:..." lead from a unit to its machine.
            if _NAME.fullmatch(event.name):
                found.add(event.name)
        return frozenset(found)


def _find_vmm(machine: _Machine) -> Init | None:
    """Find the process that is a virtual machine.

    Returns:
        None: it has no vsock device, or is not root's.

    Raises:
        MachinedError: there are several, none yet, or none any more.
        NotAMachineError: none holds the CID that it names.
    """
    if not is_roots(machine.leader):
        if not os.path.exists(f"/proc/{machine.leader}"):
            raise MachinedError("it has just ended")
        return None
    found, refusal = [], None
    for pid in [machine.leader, *_below(machine.leader)]:
        try:
            if (cid := command_line_cid(pid)) is not None:
                found.append(examine_machine(pid, cid))
        except ProcessLookupError:
            continue
        except NotAMachineError as error:
            # A shell that waits for its VMM has the same words.
            refusal = error
    if len(found) > 1:
        raise MachinedError(f"processes {found[0].pid} and {found[1].pid} both have a vsock device")
    if found:
        return found[0]
    if refusal is not None:
        raise refusal
    if machine.age < _VMM_SECONDS:
        raise MachinedError("its VMM has not begun yet")
    return None


def _machines() -> list[_Machine]:
    """Return machined's containers and virtual machines, without the host itself and libvirt's.

    Raises:
        SourceError: it cannot be asked.
    """
    code, text = _ask("machinectl", "list", "--output=json", "--no-pager", "--quiet")
    if code != 0:
        raise MachinedError(f"machinectl list: exit status {code}", "'systemctl status systemd-machined'")
    try:
        listed = json.loads(text or b"[]")
        virtual = {one["machine"]: one["class"] == "vm" for one in listed if _is_ours(one)}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise MachinedError("machinectl list does not answer what systemd documents") from None
    if not virtual:
        return []
    show = ("machinectl", "show", "--property=Name", "--property=Leader", "--property=TimestampMonotonic")
    code, text = _ask(*show, *virtual)
    if code != 0:
        # A machine is gone, so those after it are missing in the answer. Ask for each one.
        text = b"\n\n".join(_ask(*show, name)[1] for name in virtual)
    found = []
    for block in text.decode(errors="replace").split("\n\n"):
        told = dict(line.partition("=")[::2] for line in block.splitlines())
        name, leader, since = told.get("Name", ""), told.get("Leader", ""), told.get("TimestampMonotonic", "")
        if name in virtual and re.fullmatch("[1-9][0-9]{0,6}", leader):
            # A time that is not told is long ago.
            age = time.monotonic() - int(since) / 1e6 if re.fullmatch("[0-9]{1,18}", since) else _VMM_SECONDS
            found.append(_Machine(name, int(leader), virtual[name], age))
    return found


def _is_ours(listed: Mapping[str, str]) -> bool:
    """Whether a machine as `machinectl list` tells of it is for this source, by its class, program and name."""
    if listed["class"] == "vm" and listed["service"].startswith(_LIBVIRT):
        return False
    return listed["class"] in ("container", "vm") and _NAME.fullmatch(listed["machine"]) is not None


def _ask(*words: str) -> tuple[int, bytes]:
    """Run a command of machined's; return its exit status and output."""
    return run(*words, named=" ".join(words[:2]), most=_BYTES, package="systemd-container")


def _below(pid: int) -> list[int]:
    """Return the children of a process, then theirs; nearest first."""
    found = [pid]
    for one in found:
        found += children(one)
        if len(found) > _PROCESSES:
            break
    return found[1:]
