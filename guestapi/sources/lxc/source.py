"""LXC as a source: observes a container when its hook rings, and asks its monitor for what was missed then.

A container's key is its lxcpath and its name. The operator includes conf/lxc-guestapi.conf in the configuration of a
container that gets the guest API; then its hook rings, and its monitor lists that hook.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from inotify_simple import INotify, flags

from guestapi.callers.namespaces import NotAnInitError, examine, is_alive
from guestapi.errors import SourceError
from guestapi.model import Device, Init
from guestapi.settings import Settings
from guestapi.sources import mountinfo, netlink
from guestapi.sources.doorbell import Ring
from guestapi.sources.lxc import monitor
from guestapi.sources.lxc.monitor import Monitor, MonitorError, NoMonitorError
from guestapi.sources.observed import Observed
from guestapi.sources.source import Unclear

log = logging.getLogger(__name__)

#: Digits of the highest possible PID, 2²² (include/linux/threads.h, PID_MAX_LIMIT).
_PID_DIGITS = 7
#: Seconds for one monitor, and for all monitors in one look. A monitor that runs a hook answers nothing.
_MONITOR_SECONDS, _LOOK_SECONDS = 1.0, 30.0
#: Seconds to check whether a process listens, which needs no answer.
_CHECK_SECONDS = 0.1
#: Programs that ring. A container whose ``lxc.hook.start-host`` names one of them is an instance.
_HOOKS = ("guestapi", "guestapi-hook")
#: Most ``lxc.net.N`` that are asked for.
_NICS = 256
#: ``lxc.net.N.type`` of a container that is not looked at before it runs, to the ``nictype`` of a device.
_NIC_TYPES = {"veth": "p2p", "macvlan": "macvlan", "ipvlan": "ipvlan", "vlan": "physical", "phys": "physical"}
_LATE = "its mounts are not known, since guestapi-lxc.service did not run when it started"
_READ = 1 << 16


def key_of(path: str, name: str) -> str:
    """Return the key of a container. No name contains a ``/``, and a path begins with one."""
    return f"{path}/{name}"


class LxcSource:
    """The containers below the configured lxcpaths."""

    name = "lxc"

    def __init__(self, settings: Settings) -> None:
        self._project = settings.hooks.project
        # Normalised as LXC does.
        self._paths = tuple(path.rstrip("/") or "/" for path in settings.sources.lxc.paths)
        self._directories = sorted({os.path.dirname(listener.path) for listener in settings.guest_listeners})

    # At the doorbell.

    def at_doorbell(self, ring: Ring) -> Observed:
        """As `Source.at_doorbell`: for ``lxc.hook.start-host``, before the init runs."""
        name, pid = ring.environ.get("LXC_NAME", ""), ring.environ.get("LXC_PID", "")
        kind = ring.environ.get("LXC_HOOK_TYPE") or (ring.arguments[2] if len(ring.arguments) > 2 else "")
        if not name:
            raise SourceError("LXC_NAME is not set", "the hook is for lxc.hook.start-host, and LXC calls it")
        if kind != "start-host":
            raise SourceError(f"{name}: the hook is for lxc.hook.start-host, not for {kind!r}")
        if not (pid.isascii() and pid.isdigit() and len(pid) <= _PID_DIGITS):
            raise SourceError(f"{name}: LXC_PID is not a PID")
        try:
            init = examine(int(pid))
        except NotAnInitError as error:
            raise SourceError(f"{name}: {error}") from None
        path = self._path_of(name, init.pid)
        devices, problems = self._devices(init.pid)
        return self._observed(path, name, init, ring.hostname, devices, problems)

    def _path_of(self, name: str, pid: int) -> str:
        """Return the lxcpath of a container that is starting, while its monitor answers nothing."""
        found = [path for path in self._paths if _has_monitor(path, name)]
        if len(found) > 1:
            # Several have a running container of that name. The monitor's command line, by LXC, says which it is.
            title = _title(pid)
            found = [path for path in found if title == f"[lxc monitor] {path} {name}"]
        if len(found) != 1:
            known = ", ".join(self._paths)
            raise SourceError(
                f"{name}: it is in none of the lxcpaths that are followed ({known})",
                "add its lxcpath to 'paths' under [sources.lxc] in guestapi.toml",
            )
        return found[0]

    def _devices(self, pid: int) -> tuple[dict[str, Device], list[str]]:
        """Return the devices of a container whose init has not run, and a sentence for each that cannot be told."""
        devices: dict[str, Device] = {}
        problems: list[str] = []
        try:
            devices |= netlink.nics(pid)
        except SourceError as error:
            problems.append(f"guests do not see its network interfaces: {error}")
        try:
            outside = mountinfo.read(_parent(pid), mountinfo.HOST_BYTES)
            own = {mountinfo.place_of(os.path.realpath(directory), outside) for directory in self._directories}
            disks = mountinfo.disks(mountinfo.read(pid), outside, {place for place in own if place is not None})
        except SourceError as error:
            problems.append(f"guests do not see its mounts: {error}")
            disks = {"/": {"type": "disk", "path": "/"}}
        for path, disk in disks.items():
            name = path.strip("/").replace("/", "-") or "root"
            if name in devices:
                other = devices[name].get("path", f"the network interface {name}")
                problems.append(f"guests do not see the mount at {path}: its device name {name!r} is that of {other}")
            else:
                devices[name] = disk
        return devices, problems

    # All containers, whether or not their hooks rang.

    def observe(self, known: Mapping[str, Init | None]) -> Iterator[Observed | Unclear]:
        """As `Source.observe`."""
        until = time.monotonic() + _LOOK_SECONDS
        there: set[str] = set()
        for path, name, address in self._running(until):
            key = key_of(path, name)
            if key in there:
                continue
            there.add(key)
            found = self._look(path, name, address, known.get(key), until)
            if found is None and key in known:
                # It runs, and its configuration no longer names our hook.
                found = self._stopped(key)
            if found is not None:
                yield found
        for key in known.keys() - there:
            found = self._stopped(key)
            if found is not None:
                yield found

    def observe_one(self, key: str, known: Init | None) -> Observed | Unclear | None:
        """As `Source.observe_one`."""
        path, _slash, name = key.rpartition("/")
        if path not in self._paths:
            return None
        until = time.monotonic() + _MONITOR_SECONDS
        found = self._look(path, name, monitor.address(path, name), known, until)
        return found if found is not None else self._stopped(key)

    def _running(self, until: float) -> Iterator[tuple[str, str, bytes]]:
        """Yield lxcpath, name and socket address of each monitor below the configured lxcpaths."""
        for address in monitor.listening():
            text = os.fsdecode(address)
            if text.startswith("lxc/"):
                # The name is too long for a socket address, which has a hash instead.
                seconds = min(_MONITOR_SECONDS, max(0.0, until - time.monotonic()))
                try:
                    asked = Monitor(address, seconds)
                    path, name = asked.path(), asked.name()
                except MonitorError as error:
                    log.debug("%s", error)
                    continue
                # Any process can listen at such an address and send anything.
                if path in self._paths and monitor.address(path, name) == address:
                    yield path, name, address
                continue
            path, _slash, name = text.removesuffix("/command").rpartition("/")
            if path in self._paths and name:
                yield path, name, address

    def _look(
        self, path: str, name: str, address: bytes, known: Init | None, until: float
    ) -> Observed | Unclear | None:
        """Observe one container by its monitor; None: it does not run, or it is not an instance."""
        key = key_of(path, name)
        if known is not None and is_alive(known):
            # It was observed when it started; nothing else can be trusted now.
            return self._observed(path, name, known, None, None, ())
        asked = Monitor(address, min(_MONITOR_SECONDS, max(0.0, until - time.monotonic())))
        try:
            if not _wants(asked.config_item("lxc.hook.start-host")):
                return None
            init = examine(asked.init_pid(), stated_root_uid=_root_by(asked))
            hostname = asked.config_item("lxc.uts.name")
            devices, problems = _devices_by(asked)
        except NoMonitorError:
            return None
        except NotAnInitError:
            # It ended between the two requests, or another process answers.
            return Unclear(key, f"{name}: the process that its monitor names is not a container's init")
        except MonitorError as error:
            return Unclear(key, f"{name}: {error}")
        return self._observed(path, name, init, hostname, devices, [*problems, _LATE])

    def _stopped(self, key: str) -> Observed | None:
        """Observe a container that does not run, if it is defined: LXC keeps each in a directory of its name."""
        path, _slash, name = key.rpartition("/")
        if path not in self._paths:
            return None
        try:
            os.stat(f"{path}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            pass  # It is defined.
        return self._observed(path, name, None, None, None, ())

    def _observed(
        self,
        path: str,
        name: str,
        init: Init | None,
        hostname: str | None,
        devices: Mapping[str, Device] | None,
        problems: Iterable[str],
    ) -> Observed:
        return Observed(
            key=key_of(path, name),
            project=self._project,
            name=name,
            hostname=hostname,
            init=init,
            config={},
            devices=devices,
            problems=tuple(problems),
        )

    def changes(self) -> LxcChanges:
        """As `Source.changes`."""
        return LxcChanges(self._paths)


class LxcChanges:
    """Watches the lxcpaths: a directory is made or removed with its container."""

    def __init__(self, paths: Collection[str]) -> None:
        self._inotify = INotify(nonblocking=True)
        self._paths: dict[int, str] = {}
        wanted = flags.DELETE | flags.MOVED_FROM | flags.DELETE_SELF | flags.ONLYDIR
        for path in paths:
            try:
                self._paths[self._inotify.add_watch(path, wanted)] = path
            except OSError:
                pass  # LXC makes it with the first container; the look each minute finds what was missed.

    def fileno(self) -> int:
        """As `Changes.fileno`."""
        number: int = self._inotify.fileno()
        return number

    def read(self) -> Collection[str] | None:
        """As `Changes.read`."""
        found = set()
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.Q_OVERFLOW:
                return None
            if event.mask & (flags.IGNORED | flags.DELETE_SELF):
                raise SourceError(f"the lxcpath {self._paths.get(event.wd, '?')} was removed")
            if event.wd in self._paths and event.name:
                found.add(key_of(self._paths[event.wd], event.name))
        return found

    def close(self) -> None:
        """As `Changes.close`."""
        self._inotify.close()


def _has_monitor(path: str, name: str) -> bool:
    try:
        Monitor(monitor.address(path, name), _CHECK_SECONDS).check()
    except MonitorError:
        return False
    return True


def _parent(pid: int) -> int:
    """Return the PID of an init's parent: its monitor."""
    status = Path(f"/proc/{pid}/stat")
    try:
        # proc_pid_stat(5): state and parent follow the command's last parenthesis.
        return int(status.read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        raise SourceError(f"process {pid} has just ended") from None


def _title(pid: int) -> str:
    """Return the command line of an init's monitor."""
    try:
        return os.fsdecode(Path(f"/proc/{_parent(pid)}/cmdline").read_bytes().split(b"\0")[0])
    except (OSError, SourceError):
        return ""


def _wants(hooks: str | None) -> bool:
    """Whether one of a container's hooks is ours."""
    words = (word.strip("\"'") for word in (hooks or "").split())
    return any(os.path.basename(word) in _HOOKS for word in words)


def _root_by(asked: Monitor) -> int | None:
    """Return the host user who is root inside, from the monitor's ID map: lines like ``u 0 100000 65536``."""
    mappings = [line.split() for line in (asked.config_item("lxc.idmap") or "").splitlines()]
    if not mappings:
        return 0
    found = [fields[2] for fields in mappings if fields[:2] == ["u", "0"] and len(fields) == 4 and fields[2].isdigit()]
    return int(found[0]) if len(found) == 1 else None


def _devices_by(asked: Monitor) -> tuple[dict[str, Device], list[str]]:
    """Return root and network interfaces from the monitor: names that LXC gave, and no addresses that it chose."""
    devices: dict[str, Device] = {"root": {"type": "disk", "path": "/"}}
    problems: list[str] = []
    # The list has types without their numbers, and numbers may be missing.
    left = len((asked.config_item("lxc.net") or "").split())
    for number in range(_NICS):
        if not left:
            break
        begin = f"lxc.net.{number}"
        kind = asked.config_item(f"{begin}.type")
        if kind is None:
            continue
        left -= 1
        name = asked.config_item(f"{begin}.name") if kind in _NIC_TYPES else None
        if name is None:
            continue
        if name in devices:
            problems.append(f"guests do not see the network interface {name}: another device has its name")
            continue
        link = asked.config_item(f"{begin}.link")
        device = {"type": "nic", "name": name, "nictype": _NIC_TYPES[kind]}
        if link:
            device |= {"parent": link} | ({"nictype": "bridged"} if kind == "veth" else {})
        for theirs, ours in (("hwaddr", "hwaddr"), ("mtu", "mtu"), ("veth.pair", "host_name")):
            if value := asked.config_item(f"{begin}.{theirs}"):
                device[ours] = value
        devices[name] = device
    return devices, problems
